"""Tables 6 and 7: linear SVMs on features of crops, warped and full images.

    python -m experiments.svm_features --preset=digits

Networks stay as they were trained; their features are L2-normalised, and a linear SVM
is trained for each class (sections 3.2, 3.3): tested as Caltech101 is, on random
splits, and as VOC 2007 is, by mAP. Features are kept in the networks' folders.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import setting
from experiments.presets import SVM_DATA, Network, network_config
from experiments.report import Claim, Row, write_report
from experiments.runs import diverged, networks_of
from sppnet_jax import from_config, saved_config
from sppnet_jax.classification.layer_features import (
    Features,
    default_side,
    load_features,
)
from sppnet_jax.classification.svm import caltech_protocol, multi_label_protocol
from sppnet_jax.data.sources import available_splits, open_source
from sppnet_jax.features import features_from_config, file_name

NAME = "svm_features"
ACCURACY, MAP = "mean class accuracy", "mAP"
COLUMNS = (ACCURACY, MAP)
TRAIN_PER_CLASS, MAX_TEST_PER_CLASS, SPLITS = 30, 50, 10

NO_SPP = Network("zf5", levels=())
SPP = Network("zf5")
BEST = Network("overfeat7", training="multi")


class View(NamedTuple):
    """A layer of a network, and how it sees an image.

    `paper_side`: shorter side of whole images, for a network trained at 224.
    """

    network: Network
    layer: str
    mode: str
    paper_side: int | None = None

    @property
    def label(self) -> str:
        """Itself in the words of a table."""
        side = f" at {self.paper_side}/224" if self.paper_side else ""
        return f"{self.network.label}: {self.layer}, {self.mode}{side}"


# Caltech101 and VOC 2007.
PAPER: dict[View, dict[str, float]] = {
    View(NO_SPP, "fc7", "crop"): {MAP: 0.7590},
    View(SPP, "fc7", "crop"): {MAP: 0.7645},
    View(SPP, "fc7", "full", 224): {MAP: 0.7839},
    View(SPP, "fc7", "full", 392): {MAP: 0.8010},
    View(SPP, "conv5", "crop"): {},
    View(SPP, "pyramid", "crop"): {},
    View(SPP, "pyramid", "warp"): {ACCURACY: 0.8991},
    View(SPP, "pyramid", "full", 224): {ACCURACY: 0.9144},
    View(BEST, "pyramid", "full", 224): {ACCURACY: 0.9342},
    View(BEST, "fc7", "full", 364): {MAP: 0.8244},
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


def main(given: setting.Setting) -> None:
    data = SVM_DATA[given.preset_name]
    results: Results = defaultdict(dict)
    config = network_config(
        given.preset, _networks()[0], 0, root=given.root, data_dir=given.data_dir
    ).data
    name, split = data.classes
    split = split or _unseen_splits(config)
    _check_classes(config, name, split)
    for network, seed, workdir in networks_of(given, _networks()):
        for view in PAPER:
            if view.network != network:
                continue
            results[view, ACCURACY][seed] = _accuracy(workdir, view, name, split)
            if data.multi_label:
                results[view, MAP][seed] = _precision(workdir, view, *data.multi_label)
        folder = _report(given, results)
    print(f"\n{(folder / 'table.md').read_text()}\nin {folder}: table.md, plot.png")


def _networks() -> tuple[Network, ...]:
    return tuple(dict.fromkeys(view.network for view in PAPER))


def _check_classes(data: ConfigDict, name: str, split: str) -> None:
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


def _unseen_splits(data: ConfigDict) -> str:
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
    """A view's features by one network: extracted, or from the file of before."""
    config = saved_config.get_config(str(workdir))
    if name:
        config.data.name, config.data.root = name, ""
    size = config.data.image_size
    side = default_side(view.mode, image_size=size, resize_side=config.data.resize_side)
    if view.paper_side:
        side = round(size * view.paper_side / 224)
    path = workdir / file_name(config, split, view.layer, view.mode, side)
    if path.exists():
        features, provenance = load_features(path)
        wanted = {
            "checkpoint_step": from_config.checkpoint_step(workdir),
            "data": config.data.name,
            "root": config.data.root,
        }
        if all(provenance[key] == value for key, value in wanted.items()):
            return features
    features_from_config(
        config,
        workdir,
        layer=view.layer,
        split=split,
        mode=view.mode,
        side=side,
        multi_label=multi_label,
        output=path,
    )
    jax.clear_caches()  # dozens of programs in one process
    return load_features(path)[0]


def _span(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def _report(given: setting.Setting, results: Results) -> Path:
    rows = [
        Row(
            view.label,
            {
                metric: [one.share for one in results[view, metric].values()]
                for metric in COLUMNS
                if (view, metric) in results
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
    return write_report(
        given,
        NAME,
        title="Linear SVMs on features",
        columns=COLUMNS,
        rows=rows,
        claims=[
            Claim(f"{text}, by {metric}", _gains(results, metric, better, worse))
            for text, (better, worse, metrics) in COMPARISONS.items()
            for metric in metrics
            if measured[metric]
        ],
        notes=[*notes, *diverged(given, _networks())],
    )


def _gains(results: Results, metric: str, better: View, worse: View) -> list[float]:
    """How much higher the metric is, for each seed that has both."""
    highs, lows = results.get((better, metric), {}), results.get((worse, metric), {})
    return [highs[seed].share - lows[seed].share for seed in highs if seed in lows]


if __name__ == "__main__":
    setting.run(main, __doc__)
