"""Decoding, resizing and cropping of images.

Images are uint8 arrays [H, W, 3], RGB, values 0–255. Encoded images are bytes of any
format that OpenCV reads: JPEG, PNG, BMP, WebP, GIF (first frame), TIFF.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from sppnet_jax.data import encoded_images

CROPS = ("paper", "center", "random", "random_resized")
CENTER_AND_CORNERS = ("center", "top_left", "top_right", "bottom_left", "bottom_right")
POSITIONS = (*CENTER_AND_CORNERS, "top", "bottom", "left", "right")

# Longest side that `resize_shorter_side` makes: a needle of an image would fill memory.
_LONGEST_SIDE = 32_767
_MOST_IN_FLOAT = 1_000_000  # pixels

# What is kept of pixels is kept with this number: raise it where images are decoded or
# resized in another way.
READING = 3

Rectangle = tuple[int, int, int, int]  # top, left, height, width, in pixels


class Decoded(NamedTuple):
    """An image, or a part of one, at its own resolution or a smaller one.

    `pixels`: uint8 [h, w, 3]. `size`: the (height, width) of the whole image at its own
    resolution, after the EXIF orientation.
    """

    pixels: np.ndarray
    size: tuple[int, int]

    def in_whole(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [N, 4] of these pixels, if they are the whole image, in its own."""
        factors = np.tile(np.divide(self.size, self.pixels.shape[:2]), 2)
        return (boxes * factors).astype(boxes.dtype)


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes an image file of any colour type and bit depth to 8-bit RGB.

    Applies the EXIF orientation, spreads grayscale over the three channels, converts
    CMYK, palettes and 16-bit channels, and drops an alpha channel: what is transparent
    keeps its colours. Bytes after the end of a JPEG or PNG are ignored. A JPEG that has
    all its data but no end marker is read; the log counts and names it, and what the
    libraries say of others (see `EncodedImage`).

    Returns: uint8 [H, W, 3].
    Raises: ValueError if the bytes are no image, a truncated one, one of more than
    `max_pixels()`, or a TIFF of numbers that are no colours.
    """
    return decode_part(encoded, math.inf).pixels


def decode_part(
    encoded: bytes,
    least_side: float,
    choose: Callable[[int, int], Rectangle] | None = None,
) -> Decoded:
    """Decodes an image no larger than it is needed, and cuts a part out of it.

    A JPEG is decoded at 1/8, 1/4 or 1/2 where that leaves at least twice the resolution
    that is needed, so that what follows still averages over two pixels or more; the
    part's edges are rounded to these. All else is as in `decode_image`, and so are
    the pixels where nothing is reduced.

    `least_side`: that the part's shorter side will be shrunk to, in pixels.
    `choose`: from the whole image's (height, width) to the part; None: all of it.

    Raises: ValueError as `decode_image` does.
    """
    whole = encoded_images.check(encoded)
    size = None
    if encoded_images.is_jpeg(whole):
        # Most have too few pixels: their headers are not read any further.
        shorter = min(encoded_images.stated_size(whole))
        if _reduction(shorter, least_side) > 1:
            size = encoded_images.size_in_header(whole)
    pixels, by = None, 1
    if size is None:
        pixels = encoded_images.decode(whole)
        size = pixels.shape[0], pixels.shape[1]
    top, left, rows, columns = choose(*size) if choose else (0, 0, *size)
    if pixels is None:
        by = _reduction(min(rows, columns), least_side)
        pixels = encoded_images.decode(whole, by)
        above, before = encoded_images.beyond(whole, size, by)
        top, left = top + above, left + before
    edges = (top, left, top + rows, left + columns)
    top, left, bottom, right = ((2 * edge + by) // (2 * by) for edge in edges)
    return Decoded(pixels[top:bottom, left:right], size)


def decode_resized(
    encoded: bytes, side: int, max_aspect: float = math.inf
) -> np.ndarray:
    """The whole image as `resize_whole` resizes it, decoded no larger than it takes.

    Raises: ValueError as `decode_image` and `whole_size` do.
    """
    pixels, size = decode_part(encoded, side)
    return resize_whole(pixels, side, max_aspect, size)


def _reduction(side: int, least_side: float) -> int:
    """How many times smaller a JPEG is decoded: 1, 2, 4 or 8.

    `side`: the shorter one of what is needed. `least_side`: what it is shrunk to.
    """
    enough = (by for by in (8, 4, 2) if side >= 2 * by * max(least_side, 1))
    return next(enough, 1)


def image_size(encoded: bytes) -> tuple[int, int]:
    """The size of the image that `decode_image` would make, from the file's header.

    Only formats and rotations whose header doesn't decide it are decoded. A file that
    is whole but damaged inside has a size all the same.

    Returns: (height, width) in pixels, after the EXIF orientation.
    Raises: ValueError as `decode_image` does.
    """
    whole = encoded_images.check(encoded)
    size = encoded_images.size_in_header(whole)
    if size:
        return size
    height, width = encoded_images.decode(whole).shape[:2]
    return height, width


def resize_shorter_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes an image so that its shorter side is exactly `side`, keeping its aspect.

    The longer side is rounded to the nearest pixel, halves up. Shrinking averages
    areas, enlarging is bilinear.

    `side`: in pixels, at least 1.

    Returns: uint8 [H', W', 3] with min(H', W') = side.
    Raises: ValueError if the longer side would exceed 32,767 pixels.
    """
    return resize_whole(image, side, math.inf)


