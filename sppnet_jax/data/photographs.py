"""Photographs in files of a person's own, read and decoded once."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sppnet_jax.data.folders import read_image_file
from sppnet_jax.data.images import decode_image


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [height, width, 3], RGB, turned as its EXIF says.

    Raises: FileNotFoundError if it is not there; ValueError if it can't be read, or is
    no whole image.
    """
    return decode_image(read_image_file(Path(path).expanduser()))


def read_images(
    paths: Sequence[str], threads: int = 8
) -> Iterator[tuple[str, np.ndarray | Exception]]:
    """Each path with its image, or the error of reading it, in order.

    So many threads read ahead, an image each.
    """

    def read(path: str) -> np.ndarray | Exception:
        try:
            return read_image(path)
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), threads):
            some = paths[start : start + threads]
            yield from zip(some, pool.map(read, some), strict=True)
