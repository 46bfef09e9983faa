"""Softmax scores of images that are at hand, each seen whole at its own aspect.

`score_images` scores several together, `image_scorer` one after the other. A network
without a pyramid sees their centre crops, the only size that it takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sppnet_jax.buckets import BucketTable, choose_buckets
from sppnet_jax.buckets.table import pad_to_bucket, smallest_bucket
from sppnet_jax.buckets.whole_images import MAX_ASPECT, fitting_batch, photo_buckets
from sppnet_jax.data.images import check_image, crop, resize_whole
from sppnet_jax.network.preprocess import normalize
from sppnet_jax.network.trained import Network, digest_arrays
from sppnet_jax.run.caches import jit_once


def score_images(
    network: Network,
    images: Sequence[np.ndarray],
    *,
    batch_size: int = 16,
    max_buckets: int = 4,
) -> np.ndarray:
    """The softmax scores of images of any size, in buckets that fit them.

    `images`: uint8 [height, width, 3] each, RGB; those longer than 4:1 are squeezed.
    `batch_size`: of images of the training size; larger ones come in smaller batches.
    `max_buckets`: programs that are compiled, at most.

    Returns: float32 [images, classes].
    Raises: ValueError for an array that is no such image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for image in images:
        check_image(image)
    resized = [_resize(network, image) for image in images]
    if not resized:
        return np.zeros((0, network.model.num_classes), np.float32)
    buckets = choose_buckets([image.shape[:2] for image in resized], max_buckets)
    area = max(height * width for height, width in buckets)
    rows = fitting_batch(batch_size, network.model.image_size, area)
    rows = min(len(resized), rows)
    table = BucketTable(scores_of(network), network.params, buckets, rows)
    found = dict(table.map(enumerate(resized)))
    return np.stack([found[number] for number in range(len(resized))])


def image_scorer(network: Network) -> Callable[[np.ndarray], np.ndarray]:
    """`score_images` as a function of one image, in buckets that are always the same.

    The first image of a bucket compiles its program, or loads it.

    Returns: a function from an image, uint8 [height, width, 3], to float32 [classes].
    """
    decided_by = f"{network.model!r} {digest_arrays(network.preprocessing)}"
    program = jit_once(scores_of(network), decided_by)
    params = jax.device_put(network.params)
    buckets = photo_buckets(network.resize_side)

    def score(image: np.ndarray) -> np.ndarray:
        resized = _resize(network, image)
        size = resized.shape[0], resized.shape[1]
        if network.model.levels is not None:
            resized = pad_to_bucket(resized, smallest_bucket(size, buckets))
        return np.asarray(program(params, resized[None], np.array([size], np.int32)))[0]

    return score


def _resize(network: Network, image: np.ndarray) -> np.ndarray:
    resized = resize_whole(image, network.resize_side, MAX_ASPECT)
    if network.model.levels is None:
        return crop(resized, network.model.image_size, "center")
    return resized


def scores_of(network: Network) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """The program of a bucket: (params, images, valid sizes) to softmax scores.

    It takes uint8 [batch, height, width, 3] and int32 [batch, 2].
    """
    model, preprocessing = network.model, network.preprocessing

    def score(params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        valid = None if model.levels is None else sizes
        inputs = normalize(images, preprocessing, valid)
        return jax.nn.softmax(model.apply({"params": params}, inputs, valid)[0])

    return score
