"""Which proposals suit a folder of boxes: what they find, and what they take.

    python -m experiments.proposal_recall --root=FOLDER --out=runs/proposals

Searches the training images with several settings of selective search, in turn image
by image, each search on all cores. "recall": the share of the objects that some window
overlaps by an IoU of 0.5 or 0.7, of the first 300 windows of the ranking and of all.
Choose on these images, not on those that a detector is tested on.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.setting import messages_alone
from sppnet_jax.benchmarks.report import (
    Measurements,
    Report,
    Timing,
    draw_bars,
    show,
    timing_of,
    timing_parser,
)
from sppnet_jax.data.datasets import BoxData, open_box_split
from sppnet_jax.data.images import decode_image
from sppnet_jax.detection.proposals import (
    NO_COLOUR,
    ProposalSettings,
    find_boxes,
    proposal_recall,
)
from sppnet_jax.run.progress import progress_bar

VGA = 500 * 375  # pixels of a photograph that lies, 500 wide
SETTINGS = {
    "width 500": ProposalSettings(),
    "without colour": ProposalSettings(method=NO_COLOUR),
    "187,500 pixels": ProposalSettings(max_pixels=VGA),
    "187,500, without colour": ProposalSettings(method=NO_COLOUR, max_pixels=VGA),
    "width 400, least side 16": ProposalSettings(width=400, min_side=16),
    "width 320, least side 12": ProposalSettings(width=320, min_side=12),
}
FEW = 300


def run(data: BoxData, timing: Timing, images: int) -> Report:
    """Searches up to so many images, evenly spaced, with all settings."""
    source = open_box_split(data, "train")
    count = min(3 if timing.quick else images, len(source.records))
    places = np.linspace(0, len(source.records) - 1, count).astype(int)
    objects = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in SETTINGS}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    with progress_bar("images", count) as bar:
        for number, place in enumerate(places):
            record = source.records[int(place)]
            image = decode_image(record["image"])
            objects.append(record["objects"])
            # Whoever comes first finds caches that the last one left.
            names = list(SETTINGS)[number % len(SETTINGS) :]
            names += [name for name in SETTINGS if name not in names]
            for name in names * timing.rounds:
                started = perf_counter()
                boxes = find_boxes(image, SETTINGS[name])
                seconds[name].append(perf_counter() - started)
                if len(found[name]) <= number:
                    found[name].append(boxes)
            bar.update()
    rows: list[Measurements] = []
    for name, windows in found.items():
        row: dict[str, Any] = {
            "proposals": name,
            "s an image": float(np.median(seconds[name])),
            "s, mean": float(np.mean(seconds[name])),
            "s, slowest": float(max(seconds[name])),
            "windows": float(np.mean([len(own) for own in windows])),
        }
        for most, words in ((FEW, f"{FEW} windows"), (None, "all")):
            for overlap in (0.5, 0.7):
                some = [own[:most] for own in windows]
                classes = len(source.class_names)
                recall = proposal_recall(some, objects, classes, threshold=overlap)
                row[f"recall {overlap}, {words}"] = recall["recall"]
        rows.append(row)
    counted = sum(int((~own.difficult).sum()) for own in objects)
    notes = [f"{count} images of {source.name}, {source.split}: {counted} objects"]
    return Report("proposals", "Proposals", rows, plot, notes)


def plot(rows: Sequence[Measurements]) -> Figure:
    """Seconds an image, and recall at an IoU of 0.7, by setting."""
    figure = Figure(figsize=(10, 0.6 * len(rows) + 1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    times = ("s an image", "s, slowest")
    draw_bars(left, [(t, row["proposals"], row[t]) for t in times for row in rows])
    left.set_xlabel("seconds an image, median and slowest")
    recalls = [name for name in rows[0] if name.startswith("recall 0.7")]
    draw_bars(right, [(r, row["proposals"], row[r]) for r in recalls for row in rows])
    right.set_xlabel("recall at IoU 0.7")
    for axes in (left, right):
        axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


if __name__ == "__main__":
    parser = timing_parser(
        "experiments.proposal_recall", __doc__, out="runs/proposals", rounds=1
    )
    parser.add_argument("--root", required=True, help="folder of images and boxes")
    parser.add_argument("--train_split", default="", help="default: the folder's")
    parser.add_argument("--images", type=int, default=30)
    options, given = timing_of(parser)
    if options.images < 1:
        parser.error(f"--images must be at least 1, got {options.images}")
    with messages_alone(options.traceback, "nothing was written"):
        data = BoxData(
            name="box_folder", root=options.root, train_split=options.train_split
        )
        show(run(data, given, options.images), given)
