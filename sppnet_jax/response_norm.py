"""Local response normalisation, with a gradient that keeps nothing but its input.

XLA's gradient of the sum over neighbouring channels is slow on a CPU; here it is that
same sum again: what a channel takes from its neighbours, they take from it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def local_response_norm(
    maps: Float[Array, "*batch channels"],
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> Float[Array, "*batch channels"]:
    """Divides each value by (k + α Σ x²)^β, the sum over the `size` channels around it.

    Krizhevsky et al. 2012, section 3.3, whose α is not divided by the number of
    channels (Caffe's and PyTorch's is). Channels beyond the ends count as zero. All but
    `maps` are static; it differentiates in reverse mode.
    """
    return _norm(maps, size, k, alpha, beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _norm(maps: jax.Array, size: int, k: float, alpha: float, beta: float) -> jax.Array:
    wide = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
    energy = k + alpha * _around(jnp.square(wide), size // 2, size)
    return (wide * _power(energy, beta)).astype(maps.dtype)


def _forward(
    maps: jax.Array, size: int, k: float, alpha: float, beta: float
) -> tuple[jax.Array, jax.Array]:
    return _norm(maps, size, k, alpha, beta), maps


def _backward(
    size: int, k: float, alpha: float, beta: float, maps: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    wide, own = (
        x.astype(jnp.promote_types(maps.dtype, jnp.float32)) for x in (maps, gradient)
    )
    energy = k + alpha * _around(jnp.square(wide), size // 2, size)
    scale = _power(energy, beta)
    # Those that have this channel around them lie on the other side of it.
    taken = _around(own * wide * scale / energy, size - 1 - size // 2, size)
    return ((own * scale - 2 * alpha * beta * wide * taken).astype(maps.dtype),)


_norm.defvjp(_forward, _backward)


def _around(values: jax.Array, before: int, size: int) -> jax.Array:
    """The sum over `size` channels from `before` ones below each; zero beyond."""
    outside = ((0, 0),) * (values.ndim - 1)
    padded = jnp.pad(values, (*outside, (before, size - 1 - before)))
    channels = values.shape[-1]
    parts = [padded[..., i : i + channels] for i in range(size)]
    return functools.reduce(jnp.add, parts)


def _power(energy: jax.Array, beta: float) -> jax.Array:
    """energy^-beta; roots for the usual β, several times as fast as a power."""
    if beta == 0.75:
        root = jax.lax.rsqrt(energy)
        return root * jnp.sqrt(root)
    return energy**-beta
