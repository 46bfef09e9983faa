"""How soon a training makes its first step, and a photograph gets its answer.

    python -m experiments.startup_speed --out=runs/startup --demo=runs/demo

runs `python -m sppnet_jax.train` up to its first step, in a process and a workdir of
its own each time: once with an empty cache folder, once with the one that start filled,
in turn. The digits are prepared before. It tells where the time goes: importing,
opening the data, the training set's statistics, making the network, compiling the step
and running it. JAX_COMPILATION_CACHE_DIR in the environment is left out of account.

With `--demo`, the folder that `make demo` has filled, `predict` and `detect image` look
at one photograph with its networks, from the start of the process to its end.
"""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.first_step import CPU, PARTS, TOTAL
from experiments.photographs import photograph, photograph_folder
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
WHOLE = "the whole process"


def measure(
    networks: dict[str, list[str]],
    *,
    rounds: int,
    folder: Path,
    commands: Mapping[str, list[str]] = {},
) -> Report:
    """Starts every training `rounds` times with an empty and a filled cache, in turn.

    `networks`: the arguments of sppnet_jax.train for each, but for its workdir.
    `folder`: of workdirs and caches, which are removed again.
    `commands`: modules and arguments of other commands, that are measured as a whole.
    """
    rows: list[Measurements] = []
    ratios = {}
    starts: dict[str, Callable[[Path, Path], dict[str, float]]] = {
        **{name: functools.partial(start, given) for name, given in networks.items()},
        **{name: functools.partial(finish, given) for name, given in commands.items()},
    }
    bar = tqdm(total=2 * rounds * len(starts), desc="starts", disable=None)
    with bar:
        for name, begin in starts.items():
            seconds: dict[str, list[dict[str, float]]] = {FIRST: [], SECOND: []}
            for number in range(rounds):
                place = folder / f"{name.replace(' ', '_')}-{number}"
                for which in (FIRST, SECOND):
                    seconds[which].append(begin(place / which, place))
                    bar.update()
                shutil.rmtree(place)
            rows += [row for which in seconds for row in _rows(name, which, seconds)]
            totals = {
                which: np.array([one.get(TOTAL) or one[WHOLE] for one in times])
                for which, times in seconds.items()
            }
            ratios[name] = times_as_fast(totals[SECOND], totals[FIRST])._asdict()
    notes = [
        f"{name}: the second start is {r['median']:.1f} times as soon at its "
        f"{'end' if name in commands else 'first step'} as the first "
        f"({r['low']:.1f} to {r['high']:.1f})"
        for name, r in ratios.items()
    ]
    return Report(
        "startup",
        "Seconds from the start of a training to the end of its first step, and of "
        "commands that look at a photograph",
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
    command = [sys.executable, "-m", "experiments.first_step"]
    workdir.mkdir(parents=True)
    result_path = workdir / "seconds.json"
    started = time.time()
    done = subprocess.run(
        [*command, str(started), str(result_path), *arguments, f"--workdir={workdir}"],
        cwd=REPOSITORY,
        env=_environment(caches),
        capture_output=True,
        text=True,
    )
    if not result_path.exists():
        raise RuntimeError(f"the training failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, float] = json.loads(result_path.read_text())
    return result


def finish(arguments: Sequence[str], workdir: Path, caches: Path) -> dict[str, float]:
    """Seconds from the start to the end of a command, and its CPU seconds.

    `arguments`: the command and its own. `workdir`: left empty. `caches`: as `start`.

    Raises: RuntimeError with what the command said if it fails.
    """
    workdir.mkdir(parents=True)
    used, started = _cpu_of_children(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env=_environment(caches),
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"the command failed:\n{done.stdout}\n{done.stderr}")
    return {WHOLE: seconds, CPU: _cpu_of_children() - used}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment(caches: Path) -> dict[str, str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(caches.absolute())}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    return environment


def _rows(
    name: str, which: str, seconds: dict[str, list[dict[str, float]]]
) -> list[Measurements]:
    rows: list[Measurements] = []
    for part in seconds[which][0]:
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
    """The parts of each start as one bar; a command's whole is one part."""
    bars = list(dict.fromkeys((r["training"], r["start"]) for r in rows))
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for n, bar in enumerate(bars):
        left = 0.0
        own = {r["part"]: r["s"] for r in rows if (r["training"], r["start"]) == bar}
        for p, part in enumerate((*PARTS, WHOLE)):
            if part in own:
                axes.barh(n, own[part], left=left, color=f"C{p}", label=part)
                left += own[part]
        axes.text(left, n, f" {left:.1f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [f"{name}, {which}" for name, which in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds from the start of the process")
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    style = {"ncols": len(handles), "fontsize": 8}
    figure.legend(handles.values(), handles, loc="outside upper center", **style)
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


def photo_commands(demo: Path, folder: Path) -> dict[str, list[str]]:
    """Commands that look at one photograph, made in `folder`, with the demo's networks.

    Raises: ValueError for a folder that `make demo` has not filled.
    """
    detector = demo / "detect"
    if not (detector / "detector.json").exists():
        raise ValueError(f"{demo} holds no demo: run make demo, or leave out --demo")
    photo, looked = folder / "photo.jpg", f"--pictures={folder}"
    photo.write_bytes(photograph(0))
    look = ["image", f"--workdir={detector.absolute()}", looked, str(photo)]
    return {
        "predict": ["sppnet_jax.predict", f"--workdir={demo.absolute()}", str(photo)],
        "detect image": ["sppnet_jax.detect", *look],
    }


def main() -> None:
    parser = timing_parser(
        "experiments.startup_speed", __doc__, out="runs/startup", rounds=3
    )
    parser.add_argument(
        "--demo", type=Path, help="the folder that make demo has filled"
    )
    given, timing = timing_of(parser)
    with (
        messages_alone(given.traceback, "nothing is written"),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        data_dir = os.environ.get("TFDS_DATA_DIR", str(folder / "tensorflow_datasets"))
        trainings = networks(folder, quick=given.quick, data_dir=data_dir)
        commands = photo_commands(given.demo, folder) if given.demo else {}
        report = measure(
            trainings, rounds=given.rounds, folder=folder, commands=commands
        )
        show(report, timing)


if __name__ == "__main__":
    main()
