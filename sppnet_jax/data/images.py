"""Decoding, resizing and cropping of images.

Images are uint8 arrays [H, W, 3], RGB, values 0–255. Encoded images are bytes of any
format that OpenCV reads: JPEG, PNG, BMP, WebP, GIF (first frame), TIFF.
"""

import math
from typing import Any

import cv2
import numpy as np

from sppnet_jax.data import encoded_images

CROPS = ("paper", "center", "random", "random_resized")
CENTER_AND_CORNERS = ("center", "top_left", "top_right", "bottom_left", "bottom_right")
POSITIONS = (*CENTER_AND_CORNERS, "top", "bottom", "left", "right")

# Longest side that `resize_shorter_side` makes: a needle of an image would fill memory.
_LONGEST_SIDE = 32_767
_MOST_IN_FLOAT = 1_000_000  # pixels


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
    return encoded_images.decode(encoded_images.check(encoded))


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


def resize_whole(image: np.ndarray, side: int, max_aspect: float) -> np.ndarray:
    """Resizes an image so that its shorter side is `side`, its aspect bounded.

    As `resize_shorter_side`, but an image whose longer side is more than `max_aspect`
    times the shorter one is squeezed to that; its size is `whole_size`'s.
    """
    height, width = image.shape[:2]
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

    `area`: range of the rectangle's area, relative to the image's; uniform.
    `aspect`: range of its width/height; log-uniform.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = np.exp(rng.uniform(np.log(aspect[0]), np.log(aspect[1])))
        rows, columns = round(np.sqrt(pixels / ratio)), round(np.sqrt(pixels * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top = rng.integers(height - rows + 1)
            left = rng.integers(width - columns + 1)
            return _resize(image[top : top + rows, left : left + columns], size, size)
    # A very long image has no such rectangle.
    return _resize(crop(image, min(height, width), "center"), size, size)


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
