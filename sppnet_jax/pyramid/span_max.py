"""The maximum of every bin of a map, whose gradient costs little more than itself.

A bin is a span of rows and one of columns: bins of a pyramid's level, or windows of a
max pooling. On a CPU, XLA's own gradients of these maxima take seven times as long in
the pyramid and 6 to 20 times in the pooling layers (its select-and-scatter). Elsewhere
the maxima are XLA's reduce-windows; the gradient is this one there too: on an H100
XLA's take 1.7 to 4.1 times as long, forward and backward. A TPU has run neither.

The gradient asks each cell of each bin whether it is the bin's maximum, twice: to count
them, and to hand each its share. Both are plain loops over bins and cells that XLA
fuses, without a scatter. Cells that tie for a maximum share its gradient evenly, in
each pass by itself where a bin is reduced in two. It is a gradient for reverse mode
(`jax.grad`, `jax.vjp`) only.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

Spans = tuple[tuple[int, int], ...]  # half-open, along one side of a map
# Bins of more cells, or more uneven ones, are reduced along rows, then along columns.
MOST_CELLS = 16
MOST_RUNS = 4
# Where a span is longer than this, cells outnumber bins by far: XLA's reductions do.
LONGEST = 8


def span_max(
    maps: Float[Array, "batch height width channels"],
    rows: Sequence[tuple[int, int]] | np.ndarray,
    columns: Sequence[tuple[int, int]] | np.ndarray,
) -> Float[Array, "batch rows columns channels"]:
    """The maximum over each span of rows and each of columns, channel by channel.

    `maps`: float [batch, height, width, channels].
    `rows`, `columns`: static half-open spans [start, stop) inside the map, int [n, 2].
    They may overlap, leave gaps and be of different lengths.

    Returns: float [batch, row spans, column spans, channels] of the maps' dtype.
    """
    # Exact in float32, and a CPU has no arithmetic for less.
    dtype, maps = maps.dtype, maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
    rows, columns = _as_spans(rows), _as_spans(columns)
    if max(_longest(rows), _longest(columns)) > LONGEST:
        best = reduce_slices(jnp.max, reduce_slices(jnp.max, maps, rows, 1), columns, 2)
        return best.astype(dtype)
    cells = _longest(rows) * _longest(columns)
    if cells > MOST_CELLS or len(_runs(rows)) * len(_runs(columns)) > MOST_RUNS:
        maps = _span_max(maps, rows, tuple((i, i + 1) for i in range(maps.shape[2])))
        rows = tuple((i, i + 1) for i in range(len(rows)))
    return _span_max(maps, rows, columns).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _span_max(maps: jax.Array, rows: Spans, columns: Spans) -> jax.Array:
    def on_cpu(maps: jax.Array) -> jax.Array:
        def block(some_rows: Run, some_columns: Run) -> jax.Array:
            return functools.reduce(jnp.maximum, _cells(maps, some_rows, some_columns))

        return _window_of_one(_from_blocks(block, rows, columns))

    def elsewhere(maps: jax.Array) -> jax.Array:
        return _from_blocks(functools.partial(_reduce_window, maps), rows, columns)

    return jax.lax.platform_dependent(maps, cpu=on_cpu, default=elsewhere)


def _forward(
    maps: jax.Array, rows: Spans, columns: Spans
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    pooled = _span_max(maps, rows, columns)
    return pooled, (maps, pooled)


def _backward(
    rows: Spans,
    columns: Spans,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array]:
    maps, pooled = saved

    # Nothing equals NaN: all cells of its bin get its gradient, which is NaN.
    def ties_of(some_rows: Run, some_columns: Run) -> jax.Array:
        best = _strided(pooled, some_rows.first, some_rows._replace(step=1), axis=1)
        best = _strided(best, some_columns.first, some_columns._replace(step=1), axis=2)
        cells = _cells(maps, some_rows, some_columns)
        ties = functools.reduce(
            jnp.add, [(c == best).astype(maps.dtype) for c in cells]
        )
        return jnp.where(jnp.isnan(best), jnp.nan, ties)

    ties = _from_blocks(ties_of, rows, columns)
    share = gradient / ties
    total = jnp.zeros_like(maps)
    for row, in_row in _covering(rows, maps.shape[1]):
        for column, in_column in _covering(columns, maps.shape[2]):
            best = pooled[:, row[:, None], column]
            own = share[:, row[:, None], column]
            inside = (in_row[:, None] & in_column)[:, :, None]
            total += jnp.where(~(maps < best) & inside, own, 0)
    return (total,)


_span_max.defvjp(_forward, _backward)


class Run(NamedTuple):
    """Neighbouring spans of one length at one step: `spans` of them from `first` on."""

    first: int
    spans: int
    start: int
    step: int
    length: int


def _runs(spans: Spans) -> list[Run]:
    runs: list[Run] = []
    for number, (start, stop) in enumerate(spans):
        last = runs[-1] if runs else None
        if last and stop - start == last.length:
            step = start - spans[number - 1][0]
            if step > 0 and (last.spans == 1 or step == last.step):
                runs[-1] = last._replace(spans=last.spans + 1, step=step)
                continue
        runs.append(Run(number, 1, start, 1, stop - start))
    return runs


def _cells(maps: jax.Array, rows: Run, columns: Run) -> list[jax.Array]:
    """The cells of the runs' bins: for each place in a bin, that cell of every bin."""
    found = []
    for y in range(rows.start, rows.start + rows.length):
        some = _strided(maps, y, rows, axis=1)
        for x in range(columns.start, columns.start + columns.length):
            found.append(_strided(some, x, columns, axis=2))
    return found


