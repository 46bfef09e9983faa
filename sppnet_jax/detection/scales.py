"""Which scale of an image a box is pooled at, and where it lies on the maps.

An image is convolved at one or several scales, its shorter side at so many pixels. Each
box goes to the one scale at which its area comes closest to that of the images that the
network was trained on (section 4.1 of the paper). The maps of all scales of an image
are stacked into one, an atlas, so that one call pools all boxes whatever their scales:

    atlas = stack_maps(maps, atlas_size(map_sizes))
    windows = boxes_to_atlas(boxes, image_size, sizes, geometry, area=224**2)
    distinct, which = share_windows(windows)
    window_pyramid_pool(atlas, distinct, levels)[which]
"""

from collections.abc import Sequence

import numpy as np

from sppnet_jax.pyramid.geometry import Geometry, boxes_to_windows

Size = tuple[int, int]


def scale_factors(image_size: Size, sizes: Sequence[Size]) -> np.ndarray:
    """Pixels of each resized image for one of the original: float64 [scales, 2].

    Those of rows and of columns differ by rounding, and where a long image was
    squeezed. `image_size`: (height, width) of the image. `sizes`: at each scale.
    """
    return np.asarray(sizes, np.float64).reshape(-1, 2) / np.asarray(image_size, float)


def choose_scales(boxes: np.ndarray, factors: np.ndarray, area: float) -> np.ndarray:
    """The scale at which each box's area comes closest to an area (section 4.1).

    `boxes`: float [N, 4] in pixels of the image. `factors`: see `scale_factors`.
    `area`: in pixels, 224² in the paper. Of two scales equally close, the first.

    Returns: int64 [N].
    """
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    areas = sides.prod(axis=1)[:, None] * factors.prod(axis=1)
    return np.abs(areas - area).argmin(axis=1)


def boxes_to_atlas(
    boxes: np.ndarray,
    image_size: Size,
    sizes: Sequence[Size],
    geometry: Geometry,
    *,
    area: float,
    rule: str = "paper",
) -> np.ndarray:
    """The window of each box on the atlas of an image's maps.

    `boxes`: float [N, 4], (ymin, xmin, ymax, xmax) in pixels of the image.
    `image_size`: its (height, width). `sizes`: of the image at each scale.
    `area`: see `choose_scales`. `rule`: see `boxes_to_windows`.

    Returns: int32 [N, 4], half-open cells, each within the map of its scale.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    factors = scale_factors(image_size, sizes)
    scales = choose_scales(boxes, factors, area)
    windows = np.zeros((len(boxes), 4), np.int32)
    top = 0
    for scale, size in enumerate(sizes):
        mine = scales == scale
        map_size = map_size_of(size, geometry)
        scaled = boxes[mine] * np.tile(factors[scale], 2)
        found = boxes_to_windows(scaled, geometry, map_size, rule=rule)
        windows[mine] = found + np.array([top, 0, top, 0], np.int32)
        top += map_size[0]
    return windows


def share_windows(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the same cells once each, and which of them each window is.

    `windows`: int [N, 4].

    Returns: int32 [M, 4] and int64 [N], with distinct[which] equal to `windows`.
    """
    windows = np.asarray(windows, np.int32).reshape(-1, 4)
    distinct, which = np.unique(windows, axis=0, return_inverse=True)
    return distinct, which.reshape(-1)


def map_size_of(size: Size, geometry: Geometry) -> Size:
    """The (rows, columns) of the map of an image of (height, width)."""
    return geometry.map_size(int(size[0])), geometry.map_size(int(size[1]))


def atlas_size(map_sizes: Sequence[Size]) -> Size:
    """The (rows, columns) that hold maps stacked on top of each other."""
    return sum(rows for rows, _ in map_sizes), max(columns for _, columns in map_sizes)


def stack_maps(maps: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """Maps [rows, columns, channels] stacked from the top left of zeros of a size."""
    atlas = np.zeros((*size, maps[0].shape[2]), np.float32)
    top = 0
    for one in maps:
        atlas[top : top + one.shape[0], : one.shape[1]] = one
        top += one.shape[0]
    return atlas
