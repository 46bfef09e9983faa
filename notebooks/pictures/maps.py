"""Images and their features on axes, drawn alike in every picture."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sppnet_jax.pyramid.geometry import Geometry

FEATURES_COLORS = "magma"


def show_image(axes: Axes, picture: np.ndarray, title: str, **style: Any) -> None:
    """Shows an image [height, width, …]; pixel k goes from k to k + 1, as boxes count.

    `style`: of matplotlib's `imshow`.
    """
    height, width = picture.shape[:2]
    extent = (0.0, float(width), float(height), 0.0)
    axes.imshow(picture, extent=extent, interpolation="nearest", **style)
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.set_title(title, fontsize=9)


def show_map(axes: Axes, values: np.ndarray, title: str, **style: Any) -> None:
    """Shows one number for each cell of a map [rows, columns]: a cell is a square."""
    show_image(axes, values, title, **{"cmap": FEATURES_COLORS, **style})


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
