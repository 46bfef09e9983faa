"""Images with what a network says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sppnet_jax.run.figures import save_figure

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
