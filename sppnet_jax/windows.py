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

from sppnet_jax.spp import adaptive_span, check_levels, num_bins, pyramid_bins

# Windows pooled at a time: few enough that what they gather stays in the cache.
CHUNK = 64


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
    to the window; only cells that tie for a maximum share its gradient differently.
    Memory beside the result: twice the table, which is one map for each size of block
    (16 for (6, 3, 2, 1) on 43×58).

    Returns: float [N, bins, channels] of the features' dtype.
    Raises: ValueError or TypeError for arguments that do not fit.
    """
    features = jnp.asarray(features)
    if features.ndim != 3:
        raise ValueError(
            "features must be one map [height, width, channels], got "
            f"{features.shape}; use jax.vmap for several maps"
        )
    if 0 in features.shape[:2]:
        raise ValueError(f"features hold an empty map: shape {features.shape}")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise TypeError(f"features must be floating point, got {features.dtype}")
    checked = _check_windows(windows, *features.shape[:2])
    return _pool_windows(features, checked, check_levels(levels))


@functools.partial(jax.jit, static_argnames="levels")
def _pool_windows(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> jax.Array:
    """Pools chunk after chunk of the windows into one array of results."""
    count = len(windows)
    pooled = jnp.zeros((count, num_bins(levels), features.shape[2]), features.dtype)
    if not count:
        return pooled
    table, offsets = _block_table(features, *_block_counts(features.shape, levels))

    # Differentiation gathers again: what it would keep is many times the result.
    @jax.checkpoint
    def pool(table: jax.Array, windows: jax.Array) -> jax.Array:
        def pool_one(window: jax.Array) -> jax.Array:
            return _pool_window(table, offsets, features.shape[1], window, levels)

        return jax.vmap(pool_one)(windows)

    chunk = min(count, CHUNK)

    def step(index: jax.Array, pooled: jax.Array) -> jax.Array:
        # The last chunk overlaps the one before it: no padding, no copy of the result.
        start = jnp.minimum(index * chunk, count - chunk)
        some = jax.lax.dynamic_slice_in_dim(windows, start, chunk)
        return jax.lax.dynamic_update_slice_in_dim(pooled, pool(table, some), start, 0)

    return jax.lax.fori_loop(0, -(-count // chunk), step, pooled)


def _block_counts(shape: Sequence[int], levels: tuple[int, ...]) -> tuple[int, int]:
    """How many block sizes 1, 2, 4, … the largest gathered bin needs on each side."""
    gathered = min(n for n in levels if _finer(n, levels) is None)

    def count(side: int) -> int:
        bins = [pyramid_bins(size, gathered) for size in range(1, side + 1)]
        return int(max(np.diff(spans).max() for spans in bins)).bit_length()

    return count(shape[0]), count(shape[1])


def _block_table(
    features: jax.Array, row_blocks: int, column_blocks: int
) -> tuple[jax.Array, np.ndarray]:
    """Maxima of all blocks, and where those of each size begin.

    Row offsets[r, c] + y·width + x is the maximum of the 2^r × 2^c cells from (y, x).
    On the flat map a shift by rows or by columns is one shift. Blocks that would leave
    the map at its right wrap around; no bin asks for those.
    """
    _, width, channels = features.shape
    tall = features.reshape(-1, channels)
    blocks = []
    for r in range(row_blocks):
        if r:
            tall = _double(tall, width << (r - 1))
        wide = tall
        for c in range(column_blocks):
            if c:
                wide = _double(wide, 1 << (c - 1))
            blocks.append(wide)
    lengths = [len(block) for block in blocks]
    offsets = np.cumsum([0, *lengths[:-1]], dtype=np.int32)
    return jnp.concatenate(blocks), offsets.reshape(row_blocks, column_blocks)


def _double(blocks: jax.Array, step: int) -> jax.Array:
    return jnp.maximum(blocks[:-step], blocks[step:])


def _pool_window(
    table: jax.Array,
    offsets: np.ndarray,
    width: int,
    window: jax.Array,
    levels: tuple[int, ...],
) -> jax.Array:
    """All bins [bins, channels] of one window, the finest level first."""
    pooled: dict[int, jax.Array] = {}  # by level: [level, level, channels]
    for level in sorted(set(levels), reverse=True):
        finer = _finer(level, levels)
        if finer is None:
            pooled[level] = _gather_bins(table, offsets, width, window, level)
        else:
            rows = _max_of_neighbours(pooled[finer], finer // level)
            columns = _max_of_neighbours(rows.swapaxes(0, 1), finer // level)
            pooled[level] = columns.swapaxes(0, 1)
    return jnp.concatenate(
        [pooled[level].reshape(level * level, -1) for level in levels]
    )


def _gather_bins(
    table: jax.Array, offsets: np.ndarray, width: int, window: jax.Array, level: int
) -> jax.Array:
    """The n×n bins of one window, each the maximum of the blocks in its corners."""
    top, left, bottom, right = window
    index = jnp.arange(level)
    row_starts, row_stops = adaptive_span(index, bottom - top, level)
    column_starts, column_stops = adaptive_span(index, right - left, level)
    r = _log2(row_stops - row_starts)
    c = _log2(column_stops - column_starts)
    rows = top + jnp.stack([row_starts, row_stops - (1 << r)])
    columns = left + jnp.stack([column_starts, column_stops - (1 << c)])
    begin = jnp.asarray(offsets)[r[:, None], c]

    def corner(i: int, j: int) -> jax.Array:
        cells = begin + rows[i][:, None] * width + columns[j]
        return table.at[cells].get(mode="promise_in_bounds")

    return jnp.maximum(
        jnp.maximum(corner(0, 0), corner(0, 1)), jnp.maximum(corner(1, 0), corner(1, 1))
    )


def _max_of_neighbours(bins: jax.Array, side: int) -> jax.Array:
    """The maximum of each `side` neighbours along axis 0; slices beat a reduction."""
    return functools.reduce(jnp.maximum, [bins[k::side] for k in range(side)])


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
