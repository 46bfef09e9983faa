"""What a layer of a trained network says of every image of a split.

An image is seen as a centre crop, warped whole to a square, or whole at its own aspect
ratio, in fitted buckets (section 3.2). Linear SVMs are trained on the result (`svm`).
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from sppnet_jax.buckets.whole_images import (
    fit_table,
    map_whole_images,
)
from sppnet_jax.data.batches import Batches, eval_batches, warped_batches
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.datasets import VIEWS
from sppnet_jax.data.images import check_side
from sppnet_jax.data.sources import Source
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing, mirror, normalize
from sppnet_jax.network.stack import convs_of, cut_names
from sppnet_jax.network.trained import Network
from sppnet_jax.run import parallel
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.training.steps import shard_batch

_Rows = Iterator[tuple[int, np.ndarray]]
_Seen = Callable[[int, bool], None]  # index, whether it could be decoded
_Activations = Callable[..., jax.Array]

log = logging.getLogger(__name__)


class Features(NamedTuple):
    """One layer's activations of every image that could be decoded.

    `values`: float32 [N, D]. `labels`: int32 [N], or of a multi-label source int8
    [N, classes]. `indices`: int32 [N], the records' numbers in their split, ascending.
    `names`: of the records. `class_names`: in the order of the labels. `broken`: how
    many records could not be decoded and have no row.
    """

    values: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    broken: int


def layer_names(model: SPPNet, mode: str = "crop") -> tuple[str, ...]:
    """The layers whose features `extract_features` gives in a mode."""
    count = sum(1 for _ in convs_of(model.table))
    maps = *(f"conv{number}" for number in range(1, count + 1)), *cut_names(model.table)
    fcs = {"fc": ("fc6", "fc7", "fc8"), "linear": ("fc8",), "none": ()}[model.head]
    # The map of a whole image has a size of its own: no row of one length.
    return (*(maps if mode != "full" else ()), "pyramid", *fcs)


def default_layer(model: SPPNet) -> str:
    """The layer whose features are taken where none is given."""
    return "fc7" if model.head == "fc" else "pyramid"


def default_side(mode: str, *, image_size: int, resize_side: int) -> int:
    """The side at which a mode sees images, where none is given."""
    return image_size if mode == "warp" else resize_side


def extract_features(network: Network, source: Source, **options: Any) -> Features:
    """The activations of a layer for every image of a source, in its order.

    `options`: of `row_extractor`, with its errors.

    Returns: the features; broken images are left out and counted.
    """
    rows_of = row_extractor(network, source, **options)
    return label_rows(*parallel.sum_over_processes(rows_of(source)), source)


def row_extractor(
    network: Network,
    source: Source,
    *,
    layer: str,
    side: int,
    mode: str,
    batch_size: int,
    max_buckets: int = 4,
    mirrored: bool = False,
    workers: int = 0,
    threads: int = 8,
    strict: bool = False,
) -> Callable[[Source], tuple[np.ndarray, np.ndarray]]:
    """A function to the activations of a layer, of a source or of a part of it.

    `layer`: "conv1" … after their activation, a cut, "pyramid" (what the head sees),
    "fc6" and "fc7" after their ReLU, "fc8" (the logits). Maps are flattened row by row.
    `side`: in pixels; of the whole image, shorter side, in the modes "crop" and "full",
    of the square in the mode "warp".
    `mode`: "crop", the centre crop of the model's `image_size`; "warp", the whole image
    at another aspect; "full", the whole image, not longer than 4:1. A row of the mode
    "full" is that of the image alone, whatever bucket it was computed in.
    `batch_size`: of images of the training size; larger ones come in smaller batches.
    `max_buckets`: programs for whole images, which fit all of the source. `mirrored`:
    sees each image mirrored.
    `workers`, `threads`, `strict`: see `data.batches.eval_batches`.

    Returns: the function, to float32 [N, D] and bool [N], whether a record could be
    decoded; zeros and False where not, and for records of other processes joined.
    Raises: ValueError for a layer or a side that the network or the mode doesn't have,
    and for features that don't fit into the memory.
    """
    model, params = network.model, network.params
    check_request(model, layer=layer, side=side, mode=mode)
    activations = _layer_function(model, network.preprocessing, layer, mirrored)
    pixels = model.image_size if mode == "crop" else side
    length = row_length(network, layer=layer, side=side, mode=mode)
    _check_memory(len(source.records), length, layer)
    if mode == "full":
        table = fit_table(
            activations,
            network,
            source,
            side,
            batch_size=batch_size,
            max_buckets=max_buckets,
            threads=threads,
        )
    else:
        squares = _square_program(activations, params)
        as_many = batch_size * model.image_size**2 // pixels**2
        shared: dict[str, Any] = {
            "batch_size": parallel.round_up_to_devices(
                max(1, min(batch_size, as_many))
            ),
            "workers": workers,
            "threads": threads,
            "strict": strict,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def rows_of(part: Source) -> tuple[np.ndarray, np.ndarray]:
        records = len(part.records)
        values = np.zeros((records, length), np.float32)
        valid = np.zeros(records, bool)
        broken = BrokenImages(part)
        with progress_bar(layer, records) as bar:

            def seen(index: int, decoded: bool) -> None:
                if not decoded:
                    broken.add(index)
                bar.update(min(jax.process_count(), records - bar.n))

            if mode == "full":
                rows = map_whole_images(
                    table,
                    part,
                    side,
                    threads=threads,
                    strict=strict,
                    on_example=lambda one: seen(one["index"], one["mask"]),
                )
            else:
                batches = (
                    eval_batches(part, image_size=pixels, resize_side=side, **shared)
                    if mode == "crop"
                    else warped_batches(part, image_size=pixels, **shared)
                )
                rows = _rows_of_squares(squares, batches, seen)
            for index, row in rows:
                values[index], valid[index] = row, True
        broken.summarize()
        return values, valid

    return rows_of


def check_request(model: SPPNet, *, layer: str, side: int, mode: str) -> None:
    """Raises ValueError if a network can't give the features that are asked for."""
    if mode not in VIEWS:
        raise ValueError(f"unknown mode {mode!r}: choose from {', '.join(VIEWS)}")
    if layer not in layer_names(model):
        raise ValueError(
            f"unknown layer {layer!r}: this network has {_listed(layer_names(model))}"
        )
    if mode == "full" and model.levels is None:
        raise ValueError(
            "this network has no spatial pyramid (levels=None), so it takes no whole "
            "images of any size: use the mode crop or warp"
        )
    if layer not in layer_names(model, mode):
        raise ValueError(
            f"the map of {layer} has another size for each whole image, so its "
            f"features would be of no one length: choose from "
            f"{', '.join(layer_names(model, mode))}, or use the mode crop or warp"
        )
    check_side(side)
    if mode == "crop" and side < model.image_size:
        raise ValueError(
            f"a crop of {model.image_size}×{model.image_size} pixels does not fit into "
            f"an image whose shorter side is {side}: give a side of at least "
            f"{model.image_size}, or use the mode full"
        )
    if mode == "warp" and model.levels is None and side != model.image_size:
        raise ValueError(
            f"this network has no spatial pyramid (levels=None) and takes squares of "
            f"{model.image_size} pixels only, not {side}"
        )
    model.geometry.map_size(side)


