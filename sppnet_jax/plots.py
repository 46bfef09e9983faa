"""The pictures of a run: its curves, and images with what the network says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sppnet_jax.metrics import read_metrics

RIGHT, WRONG = "#2a7f3f", "#c0392b"


class Prediction(NamedTuple):
    """An image [h, w, 3], its best class and probability, its true class if known."""

    image: np.ndarray
    predicted: str
    probability: float
    label: str | None


class Sample:
    """Keeps `size` evenly spaced images of a split, to show to a person."""

    def __init__(self, records: int, size: int) -> None:
        spaced = np.linspace(0, records - 1, min(size, records))
        self._wanted = {int(index) for index in spaced}
        self._kept: dict[int, np.ndarray] = {}

    def add(self, index: int, image: np.ndarray) -> None:
        """Takes the image of a record if it is wanted and new."""
        if index in self._wanted:
            self._kept.setdefault(index, np.array(image))

    def images(self) -> list[tuple[int, np.ndarray]]:
        """(index, image) of the kept ones, in the order of the records."""
        return sorted(self._kept.items(), key=lambda kept: kept[0])


def plot_training(workdir: Path) -> Path:
    """Draws loss and accuracy over epochs from metrics.jsonl; returns training.png."""
    rows = read_metrics(workdir)
    steps = [row for row in rows if row["split"] == "train"]
    epochs = [row for row in rows if row["split"] == "train_epoch"]
    tests = [row for row in rows if row["split"] == "validation"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    _line(left, steps, "loss", color="0.8", label="training, one batch")
    _line(left, epochs, "loss", color="C0", label="training, epoch mean")
    _line(left, tests, "loss", color="C1", label="validation")
    left.set(xlabel="epoch", ylabel="loss (cross entropy)", ylim=(0, None))
    _line(right, epochs, "accuracy", color="C0", label="training (augmented)")
    _line(right, tests, "top1", color="C1", label="validation, centre crop")
    right.set(xlabel="epoch", ylabel="top-1 accuracy", ylim=(0, 1))
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return save_figure(figure, workdir / "training.png")


def plot_predictions(predictions: Sequence[Prediction], path: Path) -> Path:
    """Draws images in a grid, each at its aspect ratio, under its predicted class."""
    columns = min(8, len(predictions))
    lines = -(-len(predictions) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(1.6 * columns, 1.9 * lines),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, shown in zip(grid.flat, predictions, strict=False):
        axes.imshow(shown.image)
        title, color = f"{shown.predicted} {shown.probability:.0%}", "black"
        if shown.label is not None:
            right = shown.label == shown.predicted
            color = RIGHT if right else WRONG
            title += "" if right else f"\nnot {shown.label}"
        axes.set_title(title, color=color, fontsize=9, parse_math=False)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure and closes it; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _line(axes: Axes, rows: list[dict], name: str, **style: Any) -> None:
    if rows:
        axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], **style)
