"""Scoring whole images, each at its own aspect ratio (section 3.2, "full-image")."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sppnet_jax.buckets import aspect_buckets, pad_to_bucket, smallest_bucket
from sppnet_jax.classification.preprocess import Preprocessing, normalize
from sppnet_jax.data.images import crop, resize_shorter_side, resize_whole
from sppnet_jax.model import SPPNet

MAX_ASPECT = 4.0


def make_image_scorer(
    model: SPPNet, params: Any, preprocessing: Preprocessing, *, resize_side: int
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from an image, uint8 [h, w, 3] RGB, to its softmax scores [classes].

    The image is resized so that its shorter side is `resize_side` pixels and padded
    into a bucket; every bucket compiles once. Images longer than 4:1 are squeezed to
    4:1. A network without SPP sees the centre crop, the only size that it takes.
    """
    if model.levels is None:
        return _centre_crop_scorer(model, params, preprocessing, resize_side)
    buckets = aspect_buckets(resize_side)

    @jax.jit
    def score(params: Any, image: jax.Array, size: jax.Array) -> jax.Array:
        inputs = normalize(image[None], preprocessing, size[None])
        logits, _ = model.apply({"params": params}, inputs, size[None])
        return jax.nn.softmax(logits[0])

    def score_image(image: np.ndarray) -> np.ndarray:
        resized = resize_whole(image, resize_side, MAX_ASPECT)
        height, width = resized.shape[:2]
        padded = pad_to_bucket(resized, smallest_bucket((height, width), buckets))
        return np.asarray(score(params, padded, np.array([height, width])))

    return score_image


def _centre_crop_scorer(
    model: SPPNet, params: Any, preprocessing: Preprocessing, resize_side: int
) -> Callable[[np.ndarray], np.ndarray]:
    @jax.jit
    def score(params: Any, image: jax.Array) -> jax.Array:
        inputs = normalize(image[None], preprocessing)
        logits, _ = model.apply({"params": params}, inputs)
        return jax.nn.softmax(logits[0])

    def score_image(image: np.ndarray) -> np.ndarray:
        resized = resize_shorter_side(image, resize_side)
        return np.asarray(score(params, crop(resized, model.image_size, "center")))

    return score_image
