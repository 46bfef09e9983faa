"""A training that ends after its first step and writes down how long that took.

    python -m experiments.first_step STARTED RESULT ARGUMENTS_OF_SPPNET_JAX_TRAIN…

The process of a start in startup_speed.py: it imports nothing but what a training does.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In their order; each ends where the next begins.
PARTS = ("imports", "data", "statistics", "network", "compiling", "first step")
TOTAL = "until the first step"
CPU = "CPU seconds, all threads"


def main() -> None:
    started, result_path = float(sys.argv[1]), Path(sys.argv[2])
    sys.argv[1:3] = []
    from sppnet_jax import cli, train
    from sppnet_jax.training.network_settings import NetworkSettings

    run_to_the_first_step(
        started, result_path, lambda: cli.run(train.main, NetworkSettings)
    )


def run_to_the_first_step(
    started: float, result_path: Path, run: Callable[[], None]
) -> None:
    """Runs a training, and ends the process after its first step.

    `started`: the time that its process was started at, in seconds of `time.time()`.
    `result_path`: of a JSON file, the seconds of each part, the total and the CPU's.
    """
    import jax

    from sppnet_jax.training import networks

    ends = {"imports": time.time()}

    def ends_where(part: str, module: Any, name: str) -> None:
        """A part ends where a function is called first."""
        original = getattr(module, name)

        def called(*args: Any, **named: Any) -> Any:
            ends.setdefault(part, time.time())
            return original(*args, **named)

        setattr(module, name, called)

    ends_where("data", networks, "_prepare_statistics")
    ends_where("statistics", networks, "create_state")
    make_step = networks.make_train_step

    def make_timed_step(*args: Any, **named: Any) -> Callable[..., Any]:
        step = make_step(*args, **named)

        def timed(state: Any, *rest: Any) -> None:
            ends["network"] = time.time()  # it may still be at its random numbers
            results = step(state, *rest)  # returns when the program is compiled
            ends["compiling"] = time.time()
            jax.block_until_ready(results)
            ends["first step"] = time.time()
            times = [started, *(ends[part] for part in PARTS)]
            seconds = {part: times[n + 1] - times[n] for n, part in enumerate(PARTS)}
            seconds[TOTAL] = times[-1] - started
            seconds[CPU] = time.process_time()
            result_path.write_text(json.dumps(seconds))
            os._exit(0)  # what a training does at its end is not measured

        return timed

    networks.make_train_step = make_timed_step
    run()


if __name__ == "__main__":
    main()
