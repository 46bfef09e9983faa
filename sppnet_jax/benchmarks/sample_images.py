"""Photograph-like sizes and pixels from a seed, for suites that need no data."""

import numpy as np
from scipy import ndimage

from sppnet_jax.buckets.choice import Bucket

LONGEST = 3.0  # the most that a side is longer than the other


def sample_sizes(count: int, side: int, seed: int = 0) -> list[Bucket]:
    """Distinct sizes of images that are resized to one shorter side.

    Aspect ratios go from 1:1 to 3:1, most of them below 2:1, and three of five images
    are landscapes.

    `count`: of sizes, at most 3·`side` of the 4·`side` that there are.

    Returns: (height, width) of each.
    Raises: ValueError for more sizes than that.
    """
    if count > 3 * side:
        raise ValueError(
            f"{count} distinct sizes of shorter side {side} would not look like "
            f"photographs; at most {3 * side}"
        )
    random = np.random.default_rng(seed)
    sizes: dict[tuple[int, int], None] = {}
    while len(sizes) < count:
        aspect = min(np.exp(abs(random.normal(0.33, 0.25))), LONGEST)
        longer = round(side * aspect)
        portrait = random.random() < 0.4
        sizes[(longer, side) if portrait else (side, longer)] = None
    return list(sizes)


def sample_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth patches of colour under noise: uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    patches = random.normal(128, 60, (5, 5, 3))
    zoom = (height / 5, width / 5, 1)
    smooth = ndimage.zoom(patches, zoom, order=1, mode="nearest", grid_mode=True)
    noise = random.normal(0, 20, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)
