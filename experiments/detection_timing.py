"""Seconds that each part of a detector takes for an image: SPP-net's and R-CNN's.

    warping      SPP-net: the image is resized; R-CNN: every window is warped
    convolution  of the image at every scale; of every window
    pooling      of windows from the maps (SPP-net finds their cells first)
    fc           the fc layers and what follows them; one program for all systems
    suppression  box regression and non-maximum suppression

The systems take turns at every image, so that a busy machine slows all of them. All run
on one device, one image at a time, and nothing is read from a cache of maps. Programs
are compiled before the clock starts.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.benchmarks.timing import time_in_turn
from sppnet_jax.buckets.choice import choose_buckets
from sppnet_jax.buckets.table import pad_to_bucket, smallest_bucket
from sppnet_jax.buckets.whole_images import MAX_ASPECT
from sppnet_jax.data.images import resize_whole, whole_size
from sppnet_jax.detection.box_regression import regress_boxes
from sppnet_jax.detection.detector import Detections, Scored, Suppression, suppress
from sppnet_jax.detection.maps import map_function
from sppnet_jax.detection.rcnn import fill_color
from sppnet_jax.detection.scales import (
    Size,
    atlas_size,
    boxes_to_atlas,
    map_size_of,
    share_windows,
    stack_maps,
)
from sppnet_jax.detection.warp import warp_windows
from sppnet_jax.detection.window_features import (
    Head,
    atlas_inputs,
    in_chunks,
    padded_count,
    pool_atlas,
)
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.run.progress import progress_bar

WARPING, CONVOLUTION, POOLING = "warping", "convolution", "pooling"
FC, SUPPRESSION = "fc", "suppression"
BATCHES = (32, 64, 128)  # windows of R-CNN that are tried at a time

Seconds = dict[str, list[float]]  # by part, one for each image


class Photo(NamedTuple):
    """An image, uint8 [height, width, 3], and its proposals, float [N, 4]."""

    image: np.ndarray
    boxes: np.ndarray


Part = Callable[[Photo, Any], Any]


class System(NamedTuple):
    """A detector as the parts it goes through for an image.

    `parts`: by name, functions of the photo and what the part before returned.
    `rounds`: how often each image is measured. `warm_boxes`: how many boxes of the
    first image suffice to compile all programs; None for all boxes of all images.
    """

    name: str
    parts: dict[str, Part]
    rounds: int = 1
    warm_boxes: int | None = None


class Convolutions(NamedTuple):
    """A trained network's convolutions, and what its inputs are."""

    model: SPPNet
    params: Any
    preprocessing: Preprocessing


class Windows(NamedTuple):
    """Which scales SPP-net sees, and how a box becomes a window; see scales.py."""

    sides: tuple[int, ...]
    area: float
    rule: str = "paper"


def measure(
    systems: Sequence[System], photos: Sequence[Photo]
) -> tuple[dict[str, Seconds], dict[str, Any]]:
    """Measures every part of every system on every image, image by image in turn.

    Returns: by system the seconds of each part, for each image the median over the
    rounds; and by system what it made of the last image.
    """
    for number, photo in enumerate(photos):
        for system in systems:
            if system.warm_boxes is None:
                _run(system, photo)
            elif not number:
                _run(system, photo._replace(boxes=photo.boxes[: system.warm_boxes]))
    found: dict[str, Seconds] = {s.name: {p: [] for p in s.parts} for s in systems}
    last: dict[str, Any] = {}
    with progress_bar("timing", len(photos)) as bar:
        for photo in photos:
            rounds: dict[str, list[dict[str, float]]] = {s.name: [] for s in systems}
            for number in range(max(system.rounds for system in systems)):
                for system in systems:
                    if number < system.rounds:
                        seconds, last[system.name] = _run(system, photo)
                        rounds[system.name].append(seconds)
            for name, times in rounds.items():
                for part in found[name]:
                    median = float(np.median([one[part] for one in times]))
                    found[name][part].append(median)
            bar.update()
    return found, last


def spp_parts(
    network: Convolutions,
    windows: Windows,
    photos: Sequence[Photo],
    *,
    shared: bool = True,
    max_buckets: int = 4,
) -> dict[str, Part]:
    """SPP-net's parts up to the pooled features.

    `photos`: all images that will come; they decide the buckets.
    `shared`: windows of the same cells go on as one; else every one by itself.
    `max_buckets`: of images at each scale, and of stacked maps.
    """
    model, params, preprocessing = network
    levels = model.levels
    if levels is None:
        raise ValueError("a network without a pyramid can't pool windows from maps")
    geometry = model.geometry
    sizes = [scaled(photo, windows) for photo in photos]
    buckets = [
        choose_buckets([own[k] for own in sizes], max_buckets)
        for k in range(len(windows.sides))
    ]
    atlases = choose_buckets([_atlas(own, geometry) for own in sizes], max_buckets)
    convolve_one = jax.jit(map_function(model, preprocessing))
    pool = jax.jit(functools.partial(pool_atlas, levels=levels))
    most = most_windows(photos)

    def resize(photo: Photo, _: Any) -> Any:
        resized = [resize_whole(photo.image, s, MAX_ASPECT) for s in windows.sides]
        return [
            (
                pad_to_bucket(one, smallest_bucket(one.shape[:2], fitting))[None],
                np.array([one.shape[:2]], np.int32),
            )
            for one, fitting in zip(resized, buckets, strict=True)
        ]

    def convolve(photo: Photo, resized: Any) -> Any:
        return [convolve_one(params, padded, size) for padded, size in resized]

    def pool_windows(photo: Photo, maps: Any) -> Any:
        own = scaled(photo, windows)
        cells = [map_size_of(size, geometry) for size in own]
        atlas = stack_maps(
            [
                np.asarray(one)[0, :rows, :columns]
                for one, (rows, columns) in zip(maps, cells, strict=True)
            ],
            smallest_bucket(atlas_size(cells), atlases),
        )
        found = windows_of(photo, windows, geometry)
        if shared:
            arrays, count, which = atlas_inputs(atlas, found)
            return pool(*arrays), count, which
        padded = np.tile(np.array([[0, 0, 1, 1]], np.int32), (most, 1))
        padded[: len(found)] = found
        return pool(atlas, padded), len(found), np.arange(len(found))

    return {WARPING: resize, CONVOLUTION: convolve, POOLING: pool_windows}


