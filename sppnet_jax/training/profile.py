"""A trace of some training steps, to see where their time goes.

`tensorboard --logdir WORKDIR/profile` shows it (`pip install tensorboard xprof`): what
device and host did when, by step, and which operations took the time.
"""

import contextlib
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"
# Steps of this start that are not traced: the first compiles, then queues fill.
WARM_STEPS = 3

log = logging.getLogger(__name__)


class Profile:
    """Traces `steps` steps of a training, after its first ones; a context manager.

    `folder`: of all the traces of a run, each in a folder named by its time.
    `steps`: 0 traces nothing. `start`: the step that the training begins at.

    A training that ends on the way, by its own or by an error, leaves what was traced.
    """

    def __init__(self, folder: Path, *, steps: int, start: int) -> None:
        self._folder, self._wanted = folder, steps
        self._first = start + WARM_STEPS
        self._traced = 0
        self._running = False
        self._results: Any = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()
        elif self._wanted and not self._traced:
            log.warning(
                "no step was profiled: the training ended before its step %d, where "
                "the profile was to begin",
                self._first + 1,
            )

    def step(self, step: int) -> AbstractContextManager[Any]:
        """The context of a step: all that the host does for it, from its batch on.

        `step`: steps done before this one.
        """
        if self._wanted and step == self._first:
            options = jax.profiler.ProfileOptions()
            # Every call of Python's, in all threads that load: it would slow them down.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def add(self, results: Any) -> None:
        """Takes what a step leaves on the device; the last one is waited for."""
        if not self._running:
            return
        self._results = results
        self._traced += 1
        if self._traced == self._wanted:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        with contextlib.suppress(Exception):  # a step that failed has said so itself
            jax.block_until_ready(self._results)
        jax.profiler.stop_trace()
        log.info(
            "the profile of %d steps from step %d on is in %s: tensorboard --logdir %s",
            self._traced,
            self._first + 1,
            self._folder,
            self._folder,
        )
