"""What annotations of every format say of an image: its objects, fitted into it.

Boxes become half-open and 0-based, (ymin, xmin, ymax, xmax) in pixels, and lie in the
image as `decode_image` shows it. `EVENTS` says what annotations from the wild may hold
and what becomes of it, and is counted in the notes that are logged; each format adds
events of its own.
"""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image

from sppnet_jax.data.encoded_images import ORIENTATION

# What may happen to a box or a file, as the notes say it.
EVENTS = {
    "crossing": "boxes reached past the image's border: clamped",
    "touching": (
        "boxes reached past the image's border by at most a pixel, as rounded ones "
        "do: clamped"
    ),
    "outside": "boxes lay wholly outside the image: dropped",
    "empty": "boxes had xmin = xmax or ymin = ymax, a line or a point: dropped",
    "swapped": "boxes had xmin > xmax or ymin > ymax: put right",
    "shares": (
        "boxes lay between 0 and 1, as shares of the image's sides do and no pixels: "
        "dropped"
    ),
    "no number": "boxes lacked a coordinate, or it was no finite number: dropped",
    "no name": "objects had no name: dropped",
    "no difficult": (
        "objects did not say, or not clearly, whether they are difficult: taken as not "
        "difficult"
    ),
    "scaled": (
        "annotations gave a size of the image's aspect but of another scale: their "
        "boxes were scaled to the image"
    ),
    "turned": (
        "annotations gave the image's size before its EXIF rotation: their boxes were "
        "turned with it"
    ),
    "transposed": (
        "annotations gave the image's width as its height and the reverse: their boxes "
        "were kept as they are"
    ),
    "other size": (
        "annotations gave a size that isn't the image's: their boxes were kept as they "
        "are"
    ),
    "no object": "images have no object left: kept, all of it background",
    "broken image": "images could not be opened: left out",
}

# Sizes so close are roundings of one another, and no other scale.
_SAME_SIZE_PIXELS = 2
_SAME_ASPECT = 0.01

# How a box as annotated becomes one in the image as it is shown.
Change = Callable[[np.ndarray], np.ndarray]


class AnnotatedObject(NamedTuple):
    """One object of an image."""

    name: str  # of its class
    box: tuple[float, float, float, float]  # half-open, 0-based pixels, in the image
    pose: str = "unspecified"  # one of `voc_annotations.POSES`
    is_truncated: bool = False
    is_difficult: bool = False


class AnnotatedImage(NamedTuple):
    """What is known of an image."""

    size: tuple[int, int]  # (height, width) in pixels
    objects: tuple[AnnotatedObject, ...]


def fit_box(
    sides: Sequence[float | None],
    size: tuple[int, int],
    events: list[str],
    change: Change | None = None,
    origin: int = 0,
    in_pixels: bool = True,
) -> tuple[float, float, float, float] | None:
    """A box as it was annotated, put right and clamped to its image.

    `sides`: ymin, xmin, ymax, xmax, however they are; None for one that is no number.
    `size`: of the image, (height, width). `events`: what happened is added to them.
    `change`: see `change_of_size`. `origin`: the number of the first pixel; where it is
    1, as in VOC, the last pixel is part of the box. `in_pixels`: whether the file has
    pixels, so that a box between 0 and 1 (and a hundredth) can't be meant.

    Returns: the box, or None if it is dropped.
    """
    given = np.array(sides, float)
    first, last = np.minimum(given[:2], given[2:]), np.maximum(given[:2], given[2:])
    with np.errstate(over="ignore", invalid="ignore"):
        box = np.concatenate([first - origin, last])
        box = change(box) if change else box
        clamped = clamp_boxes(box, size)
        over = np.abs(box - clamped).max()
    dropped = (
        (not np.isfinite(given).all(), "no number"),
        ((first == last).any(), "empty"),
        (in_pixels and np.abs(given - 0.5).max() <= 0.51 and min(size) > 1, "shares"),
        (not (clamped[:2] < clamped[2:]).all(), "outside"),
    )
    for happened, event in dropped:
        if happened:
            events.append(event)
            return None
    if (first != given[:2]).any():
        events.append("swapped")
    if over > 0:
        # Turning and scaling may leave rounding errors.
        events.append("touching" if over <= 1 + 1e-6 else "crossing")
    ymin, xmin, ymax, xmax = clamped.tolist()
    return ymin, xmin, ymax, xmax


def clamp_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes [N, 4] cut off at the border of an image (height, width): empty outside."""
    return np.clip(boxes, 0, [*size, *size])


def change_of_size(
    told: tuple[float | None, float | None], size: tuple[int, int], encoded: bytes
) -> tuple[Change | None, str]:
    """What the size that an annotation tells says on its boxes.

    `told`: (height, width), None for what is no number. `size`, `encoded`: the image's.

    Returns: how its boxes change, None for not at all; and the event that it is, or "".
    """
    (height, width), (rows, columns) = size, told
    if not (rows and columns and 0 < rows < np.inf and 0 < columns < np.inf):
        return None, ""
    given = (rows, columns)
    if given == size:
        return None, ""
    if given == (width, height):
        orientation = _orientation(encoded)
        if orientation in (5, 6, 7, 8):
            return lambda box: _turn(box, orientation, given), "turned"
        return None, "transposed"
    scale = (height / rows, width / columns)
    close = max(abs(height - rows), abs(width - columns)) <= _SAME_SIZE_PIXELS
    if not close and abs(scale[0] / (scale[1] or np.inf) - 1) <= _SAME_ASPECT:
        return lambda box: box * [*scale, *scale], "scaled"
    return None, "other size"


def number(value: object) -> float | None:
    """A number as it stands in a file, also as text; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and "_" in value:  # of Python's own numbers
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def truth(value: object) -> bool | None:
    """Whether a file says yes, in one of many words; None for no clear answer."""
    word = str(value).strip().lower()
    true = word in ("1", "1.0", "true", "yes")
    false = word in ("0", "0.0", "false", "no")
    return true if true or false else None


def _turn(box: np.ndarray, orientation: int, frame: tuple[float, float]) -> np.ndarray:
    """A box in a frame (height, width) that EXIF's orientation 5 to 8 turns."""
    height, width = frame
    ymin, xmin, ymax, xmax = box
    # All exchange the axes, and mirror none, one or both of them.
    if orientation in (6, 7):
        ymin, ymax = height - ymax, height - ymin
    if orientation in (7, 8):
        xmin, xmax = width - xmax, width - xmin
    return np.array([xmin, ymin, xmax, ymax])


def _orientation(encoded: bytes) -> int:
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        # Pillow raises errors of many types for odd files; it is no reason to fail.
        return 1
