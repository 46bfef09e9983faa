"""Photographs in files of a person's own, read and decoded once."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sppnet_jax.data.folders import read_image_file
from sppnet_jax.data.images import Decoded, decode_image, decode_part


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [height, width, 3], RGB, turned as its EXIF says.

    Raises: FileNotFoundError if it is not there; ValueError if it can't be read, or is
    no whole image.
    """
    return decode_image(read_image_file(Path(path).expanduser()))


def read_part(path: str | Path, least_side: float) -> Decoded:
    """As `read_image`, decoded no larger than it takes: see `images.decode_part`."""
    return decode_part(read_image_file(Path(path).expanduser()), least_side)


def read_images(
    paths: Sequence[str], threads: int = 8, least_side: float = math.inf
) -> Iterator[tuple[str, Decoded | Exception]]:
    """Each path with its image, or the error of reading it, in order.

    So many threads read ahead, an image each.
    `least_side`: what shorter sides will be shrunk to, see `images.decode_part`.
    """

    def read(path: str) -> Decoded | Exception:
        try:
            return read_part(path, least_side)
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), threads):
            some = paths[start : start + threads]
            yield from zip(some, pool.map(read, some), strict=True)
