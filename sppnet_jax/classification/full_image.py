"""Scoring whole images, each at its own aspect ratio (section 3.2, "full-image")."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sppnet_jax.buckets import aspect_buckets, pad_to_bucket, smallest_bucket
from sppnet_jax.classification.preprocess import Preprocessing, normalize
from sppnet_jax.data.images import resize_whole
from sppnet_jax.model import SPPNet

MAX_ASPECT = 4.0


def make_full_image_scorer(
    model: SPPNet, params: Any, preprocessing: Preprocessing, *, side: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from an image, uint8 [h, w, 3] RGB, to its softmax scores [classes].

    The image is resized so that its shorter side is `side` pixels and padded into a
    bucket; every bucket compiles once. Images longer than
    4:1 are squeezed to 4:1.
    """
    buckets = aspect_buckets(side)

    @jax.jit
    def score(params, image, size):
        inputs = normalize(image[None], preprocessing, size[None])
        logits, _ = model.apply({"params": params}, inputs, size[None])
        return jax.nn.softmax(logits[0])

    def score_image(image: np.ndarray) -> np.ndarray:
        resized = resize_whole(image, side, MAX_ASPECT)
        size = resized.shape[:2]
        padded = pad_to_bucket(resized, smallest_bucket(size, buckets))
        return np.asarray(score(params, padded, np.array(size)))

    return score_image
