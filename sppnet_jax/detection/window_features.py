"""What the network says of boxes in an image: pooled, then through the fc layers.

SPP-net pools each box's window from the maps of its image (`from_maps`); R-CNN warps
and convolves each box by itself (`from_warped`). All else is the same code for both.

    features = from_maps(...)
    program = make_program(features, head)
    rows_of(features, program, params, image, chosen)

`head` is what is computed of each pooled vector, (params, pooled [n, D]) → arrays of n
rows: fc7, or the scores of all classes. Boxes with the same cells go through it once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.buckets.choice import choose_buckets
from sppnet_jax.buckets.table import smallest_bucket
from sppnet_jax.detection.maps import scaled_sizes
from sppnet_jax.detection.scales import (
    Size,
    atlas_size,
    boxes_to_atlas,
    map_size_of,
    share_windows,
    stack_maps,
)
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.pyramid.pooling import spatial_pyramid_pool
from sppnet_jax.pyramid.windows import window_pyramid_pool
from sppnet_jax.run.caches import jit_once

Head = Callable[[Any, jax.Array], Any]
Rows = np.ndarray

# Windows are padded to multiples of two of these, and go through the head so many at a
# time: a program serves every image with as many.
CHUNK = 256
FEWEST = 64  # rows of a program: fewer would take about as long, and one more program


class WindowFeatures(NamedTuple):
    """The boxes of every image of a split, and how their pooled features are had.

    `boxes`: float [N, 4] for each image.
    `inputs`: from (image, chosen rows of its boxes) to the arrays that `pool` takes,
    the number of distinct windows, and which of them each chosen box is.
    `pool`: from those arrays to pooled features [M, D], on the device; rows from the
    number of distinct windows on are padding.
    """

    boxes: Sequence[np.ndarray]
    inputs: Callable[[int, Rows], tuple[Any, int, np.ndarray]]
    pool: Callable[[Any], jax.Array]


def from_maps(
    maps_of: Callable[[int], list[np.ndarray]],
    boxes: Sequence[np.ndarray],
    sizes: np.ndarray,
    *,
    sides: Sequence[int],
    geometry: Geometry,
    levels: tuple[int, ...],
    area: float,
    rule: str = "paper",
    reducer: str = "max",
    max_buckets: int = 4,
    buckets: Sequence[Size] = (),
    least_windows: int = 0,
) -> WindowFeatures:
    """Boxes pooled from the maps of their images: SPP-net.

    `maps_of`: an image's maps at all scales, `maps.load_maps` for instance.
    `boxes`: float [N, 4] for each image, in its pixels. `sizes`: of the images, int
    [images, 2]; (0, 0) for a broken one, which must have no boxes.
    `sides`, `area`, `rule`: see scales.py. `reducer`: of each bin.
    `buckets`: shapes of stacked maps; by default the best `max_buckets` for these
    images. `least_windows`: distinct windows are padded to so many at least.
    """
    per_side = [scaled_sizes(sizes, side) for side in sides]
    shapes = [
        atlas_size([map_size_of(scaled[image], geometry) for scaled in per_side])
        for image in range(len(sizes))
    ]
    if shapes and not buckets:
        buckets = choose_buckets(np.array(shapes), max_buckets)

    def inputs(image: int, chosen: Rows) -> tuple[Any, int, np.ndarray]:
        atlas = stack_maps(maps_of(image), smallest_bucket(shapes[image], buckets))
        windows = boxes_to_atlas(
            boxes[image][chosen],
            tuple(sizes[image]),
            [tuple(scaled[image]) for scaled in per_side],
            geometry,
            area=area,
            rule=rule,
        )
        return atlas_inputs(atlas, windows, least_windows)

    def pool(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        return pool_atlas(*arrays, levels, reducer)

    return WindowFeatures(boxes, inputs, pool)


def atlas_inputs(
    atlas: np.ndarray, windows: np.ndarray, least: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray], int, np.ndarray]:
    """An atlas and its distinct windows, padded; see `WindowFeatures.inputs`."""
    distinct, which = share_windows(windows)
    padded = np.zeros((padded_count(max(len(distinct), least)), 4), np.int32)
    padded[:, 2:] = 1
    padded[: len(distinct)] = distinct
    return (atlas, padded), len(distinct), which


def pool_atlas(
    atlas: jax.Array,
    windows: jax.Array,
    levels: tuple[int, ...],
    reducer: str = "max",
) -> jax.Array:
    """The pyramid of each window as one vector [M, bins·channels]."""
    pooled = window_pyramid_pool(atlas, windows, levels, reducer=reducer)
    return pooled.reshape(len(windows), -1)


def from_warped(
    stored_of: Callable[[int], np.ndarray],
    boxes: Sequence[np.ndarray],
    levels: tuple[int, ...] | None,
    reducer: str = "max",
) -> WindowFeatures:
    """Boxes warped and convolved one by one, see rcnn.py: R-CNN.

    `stored_of`: what is kept of an image's boxes, [N, …].
    `levels`: of the pyramid; None where that is pooled already.
    """

    def inputs(image: int, chosen: Rows) -> tuple[Any, int, np.ndarray]:
        stored = stored_of(image)
        rows, which = np.unique(chosen, return_inverse=True)
        padded = np.zeros((padded_count(len(rows)), *stored.shape[1:]), np.float32)
        padded[: len(rows)] = stored[rows]
        return padded, len(rows), which.reshape(-1)

    def pool(stored: jax.Array) -> jax.Array:
        pooled = stored
        if levels is not None:
            pooled = spatial_pyramid_pool(stored, levels, reducer=reducer)
        return pooled.reshape(len(stored), -1)

    return WindowFeatures(boxes, inputs, pool)


def make_program(
    features: WindowFeatures, head: Head, decided_by: str = ""
) -> Callable[..., Any]:
    """Compiles (params, arrays, count) → `head` of the pooled features, [M, …] each.

    Whole chunks of padding, from row `count` on, stay zeros: the fc layers take most
    of the time.
    `decided_by`: all that the pooling and the head depend on beside their arguments,
    as text, where the next start is to find what is traced: see `jit_once`.
    """

    def program(params: Any, arrays: Any, count: jax.Array) -> Any:
        return in_chunks(head, params, features.pool(arrays), count)

    if decided_by:
        return jit_once(program, decided_by, least_arrays=0)
    return jax.jit(program)


def in_chunks(head: Head, params: Any, pooled: jax.Array, count: jax.Array) -> Any:
    """`head` of the first `count` rows, a chunk at a time; zeros for those after."""
    chunk = min(CHUNK, len(pooled))

    def part(start: Any) -> Any:
        return head(params, jax.lax.dynamic_slice_in_dim(pooled, start, chunk))

    zeros = jax.tree.map(
        lambda s: jnp.zeros((len(pooled), *s.shape[1:]), s.dtype),
        jax.eval_shape(part, 0),
    )

    def step(index: jax.Array, found: Any) -> Any:
        start = index * chunk
        put = jax.lax.dynamic_update_slice_in_dim
        rows = part(start)
        return jax.tree.map(lambda old, new: put(old, new, start, 0), found, rows)

    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, step, zeros)


def rows_of(
    features: WindowFeatures,
    program: Callable[..., Any],
    params: Any,
    image: int,
    chosen: Rows,
) -> Any:
    """The head's rows for chosen boxes of an image, NumPy arrays [n, …]."""
    if not len(chosen):
        raise ValueError(f"no boxes of image {image} were chosen")
    arrays, count, which = features.inputs(image, np.asarray(chosen))
    found = jax.device_get(program(params, arrays, count))
    return jax.tree.map(lambda rows: rows[which], found)


def pooled_rows(params: Any, pooled: jax.Array) -> jax.Array:
    """The head that changes nothing: the pooled features themselves."""
    del params
    return pooled


def padded_count(count: int) -> int:
    """The next power of two, then of two chunks the next multiple: few programs."""
    if count > 2 * CHUNK:
        return -(-count // (2 * CHUNK)) * 2 * CHUNK
    return max(FEWEST, 1 << (count - 1).bit_length())
