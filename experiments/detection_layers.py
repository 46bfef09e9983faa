"""Table 9: which layer, with fine-tuning and box regression or without?

    python -m experiments.detection_layers --preset=digits
    python -m experiments.detection_layers --preset=folder --root=FOLDER \\
        --network=WORKDIR --scales 1 5 --rcnn

Trains a detector for each row, with one scale and with five, on the same network and
proposals, and tests it. Fine-tuning is done once a column; see runs.py.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from experiments.report import (
    TEXT,
    Cited,
    Claim,
    Column,
    Row,
    differences,
    plot_shares,
    write_report,
)
from experiments.runs import DetectionSetting, DetectorRecipe, detector_test
from experiments.setting import paper_scales, run_detection

NAME = "detection_layers"
ONE, FIVE, RCNN = "SPP, 1 scale", "SPP, 5 scales", "R-CNN"
TITLE = "Detection by layer, mAP (11 points)"


class Kind(NamedTuple):
    """A row: what scores the windows."""

    label: str
    layer: str
    finetuned: bool
    regression: bool


POOL5 = Kind("pool5", "pyramid", False, False)
FC6 = Kind("fc6", "fc6", False, False)
FC6_TUNED = Kind("fc6, fine-tuned", "fc6", True, False)
FC7_TUNED = Kind("fc7, fine-tuned", "fc7", True, False)
FC7_BOXES = Kind("fc7, fine-tuned, box regression", "fc7", True, True)

# VOC 2007; R-CNN with AlexNet.
PAPER: dict[Kind, dict[str, Cited]] = {
    POOL5: {ONE: Cited(0.430), FIVE: Cited(0.449, TEXT), RCNN: Cited(0.442, TEXT)},
    FC6: {ONE: Cited(0.425), FIVE: Cited(0.448), RCNN: Cited(0.462)},
    FC6_TUNED: {ONE: Cited(0.523), FIVE: Cited(0.537), RCNN: Cited(0.531)},
    FC7_TUNED: {ONE: Cited(0.545), FIVE: Cited(0.552, TEXT), RCNN: Cited(0.542)},
    FC7_BOXES: {
        ONE: Cited(0.580, TEXT),
        FIVE: Cited(0.592, TEXT),
        RCNN: Cited(0.585, TEXT),
    },
}
# What the paper finds better, than what.
COMPARISONS = {
    "Fine-tuning helps (fc6)": (FC6_TUNED, FC6),
    "fc7 is better than fc6 (fine-tuned)": (FC7_TUNED, FC6_TUNED),
    "Box regression helps (fc7, fine-tuned)": (FC7_BOXES, FC7_TUNED),
}

Precisions = dict[tuple[Kind, str], dict[int, float]]  # by row and column, by seed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scales", type=int, nargs="+", choices=(1, 5), default=[1, 5])
    parser.add_argument("--rcnn", action="store_true", help="R-CNN's column too")


def main(given: DetectionSetting, options: argparse.Namespace) -> Path:
    columns = {
        name: DetectorRecipe(paper_scales(given, count))
        for name, count in ((ONE, 1), (FIVE, 5))
        if count in options.scales
    }
    if options.rcnn:
        columns[RCNN] = DetectorRecipe(system="rcnn")
    precisions: Precisions = defaultdict(dict)
    for seed in given.seeds:
        for column, detector in columns.items():
            for kind in PAPER:
                own = detector._replace(
                    layer=kind.layer,
                    finetuned=kind.finetuned,
                    regression=kind.regression,
                )
                report = detector_test(given, own, seed)
                precisions[kind, column][seed] = report["map_11_point"]
                folder = _report(given, list(columns), precisions, report)
    return folder


def _report(
    given: DetectionSetting,
    names: list[str],
    precisions: Precisions,
    report: dict[str, object],
) -> Path:
    columns = [Column(name) for name in names]
    rows = [
        Row(
            kind.label,
            {n: list(precisions.get((kind, n), {}).values()) for n in names},
            {name: figure for name, figure in paper.items() if name in names},
        )
        for kind, paper in PAPER.items()
    ]
    claims = [
        Claim(text, _gains(precisions, names, better, worse))
        for text, (better, worse) in COMPARISONS.items()
    ]
    notes = [
        "Pairs are detectors that differ in one thing, at one seed and in one column; "
        "all share the network and the test images.",
        f"Tested on {report['images']} images of {report['data']}, split "
        f"{report['split']}.",
        "R-CNN's figures of the paper are AlexNet's; on the ZF-5 of its SPP-nets it "
        "has 55.1 without and 59.2 with box regression (text).",
    ]
    folder = write_report(
        given,
        NAME,
        title=TITLE,
        columns=columns,
        rows=rows,
        claims=claims,
        notes=notes,
    )
    plot_shares(folder, TITLE, {"mAP": names}, rows)
    return folder


def _gains(
    precisions: Precisions, names: list[str], better: Kind, worse: Kind
) -> list[float]:
    """How much higher one row is, for each column and seed that has both."""
    return [
        gain
        for name in names
        for gain in differences(
            precisions[better, name], precisions[worse, name], float
        )
    ]


if __name__ == "__main__":
    run_detection(main, __doc__, add_options=add_options)
