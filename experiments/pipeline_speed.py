"""How fast images are read for training, beside the bare decoding of the same files.

    python -m experiments.pipeline_speed --root=FOLDER --out=runs/pipeline

Without --root it makes a folder of photographs. Time is CPU time, of all threads and
processes: what decides how many cores a device needs. Each pipeline is measured from
full buffers to full buffers, so nothing is read before the clock starts or after it
stops; they stay open side by side, and are measured in turn. The parts of the work are
timed alone too: they show what bounds the whole.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
from matplotlib.figure import Figure

from experiments.photographs import photograph_folder
from experiments.setting import messages_alone
from sppnet_jax.benchmarks.report import (
    Measurements,
    Report,
    Timing,
    show,
    timing_of,
    timing_parser,
)
from sppnet_jax.benchmarks.timing import in_turn, spread, times_as_fast
from sppnet_jax.data import images
from sppnet_jax.data.batches import Batches, train_batches
from sppnet_jax.data.sources import Record, Records, Source, open_source

BARE = "bare decoding"
REST = "the rest: Grain, shuffling, batches"
# Buffers that have not grown for so long are full.
FULL_SECONDS = 1.0
MOST_FILES = 400


class _Case(NamedTuple):
    """A data set, how its images are cropped, and how many batches are measured."""

    name: str
    source: Source
    image_size: int
    resize_side: int
    min_area: float
    flip: bool
    steps: int


class Used(NamedTuple):
    """What a piece of work took, in seconds."""

    cpu: float
    wall: float


class Counted:
    """Records that count in a file how many of them were read, in any process."""

    def __init__(self, records: Records, path: Path) -> None:
        self._records, self.path = records, path
        path.touch()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(file, b".")
        os.close(file)
        return self._records[index]

    def reads(self) -> int:
        return os.stat(self.path).st_size


Work = Callable[[], Used]


def run(cases: Sequence[_Case], timing: Timing, folder: Path, *, batch: int) -> Report:
    """Measures each case: its pipelines, and the parts of their work.

    `folder`: for files that last as long as the run. `batch`: images of a batch.
    """
    rows: list[Measurements] = []
    notes: list[str] = []
    for case in cases:
        count = case.steps * batch
        work = {BARE: _repeat(_decode(case), count)}
        with contextlib.ExitStack() as stack:
            for name, options in _pipelines(case, quick=timing.quick).items():
                records = Counted(case.source.records, folder / f"{len(work)}.reads")
                batches = train_batches(
                    case.source._replace(records=records),
                    batch_size=batch,
                    image_size=case.image_size,
                    resize_side=case.resize_side,
                    min_area=case.min_area,
                    **options,
                )
                stack.enter_context(batches)
                stack.callback(records.path.unlink)
                work[name] = _drain(batches, records, case.steps, batch)
            for name, part in _parts(case).items():
                work[name] = _repeat(part, count)
            for warm_up in work.values():
                warm_up()
            used = in_turn(work, rounds=timing.rounds, label=case.name)
        rows += _rows(case, used, count)
        notes.append(_bound(case, rows))
    if timing.quick:
        notes.append("quick: no worker processes")
    return Report(
        "pipeline",
        "Images read for training, beside the bare decoding of the same files",
        rows,
        plot,
        notes,
    )


def _children_seconds() -> float:
    """CPU seconds of this process's living children."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def _drain(batches: Batches, records: Counted, steps: int, batch: int) -> Work:
    """Takes batches from full buffers, and waits until they are full again."""

    def fill() -> None:
        seen, since = records.reads(), time.perf_counter()
        while time.perf_counter() - since < FULL_SECONDS:
            time.sleep(0.02)
            if records.reads() != seen:
                seen, since = records.reads(), time.perf_counter()

    next(batches)
    fill()

    def work() -> Used:
        full = records.reads() + steps * batch
        # Looking for the children takes a while: it is not between these clocks.
        before = _children_seconds()
        started, own = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(batches)
        while records.reads() < full:
            time.sleep(0.02)
        own, wall = time.process_time() - own, time.perf_counter() - started
        return Used(own + _children_seconds() - before, wall)

    return work