def _listed(names: tuple[str, ...]) -> str:
    """Names of layers, the convolutions by the first and the last."""
    convs = [name for name in names if name.startswith("conv")]
    others = [name for name in names if name not in convs]
    return ", ".join([f"conv1 to {convs[-1]}", *others])


def _layer_function(
    model: SPPNet, preprocessing: Preprocessing, layer: str, mirrored: bool = False
) -> _Activations:
    """From (params, images, valid sizes or None) to a layer's activations [b, D]."""

    def activations(
        params: Any, images: jax.Array, sizes: jax.Array | None = None
    ) -> jax.Array:
        if mirrored:
            images = mirror(images, sizes)
        inputs = normalize(images, preprocessing, sizes)
        if layer == "pyramid":  # all that a network without a head has
            maps, _ = model.apply({"params": params}, inputs, sizes, method="features")
            values: Any = model.apply({"params": params}, maps, sizes, method="pool")
        else:
            logits, named = model.apply({"params": params}, inputs, sizes)
            values = {**named, "fc8": logits}[layer]
        return values.reshape(len(images), -1).astype(jnp.float32)

    return activations


def row_length(network: Network, *, layer: str, side: int, mode: str) -> int:
    """How many numbers the features of an image are; see `row_extractor`."""
    pixels = network.model.image_size if mode == "crop" else side
    image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), np.uint8)
    size = jax.ShapeDtypeStruct((1, 2), np.int32) if mode == "full" else None
    activations = _layer_function(network.model, network.preprocessing, layer)
    return jax.eval_shape(activations, network.params, image, size).shape[1]


def _check_memory(records: int, length: int, layer: str) -> None:
    needed, free = 4 * records * length, psutil.virtual_memory().available
    log.info(
        "features of %s: %d images × %d numbers, %s",
        layer,
        records,
        length,
        _size_of(needed),
    )
    if needed > free:
        raise ValueError(
            f"the features of {layer} for {records} images take {_size_of(needed)}, "
            f"and {_size_of(free)} of memory are free: extract them in parts, such as "
            "split 'train[:10%]', or choose a later layer"
        )


def _size_of(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _square_program(
    activations: _Activations, params: Any
) -> Callable[[Any], np.ndarray]:
    """From a batch of squares to their activations [b, D], on all devices."""
    program = parallel.data_parallel(
        lambda params, batch: activations(params, batch["image"])
    )
    replicated = parallel.replicate(params)

    def run(batch: Any) -> np.ndarray:
        found = np.asarray(program(replicated, shard_batch(batch)))
        return found.reshape(-1, found.shape[-1])

    return run


def _rows_of_squares(
    program: Callable[[Any], np.ndarray], batches: Batches, seen: _Seen
) -> _Rows:
    with batches:
        for batch in batches:
            found = program(batch)
            for index, mask, row in zip(
                batch["index"], batch["mask"], found, strict=True
            ):
                if index < 0:
                    continue
                seen(int(index), bool(mask))
                if mask:
                    yield int(index), row


def label_rows(
    values: np.ndarray, valid: np.ndarray, source: Source, threads: int = 8
) -> Features:
    """Leaves broken records out, and reads what the others are called.

    `values`, `valid`: of every record, as of `row_extractor`.
    """
    indices = np.flatnonzero(valid)

    def read(number: int) -> tuple[str, Any]:
        record = source.records[number]
        label = record["labels"] if source.multi_label else record["label"]
        return record["name"], label

    with ThreadPoolExecutor(threads) as pool:
        read_again = list(pool.map(read, indices.tolist()))
    shape = (-1, len(source.class_names)) if source.multi_label else (-1,)
    dtype = np.int8 if source.multi_label else np.int32
    return Features(
        values=values if valid.all() else values[valid],
        labels=np.array([label for _, label in read_again], dtype).reshape(shape),
        indices=indices.astype(np.int32),
        names=tuple(name for name, _ in read_again),
        class_names=source.class_names,
        broken=int((~valid).sum()),
    )
