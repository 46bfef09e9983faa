"""Tables 6 and 7: linear SVMs on features of crops, warped and full images.

    python -m experiments.svm_features --preset=digits

Networks stay as they were trained; their features are L2-normalised, and a linear SVM
is trained for each class (sections 3.2, 3.3): tested as Caltech101 is, on random
splits, and as VOC 2007 is, by mAP. Features are kept in the networks' folders.
"""

from collections import defaultdict
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.report import Cited, Claim, Row, differences, write_network_report
from experiments.runs import (
    PAPER_SIDE,
    NetworkRecipe,
    Setting,
    diverged,
    network_features,
    networks_of,
    settings_of,
)
from experiments.setting import run
from sppnet_jax.classification.svm import caltech_protocol, multi_label_protocol
from sppnet_jax.data.datasets import ImageData
from sppnet_jax.data.sources import available_splits, open_source
from sppnet_jax.training.layer_features import Features

NAME = "svm_features"
ACCURACY, MAP = "mean class accuracy", "mAP"
COLUMNS = (ACCURACY, MAP)
TRAIN_PER_CLASS, MAX_TEST_PER_CLASS, SPLITS = 30, 50, 10

NO_SPP = NetworkRecipe("zf5", levels=())
SPP = NetworkRecipe("zf5")
BEST = NetworkRecipe("overfeat7", training="multi")


class View(NamedTuple):
    """A layer of a network, and how it sees an image.

    `paper_side`: shorter side of whole images, for a network trained at 224.
    """

    network: NetworkRecipe
    layer: str
    mode: str
    paper_side: int | None = None

    @property
    def label(self) -> str:
        """Itself in the words of a table."""
        side = f" at {self.paper_side}/{PAPER_SIDE}" if self.paper_side else ""
        return f"{self.network.label}: {self.layer}, {self.mode}{side}"


# Caltech101 and VOC 2007.
PAPER: dict[View, dict[str, Cited]] = {
    View(NO_SPP, "fc7", "crop"): {MAP: Cited(0.7590)},
    View(SPP, "fc7", "crop"): {MAP: Cited(0.7645)},
    View(SPP, "fc7", "full", 224): {MAP: Cited(0.7839)},
    View(SPP, "fc7", "full", 392): {MAP: Cited(0.8010)},
    View(SPP, "conv5", "crop"): {},
    View(SPP, "pyramid", "crop"): {},
    View(SPP, "pyramid", "warp"): {ACCURACY: Cited(0.8991)},
    View(SPP, "pyramid", "full", 224): {ACCURACY: Cited(0.9144)},
    View(BEST, "pyramid", "full", 224): {ACCURACY: Cited(0.9342)},
    View(BEST, "fc7", "full", 364): {MAP: Cited(0.8244)},
}
# What the paper finds better, than what, and by which metrics.
COMPARISONS = {
    "SPP is better than no SPP (fc7, crops)": (
        View(SPP, "fc7", "crop"),
        View(NO_SPP, "fc7", "crop"),
        COLUMNS,
    ),
    "The full image is better than its crop (fc7)": (
        View(SPP, "fc7", "full", 224),
        View(SPP, "fc7", "crop"),
        COLUMNS,
    ),
    "The full image is better at 392/224 than at 224/224 (fc7)": (
        View(SPP, "fc7", "full", 392),
        View(SPP, "fc7", "full", 224),
        (MAP,),
    ),
    "The full image is better than the warped one (pyramid)": (
        View(SPP, "pyramid", "full", 224),
        View(SPP, "pyramid", "warp"),
        COLUMNS,
    ),
}


class Measured(NamedTuple):
    """A share of 1 by the rules of a metric, and on what it was measured."""

    share: float
    data: str
    splits_sd: float | None = None


Results = dict[tuple[View, str], dict[int, Measured]]  # by view and metric, by seed


def main(given: Setting) -> Path:
    results: Results = defaultdict(dict)
    data = settings_of(given, _networks()[0], 0).data
    name, split = given.preset.svm_classes
    multi_label = given.preset.svm_multi_label
    split = split or _unseen_splits(data)
    _check_classes(data, name, split)
    for network, seed, workdir in networks_of(given, _networks()):
        for view in PAPER:
            if view.network != network:
                continue
            results[view, ACCURACY][seed] = _accuracy(workdir, view, name, split)
            if multi_label:
                results[view, MAP][seed] = _precision(workdir, view, *multi_label)
        folder = _report(given, results)
    return folder


