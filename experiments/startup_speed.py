"""How soon a training makes its first step: the first start beside the second.

    python -m experiments.startup_speed --out=runs/startup

runs `python -m sppnet_jax.train` up to its first step, in a process and a workdir of
its own each time: once with an empty cache folder, once with the one that start filled,
in turn. The digits are prepared before. It tells where the time goes: importing,
opening the data, the training set's statistics, making the network, compiling the step
and running it. JAX_COMPILATION_CACHE_DIR in the environment is left out of account.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.first_step import CPU, PARTS, TOTAL
from experiments.photographs import photograph_folder
from experiments.setting import messages_alone
from sppnet_jax.benchmarks.report import (
    Measurements,
    Report,
    show,
    timing_of,
    timing_parser,
)
from sppnet_jax.benchmarks.timing import spread, times_as_fast
from sppnet_jax.data.sources import open_source

REPOSITORY = Path(__file__).parent.parent
FIRST, SECOND = "first", "second"


def measure(networks: dict[str, list[str]], *, rounds: int, folder: Path) -> Report:
    """Starts every training `rounds` times with an empty and a filled cache, in turn.

    `networks`: the arguments of sppnet_jax.train for each, but for its workdir.
    `folder`: of workdirs and caches, which are removed again.
    """
    rows: list[Measurements] = []
    ratios = {}
    bar = tqdm(total=2 * rounds * len(networks), desc="starts", disable=None)
    with bar:
        for name, arguments in networks.items():
            seconds: dict[str, list[dict[str, float]]] = {FIRST: [], SECOND: []}
            for number in range(rounds):
                place = folder / f"{name.replace(' ', '_')}-{number}"
                for which in (FIRST, SECOND):
                    seconds[which].append(start(arguments, place / which, place))
                    bar.update()
                shutil.rmtree(place)
            rows += [row for which in seconds for row in _rows(name, which, seconds)]
            totals = {
                which: np.array([one[TOTAL] for one in times])
                for which, times in seconds.items()
            }
            ratios[name] = times_as_fast(totals[SECOND], totals[FIRST])._asdict()
    notes = [
        f"{name}: the second start is {r['median']:.1f} times as soon at its first "
        f"step as the first ({r['low']:.1f} to {r['high']:.1f})"
        for name, r in ratios.items()
    ]
    return Report(
        "startup",
        "Seconds from the start of a training to the end of its first step",
        rows,
        plot,
        notes,
        {"second start is × as soon": ratios},
    )


def start(arguments: Sequence[str], workdir: Path, caches: Path) -> dict[str, float]:
    """Seconds of each part of a start, its CPU seconds, and the total.

    `arguments`: of sppnet_jax.train. `caches`: the user's cache folder in this start.

    Raises: RuntimeError with what the training said if it fails.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches.absolute())}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "experiments.first_step"]
    workdir.mkdir(parents=True)
    result_path = workdir / "seconds.json"
    started = time.time()
    done = subprocess.run(
        [*command, str(started), str(result_path), *arguments, f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    if not result_path.exists():
        raise RuntimeError(f"the training failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, float] = json.loads(result_path.read_text())
    return result


def _rows(
    name: str, which: str, seconds: dict[str, list[dict[str, float]]]
) -> list[Measurements]:
    rows: list[Measurements] = []
    for part in (*PARTS, TOTAL, CPU):
        times = np.array([one[part] for one in seconds[which]])
        middle = spread(times)
        ratio = None
        if which == SECOND:
            before = np.array([one[part] for one in seconds[FIRST]])
            ratio = times_as_fast(times, before).median
        rows.append(
            {
                "training": name,
                "start": which,
                "part": part,
                "s": middle.median,
                "low": middle.low,
                "high": middle.high,
                "first / second": ratio,
            }
        )
    return rows


def plot(rows: Sequence[Measurements]) -> Figure:
    """The parts of each start as one bar."""
    bars = list(dict.fromkeys((r["training"], r["start"]) for r in rows))
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for n, bar in enumerate(bars):
        left = 0.0
        for p, part in enumerate(PARTS):
            (length,) = (
                r["s"]
                for r in rows
                if (r["training"], r["start"], r["part"]) == (*bar, part)
            )
            axes.barh(
                n, length, left=left, color=f"C{p}", label=part if not n else None
            )
            left += length
        axes.text(left, n, f" {left:.1f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [f"{name}, {which}" for name, which in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds from the start of the process")
    figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize=8)
    return figure


def networks(folder: Path, *, quick: bool, data_dir: str) -> dict[str, list[str]]:
    """The trainings to start: the tour's digits, and photographs at 96 pixels.

    The photographs are made in `folder`; the digits are prepared.
    """
    where = f"--config.data.data_dir={data_dir}"
    open_source("digit_scenes/classification", "train", data_dir=data_dir)
    digits = ["--config=configs/digits.py", where]
    if quick:
        small = ["--config.model.width=0.02", "--config.inputs.statistics_images=32"]
        return {"digits": [*digits, *small]}
    photographs = photograph_folder(folder / "photographs", images=1_000)
    root = f"--config.data.root={photographs}"
    return {
        "digits": digits,
        "photographs": ["--config=configs/folder.py", root],
    }


def main() -> None:
    given, timing = timing_of(
        timing_parser(
            "experiments.startup_speed", __doc__, out="runs/startup", rounds=3
        )
    )
    with (
        messages_alone(given.traceback, "nothing is written"),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        data_dir = os.environ.get("TFDS_DATA_DIR", str(folder / "tensorflow_datasets"))
        trainings = networks(folder, quick=given.quick, data_dir=data_dir)
        show(measure(trainings, rounds=given.rounds, folder=folder), timing)


if __name__ == "__main__":
    main()
