"""The mean of any bins of a map, each from four vectors of one table of sums.

The table (a summed-area table, or integral image) holds the sum of all cells above and
left of each corner of the map; a bin's sum is two of them less two others. In floating
point the small difference of large sums loses digits. So cells are summed as integers
here: integers that overflow on the way still give the right difference.

Each value becomes two integers of 32 bits, high + low · 2^-bits in units of a power of
two that suits its channel. `bits` are as many as let the sum of all cells fit: 17 for
75×100 cells, 34 with both integers. What is lost is less than a float32's rounding of
the bin's own mean, unless the bin's values are far below its channel's largest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class SumTable(NamedTuple):
    """Sums of cells above and left of each corner: [height + 1, width + 1, 2·channels].

    `unit`: float [channels], what a one stands for in the first half, the high parts.
    """

    sums: jax.Array
    unit: jax.Array


def sum_table(features: Float[Array, "height width channels"]) -> SumTable:
    """The table of a map of finite cells, float32 or float64."""
    height, width = features.shape[:2]
    parts, unit = _as_integers(features, terms=height * width)
    sums = jnp.pad(parts, ((1, 0), (1, 0), (0, 0)))
    return SumTable(_running_sums(sums), unit)


def span_mean(
    table: SumTable, edges: Int[Array, "4 windows bins"]
) -> Float[Array, "windows bins channels"]:
    """The mean of each bin, channel by channel.

    `edges`: int [4, windows, bins], (top, left, bottom, right) of each bin, half-open,
    at least one cell and inside the map.

    The error is a few roundings of the bin's mean, and (height·width)² · 2^-59 of the
    channel's largest magnitude (in float64, 2^-123): 1e-10 on a map of 75×100.

    Returns: float [windows, bins, channels] of the dtype of the table's unit.
    """
    top, left, bottom, right = edges
    height, width = (side - 1 for side in table.sums.shape[:2])
    flat = table.sums.reshape(-1, table.sums.shape[2])

    def corner(y: jax.Array, x: jax.Array) -> jax.Array:
        return flat.at[y * (width + 1) + x].get(mode="promise_in_bounds")

    sums = corner(bottom, right) - corner(top, right)
    sums += corner(top, left) - corner(bottom, left)
    total = _as_floats(sums, table.unit, terms=height * width)
    return total / _areas(edges, total.dtype) * table.unit


def span_mean_gradient(
    gradient: Float[Array, "windows bins channels"],
    edges: Int[Array, "4 windows bins"],
    height: int,
    width: int,
) -> Float[Array, "height width channels"]:
    """The gradient of a map's cells from that of the means of its bins.

    Each bin's is added at its corners; running sums spread it over its cells. These are
    sums of integers too, and do not depend on an order of adding. A gradient that is
    not finite makes its channel NaN.

    Returns: float [height, width, channels] of the gradient's dtype.
    """
    top, left, bottom, right = edges
    terms = top.size
    share = gradient / _areas(edges, gradient.dtype)
    parts, unit = _as_integers(share, terms)
    sums = jnp.zeros((height + 1, width + 1, parts.shape[-1]), parts.dtype)
    for y, x, sign in (
        (top, left, 1),
        (top, right, -1),
        (bottom, left, -1),
        (bottom, right, 1),
    ):
        sums = sums.at[y, x].add(sign * parts, mode="promise_in_bounds")
    sums = _running_sums(sums)[:height, :width]
    total = _as_floats(sums, unit, terms) * unit
    finite = jnp.isfinite(gradient).all(axis=(0, 1))
    return jnp.where(finite, total, jnp.nan)


def _as_integers(values: jax.Array, terms: int) -> tuple[jax.Array, jax.Array]:
    """High and low parts, int [..., 2·channels], and the unit, float [channels].

    The sum of any `terms` of them fits into the integers.
    """
    bits, limits = _bits(values.dtype, terms), jnp.finfo(values.dtype)
    largest = jnp.max(jnp.abs(values), axis=(0, 1), initial=0)
    # Neither the unit nor what it is the inverse of may be subnormal.
    exponent = jnp.maximum(jnp.frexp(largest)[1], int(limits.minexp) + bits + 2)
    one = jnp.ones_like(largest)
    scaled = values * jnp.ldexp(one, bits + 1 - exponent)  # below 2^(bits + 1)
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * 2.0**bits)
    parts = jnp.concatenate([high, low], axis=-1).astype(_integer(values.dtype))
    return parts, jnp.ldexp(one, exponent - bits - 1)


def _as_floats(sums: jax.Array, unit: jax.Array, terms: int) -> jax.Array:
    """Sums of high and of low parts as floats, in units."""
    high, low = jnp.split(sums.astype(unit.dtype), 2, axis=-1)
    return high + low * 2.0 ** -_bits(unit.dtype, terms)


def _bits(dtype: jnp.dtype, terms: int) -> int:
    return jnp.iinfo(_integer(dtype)).bits - 2 - terms.bit_length()


def _integer(dtype: jnp.dtype) -> jnp.dtype:
    """As wide as the float; int64 is there wherever float64 is."""
    return jnp.dtype(f"int{8 * dtype.itemsize}")


def _running_sums(cells: jax.Array) -> jax.Array:
    return jax.lax.cumsum(jax.lax.cumsum(cells, axis=0), axis=1)


def _areas(edges: jax.Array, dtype: jnp.dtype) -> jax.Array:
    top, left, bottom, right = edges
    return ((bottom - top) * (right - left)).astype(dtype)[:, :, None]