def _strided(maps: jax.Array, start: int, run: Run, axis: int) -> jax.Array:
    stop = start + (run.spans - 1) * run.step + 1
    return jax.lax.slice_in_dim(maps, start, stop, run.step, axis)


def _reduce_window(maps: jax.Array, rows: Run, columns: Run) -> jax.Array:
    """The maxima of the runs' bins, as XLA has them."""
    for axis, run in ((1, rows), (2, columns)):
        stop = run.start + (run.spans - 1) * run.step + run.length
        maps = jax.lax.slice_in_dim(maps, run.start, stop, axis=axis)
    return jax.lax.reduce_window(
        maps,
        np.array(-np.inf, maps.dtype),
        jax.lax.max,
        (1, rows.length, columns.length, 1),
        (1, rows.step, columns.step, 1),
        "VALID",
    )


def _from_blocks(
    block: Callable[[Run, Run], jax.Array], rows: Spans, columns: Spans
) -> jax.Array:
    """Puts together what `block` makes of each run of rows and each of columns."""
    return jnp.concatenate(
        [
            jnp.concatenate([block(y, x) for x in _runs(columns)], axis=2)
            for y in _runs(rows)
        ],
        axis=1,
    )


def _covering(spans: Spans, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The k-th span that holds each cell and whether there is one, for each k."""
    holding = [
        [i for i, (start, stop) in enumerate(spans) if start <= cell < stop]
        for cell in range(size)
    ]
    most = max(map(len, holding))
    return [
        (
            np.array([own[k] if k < len(own) else 0 for own in holding]),
            np.array([k < len(own) for own in holding]),
        )
        for k in range(most)
    ]


def reduce_slices(
    reduce: Callable[..., jax.Array],
    maps: jax.Array,
    spans: Iterable[Sequence[int]],
    axis: int,
) -> jax.Array:
    """Each span of an axis reduced to one cell."""
    parts = [
        reduce(jax.lax.slice_in_dim(maps, start, stop, axis=axis), axis=axis)
        for start, stop in spans
    ]
    return jnp.stack(parts, axis=axis)


def _longest(spans: Spans) -> int:
    return max(stop - start for start, stop in spans)


def _as_spans(spans: Sequence[tuple[int, int]] | np.ndarray) -> Spans:
    return tuple((int(start), int(stop)) for start, stop in spans)


@jax.custom_vjp
def materialized(
    maps: Shaped[Array, "*batch channels"],
) -> Shaped[Array, "*batch channels"]:
    """The same values, held in memory of their own.

    XLA fuses elementwise operations, slices and gathers into all that read them, also
    where each reader then computes them anew. On a CPU its `optimization_barrier` is
    gone by then; but it does not fuse a reduce-window, and this is one of single cells.
    """
    return jax.lax.platform_dependent(
        maps, cpu=_window_of_one, default=jax.lax.optimization_barrier
    )


materialized.defvjp(
    lambda maps: (materialized(maps), None), lambda _, gradient: (gradient,)
)


def _window_of_one(maps: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(maps.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(maps.dtype).min
    before = (maps.ndim - 1) * (1,)
    return jax.lax.reduce_window(
        maps[..., None, :],
        np.array(lowest, maps.dtype),
        jax.lax.max,
        (*before, 2, 1),
        (*before, 1, 1),
        (*((0, 0) for _ in before), (1, 0), (0, 0)),
    )[..., 0, :]
