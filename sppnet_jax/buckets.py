"""Buckets: a few static input shapes that serve images of every size.

XLA compiles a program for each input shape. An image is padded, at its bottom and
right, into the smallest bucket that holds it, and its true height and width go along as
its valid size; the model masks the rest, so the result is that of the image alone.
"""

from collections.abc import Sequence

import numpy as np

Bucket = tuple[int, int]
ASPECTS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def aspect_buckets(side: int, aspects: Sequence[float] = ASPECTS) -> tuple[Bucket, ...]:
    """Buckets (height, width) for images whose shorter side is `side` pixels.

    One for each aspect ratio in landscape and in portrait, smallest first.
    """
    longs = [round(side * aspect) for aspect in aspects]
    both = {(side, long) for long in longs} | {(long, side) for long in longs}
    return tuple(sorted(both, key=lambda bucket: (bucket[0] * bucket[1], bucket)))


def smallest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of least area that holds an image of (height, width).

    Raises: ValueError if none does.
    """
    fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
    if not fitting:
        raise ValueError(
            f"no bucket holds an image of {size[0]}×{size[1]}; there are "
            + ", ".join(f"{h}×{w}" for h, w in buckets)
        )
    return min(fitting, key=lambda bucket: bucket[0] * bucket[1])


def pad_to_bucket(image: np.ndarray, bucket: Bucket) -> np.ndarray:
    """The image [h, w, 3] at the top left of zeros of the bucket's size."""
    height, width = image.shape[:2]
    padding = ((0, bucket[0] - height), (0, bucket[1] - width), (0, 0))
    return np.pad(image, padding)
