"""What the default device can do at most, as measured: the two lines of a roofline.

A published peak is of another clock, another precision or another number of cores. A
large matrix product and a large copy, each at its best of several, are bounds that
programs on this very device can be compared with.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LONG = 0.05  # seconds: a product that takes as long is large enough
LARGEST = 16384
REPEATS = 7


def measured_peak(dtype: Any = "float32") -> float:
    """FLOP/s of the fastest large matrix product, a multiply-add counted as two.

    `dtype`: of both factors and of the product, at JAX's default precision: on an
    NVIDIA GPU a product of float32 is one of TF32, as are its convolutions.
    """
    product = jax.jit(jnp.matmul)
    best, side = 0.0, 512
    while True:
        a = jnp.full((side, side), 0.5, dtype)
        seconds = _fastest(functools.partial(product, a, a))
        best = max(best, 2 * side**3 / seconds)
        if seconds >= LONG or side >= LARGEST:
            return best
        side *= 2


def measured_bandwidth(megabytes: int = 512) -> float:
    """Bytes/s between memory and the processor: a large array read and written back.

    `megabytes`: of the array, 2^20 bytes each; it must not fit into a cache.
    """
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    # Donated, so that no call waits for fresh pages from the operating system.
    held = [jnp.zeros(megabytes * 2**18, "float32")]

    def step() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    return 2 * megabytes * 2**20 / _fastest(step)


def _fastest(call: Callable[[], jax.Array]) -> float:
    """The least seconds of several calls, after one that compiles."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return min(seconds)
