"""The memory that training a detector takes, at the size of VOC 2007.

    python -m experiments.detector_memory --out=runs/memory

trains by configs/detect_pretrained.py in a process of its own for each number of
--images, and reports its peak resident memory. Images, objects of 20 classes, 2,000
proposals an image and the maps are made up: there are as many and as large as of VOC's
trainval, whose images have 500×375 pixels, 2.5 objects each, but images are small
files, and a few scenes with their maps come again and again. The proposals come from a
file. So nothing is searched or convolved, and all that learns from windows is run as it
is. The same command goes on where it stopped.
"""

import argparse
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure

from configs import detect_pretrained
from experiments.setting import messages_alone
from sppnet_jax.benchmarks.report import (
    Measurements,
    Report,
    draw_bars,
    show,
    timing_of,
    timing_parser,
)
from sppnet_jax.data.sources import Source
from sppnet_jax.detection import detector_training, split_features
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.maps import image_sizes, map_file, scaled_sizes
from sppnet_jax.detection.proposals import save_proposals
from sppnet_jax.detection.scales import map_size_of
from sppnet_jax.network.model import pooled_length
from sppnet_jax.network.trained import Network
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run import progress, run_folder
from sppnet_jax.run.files import write_array, write_json, write_text
from sppnet_jax.run.settings import read

REPOSITORY = Path(__file__).parent.parent
IMAGES = (2_505, 5_011)  # half of VOC 2007's trainval, and all of it
CLASSES = 20
OBJECTS = 2.516  # an image, difficult ones left out
SIZE = (75, 100)  # of the files, in pixels: a fifth of VOC's
SCENES = 60  # that differ in objects and maps; proposals differ in every image
RESULT = "memory.json"
LIMIT = 8.0  # GB, what it may take


def measure(counts: Sequence[int], windows: int, folder: Path) -> Report:
    """Trains on so many images, each number in a process of its own.

    `windows`: proposals of an image. `folder`: keeps the data, runs and results.
    """
    rows: list[Measurements] = []
    for count in sorted(counts):
        place = folder / f"{count}_images"
        made_up_data(place / "data", count, windows)
        if not _result(place)["done"]:
            command = [sys.executable, "-m", "experiments.detector_memory", "--train"]
            subprocess.run([*command, str(place)], cwd=REPOSITORY)
        seen = _result(place)
        if not seen["done"]:
            raise RuntimeError(f"the training on {count} images has failed, see above")
        steps = {f"{name}, GB": peak for name, peak in seen["peaks"].items()}
        row = {"images": count, "peak, GB": seen["peak"], "s": seen["seconds"]}
        rows.append({**row, **steps})
    notes = [
        f"{windows:,} proposals an image, {CLASSES} classes. Columns of steps: the "
        "peak up to their end."
    ]
    title = "Peak resident memory of `detect train`, from made-up maps"
    return Report("detector_memory", title, rows, plot, notes)


def made_up_data(folder: Path, count: int, windows: int) -> None:
    """Writes images with boxes in YOLO's layout, one more to test, and proposals."""
    if (folder / "proposals.npz").exists():
        return
    rng = np.random.default_rng(0)
    names, proposals = [], []
    for index in range(count + 1):
        place, name = folder / ("train" if index < count else "test"), f"{index:06d}"
        (height, width), boxes, labels = _scene(index)
        color = tuple(rng.integers(0, 256, 3).tolist())
        image = np.full((height, width, 3), color, np.uint8)
        (place / "images").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / "images" / f"{name}.png"), image)
        lines = (
            f"{label} {(left + right) / 2} {(top + bottom) / 2} {right - left} "
            f"{bottom - top}\n"
            for label, (top, left, bottom, right) in zip(labels, boxes, strict=True)
        )
        write_text(place / "labels" / f"{name}.txt", "".join(lines))
        near = np.repeat(boxes, 8, axis=0)
        near = np.clip(near + rng.uniform(-0.03, 0.03, near.shape), 0, 1)
        found = np.concatenate([near, _boxes(rng, windows)])[:windows]
        names.append(f"{place.name}/images/{name}.png")
        proposals.append(found * [height, width, height, width])
    write_text(folder / "classes.txt", "".join(f"class{n}\n" for n in range(CLASSES)))
    save_proposals(folder / "proposals.npz", names, proposals)