def resize_whole(
    image: np.ndarray,
    side: int,
    max_aspect: float,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Resizes an image so that its shorter side is `side`, its aspect bounded.

    As `resize_shorter_side`, but an image whose longer side is more than `max_aspect`
    times the shorter one is squeezed to that; its size is `whole_size`'s.

    `size`: the image's own (height, width) where it was decoded smaller.
    """
    height, width = size or image.shape[:2]
    return _resize(image, *whole_size(height, width, side, max_aspect))


def check_side(side: int) -> None:
    """Raises ValueError for a shorter side that images of 4:1 can't have, in pixels."""
    if not 1 <= side <= _LONGEST_SIDE // 4:
        raise ValueError(
            f"images at a shorter side of {side:,} pixels are not made: give 1 to "
            f"{_LONGEST_SIDE // 4:,}"
        )


def check_image(image: np.ndarray) -> None:
    """Raises ValueError for an array that is no image, uint8 [height, width, 3]."""
    shape = list(np.shape(image))
    if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[2] != 3:
        kind = getattr(image, "dtype", type(image).__name__)
        raise ValueError(
            f"image must be uint8 [height, width, 3], RGB, got {kind} {shape}"
        )
    if 0 in shape:
        raise ValueError(f"the image has no pixels: shape {shape}")


def warp(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes a whole image to a square, uint8 [side, side, 3], whatever its aspect."""
    return _resize(image, side, side)


def whole_size(
    height: int, width: int, side: int, max_aspect: float
) -> tuple[int, int]:
    """The (height, width) that `resize_whole` gives an image of this height and width.

    Raises: ValueError if the longer side would exceed 32,767 pixels.
    """
    shorter = min(height, width)
    if max(height, width) > max_aspect * shorter:
        longer = round(side * max_aspect)
        return (longer, side) if height > width else (side, longer)
    # Whole numbers only: halves must not depend on floating-point rounding.
    new_height, new_width = (
        (2 * length * side + shorter) // (2 * shorter) for length in (height, width)
    )
    if shorter != side and max(new_height, new_width) > _LONGEST_SIDE:
        raise ValueError(
            f"an image of {height}×{width} pixels (height×width) is too narrow: with "
            f"its shorter side at {side} it would be {new_height}×{new_width}"
        )
    return new_height, new_width


def crop(image: np.ndarray, size: int, position: str) -> np.ndarray:
    """Cuts a square out of the centre, a corner or a side's middle of the entire image.

    `image`: [H, W, ...]. `size`: the square's side, at most min(H, W).
    `position`: one of `POSITIONS`; a middle is rounded towards the top left.

    Returns: [size, size, ...], a view of the image.
    Raises: ValueError for an unknown position, or an image smaller than the crop.
    """
    top, left = crop_corner(*_room(image, size), position)
    return image[top : top + size, left : left + size]


def crop_corner(rows: Any, columns: Any, position: str) -> tuple[Any, Any]:
    """Where a crop begins, (top, left), that has some room in the image to move.

    `rows`, `columns`: the image's size less the crop's; ints, or arrays of ints.

    Raises: ValueError for an unknown position.
    """
    if position not in POSITIONS:
        raise ValueError(f"unknown position {position!r}; there are {POSITIONS}")
    top, left = rows // 2, columns // 2
    if position.startswith(("top", "bottom")):
        top = rows if position.startswith("bottom") else rows * 0
    if position.endswith(("left", "right")):
        left = columns if position.endswith("right") else columns * 0
    return top, left


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """As `crop`, at a uniformly random place."""
    rows, columns = _room(image, size)
    top, left = rng.integers(rows + 1), rng.integers(columns + 1)
    return image[top : top + size, left : left + size]


def mirror(image: np.ndarray) -> np.ndarray:
    """Mirrors an image, left for right: uint8 [H, W, 3], contiguous."""
    return cv2.flip(image, 1)  # NumPy copies a reversed axis byte by byte


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.35, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Cuts out a random rectangle and resizes it to a square, uint8 [size, size, 3].

    `area`, `aspect`: see `random_rectangle`.
    """
    rows, columns = image.shape[:2]
    top, left, height, width = random_rectangle(rows, columns, rng, area, aspect)
    return warp(image[top : top + height, left : left + width], size)


def random_rectangle(
    height: int,
    width: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.35, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Rectangle:
    """A random rectangle of an image of this height and width.

    `area`: range of the rectangle's area, relative to the image's; uniform.
    `aspect`: range of its width/height; log-uniform.
    """
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
        rows, columns = round(np.sqrt(pixels / ratio)), round(np.sqrt(pixels * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = int(rng.integers(height - rows + 1))
            left = int(rng.integers(width - columns + 1))
            return top, left, rows, columns
    # A very long image has no such rectangle.
    side = min(height, width)
    return (*crop_corner(height - side, width - side, "center"), side, side)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    rows, columns = image.shape[:2]
    if height * width >= rows * columns:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    if not _averages_in_float(rows, columns, height, width):
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    # OpenCV averages bytes by converting each anew for every use, in the same order.
    precise = image.astype(np.float32)
    averaged = cv2.resize(precise, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.convertScaleAbs(averaged)  # rounds; all are within 0 to 255


def _averages_in_float(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether OpenCV averages areas of bytes in float32, and they are few enough."""
    # Whole factors have integer arithmetic of their own; where one side grows, it
    # interpolates. Large images would take four times their memory.
    shrinks = height <= rows and width <= columns
    whole = rows % height == 0 and columns % width == 0
    return shrinks and not whole and rows * columns <= _MOST_IN_FLOAT


def _room(image: np.ndarray, size: int) -> tuple[int, int]:
    rows, columns = image.shape[0] - size, image.shape[1] - size
    if min(rows, columns) < 0:
        raise ValueError(
            f"a crop of {size}×{size} does not fit into an image of shape "
            f"{image.shape}; resize the shorter side to at least {size} first"
        )
    return rows, columns
