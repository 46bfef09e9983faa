"""R-CNN's way to look at windows: each is cut out of the image and warped to a square.

The box keeps some of its surroundings: warped to `side` pixels, the box itself fills
the square but for a frame of `context` pixels (Girshick et al. 2014, appendix A, "warp
with context"; 16 of 227 there). Where the frame leaves the image it shows the mean
colour, which is zero once the mean is subtracted.

Positions are those of pixel areas: a square's pixel i covers [i, i + 1), as a box's
edges do in the image. Enlarging is bilinear; shrinking weighs all pixels by a triangle
as wide as two pixels of the square, so that nothing aliases. Both are Pillow's resize,
which takes boxes with fractions and leaves other threads free to run.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image

from sppnet_jax.data.images import check_image

# Edges are rounded to this part of a pixel, which Pillow's float32 holds exactly, so
# that a window depends on its own box alone.
GRID = 1 / 256


def warp_windows(
    image: np.ndarray,
    boxes: np.ndarray,
    side: int,
    *,
    context: int = 16,
    fill: float | Sequence[float] | np.ndarray = 128,
    threads: int | None = None,
) -> np.ndarray:
    """Warps windows of one image, with their surroundings, to squares of one size.

    `image`: uint8 [h, w, 3].
    `boxes`: float [N, 4], half-open (ymin, xmin, ymax, xmax) in pixels. They may leave
    the image by up to its own size on each side.
    `side`: of the squares, in pixels. `context`: how many of them frame the box on each
    side, below side / 2. For R-CNN's framing at any side: round(16 · side / 227).
    `fill`: the colour outside the image, 0 to 255, one number or three; rounded.
    `threads`: how many to use; None for one a core.

    Returns: uint8 [N, side, side, 3].
    Raises: ValueError for boxes that are empty, not finite or far outside the image,
    and for arguments that do not fit.
    """
    boxes = np.asarray(boxes, np.float64)
    color = _check(image, boxes, side, context, fill)
    warped = np.empty((len(boxes), side, side, 3), np.uint8)
    if not len(boxes):
        return warped
    frame = (boxes[:, 2:] - boxes[:, :2]) * (context / (side - 2 * context))
    start = np.round((boxes[:, :2] - frame) / GRID) * GRID
    stop = np.round((boxes[:, 2:] + frame) / GRID) * GRID
    padded, origin = _pad(image, start, stop, side, color)
    corners = np.concatenate([start, stop], axis=1)
    # Pillow wants (left, top, right, bottom), from the corner of the padded image.
    areas = (corners - np.tile(origin, 2))[:, [1, 0, 3, 2]]

    def warp(number: int) -> None:
        resized = padded.resize(
            (side, side), PIL.Image.Resampling.BILINEAR, box=tuple(areas[number])
        )
        warped[number] = np.asarray(resized)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for _ in pool.map(warp, range(len(boxes))):
            pass
    return warped


def _pad(
    image: np.ndarray, start: np.ndarray, stop: np.ndarray, side: int, color: np.ndarray
) -> tuple[PIL.Image.Image, np.ndarray]:
    """The image with colour around it, and the (y, x) where the result begins.

    It holds every pixel with a weight in any window [start, stop): beyond its edge,
    half of the triangle's width less half a pixel of the square.
    """
    reach = np.maximum((stop - start) / side, 1)
    start = np.floor((start - reach).min(axis=0)).astype(int)
    stop = np.ceil((stop + reach).max(axis=0)).astype(int)
    size = np.array(image.shape[:2])
    before, after = np.maximum(-start, 0), np.maximum(stop - size, 0)
    padded = np.empty((*(before + size + after), 3), np.uint8)
    padded[:] = color
    top, left = before
    padded[top : top + size[0], left : left + size[1]] = image
    return PIL.Image.fromarray(padded), -before


def _check(
    image: np.ndarray,
    boxes: np.ndarray,
    side: int,
    context: int,
    fill: float | Sequence[float] | np.ndarray,
) -> np.ndarray:
    """Checks the arguments of `warp_windows`; returns the colour, uint8 [3]."""
    check_image(image)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            "boxes must be float [N, 4], (ymin, xmin, ymax, xmax) in pixels, got shape "
            f"{boxes.shape}"
        )
    if not 0 <= 2 * context < side:
        raise ValueError(
            f"a context of {context} pixels on each side leaves nothing of {side} for "
            "the box: it must be at least 0 and below side / 2"
        )
    size = np.array(image.shape[:2] * 2)
    pixels = "×".join(map(str, image.shape[:2]))
    faults = {
        "is not finite": ~np.isfinite(boxes).all(axis=1),
        "is empty": ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1),
        f"is far outside the image of {pixels} pixels; clip boxes to it first": (
            (boxes < -size) | (boxes > 2 * size)
        ).any(axis=1),
    }
    for fault, bad in faults.items():
        if bad.any():
            first = int(bad.argmax())
            raise ValueError(f"box {first} {fault}: {boxes[first].tolist()}")
    color = np.asarray(fill, np.float64)
    if color.shape not in ((), (3,)) or not ((color >= 0) & (color <= 255)).all():
        raise ValueError(
            f"fill must be one number from 0 to 255, or three, got {fill!r}"
        )
    return np.broadcast_to(np.round(color).astype(np.uint8), 3)
