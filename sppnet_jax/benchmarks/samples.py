"""Networks, photograph-like sizes and pixels from a seed, for suites without data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from sppnet_jax.buckets.choice import Bucket
from sppnet_jax.network.model import SPPNet, create_model

LONGEST = 3.0  # the most that a side is longer than the other


def random_network(width: float, side: int, dtype: str) -> tuple[SPPNet, Any]:
    """ZF-5 {6,3,2,1} of 1,000 classes with random weights: the model, its params."""
    model = create_model(
        "zf5", width=width, image_size=side, weight_init="he", dtype=jnp.dtype(dtype)
    )
    blank = jnp.zeros((1, side, side, 3))
    return model, jax.jit(model.init)(jax.random.key(0), blank)["params"]


def scorer(model: SPPNet) -> Callable[..., jax.Array]:
    """Logits of images, as a function that JAX has not seen before.

    Of (params, images uint8 [batch, height, width, 3], valid sizes if there are any).
    """

    def scores(params: Any, images: jax.Array, sizes: Any = None) -> jax.Array:
        inputs = images.astype(model.dtype) / 128 - 1
        return model.apply({"params": params}, inputs, sizes)[0]

    return scores


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
