"""Features and the vectors that are pooled from them, drawn alike in every picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.run.figures import show_image

FEATURES_COLORS, SCORES_COLORS = "magma", "viridis"


def show_map(axes: Axes, values: np.ndarray, title: str, **style: Any) -> None:
    """Shows one number for each cell of a map [rows, columns]: a cell is a square."""
    given = {"cmap": FEATURES_COLORS, "interpolation": "nearest", **style}
    show_image(axes, values, title, **given)


def show_vector(
    axes: Axes, vector: np.ndarray, levels: Sequence[int], **style: Any
) -> None:
    """Shows a pyramid [bins, channels] as fc6 takes it, levels named at the left."""
    given = {"cmap": FEATURES_COLORS, "interpolation": "nearest", **style}
    axes.imshow(vector, aspect="auto", **given)
    ends = np.cumsum([0, *(level * level for level in levels)])
    for end in ends[1:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1)
    axes.set_yticks((ends[:-1] + ends[1:] - 1) / 2, [f"{n}×{n}" for n in levels])
    axes.tick_params(axis="y", length=0)


def centers(geometry: Geometry, count: int) -> np.ndarray:
    """Where units' receptive-field centres lie, counted as boxes are: float [count].

    A pixel's middle is half a pixel from its edges, where boxes begin.
    """
    return geometry.center + geometry.stride * np.arange(count) + 0.5


def check_features(features: Any) -> np.ndarray:
    """One map as float32 [rows, columns, channels]; ValueError if it is not one."""
    features = np.asarray(features, np.float32)
    if features.ndim != 3 or not features.size:
        raise ValueError(
            f"features must be one map [rows, columns, channels], got {features.shape}"
        )
    return features


def check_fits(features: np.ndarray, image: np.ndarray, geometry: Geometry) -> None:
    """Raises ValueError unless the map is that of the image as it is."""
    expected = tuple(geometry.map_size(side) for side in image.shape[:2])
    if features.shape[:2] != expected:
        raise ValueError(
            f"an image of {image.shape[0]}×{image.shape[1]} pixels has a map of "
            f"{expected[0]}×{expected[1]}, but the features are "
            f"{features.shape[0]}×{features.shape[1]}: give the image as the network "
            "saw it, resized"
        )
