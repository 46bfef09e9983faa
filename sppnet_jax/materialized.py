"""A stop for XLA's fusion, which may compute a value once for each of its readers."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped


@jax.custom_vjp
def materialized(
    maps: Shaped[Array, "batch rows columns channels"],
) -> Shaped[Array, "batch rows columns channels"]:
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
    windows, strides = (1, 1, 1, 2, 1), (1, 1, 1, 1, 1)
    padding = ((0, 0), (0, 0), (0, 0), (1, 0), (0, 0))
    is_float = jnp.issubdtype(maps.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(maps.dtype).min
    return jax.lax.reduce_window(
        maps[:, :, :, None],
        np.array(lowest, maps.dtype),
        jax.lax.max,
        windows,
        strides,
        padding,
    )[:, :, :, 0]