def _repeat(part: Callable[[int], Any], times: int) -> Work:
    """Does a part of the work for so many images, one after the other."""

    def work() -> Used:
        cpu, started = time.process_time(), time.perf_counter()
        for index in range(times):
            part(index)
        return Used(time.process_time() - cpu, time.perf_counter() - started)

    return work


def _pipelines(case: _Case, *, quick: bool) -> dict[str, dict[str, Any]]:
    resized = {"crop": "random_resized", "flip": case.flip}
    pipelines = {
        "1 thread": {**resized, "threads": 1},
        "8 threads": {**resized, "threads": 8},
        "1 worker": {**resized, "threads": 1, "workers": 1},
        "2 workers": {**resized, "threads": 1, "workers": 2},
        "paper's crops": {"crop": "paper", "flip": case.flip, "threads": 1},
        "centre crops": {"crop": "center", "flip": False, "threads": 1},
    }
    if quick:
        return {k: v for k, v in pipelines.items() if "workers" not in v}
    return pipelines


def _decode(case: _Case) -> Callable[[int], Any]:
    files = [np.frombuffer(encoded, np.uint8) for encoded in _files(case.source)]
    return lambda n: cv2.imdecode(files[n % len(files)], cv2.IMREAD_COLOR_RGB)


def _parts(case: _Case) -> dict[str, Callable[[int], Any]]:
    """The work that "1 thread" does for an image, in parts; and what it doesn't do."""
    files = _files(case.source)
    count = len(files)
    decoded = [images.decode_image(encoded) for encoded in files]
    random = np.random.default_rng(0)
    size, area = case.image_size, (case.min_area, 1.0)

    def bilinear(n: int) -> Any:
        image = decoded[n % count]
        side = round(min(image.shape[:2]) * 0.9)
        return cv2.resize(image[:side, :side], (size, size))

    return {
        "part: reading the record": lambda n: case.source.records[n % count],
        "part: decoding, file checked": lambda n: images.decode_image(files[n % count]),
        "part: cropping, resizing": lambda n: images.random_resized_crop(
            decoded[n % count], size, random, area
        ),
        "not used: bilinear resizing": bilinear,
    }


def _rows(case: _Case, used: dict[str, list[Used]], count: int) -> list[Measurements]:
    cpu = {name: np.array([u.cpu for u in us]) / count for name, us in used.items()}
    wall = {name: np.array([u.wall for u in us]) / count for name, us in used.items()}
    parts = [name for name in used if name.startswith("part: ")]
    names = [name for name in used if name not in parts and "not used" not in name]
    rows: list[Measurements] = []
    for name in used:
        middle = spread(cpu[name] * 1e3)
        row: dict[str, Any] = {
            "images": case.name,
            "what": name,
            "CPU ms": middle.median,
            "low": middle.low,
            "high": middle.high,
        }
        if name in names:
            share = times_as_fast(cpu[name], cpu[BARE])
            row |= {
                "images/s per core": 1e3 / middle.median,
                "images/s": 1 / float(np.median(wall[name])),
                "of bare decoding": share.median,
            }
        rows.append(row)
    return rows


def _bound(case: _Case, rows: Sequence[Measurements]) -> str:
    """What the parts leave of the bare rate if all else cost nothing."""
    ms = {row["what"]: row["CPU ms"] for row in rows if row["images"] == case.name}
    bare, resizing = ms[BARE], ms["part: cropping, resizing"]
    parts = sum(value for name, value in ms.items() if name.startswith("part: "))
    return (
        f"{case.name}: decoding takes {bare:.3f} ms, resizing {resizing:.3f}: with all "
        f"else for nothing the pipeline would have {bare / (bare + resizing):.0%} of "
        f"the bare rate; the parts of one thread's work are {parts:.3f} of its "
        f"{ms['1 thread']:.3f} ms. Were it bilinear, resizing would take "
        f"{ms['not used: bilinear resizing']:.3f}"
    )


