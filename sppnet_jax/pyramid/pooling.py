"""Spatial pyramid pooling: a map of any size becomes a vector of one size.

An n×n level cuts the map into n×n bins and keeps the maximum of each bin, channel by
channel. A pyramid is several levels, finest first by custom: (6, 3, 2, 1) has
36 + 9 + 4 + 1 = 50 bins. The number of bins does not depend on the size of the map, so
the fully connected layers behind it accept images of any size (He et al. 2014,
section 2.2).

Layout everywhere: features [..., height, width, channels], bins row-major in a level.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from sppnet_jax.pyramid.span_max import reduce_slices, span_max


def pyramid_bins(size: int, level: int, rule: str = "adaptive") -> np.ndarray:
    """The half-open spans [start, stop) of a level's bins along one side of a map.

    `rule="adaptive"`: bin i covers floor(i·a/n) to ceil((i+1)·a/n) (appendix A), for
    every size and level; bins overlap where n does not divide a, and repeat where the
    map is smaller than the level. `rule="sliding"`: windows of ceil(a/n) at a stride of
    floor(a/n) (section 2.2), which gives n bins for some sizes only.

    Returns: int [level, 2].
    Raises: ValueError where the sliding rule does not give `level` bins.
    """
    if size < 1 or level < 1:
        raise ValueError(f"size and level must be at least 1, got {size=}, {level=}")
    index = np.arange(level)
    if rule == "adaptive":
        starts, stops = adaptive_span(index, size, level)
        return np.stack([starts, stops], axis=1)
    if rule == "sliding":
        window, stride = math.ceil(size / level), size // level
        outputs = (size - window) // stride + 1 if stride else 0
        if outputs != level:
            seen = f"{outputs}×{outputs}" if outputs else "no"
            why = "" if outputs else " (stride 0)"
            raise ValueError(
                f"the sliding rule gives {seen} outputs{why} on a map of size {size} "
                f"at level {level}, not {level}: window ceil({size}/{level}) = "
                f"{window}, stride floor({size}/{level}) = {stride}. "
                "Use rule='adaptive', which fits every size."
            )
        return np.stack([index * stride, index * stride + window], axis=1)
    raise ValueError(f"unknown rule {rule!r}: use 'adaptive' or 'sliding'")


def spatial_pyramid_pool(
    features: Float[ArrayLike, "*batch height width channels"],
    levels: Sequence[int],
    *,
    rule: str = "adaptive",
    valid_size: Int[ArrayLike, "*#batch 2"] | Sequence[int] | None = None,
    reducer: str = "max",
) -> Float[Array, "*batch bins channels"]:
    """Pools every bin of every level; the number of bins is the sum of n·n over levels.

    `features`: float [..., height, width, channels], any number of leading dimensions.
    `levels`: bins come in this order, row-major inside a level.
    `valid_size`: int [..., 2], broadcast over the leading dimensions: the (height,
    width) of each map that counts, from its top left. The result is that of the cropped
    map, exactly. It may be traced: new sizes compile nothing. Traced values are clamped
    to [1, height] and [1, width]; concrete ones outside raise.
    `reducer`: "max" (the paper) or "mean". A maximum differentiates in reverse mode
    (`jax.grad`, `jax.vjp`); cells that tie for it share its gradient.

    Returns: float [..., bins, channels] of the features' dtype.
    Raises: ValueError or TypeError for arguments that do not fit.
    """
    features = jnp.asarray(features)
    check_reducer(reducer)
    if features.ndim < 3:
        raise ValueError(
            f"features must be [..., height, width, channels], got {features.shape}"
        )
    check_maps(features)
    levels = check_levels(levels)
    *batch, height, width, channels = features.shape
    maps = features.reshape(math.prod(batch), height, width, channels)
    sizes = None
    if valid_size is not None:
        if rule != "adaptive":
            raise ValueError(
                f"valid_size needs rule='adaptive', got {rule!r}: whether the sliding "
                "rule gives n×n bins depends on the size, which is not known here"
            )
        sizes = _check_valid_size(valid_size, batch, height, width).reshape(-1, 2)
    bins = _pool_pyramid(maps, sizes, levels=levels, rule=rule, reducer=reducer)
    return bins.reshape(*batch, num_bins(levels), channels)


# One program where nothing else is compiled around it; a part of the other's if it is.
@partial(jax.jit, static_argnames=("levels", "rule", "reducer"), inline=True)
def _pool_pyramid(
    maps: jax.Array,
    sizes: jax.Array | None,
    *,
    levels: tuple[int, ...],
    rule: str,
    reducer: str,
) -> jax.Array:
    """Bins [maps, bins, channels]; `sizes`: that count, int [maps, 2], None for all."""
    dtype = maps.dtype
    if reducer == "mean":
        maps = maps.astype(jnp.promote_types(dtype, jnp.float32))
    if sizes is None:
        pool = partial(_pool_whole, maps, rule=rule, reducer=reducer)
    else:
        pool = partial(_pool_valid, maps, sizes=sizes, reducer=reducer)
    nested = rule == "adaptive" and reducer == "max"
    pooled = _pool_levels(levels, pool, nested=nested)
    flat = [pooled[n].reshape(len(maps), n * n, maps.shape[-1]) for n in levels]
    return jnp.concatenate(flat, axis=1).astype(dtype)


def adaptive_span(index: Any, size: Any, level: int) -> tuple[Any, Any]:
    """Start and stop of adaptive bins (appendix A); ints, arrays or traced values."""
    return index * size // level, -(-(index + 1) * size // level)


def num_bins(levels: Sequence[int]) -> int:
    """The number of bins of a pyramid: the sum of n·n over its levels."""
    return sum(level * level for level in check_levels(levels))


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels as a tuple of ints; ValueError if they are not positive integers."""
    if levels is None or isinstance(levels, int | np.integer | str) or not len(levels):
        raise ValueError(f"levels must be a tuple such as (6, 3, 2, 1), got {levels!r}")
    if not all(isinstance(n, int | np.integer) and n >= 1 for n in levels):
        raise ValueError(f"every level must be a positive integer, got {levels!r}")
    return tuple(int(n) for n in levels)


