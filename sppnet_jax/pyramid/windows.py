"""The pyramid over thousands of windows of one map: how SPP-net detects.

The convolutions run once for an image; then every window of its features is pooled into
bins of its own (He et al. 2014, section 4). Bins differ in size from window to window,
and a masked maximum over the map would cost its whole area for each of them. Here a bin
is four gathered vectors instead, by a sparse table (the range-maximum query):

- The table holds the maximum of every block of 2^r × 2^c cells, at every position. Each
  doubling is one maximum of the table before it and a shifted copy of that.
- The largest block that fits into a bin, put into each of its four corners, covers it.
  The four overlap, but a maximum does not mind counting a cell twice: the result is
  exact, bit for bit that of slicing the window out and pooling it.
- A level that divides a finer one is read off the finer one's bins. So the table ends
  at the largest bin that is gathered: blocks of 8×8 for (6, 3, 2, 1) on a 43×58 map.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from sppnet_jax.pyramid.pooling import (
    adaptive_span,
    check_levels,
    check_maps,
    num_bins,
    pyramid_bins,
)
from sppnet_jax.pyramid.span_max import materialized

# Windows pooled at a time, and channels of a table: few enough that both the table and
# what is gathered from it stay in a CPU's cache.
CHUNK = 128
CHANNELS = 64
CHUNK_ELSEWHERE = 4096  # an accelerator wants large pieces, and all channels
FEWEST_CHANNELS = 16  # of a table, if all tables are to have as many


def window_pyramid_pool(
    features: Float[ArrayLike, "height width channels"],
    windows: Int[ArrayLike, "windows 4"],
    levels: Sequence[int],
) -> Float[Array, "windows bins channels"]:
    """Pools every bin of every level of every window; adaptive bins (appendix A).

    `features`: float [height, width, channels], one map; `jax.vmap` over several.
    `windows`: int [N, 4], half-open cells (top, left, bottom, right). They are traced:
    new windows compile nothing, another N does. Traced windows are clamped to the map
    and to at least one cell; concrete ones that would need it raise.
    `levels`: bins come in this order, row-major inside a level.

    The result and the gradient are those of `spatial_pyramid_pool` on the map cropped
    to the window; only cells that tie for a maximum share its gradient differently. It
    differentiates in reverse mode (`jax.grad`, `jax.vjp`).
    Memory beside the result: the table, which is one map for each size of block (16 for
    (6, 3, 2, 1) on 43×58), of 64 channels at a time on a CPU.

    Returns: float [N, bins, channels] of the features' dtype.
    Raises: ValueError or TypeError for arguments that do not fit.
    """
    features = jnp.asarray(features)
    if features.ndim != 3:
        raise ValueError(
            "features must be one map [height, width, channels], got "
            f"{features.shape}; use jax.vmap for several maps"
        )
    check_maps(features)
    checked = _check_windows(windows, *features.shape[:2])
    return _pool_windows(features, checked, check_levels(levels))


def _pool_here(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> jax.Array:
    def on_cpu(features: jax.Array, windows: jax.Array) -> jax.Array:
        if features.dtype.itemsize != 2:
            return _pool(features, windows, levels)
        # A CPU has no arithmetic for half floats; their order is that of integers.
        order = _flip_negative(_pool(_order(features), windows, levels))
        return jax.lax.bitcast_convert_type(order, features.dtype)

    depth = features.shape[2]
    elsewhere = functools.partial(
        _pool, levels=levels, channels=depth, chunk=CHUNK_ELSEWHERE
    )
    return jax.lax.platform_dependent(features, windows, cpu=on_cpu, default=elsewhere)


_differentiable = jax.custom_vjp(_pool_here, nondiff_argnums=(2,))
_pool_windows = jax.jit(_differentiable, static_argnums=2)


def _forward(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    pooled = _differentiable(features, windows, levels)
    return pooled, (features, windows, pooled)


def _backward(
    levels: tuple[int, ...],
    saved: tuple[jax.Array, jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, None]:
    features, windows, pooled = saved
    # Nothing equals NaN: its gradient would come to no cell, and nobody would notice.
    gradient = jnp.where(jnp.isnan(pooled), jnp.nan, gradient)

    def again(features: jax.Array) -> jax.Array:
        # Thousands of windows add to a cell: half floats would lose most of the sum.
        wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        return _pool_here(wide, windows, levels).astype(features.dtype)

    return jax.vjp(again, features)[1](gradient)[0], None


_differentiable.defvjp(_forward, _backward)


def _pool(
    features: jax.Array,
    windows: jax.Array,
    levels: tuple[int, ...],
    *,
    channels: int = CHANNELS,
    chunk: int = CHUNK,
) -> jax.Array:
    """Pools some windows and some channels at a time into one array of results.

    `channels`: of a table, or fewer, so that all tables have as many.
    """
    count, (height, width, depth) = len(windows), features.shape
    results = jax.lax.empty((count, num_bins(levels), depth), features.dtype)
    if not results.size:
        return results
    counts = block_counts(features.shape, levels)
    corners = {
        level: _corners(windows, level, counts, height * width, width)
        for level in levels
        if _finer(level, levels) is None
    }
    channels = max(n for n in range(1, min(channels, depth) + 1) if depth % n == 0)
    if channels < FEWEST_CHANNELS:
        channels = depth
    chunk = -(-count // -(-count // chunk))  # of equal size, but for the rounding

    # Differentiation gathers again: what it would keep is many times the result.
    @jax.checkpoint
    def pool(table: jax.Array, some: dict[int, jax.Array]) -> jax.Array:
        return _pool_bins(table, some, levels)

    def pool_channels(number: jax.Array, results: jax.Array) -> jax.Array:
        first = number * channels
        some_features = jax.lax.dynamic_slice_in_dim(features, first, channels, axis=2)
        table = _block_table(some_features, *counts)

        def pool_chunk(index: jax.Array, results: jax.Array) -> jax.Array:
            # The last chunk overlaps the one before it: no padding, no copy.
            start = jnp.minimum(index * chunk, count - chunk)
            some = {
                level: jax.lax.dynamic_slice_in_dim(cells, start, chunk, axis=1)
                for level, cells in corners.items()
            }
            pooled = pool(table, some)
            return jax.lax.dynamic_update_slice(results, pooled, (start, 0, first))

        return jax.lax.fori_loop(0, -(-count // chunk), pool_chunk, results)

    return jax.lax.fori_loop(0, depth // channels, pool_channels, results)


def _order(features: jax.Array) -> jax.Array:
    """Half floats as int16 of the same order; NaN is above all, a maximum keeps it."""
    features = jnp.where(jnp.isnan(features), jnp.nan, features)  # without a sign
    return _flip_negative(jax.lax.bitcast_convert_type(features, jnp.int16))


def _flip_negative(bits: jax.Array) -> jax.Array:
    """Sign and magnitude to two's complement, and back."""
    return bits ^ ((bits >> 15) & jnp.int16(0x7FFF))


