"""Images with what a network says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sppnet_jax.run.figures import panels, save_figure, shortened, show_image, some_of

RIGHT, WRONG = "#2a7f3f", "#c0392b"
_TITLE = 20  # letters of a class


class Prediction(NamedTuple):
    """An image [h, w, 3], its best class and probability, its true class if known."""

    image: np.ndarray
    predicted: str
    probability: float
    label: str | None


def plot_predictions(predictions: Sequence[Prediction], path: Path) -> Path:
    """Draws images in a grid, each at its aspect ratio, under its predicted class.

    The first 64, see `some_of`.
    """
    predictions = some_of(predictions, "images")
    columns = min(8, len(predictions))
    figure, grid = panels(
        len(predictions), columns, 1.0, width=1.6 * columns, title=0.45
    )
    for axes, shown in zip(grid, predictions, strict=True):
        name = shortened(shown.predicted, _TITLE)
        title, color = f"{name} {shown.probability:.0%}", "black"
        if shown.label is not None:
            right = shown.label == shown.predicted
            color = RIGHT if right else WRONG
            title += "" if right else f"\nnot {shortened(shown.label, _TITLE)}"
        show_image(axes, shown.image, title)
        axes.axis("off")
        axes.title.set_color(color)
    return save_figure(figure, path)