def _pool_whole(maps: jax.Array, level: int, *, rule: str, reducer: str) -> jax.Array:
    rows, columns = (pyramid_bins(size, level, rule) for size in maps.shape[1:3])
    if reducer == "max":
        return span_max(maps, rows, columns)
    return _mean_of_spans(_mean_of_spans(maps, rows, 1), columns, 2)


def _pool_valid(
    maps: jax.Array, level: int, *, sizes: jax.Array, reducer: str
) -> jax.Array:
    rows = _reduce_gathered(maps, sizes[:, 0], level, 1, reducer)
    return _reduce_gathered(rows, sizes[:, 1], level, 2, reducer)


def _pool_levels(
    levels: tuple[int, ...], pool: Callable[[int], jax.Array], *, nested: bool
) -> dict[int, jax.Array]:
    """Pools the finest level first; a level that divides a finer one is read off it.

    Under the adaptive rule, if n divides m, a bin of level n is exactly the union of
    (m/n)×(m/n) neighbouring bins of level m, whatever the size of the map.
    """
    pooled: dict[int, jax.Array] = {}  # by level: [batch, level, level, channels]
    for level in sorted(set(levels), reverse=True):
        finer = [m for m in pooled if m % level == 0]
        if nested and finer:
            blocks = pyramid_bins(min(finer), level)
            pooled[level] = span_max(pooled[min(finer)], blocks, blocks)
        else:
            pooled[level] = pool(level)
    return pooled


def _mean_of_spans(maps: jax.Array, spans: np.ndarray, axis: int) -> jax.Array:
    """The mean of static spans along an axis: a reshape where they tile it."""
    size, level = maps.shape[axis], len(spans)
    if size % level == 0:
        tiles = (*maps.shape[:axis], level, size // level, *maps.shape[axis + 1 :])
        return jnp.mean(maps.reshape(tiles), axis=axis + 1)
    return reduce_slices(jnp.mean, maps, spans.tolist(), axis)


def _reduce_gathered(
    maps: jax.Array, sizes: jax.Array, level: int, axis: int, reducer: str
) -> jax.Array:
    """Reduces the adaptive bins of traced sizes along one axis.

    All bins are gathered at once, each as long as the longest that there can be: masks
    over the whole axis, bin by bin, take several times as long to compile and to run.
    """
    batch, size = len(maps), maps.shape[axis]
    longest = min(-(-size // level) + 1, size)
    bins = jnp.arange(level)[None, :, None]
    start, stop = adaptive_span(bins, sizes[:, None, None], level)
    position = start + jnp.arange(longest)
    before, after = [1] * (axis - 1), [1] * (maps.ndim - axis - 1)
    index = position.reshape(batch, *before, level * longest, *after)
    cells = jnp.take_along_axis(maps, index, axis, mode="clip")
    cells = cells.reshape(*maps.shape[:axis], level, longest, *maps.shape[axis + 1 :])
    inside = (position < stop).reshape(batch, *before, level, longest, *after)
    if reducer == "max":
        return jnp.max(cells, axis=axis + 1, initial=-jnp.inf, where=inside)
    return jnp.mean(cells, axis=axis + 1, where=inside)


def check_reducer(reducer: str) -> None:
    """Raises ValueError for a reducer that there is not."""
    if reducer not in ("max", "mean"):
        raise ValueError(f"unknown reducer {reducer!r}: use 'max' or 'mean'")


def check_maps(features: jax.Array) -> None:
    """Raises ValueError or TypeError for maps that are empty or of whole numbers."""
    if 0 in features.shape[-3:-1]:
        raise ValueError(f"features hold an empty map: shape {features.shape}")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise TypeError(f"features must be floating point, got {features.dtype}")


def _check_valid_size(
    valid_size: Any, batch: Sequence[int], height: int, width: int
) -> jax.Array:
    """The valid sizes as int [*batch, 2], each inside the map."""
    sizes = jnp.asarray(valid_size)
    if sizes.shape[-1:] != (2,):
        raise ValueError(
            "valid_size must be (height, width) for each map, int [..., 2], got shape "
            f"{sizes.shape}"
        )
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise TypeError(f"valid_size must be integer, got {sizes.dtype}")
    parts = jax.tree.leaves(valid_size)
    if not any(isinstance(part, jax.core.Tracer) for part in parts):
        known = np.asarray(valid_size)
        if (known < 1).any() or (known > (height, width)).any():
            raise ValueError(
                f"valid_size must lie within 1 and the map's size {(height, width)}, "
                f"got {known.tolist()}"
            )
    sizes = jnp.clip(sizes, 1, jnp.array([height, width]))
    try:
        return jnp.broadcast_to(sizes, (*batch, 2))
    except ValueError as error:
        raise ValueError(
            f"valid_size of shape {sizes.shape} does not fit features whose leading "
            f"dimensions are {tuple(batch)}"
        ) from error