def plot(rows: Sequence[Measurements]) -> Figure:
    """The rate per core of each pipeline, and the parts of one thread's work."""
    cases = list(dict.fromkeys(row["images"] for row in rows))
    figure = Figure(figsize=(10, 3.4 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False)
    for (rates, parts), case in zip(grid, cases, strict=True):
        own = [row for row in rows if row["images"] == case]
        shown = [row for row in own if row.get("of bare decoding") is not None]
        bars = rates.barh(
            [row["what"] for row in shown],
            [row["images/s per core"] for row in shown],
            color=["0.5"] + ["C0"] * (len(shown) - 1),
        )
        shares = [f"{row['of bare decoding']:.0%}" for row in shown]
        rates.bar_label(bars, shares, padding=3, fontsize=8)
        rates.invert_yaxis()
        rates.margins(x=0.15)
        rates.set_xlabel("images/s per core")
        rates.locator_params(axis="x", nbins=6)
        rates.set_title(case, fontsize=10)
        named = [row for row in own if row["what"].startswith("part: ")]
        lengths = [row["CPU ms"] for row in named]
        (whole,) = (row["CPU ms"] for row in own if row["what"] == "1 thread")
        labels = [row["what"].removeprefix("part: ") for row in named]
        left = 0.0
        for n, (label, length) in enumerate(
            zip(
                [*labels, REST], [*lengths, max(0.0, whole - sum(lengths))], strict=True
            )
        ):
            parts.barh(0, length, left=left, color=f"C{n}", label=label)
            left += length
        (bare,) = (row["CPU ms"] for row in own if row["what"] == BARE)
        parts.axvline(bare, color="k", linestyle="--", linewidth=1, label=BARE)
        parts.set_yticks([0], ["1 thread"])
        parts.set_ylim(-1.2, 3)
        parts.set_xlabel("CPU ms per image")
        parts.legend(fontsize=8, loc="upper left")
    return figure


def main() -> None:
    parser = timing_parser(
        "experiments.pipeline_speed", __doc__, out="runs/pipeline", rounds=7
    )
    parser.add_argument("--root", default="", help="folder of class folders of images")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data")
    given, timing = timing_of(parser)
    with (
        messages_alone(given.traceback, "nothing is written"),
        tempfile.TemporaryDirectory() as name,
    ):
        opened = open_cases(
            Path(name), root=given.root, data_dir=given.data_dir, quick=given.quick
        )
        batch = 8 if given.quick else 64
        show(run(opened, timing, Path(name), batch=batch), timing)


def open_cases(folder: Path, *, root: str, data_dir: str, quick: bool) -> list[_Case]:
    """A folder of photographs at the paper's sizes, and the digits of the tour.

    `folder`: the photographs are made there if there is no `root`.
    """
    made = root or str(
        photograph_folder(folder / "photographs", images=40 if quick else 600)
    )
    photographs = open_source("image_folder", "train", root=made)
    digits = open_source("digit_scenes/classification", "train", data_dir=data_dir)
    sizes = np.array([images.image_size(e) for e in _files(photographs)])
    few = 2 if quick else 0
    height, width = np.median(sizes, axis=0).astype(int)
    return [
        _Case(
            f"photographs, {width}×{height}",
            photographs,
            224,
            256,
            0.35,
            True,
            few or 12,
        ),
        _Case("digit scenes", digits, 64, 72, 0.6, False, few or 48),
    ]


def _files(source: Source) -> list[bytes]:
    count = min(MOST_FILES, len(source.records))
    return [source.records[index]["image"] for index in range(count)]


if __name__ == "__main__":
    main()