def _networks() -> tuple[NetworkRecipe, ...]:
    return tuple(dict.fromkeys(view.network for view in PAPER))


def _check_classes(data: ImageData, name: str, split: str) -> None:
    """Raises ValueError if a class has too few images to train on some, test on others.

    Before any network is trained.
    """
    source = open_source(
        name or data.name, split, root="" if name else data.root, data_dir=data.data_dir
    )
    labels = [source.records[index]["label"] for index in range(len(source.records))]
    counts = np.bincount(labels, minlength=len(source.class_names))
    if counts.min() < 2:
        raise ValueError(
            f"the class {source.class_names[counts.argmin()]!r} has {counts.min()} "
            f"images in split {split!r} of {source.name!r}: SVMs need at least 2 of "
            "each class, one to train on and one to test on"
        )


def _unseen_splits(data: ImageData) -> str:
    """All splits of a network's own data set but the one it was trained on."""
    splits = available_splits(data.name, root=data.root, data_dir=data.data_dir)
    return "+".join(split for split in splits if split != "train")


def _accuracy(workdir: Path, view: View, name: str, split: str) -> Measured:
    features = _features(workdir, view, name, split)
    train = min(TRAIN_PER_CLASS, int(np.bincount(features.labels).min()) // 2)
    found = caltech_protocol(
        features.values,
        features.labels,
        train_per_class=train,
        max_test_per_class=MAX_TEST_PER_CLASS,
        splits=SPLITS,
    )
    accuracy, tested = found["mean_class_accuracy"], found["test_per_class"]
    return Measured(
        accuracy["mean"],
        f"{SPLITS} random splits of {name or 'their own data set'}, split "
        f"{split}: {train} images of each of {found['num_classes']} classes to train "
        f"on, {_span(tested)} others to test on; the paper on Caltech101, "
        f"{TRAIN_PER_CLASS} and at most {MAX_TEST_PER_CLASS} of 102 classes",
        accuracy["sd"],
    )


def _precision(workdir: Path, view: View, name: str, train: str, test: str) -> Measured:
    seen = _features(workdir, view, name, train, multi_label=True)
    unseen = _features(workdir, view, name, test, multi_label=True)
    found = multi_label_protocol(seen.values, seen.labels, unseen.values, unseen.labels)
    return Measured(
        found["mean_average_precision"],
        f"{name}: {found['train_images']} images of split {train} to train on, "
        f"{found['test_images']} of {test} to test on; the paper on VOC 2007",
    )


def _features(
    workdir: Path, view: View, name: str, split: str, *, multi_label: bool = False
) -> Features:
    return network_features(
        workdir,
        view.layer,
        split,
        mode=view.mode,
        data=name,
        paper_side=view.paper_side,
        multi_label=multi_label,
    )


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _report(given: Setting, results: Results) -> Path:
    rows = [
        Row(
            view.label,
            {
                metric: [one.share for one in results[view, metric].values()]
                for metric in COLUMNS
            },
            paper,
        )
        for view, paper in PAPER.items()
    ]
    measured = {
        metric: [
            one
            for (_, own), seeds in results.items()
            if own == metric
            for one in seeds.values()
        ]
        for metric in COLUMNS
    }
    notes = [f"{name}: {found[0].data}." for name, found in measured.items() if found]
    spread = np.mean([one.splits_sd for one in measured[ACCURACY]])
    notes.append(
        f"Over the {SPLITS} splits of one network, {ACCURACY} has a standard deviation "
        f"of {100 * spread:.1f} points, the mean of all rows."
    )
    return write_network_report(
        given,
        NAME,
        title="Linear SVMs on features",
        columns=COLUMNS,
        rows=rows,
        claims=[
            Claim(
                f"{text}, by {metric}",
                differences(
                    results[better, metric],
                    results[worse, metric],
                    attrgetter("share"),
                ),
            )
            for text, (better, worse, metrics) in COMPARISONS.items()
            for metric in metrics
            if measured[metric]
        ],
        notes=[*notes, *diverged(given, _networks())],
    )


if __name__ == "__main__":
    run(main, __doc__)
