"""The network of the suites on buckets, as a function of images and valid sizes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sppnet_jax.network.model import SPPNet, create_model


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