def _scene(index: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """An image's size, its objects' boxes as shares of the sides, and their classes."""
    number = index % SCENES
    rng = np.random.default_rng((1, number))
    height, width = SIZE if number % 5 else SIZE[::-1]  # some are upright
    boxes = _boxes(rng, 1 + rng.poisson(OBJECTS - 1))
    return (height, width), boxes, rng.integers(0, CLASSES, len(boxes))


def _map_of(index: int, rows: int, columns: int, channels: int) -> np.ndarray:
    """A map of an image: noise, and in each object's box what tells its class."""
    _, boxes, labels = _scene(index)
    rng = np.random.default_rng((2, index % SCENES))
    values = rng.standard_normal((rows, columns, channels), np.float32)
    for label, box in zip(labels, boxes, strict=True):
        top, left, bottom, right = np.rint(box * ([rows, columns] * 2)).astype(int)
        told = np.random.default_rng((3, label)).standard_normal(channels, np.float32)
        values[top:bottom, left:right] += 2 * told
    return np.maximum(values, 0)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random boxes as shares of the image's sides, float [count, 4]."""
    sides = rng.uniform(0.1, 0.9, (count, 2))
    first = rng.uniform(0, 1 - sides)
    return np.concatenate([first, first + sides], axis=1)


def train(folder: Path) -> None:
    """Trains in this process, and writes its peaks down.

    The peak of a run that goes on is the highest of all its processes.
    """
    config = detect_pretrained.get_config()
    config.data.root = str(folder / "data")
    config.data.name, config.data.train_split = "yolo_folder", "train"
    config.proposals.method = "file"
    config.proposals.file = str(folder / "data" / "proposals.npz")
    settings = read(DetectorSettings, config.to_dict())
    known, started = _result(folder), time.monotonic()
    peaks: dict[str, float] = known["peaks"]

    def note(step: str, done: bool = False) -> None:
        new = step not in peaks
        peaks.setdefault(step, 0.0)
        # The kernel's count is rounded, and may fall: an earlier step's is a bound.
        before = itertools.takewhile(lambda name: name != step, list(peaks))
        peaks[step] = max(peaks[step], _peak(), *(peaks[name] for name in before))
        if new or done:
            seconds = round(known["seconds"] + time.monotonic() - started)
            seen = {"peak": max(peaks.values()), "seconds": seconds, "peaks": peaks}
            write_json(folder / RESULT, {**seen, "done": done})

    progress.WATCHERS.append(lambda step, _: note(step))
    vars(split_features)["convolve_split"] = _link_maps
    detector_training.train_detector(settings, folder / "run")
    note("box regression", done=True)


def _link_maps(
    network: Network, source: Source, folder: Path, *, sides: Sequence[int], **_: Any
) -> None:
    """Puts made-up maps where those of a split's images would be written."""
    channels = pooled_length(network.model) // num_bins(network.model.levels or ())
    made, records = folder.with_name("made_up_maps"), source.records
    for side in sides:
        for index, size in enumerate(scaled_sizes(image_sizes(source), side)):
            shown = int(Path(records[index]["name"]).stem) % SCENES
            origin = made / f"{side}-{shown}.npy"
            if not origin.exists():
                shape = (*map_size_of(tuple(size), network.geometry), channels)
                write_array(origin, _map_of(shown, *shape))
            path = map_file(folder, side, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                os.link(origin, path)


def _result(folder: Path) -> dict[str, Any]:
    """What is known so far of the training in a folder."""
    path = folder / RESULT
    known: dict[str, Any] = {"seconds": 0, "peaks": {}, "done": False}
    return known | (run_folder.read_json(path) if path.exists() else {})


def _peak() -> float:
    """The most memory that this process has had so far, in GB."""
    # Linux's; its getrusage counts what the process was that started this one, too.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plot(rows: Sequence[Measurements]) -> Figure:
    """The peak up to the end of each step, for each number of images."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [name for name in rows[0] if name.endswith(", GB")][1:]  # not of them all
    draw_bars(
        axes,
        [
            (f"{row['images']:,} images", name.removesuffix(", GB"), row[name])
            for name in steps
            for row in rows
        ],
    )
    axes.axvline(LIMIT, color="0.6", ls="--", label="what it may take")
    axes.set_xlabel("peak memory, GB")
    axes.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = timing_parser(
        "experiments.detector_memory", __doc__, out="runs/memory", rounds=1
    )
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--windows", type=int, default=2_000, help="of an image")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    given, timing = timing_of(parser)
    with messages_alone(given.traceback, "the same command goes on from there"):
        if given.train:
            train(given.train)
            return
        counts, windows = ((6,), 40) if given.quick else (given.images, given.windows)
        show(measure(counts, windows, timing.folder.absolute()), timing)


if __name__ == "__main__":
    main()
