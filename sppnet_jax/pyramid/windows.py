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

A mean does mind. Its bins are four vectors of a table of sums instead (`span_mean`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from sppnet_jax.pyramid.pooling import (
    adaptive_span,
    check_levels,
    check_maps,
    check_reducer,
    num_bins,
    pyramid_bins,
)
from sppnet_jax.pyramid.span_max import materialized
from sppnet_jax.pyramid.span_mean import (
    SumTable,
    span_mean,
    span_mean_gradient,
    sum_table,
)

# Windows pooled at a time, and channels of a table: few enough that both the table and
# what is gathered from it stay in a CPU's cache.
CHUNK = 128
CHANNELS = 64
CHUNK_ELSEWHERE = 1024  # on a GPU, 4096 took half as long again for 2,000 windows
FEWEST_CHANNELS = 16  # of a table, if all tables are to have as many


def window_pyramid_pool(
    features: Float[ArrayLike, "height width channels"],
    windows: Int[ArrayLike, "windows 4"],
    levels: Sequence[int],
    *,
    reducer: str = "max",
) -> Float[Array, "windows bins channels"]:
    """Pools every bin of every level of every window; adaptive bins (appendix A).

    `features`: float [height, width, channels], one map; `jax.vmap` over several.
    `windows`: int [N, 4], half-open cells (top, left, bottom, right). They are traced:
    new windows compile nothing, another N does. Traced windows are clamped to the map
    and to at least one cell; concrete ones that would need it raise.
    `levels`: bins come in this order, row-major inside a level.
    `reducer`: "max" (the paper) or "mean".

    The result and the gradient are those of `spatial_pyramid_pool` on the map cropped
    to the window; only cells that tie for a maximum share its gradient differently. It
    differentiates in reverse mode (`jax.grad`, `jax.vjp`). A maximum is exact. The
    error of a mean is a few roundings of float32 (of float64 for float64), and
    (height·width)² · 2^-59 of the channel's largest magnitude: 1e-10 on a map of
    75×100. NaN and infinities reach the bins that hold them and no others.
    Memory beside the result: the table, of 64 channels at a time on a CPU. It is one
    map for each size of block (16 for (6, 3, 2, 1) on 43×58), two maps for means.

    Returns: float [N, bins, channels] of the features' dtype.
    Raises: ValueError or TypeError for arguments that do not fit.
    """
    features = jnp.asarray(features)
    check_reducer(reducer)
    if features.ndim != 3:
        raise ValueError(
            "features must be one map [height, width, channels], got "
            f"{features.shape}; use jax.vmap for several maps"
        )
    check_maps(features)
    checked = _check_windows(windows, *features.shape[:2])
    return _PROGRAMS[reducer](features, checked, check_levels(levels))


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


def _forward(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _differentiable(features, windows, levels), (features, windows)


def _backward(
    levels: tuple[int, ...],
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, None]:
    features, windows = saved
    # Map by map under vmap too: a loop over several runs until the last one ends.
    backward = jax.custom_batching.sequential_vmap(
        functools.partial(_gradient_of_max, levels=levels)
    )
    return backward(features, gradient, windows), None


def _gradient_of_max(
    features: jax.Array,
    gradient: jax.Array,
    windows: jax.Array,
    levels: tuple[int, ...],
) -> jax.Array:
    """The gradient of `_pool`; that of half floats is summed in float32.

    As forwards, some channels at a time: bins hand theirs to the blocks of the table
    that hold their maximum, and these to the halves that they are made of. What is
    read more than once is held, or XLA computes it for each reader.
    """
    counts = block_counts(features.shape, levels)
    height, width, depth = features.shape
    size = height * width * counts[0] * counts[1]
    gathered = _gathered_corners(windows, features.shape, levels)
    bins = [level * level for level in gathered]
    corners = jnp.concatenate(list(gathered.values()), axis=2)  # [4, windows, bins]
    channels = _table_channels(depth, CHANNELS)

    def all_levels(flat: jax.Array) -> jax.Array:
        parts = jnp.split(flat, np.cumsum(bins)[:-1], axis=1)
        return _all_levels(dict(zip(gathered, parts, strict=True)), levels)

    def of_channels(number: jax.Array, total: jax.Array) -> jax.Array:
        first = number * channels
        some, own = (
            _widened(jax.lax.dynamic_slice_in_dim(values, first, channels, axis=2))
            for values in (features, gradient)
        )
        table = _block_table(some, *counts)
        blocks = [table.at[c].get(mode="promise_in_bounds") for c in corners]
        best = _held(functools.reduce(jnp.maximum, blocks))
        (share,) = jax.vjp(all_levels, best)[1](_held(own))
        # Nothing equals NaN: its gradient would come to no cell, and nobody would know.
        share = _held(jnp.where(jnp.isnan(best), jnp.nan, share))
        # Of corners that tie the first, so that those on the same cells count once.
        holder = jnp.full(best.shape, len(blocks) - 1, jnp.int8)
        for corner in reversed(range(len(blocks) - 1)):
            holder = jnp.where(blocks[corner] < best, holder, jnp.int8(corner))
        holder = _held(holder)
        rows = [jnp.where(holder == corner, share, 0) for corner in range(len(blocks))]
        sums = jnp.zeros((size, channels), share.dtype)
        sums = sums.at[corners].add(jnp.stack(rows), mode="promise_in_bounds")
        cells = _block_table_gradient(table, sums, *counts, height, width)
        cells = cells.reshape(height, width, channels).astype(total.dtype)
        return jax.lax.dynamic_update_slice(total, cells, (0, 0, first))

    if not len(windows):
        return jnp.zeros_like(features)
    empty = jax.lax.empty(features.shape, features.dtype)
    return jax.lax.fori_loop(0, depth // channels, of_channels, empty)


def _block_table_gradient(
    table: jax.Array,
    gradient: jax.Array,
    row_blocks: int,
    column_blocks: int,
    height: int,
    width: int,
) -> jax.Array:
    """From gradients of all blocks to those of the cells, [cells, channels]."""
    cells = height * width
    sums = [
        gradient[number * cells : (number + 1) * cells]
        for number in range(row_blocks * column_blocks)
    ]
    for number in reversed(range(1, len(sums))):
        r, c = divmod(number, column_blocks)
        half = number - 1 if c else number - column_blocks
        shift = 1 << (c - 1) if c else width << (r - 1)
        near = table[half * cells : (half + 1) * cells]
        far = table[half * cells + shift : (half + 1) * cells + shift]
        own = sums[number]
        to_near = jnp.where(near < far, 0, jnp.where(far < near, own, own / 2))
        # Blocks that would leave the map have no gradient: none is cut off here.
        to_far = jnp.pad((own - to_near)[: cells - shift], ((shift, 0), (0, 0)))
        sums[half] = _held(sums[half] + to_near + to_far)
    return sums[0]


def _held(rows: jax.Array) -> jax.Array:
    """`materialized`, of fewer than four dimensions."""
    shape = (1,) * (4 - rows.ndim) + rows.shape
    return materialized(rows.reshape(shape)).reshape(rows.shape)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mean(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> jax.Array:
    # Map by map under vmap too: for several at once the condition takes both ways.
    pool = functools.partial(_mean_here, levels=levels)
    return jax.custom_batching.sequential_vmap(pool)(features, windows)


def _mean_here(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> jax.Array:
    # A CPU would widen all results for each half float that it puts into them.
    kept = jnp.int16 if features.dtype.itemsize == 2 else features.dtype
    counts = block_counts(features.shape, levels)
    edges = _bin_edges(windows, levels)
    corners = _gathered_corners(windows, features.shape, levels)

    def as_bits(means: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(means.astype(features.dtype), kept)

    def pool_finite(table: SumTable, edges: jax.Array) -> jax.Array:
        return as_bits(span_mean(table, edges))

    # One infinite sum would spoil all that follow: a maximum and a minimum stand in.
    def tables(cells: jax.Array) -> tuple[SumTable, jax.Array, jax.Array]:
        finite = jnp.isfinite(cells)
        infinities = jnp.where(finite, 0, cells)
        return (
            sum_table(jnp.where(finite, cells, 0)),
            _block_table(infinities, *counts),
            _block_table(-infinities, *counts),
        )

    def pool_any(tables: Any, places: Any) -> jax.Array:
        (sums, highest, lowest), (edges, corners) = tables, places
        infinities = _pool_bins(highest, corners, levels)
        infinities -= _pool_bins(lowest, corners, levels)
        return as_bits(span_mean(sums, edges) + infinities)

    def pool(features: jax.Array, *, channels: int, chunk: int) -> jax.Array:
        pieces = functools.partial(
            _in_pieces,
            _widened(features),
            results=(num_bins(levels), kept),
            channels=channels,
            chunk=chunk,
        )
        bits = jax.lax.cond(
            jnp.isfinite(features).all(),
            lambda: pieces(edges, sum_table, pool_finite),
            lambda: pieces((edges, corners), tables, pool_any),
        )
        return jax.lax.bitcast_convert_type(bits, features.dtype)

    on_cpu = functools.partial(pool, channels=CHANNELS, chunk=CHUNK)
    elsewhere = functools.partial(
        pool, channels=features.shape[2], chunk=CHUNK_ELSEWHERE
    )
    return jax.lax.platform_dependent(features, cpu=on_cpu, default=elsewhere)


def _mean_forward(
    features: jax.Array, windows: jax.Array, levels: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _mean(features, windows, levels), (features, windows)


def _mean_backward(
    levels: tuple[int, ...], saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    features, windows = saved
    height, width, depth = features.shape
    edges = _bin_edges(windows, levels)

    def pull_back(gradient: jax.Array, *, channels: int) -> jax.Array:
        channels = _table_channels(depth, channels)

        def pull_channels(number: jax.Array, total: jax.Array) -> jax.Array:
            first = number * channels
            some = jax.lax.dynamic_slice_in_dim(gradient, first, channels, axis=2)
            part = span_mean_gradient(some, edges, height, width)
            return jax.lax.dynamic_update_slice(total, part, (0, 0, first))

        total = jnp.zeros_like(features, gradient.dtype)
        return jax.lax.fori_loop(0, depth // channels, pull_channels, total)

    if not gradient.size:
        return jnp.zeros_like(features), None
    on_cpu = functools.partial(pull_back, channels=CHANNELS)
    elsewhere = functools.partial(pull_back, channels=depth)
    total = jax.lax.platform_dependent(
        _widened(gradient), cpu=on_cpu, default=elsewhere
    )
    return total.astype(features.dtype), None


_mean.defvjp(_mean_forward, _mean_backward)

_PROGRAMS = {
    "max": jax.jit(_differentiable, static_argnums=2),
    "mean": jax.jit(_mean, static_argnums=2),
}


def _pool(
    features: jax.Array,
    windows: jax.Array,
    levels: tuple[int, ...],
    *,
    channels: int = CHANNELS,
    chunk: int = CHUNK,
) -> jax.Array:
    """The maxima of all bins; `channels` and `chunk` are those of `_in_pieces`."""
    counts = block_counts(features.shape, levels)
    corners = _gathered_corners(windows, features.shape, levels)

    def pool(table: jax.Array, some: dict[int, jax.Array]) -> jax.Array:
        return _pool_bins(table, some, levels)

    return _in_pieces(
        *(features, corners, lambda some: _block_table(some, *counts), pool),
        results=(num_bins(levels), features.dtype),
        channels=channels,
        chunk=chunk,
    )


def _in_pieces(
    features: jax.Array,
    places: Any,
    table_of: Callable[[jax.Array], Any],
    pool: Callable[[Any, Any], jax.Array],
    *,
    results: tuple[int, Any],
    channels: int,
    chunk: int,
) -> jax.Array:
    """Pools some windows and some channels at a time into one array of results.

    `places`: what `pool` needs of the windows, arrays with these along axis 1.
    `results`: the number of bins and the dtype of what `pool` returns.
    `channels`: of a table, or fewer, so that all tables have as many.
    """
    count, depth = jax.tree.leaves(places)[0].shape[1], features.shape[2]
    bins, dtype = results
    pooled = jax.lax.empty((count, bins, depth), dtype)
    if not pooled.size:
        return pooled
    channels = _table_channels(depth, channels)
    chunk = -(-count // -(-count // chunk))  # of equal size, but for the rounding

    def pool_channels(number: jax.Array, pooled: jax.Array) -> jax.Array:
        first = number * channels
        table = table_of(
            jax.lax.dynamic_slice_in_dim(features, first, channels, axis=2)
        )

        def pool_chunk(index: jax.Array, pooled: jax.Array) -> jax.Array:
            # The last chunk overlaps the one before it: no padding, no copy.
            start = jnp.minimum(index * chunk, count - chunk)
            some = jax.tree.map(
                lambda own: jax.lax.dynamic_slice_in_dim(own, start, chunk, axis=1),
                places,
            )
            part = pool(table, some)
            return jax.lax.dynamic_update_slice(pooled, part, (start, 0, first))

        return jax.lax.fori_loop(0, -(-count // chunk), pool_chunk, pooled)

    return jax.lax.fori_loop(0, depth // channels, pool_channels, pooled)


def _table_channels(depth: int, channels: int) -> int:
    """The most channels up to `channels` that divide `depth`; all, if those are few."""
    most = max(n for n in range(1, min(channels, depth) + 1) if depth % n == 0)
    return most if most >= FEWEST_CHANNELS else depth


def _bin_edges(windows: jax.Array, levels: tuple[int, ...]) -> jax.Array:
    """(top, left, bottom, right) of all bins on the map: int32 [4, windows, bins]."""
    top, left, bottom, right = windows.T[:, :, None]
    found = []
    for level in levels:
        index = jnp.arange(level, dtype=jnp.int32)
        rows = jnp.stack(adaptive_span(index, bottom - top, level)) + top
        columns = jnp.stack(adaptive_span(index, right - left, level)) + left
        starts, stops = (
            jnp.stack(jnp.broadcast_arrays(y[:, :, None], x[:, None, :]))
            for y, x in zip(rows, columns, strict=True)
        )
        edges = jnp.concatenate([starts, stops])
        found.append(edges.reshape(4, len(windows), level * level))
    return jnp.concatenate(found, axis=2)


def _widened(values: jax.Array) -> jax.Array:
    """Half floats as float32: thousands of them add up."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


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


def _gathered_corners(
    windows: jax.Array, shape: Sequence[int], levels: tuple[int, ...]
) -> dict[int, jax.Array]:
    """The corners of each level that is not read off a finer one."""
    height, width = shape[:2]
    counts = block_counts(shape, levels)
    return {
        level: _corners(windows, level, counts, height * width, width)
        for level in levels
        if _finer(level, levels) is None
    }


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
    """All bins of some windows, [windows, bins, channels]."""
    gathered = {}
    for level, places in corners.items():
        blocks = [table.at[own].get(mode="promise_in_bounds") for own in places]
        bins = functools.reduce(jnp.maximum, blocks)
        gathered[level] = materialized(bins.reshape(len(bins), level, level, -1))
    return _all_levels(gathered, levels)


def _all_levels(gathered: dict[int, jax.Array], levels: tuple[int, ...]) -> jax.Array:
    """All bins [windows, bins, channels] from those of the levels that no other has."""
    pooled: dict[int, jax.Array] = {}  # by level: [windows, level, level, channels]
    for level in sorted(set(levels), reverse=True):
        finer = _finer(level, levels)
        if finer is None:
            own = gathered[level]
            pooled[level] = own.reshape(len(own), level, level, -1)
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
