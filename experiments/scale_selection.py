"""Section 4.1: how many scales, and at which should a window be pooled?

    python -m experiments.scale_selection --preset=digits
    python -m experiments.scale_selection --preset=digits --scorer=softmax

Tests detectors with one scale, smaller and larger than the paper's, and with its five,
where each window goes to the scale at which it comes closest to a square of half, once,
… the side that the network was trained at. It counts which scales the windows go to.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.report import (
    TEXT,
    Cited,
    Claim,
    Column,
    Row,
    differences,
    draw_shares,
    write_report,
)
from experiments.runs import (
    DetectionSetting,
    DetectorRecipe,
    detector_test,
    open_test_split,
)
from experiments.setting import paper_scales, run_detection
from sppnet_jax.detection.maps import scaled_sizes
from sppnet_jax.detection.scales import choose_scales, scale_factors
from sppnet_jax.run.figures import save_figure

NAME = "scale_selection"
TITLE = "Scales of the image, and the scale of a window"
ELEVEN, AREA = "mAP, 11 points", "mAP, area"
COLUMNS = (Column(ELEVEN), Column(AREA, paper=False))
SIDES = (0.7, 1.0, 1.4)  # of the paper's single scale
WINDOW_SIDES = (0.5, 0.75, 1.0, 1.5)  # of the training side


class Choice(NamedTuple):
    """A row: how many scales, and how the one of the paper is changed.

    `factor`: of the single scale's side, or of the side that windows should have.
    """

    scales: int
    factor: float = 1.0


CHOICES = (*(Choice(1, f) for f in SIDES), *(Choice(5, f) for f in WINDOW_SIDES))
# VOC 2007, by SVMs on fine-tuned fc7 with box regression.
PAPER = {Choice(1): Cited(0.580, TEXT), Choice(5): Cited(0.592, TEXT)}

Reports = dict[Choice, dict[int, dict[str, Any]]]  # by seed
Shares = dict[Choice, dict[int, float]]  # by side of the image


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scorer",
        choices=("svm", "softmax"),
        default="svm",
        help="softmax is quick: no SVMs, no box regression",
    )


def main(given: DetectionSetting, options: argparse.Namespace) -> Path:
    reports: Reports = defaultdict(dict)
    shares: Shares = {}
    for seed in given.seeds:
        for choice in CHOICES:
            detector = detector_of(given, choice, options.scorer)
            reports[choice][seed] = detector_test(given, detector, seed)
            if choice not in shares:
                shares[choice] = _shares(given, detector, seed)
            folder = _report(given, options.scorer, reports, shares)
    return folder


def detector_of(given: DetectionSetting, choice: Choice, scorer: str) -> DetectorRecipe:
    """The detector of a row."""
    scales, window_side = paper_scales(given, choice.scales), 0
    if choice.scales == 1:
        scales = tuple(round(side * choice.factor) for side in scales)
    elif choice.factor != 1:
        window_side = round(given.image_size * choice.factor)
    return DetectorRecipe(
        scales, scorer=scorer, regression=scorer == "svm", window_side=window_side
    )


def scale_shares(
    proposals: Sequence[np.ndarray],
    sizes: np.ndarray,
    sides: Sequence[int],
    area: float,
) -> dict[int, float]:
    """The share of all windows that goes to each scale, by the image's shorter side.

    `proposals`: float [N, 4] for each image. `sizes`: of the images, int [images, 2].
    """
    counts: Counter[int] = Counter()
    for number, boxes in enumerate(proposals):
        if len(boxes):
            own = [scaled_sizes(sizes[number : number + 1], side)[0] for side in sides]
            size = int(sizes[number, 0]), int(sizes[number, 1])
            factors = scale_factors(size, [(int(h), int(w)) for h, w in own])
            counts.update(choose_scales(boxes, factors, area).tolist())
    total = max(1, sum(counts.values()))
    return {side: counts[number] / total for number, side in enumerate(sides)}


def _shares(
    given: DetectionSetting, detector: DetectorRecipe, seed: int
) -> dict[int, float]:
    split = open_test_split(given, detector, seed)
    side = detector.window_side or given.image_size
    return scale_shares(split.proposals, split.sizes, detector.scales, side**2)


def _report(
    given: DetectionSetting, scorer: str, reports: Reports, shares: Shares
) -> Path:
    rows = [
        Row(
            _label(given, choice),
            {
                ELEVEN: [r["map_11_point"] for r in reports[choice].values()],
                AREA: [r["map_area"] for r in reports[choice].values()],
            },
            {ELEVEN: PAPER[choice]} if choice in PAPER else {},
        )
        for choice in CHOICES
    ]
    one, five = reports[Choice(1)], reports[Choice(5)]
    gains = differences(five, one, itemgetter("map_11_point"))
    report = next(iter(one.values()), None) or next(iter(reports[CHOICES[0]].values()))
    scored = "SVMs on fine-tuned fc7, box regression"
    if scorer == "softmax":
        scored = "the softmax of the fine-tuned fc8, no box regression"
    went = {
        _label(given, choice): {str(side): share for side, share in found.items()}
        for choice, found in shares.items()
        if choice.scales > 1
    }
    listed = [
        f"{label}: "
        + ", ".join(f"{share:.0%} at {side}" for side, share in own.items())
        for label, own in went.items()
    ]
    notes = [
        f"Scored by {scored}; the paper by SVMs, with box regression.",
        f"Tested on {report['images']} images of {report['data']}, split "
        f"{report['split']}; seeds share the network and the images.",
        *(f"Windows of {line}." for line in listed),
    ]
    folder = write_report(
        given,
        NAME,
        title=TITLE,
        about={
            "scorer": scorer,
            "windows_at_each_scale": went,
        },
        columns=COLUMNS,
        rows=rows,
        claims=[Claim("Five scales are better than one, 11 points", gains)],
        notes=notes,
    )
    _plot(folder, rows, shares)
    return folder


def _label(given: DetectionSetting, choice: Choice) -> str:
    sides = detector_of(given, choice, "svm").scales
    if choice.scales == 1:
        return f"1 scale: {sides[0]}"
    side = round(given.image_size * choice.factor)
    return f"{len(sides)} scales, windows near {side}×{side}"


def _plot(folder: Path, rows: Sequence[Row], shares: Shares) -> None:
    """mAP here and in the paper, and where the windows go, row by row."""
    figure = Figure(figsize=(12.5, 1.8 + 0.4 * len(rows)), layout="constrained")
    figure.suptitle(TITLE)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(1, 0.6, 1.4))
    draw_shares(axes[0], "mAP", [ELEVEN], rows, ours=True)
    draw_shares(axes[1], "mAP", [ELEVEN], rows, ours=False)
    _draw_shares(axes[2], shares)
    save_figure(figure, folder / "plot.png")


def _draw_shares(axes: Axes, shares: Shares) -> None:
    """A bar for each row, divided by the scales that its windows go to."""
    several = sorted({s for c, own in shares.items() if c.scales > 1 for s in own})
    colors = matplotlib.colormaps["viridis"](
        np.linspace(0.15, 0.9, max(1, len(several)))
    )
    for height, choice in zip(range(len(CHOICES))[::-1], CHOICES, strict=True):
        start = 0.0
        for side, share in shares.get(choice, {}).items():
            color = colors[several.index(side)] if choice.scales > 1 else "0.75"
            axes.barh(height, 100 * share, left=100 * start, color=color, height=0.6)
            start += share
    axes.legend(
        handles=[
            Patch(color=color, label=str(side))
            for side, color in zip(several, colors, strict=False)
        ],
        title="shorter side",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )
    axes.set_xlabel("windows at each scale in %\n(gray: there is one only)")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_detection(main, __doc__, add_options=add_options)