def rcnn_parts(
    network: Convolutions, photos: Sequence[Photo], *, context: int, batch_size: int
) -> dict[str, Part]:
    """R-CNN's parts up to the pooled features.

    `context`, `batch_size`: see rcnn.py.
    """
    model, params, preprocessing = network
    fill = fill_color(preprocessing)
    convolve_batch = jax.jit(map_function(model, preprocessing))
    most = most_windows(photos)

    @jax.jit
    def pool_batch(maps: jax.Array) -> Any:
        return model.apply({}, maps, method="pool")

    @jax.jit
    def join(parts: list[jax.Array]) -> jax.Array:
        rows = jnp.concatenate(parts)[:most]
        return jnp.pad(rows, ((0, most - len(rows)), (0, 0)))

    def warp(photo: Photo, _: Any) -> np.ndarray:
        return warp_windows(
            photo.image, photo.boxes, model.image_size, context=context, fill=fill
        )

    def convolve(photo: Photo, warped: np.ndarray) -> Any:
        found = []
        for start in range(0, len(warped), batch_size):
            part = warped[start : start + batch_size]
            missing = ((0, batch_size - len(part)), *((0, 0),) * 3)
            found.append(convolve_batch(params, np.pad(part, missing), None))
        return found

    def pool(photo: Photo, maps: Any) -> Any:
        count = len(photo.boxes)
        return join([pool_batch(part) for part in maps]), count, np.arange(count)

    return {WARPING: warp, CONVOLUTION: convolve, POOLING: pool}


def fastest_batch(
    network: Convolutions, count: int, candidates: Sequence[int] = BATCHES
) -> tuple[int, dict[int, float]]:
    """The batch size at which R-CNN's convolutions of so many windows are fastest.

    Returns: it, and the estimated seconds for all windows by batch size.
    """
    model, params, preprocessing = network
    convolve = jax.jit(map_function(model, preprocessing))
    side = model.image_size

    def convolving(batch_size: int) -> Callable[[], jax.Array]:
        shape = (batch_size, side, side, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        return lambda: convolve(params, images, None)

    found = time_in_turn({str(size): convolving(size) for size in candidates}, rounds=2)
    seconds = {
        size: float(found[str(size)].min()) * -(-count // size) for size in candidates
    }
    return min(seconds, key=lambda size: seconds[size]), seconds


def fc_program(head: Head) -> Callable[..., Any]:
    """The program of the fc part, (weights, pooled, count) → `head` of the rows."""

    @jax.jit
    def program(weights: Any, pooled: jax.Array, count: Any) -> Any:
        return in_chunks(head, weights, pooled, count)

    return program


def fc_part(program: Callable[..., Any], weights: Any) -> Part:
    """The fc part of a system: its result has a row for each box of the photo."""

    def part(photo: Photo, pooled: Any) -> Any:
        features, count, which = pooled
        found = jax.device_get(program(weights, features, count))
        return jax.tree.map(lambda rows: rows[which], found)

    return part


def suppression_part(rules: Suppression) -> Part:
    """From scores and deltas to detections; see detector.py."""

    def part(photo: Photo, found: Any) -> Detections:
        scores, deltas = found
        boxes = np.asarray(photo.boxes, np.float32)
        if deltas is None:
            moved = np.broadcast_to(boxes[:, None], (*scores.shape, 4))
        else:
            height, width = photo.image.shape[:2]
            moved = np.asarray(regress_boxes(boxes, deltas, height, width))
        scored = [Scored(moved, scores)]
        return suppress(scored, rules)

    return part


def scaled(photo: Photo, windows: Windows) -> list[Size]:
    """The (height, width) of an image at each scale."""
    height, width = photo.image.shape[:2]
    return [whole_size(height, width, side, MAX_ASPECT) for side in windows.sides]


def windows_of(photo: Photo, windows: Windows, geometry: Any) -> np.ndarray:
    """The windows of an image's boxes on its atlas, int32 [N, 4]."""
    return boxes_to_atlas(
        photo.boxes,
        photo.image.shape[:2],
        scaled(photo, windows),
        geometry,
        area=windows.area,
        rule=windows.rule,
    )


def distinct_share(
    network: Convolutions, windows: Windows, photos: Sequence[Photo]
) -> float:
    """The share of the windows of all images that are left if none repeats another."""
    geometry = network.model.geometry
    found = [windows_of(photo, windows, geometry) for photo in photos]
    distinct = sum(len(share_windows(own)[0]) for own in found)
    return distinct / max(1, sum(map(len, found)))


def most_windows(photos: Sequence[Photo]) -> int:
    """As many rows as fit the windows of any image: one fc program serves them all."""
    return padded_count(max(len(photo.boxes) for photo in photos))


def _run(system: System, photo: Photo) -> tuple[dict[str, float], Any]:
    seconds, value = {}, None
    for name, part in system.parts.items():
        started = time.perf_counter()
        value = jax.block_until_ready(part(photo, value))
        seconds[name] = time.perf_counter() - started
    return seconds, value


def _atlas(sizes: Sequence[Size], geometry: Any) -> Size:
    return atlas_size([map_size_of(size, geometry) for size in sizes])
