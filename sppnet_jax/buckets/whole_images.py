"""Whole images of a split through a compiled function, in buckets that fit them."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sppnet_jax.buckets import BucketTable, choose_buckets, padding_waste
from sppnet_jax.buckets.choice import Bucket
from sppnet_jax.data.sources import Source
from sppnet_jax.network.trained import Network

if TYPE_CHECKING:
    from sppnet_jax.data.batches import Example

MAX_ASPECT = 4.0
# The aspects of photographs' buckets. They are few: to trace a program of one more
# takes as long as several photographs.
_ASPECTS = (4 / 3, 16 / 9, 2.6, MAX_ASPECT)
_ROUNDING = 1.01  # a photograph of 4:3 has 500×374 pixels

log = logging.getLogger(__name__)


def photo_buckets(side: int) -> tuple[Bucket, ...]:
    """The few sizes that any photographs are padded to, landscape first.

    `side`: the photographs' shorter side in pixels; they are at most as long as 4:1.
    """
    longer = [math.ceil(side * aspect * _ROUNDING) for aspect in _ASPECTS]
    return tuple([(side, long) for long in longer] + [(long, side) for long in longer])


def fit_table(
    function: Callable[..., Any],
    network: Network,
    source: Source,
    side: int,
    *,
    batch_size: int,
    max_buckets: int,
    threads: int,
) -> BucketTable:
    """The programs of a function for a split's images, in the buckets that fit it best.

    `function`: (params, images, valid sizes) to rows, as `BucketTable` takes it.
    `side`: the images' shorter side in pixels; images longer than 4:1 are squeezed.
    `batch_size`: of images of the training size; larger images come in smaller batches.
    `max_buckets`: programs at most.

    Raises: ValueError for a side that is too small for the network.
    """
    # Here, not above: a start has no need of it, and it takes a while.
    from sppnet_jax.data.batches import whole_sizes

    smallest = network.geometry.min_image_size
    if side < smallest:
        raise ValueError(
            f"images at a shorter side of {side} pixels are too small for this "
            f"network: it needs at least {smallest}"
        )
    sizes = whole_sizes(source, side, MAX_ASPECT, threads)
    buckets = choose_buckets(sizes, max_buckets)
    log.info(
        "%d images at shorter side %d: buckets %s, %.1f %% of them padding",
        len(sizes),
        side,
        ", ".join(f"{height}×{width}" for height, width in buckets),
        100 * padding_waste(sizes, buckets),
    )
    squeezed = int((sizes.max(axis=1) >= round(MAX_ASPECT * side)).sum())
    if squeezed:
        log.warning("%d images are longer than 4:1 and squeezed to it", squeezed)
    area = max(height * width for height, width in buckets)
    batch_size = fitting_batch(batch_size, network.model.image_size, area)
    return BucketTable(function, network.params, buckets, batch_size)


def fitting_batch(batch_size: int, training_side: int, area: int) -> int:
    """How many images of an area are as many pixels as a batch of the training size."""
    return max(1, min(batch_size, batch_size * training_side**2 // area))


def map_whole_images(
    table: BucketTable,
    source: Source,
    side: int,
    *,
    threads: int,
    strict: bool,
    on_example: "Callable[[Example], None]",
    indices: Iterable[int] | None = None,
    join: bool = True,
) -> Iterator[tuple[int, Any]]:
    """Yields (index, result) for each image that can be decoded, as batches finish.

    Of several processes each takes every n-th record. `on_example`: called with every
    example of `whole_images` before its result is there. `strict`: a broken image is an
    error. `indices`: the records to take in place of these, asked for one by one.
    `join`: see `BucketTable.map`.
    """
    from sppnet_jax.data.batches import whole_images

    examples = whole_images(
        source,
        sides=(side,),
        max_aspect=MAX_ASPECT,
        threads=threads,
        strict=strict,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        indices=indices,
    )

    def valid_images() -> Iterator[tuple[int, np.ndarray]]:
        for example in examples:
            on_example(example)
            if example["mask"]:
                yield int(example["index"]), example["images"][0]

    with closing(examples):
        yield from table.map(valid_images(), join=join)