def block_counts(shape: Sequence[int], levels: tuple[int, ...]) -> tuple[int, int]:
    """How many block sizes 1, 2, 4, … the longest gathered bin needs on each side.

    The table of a map of this shape (height, width, …) is their product times the map.
    """
    gathered = [n for n in levels if _finer(n, levels) is None]

    def count(side: int) -> int:
        # Not always a bin of the coarsest level: 2 cells are bins of 1, 2, 1 for n = 3.
        lengths = [
            np.diff(pyramid_bins(size, level)).max()
            for level in gathered
            for size in range(1, side + 1)
        ]
        return int(max(lengths)).bit_length()

    return count(shape[0]), count(shape[1])


def _block_table(features: jax.Array, row_blocks: int, column_blocks: int) -> jax.Array:
    """Maxima of all blocks, those of each size one after another as flat maps.

    Row (r·column_blocks + c)·height·width + y·width + x is the maximum of the
    2^r × 2^c cells from (y, x): on a flat map a shift by rows or columns is one shift.
    Blocks that would leave the map hold anything; no bin asks for those.
    """
    height, width, channels = features.shape
    cells, sizes = height * width, row_blocks * column_blocks
    last_shift = (width << row_blocks) + (1 << column_blocks)
    table = jax.lax.empty((cells * sizes + last_shift, channels), features.dtype)
    flat = features.reshape(cells, channels)
    table = jax.lax.dynamic_update_slice(table, flat, (0, 0))
    for number in range(1, sizes):
        r, c = divmod(number, column_blocks)
        half = (number - 1 if c else number - column_blocks) * cells
        shift = 1 << (c - 1) if c else width << (r - 1)
        blocks = jnp.maximum(
            table[half : half + cells], table[half + shift : half + shift + cells]
        )
        table = jax.lax.dynamic_update_slice(table, blocks, (number * cells, 0))
    return table


