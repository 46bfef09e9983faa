"""What a suite found, as a table on the screen, JSON and a picture in a folder."""

import argparse
import datetime
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from sppnet_jax.run.files import check_folder, write_json
from sppnet_jax.run.memory import keep_memory

Measurements = Mapping[str, Any]
T = TypeVar("T")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "torchvision", "onnxruntime")


class Timing(NamedTuple):
    """How a suite is timed.

    `rounds`: how often each alternative is timed. `quick`: small shapes, to see that
    everything runs; its numbers mean nothing. `folder`: where files go.
    """

    rounds: int
    quick: bool
    folder: Path


class Report(NamedTuple):
    """What a suite found.

    `rows`: the table, one dict of column → value each; seconds have the unit in the
    column's name. `notes`: what a reader must know, such as a peer that is missing.
    `plot`: draws the rows into a matplotlib figure. `results`: whatever else goes into
    the JSON file, such as ratios.
    """

    suite: str
    title: str
    rows: Sequence[Measurements]
    plot: Callable[[Sequence[Measurements]], Any]
    notes: Sequence[str] = ()
    results: Mapping[str, Any] = {}


def timing_parser(
    module: str, description: str | None, *, out: str, rounds: int, **options: Any
) -> argparse.ArgumentParser:
    """The command line of `python -m MODULE`, a script that measures; see `timing_of`.

    `out`: the usual folder of the results. `rounds`: the usual number of them.
    `options`: others of the parser.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.add_argument(
        "--out", type=_result_folder, default=out, help="folder of the results"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="timings of each")
    parser.add_argument("--quick", action="store_true", help="small, to see it run")
    parser.add_argument("--traceback", action="store_true")
    return parser


def timing_of(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Timing]:
    """What the command line says, to a process that keeps memory from here on.

    Errors are those of argparse.
    """
    given = parser.parse_args()
    keep_memory()
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    return given, Timing(given.rounds, given.quick, given.out)


def _result_folder(path: str) -> Path:
    """The folder of --out, made before anything is measured: a type for argparse."""
    folder = Path(path).expanduser()
    try:
        check_folder(folder)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return folder


def machine() -> dict[str, Any]:
    """What the numbers of a report depend on: device, cores, versions; and when."""
    device = jax.devices()[0]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def kept(
    cases: Iterable[T], rows: Sequence[Measurements], suite: str, timing: Timing
) -> Iterator[T]:
    """The cases of a suite; the rows that each adds are written when it is done.

    A suite that ends on the way leaves them in SUITE_unfinished.json.
    """
    for case in cases:
        yield case
        found = {"machine": machine(), "rounds": timing.rounds, "rows": list(rows)}
        write_json(_unfinished(suite, timing), found)


def show(report: Report, timing: Timing) -> None:
    """Prints a report and writes SUITE.json and SUITE.png into the timing's folder."""
    seen = machine()
    versions = ", ".join(f"{name} {v}" for name, v in seen["versions"].items())
    print(f"\n{report.title}")
    print(f"{seen['device']} × {seen['devices']}, {seen['cores']} cores, {versions}")
    print(table(report.rows))
    for note in report.notes:
        print(note)
    if timing.quick:
        print("quick: small shapes, these numbers mean nothing")
    path = timing.folder / f"{report.suite}.json"
    write_json(
        path,
        {
            "suite": report.suite,
            "title": report.title,
            "machine": seen,
            "rounds": timing.rounds,
            "quick": timing.quick,
            "rows": [dict(row) for row in report.rows],
            "notes": list(report.notes),
            **report.results,
        },
    )
    picture = path.with_suffix(".png")
    report.plot(report.rows).savefig(picture, dpi=150)
    _unfinished(report.suite, timing).unlink(missing_ok=True)
    print(f"written: {path}, {picture}", flush=True)


def table(rows: Sequence[Measurements]) -> str:
    """Rows as aligned text; the columns of all rows, in the order they appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [isinstance(row.get(columns[0]), str) for row in rows[:1]]
    return "\n".join(
        "  ".join(
            c.ljust(w) if not n and all(text) else c.rjust(w)
            for n, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cell(value: Any) -> str:
    """A value as a person reads it: three digits, a dash for what there is not."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def draw_bars(
    axes: Any,
    bars: Iterable[tuple[str, str, float | None]],
    *,
    upright: bool = False,
) -> list[Any]:
    """Bars of each group beside each other, a colour for each name; None has no bar.

    `bars`: (name, group, length). `upright`: they stand, else they lie, the first on
    top.

    Returns: matplotlib's containers of bars, one for each name.
    """
    values: dict[str, dict[str, float | None]] = defaultdict(dict)
    for name, group, length in bars:
        values[name][group] = length
    groups = list(dict.fromkeys(group for own in values.values() for group in own))
    width, drawn = 0.8 / len(values), []
    draw = axes.bar if upright else axes.barh
    for number, (name, own) in enumerate(values.items()):
        places = [n - 0.4 + (number + 0.5) * width for n in range(len(groups))]
        lengths = [own.get(group) or 0.0 for group in groups]
        color = f"C{number}"
        drawn.append(draw(places, lengths, width * 0.9, label=name, color=color))
    if upright:
        axes.set_xticks(range(len(groups)), groups)
    else:
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.4, -0.6)
    return drawn


def _unfinished(suite: str, timing: Timing) -> Path:
    return timing.folder / f"{suite}_unfinished.json"


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