def _corners(
    windows: jax.Array, level: int, counts: tuple[int, int], cells: int, width: int
) -> jax.Array:
    """Where in the table each bin's four blocks are: int32 [4, windows, level·level].

    They lie in the corners of the bin, and are as large as fit into it.
    """
    top, left, bottom, right = windows.T[:, :, None]
    index = jnp.arange(level, dtype=jnp.int32)  # as the windows, also under x64
    row_starts, row_stops = adaptive_span(index, bottom - top, level)
    column_starts, column_stops = adaptive_span(index, right - left, level)
    r = _log2(row_stops - row_starts)
    c = _log2(column_stops - column_starts)
    rows = top + jnp.stack([row_starts, row_stops - (1 << r)])
    columns = left + jnp.stack([column_starts, column_stops - (1 << c)])
    block = (r[:, :, None] * counts[1] + c[:, None, :]) * cells
    places = (rows * width)[:, None, :, :, None] + columns[None, :, :, None, :]
    return (block + places).reshape(4, len(windows), level * level)


def _pool_bins(
    table: jax.Array, corners: dict[int, jax.Array], levels: tuple[int, ...]
) -> jax.Array:
    """All bins of some windows, [windows, bins, channels], the finest level first."""
    pooled: dict[int, jax.Array] = {}  # by level: [windows, level, level, channels]
    for level in sorted(set(levels), reverse=True):
        finer = _finer(level, levels)
        if finer is None:
            blocks = [table.at[c].get(mode="promise_in_bounds") for c in corners[level]]
            bins = functools.reduce(jnp.maximum, blocks)
            pooled[level] = materialized(bins.reshape(len(bins), level, level, -1))
        else:
            side = finer // level
            rows = _max_of_neighbours(pooled[finer], side, axis=1)
            pooled[level] = _max_of_neighbours(rows, side, axis=2)
    flat = [pooled[n].reshape(len(pooled[n]), n * n, -1) for n in levels]
    return jnp.concatenate(flat, axis=1)


def _max_of_neighbours(bins: jax.Array, side: int, axis: int) -> jax.Array:
    """The maximum of each `side` neighbours along an axis; slices beat a reduction."""
    parts = [
        jax.lax.slice_in_dim(bins, k, None, stride=side, axis=axis) for k in range(side)
    ]
    return functools.reduce(jnp.maximum, parts)


def _finer(level: int, levels: tuple[int, ...]) -> int | None:
    """The least finer level that this one can be read off, if there is one."""
    return min((m for m in levels if m > level and m % level == 0), default=None)


def _log2(number: jax.Array) -> jax.Array:
    """Rounded down, of int32 from 1 up."""
    return 31 - jax.lax.clz(number)


def _check_windows(windows: Any, height: int, width: int) -> jax.Array:
    """The windows as int32 [N, 4], each at least one cell and inside the map."""
    array = jnp.asarray(windows)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(
            "windows must be int [N, 4], (top, left, bottom, right), got shape "
            f"{array.shape}"
        )
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"windows must be integer cells, got {array.dtype}; boxes_to_windows makes "
            "them from boxes in pixels"
        )
    parts = jax.tree.leaves(windows)
    if not any(isinstance(part, jax.core.Tracer) for part in parts):
        known = np.asarray(windows)
        inside = (known[:, :2] >= 0) & (known[:, 2:] <= (height, width))
        bad = ~(inside & (known[:, :2] < known[:, 2:])).all(axis=1)
        if bad.any():
            first = int(bad.argmax())
            raise ValueError(
                f"window {first} is {tuple(known[first].tolist())}: (top, left, "
                "bottom, right) must hold at least one cell and lie inside the map "
                f"of {height}×{width}"
            )
    size = jnp.array([height, width], jnp.int32)
    starts = jnp.clip(array[:, :2].astype(jnp.int32), 0, size - 1)
    stops = jnp.clip(array[:, 2:].astype(jnp.int32), starts + 1, size)
    return jnp.concatenate([starts, stops], axis=1)
