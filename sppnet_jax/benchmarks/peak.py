"""FLOPs of a function, and what the default device can do at most, as measured.

The two rates are the lines of a roofline. A published peak is of another clock, another
precision or another number of cores. A large matrix product and a large copy, each at
its best of several, are bounds that programs on this very device can be compared with.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LONG = 0.05  # seconds: a product that takes as long is large enough
LARGEST = 16384
REPEATS = 7
AT_LEAST = 0.01  # seconds of work before it is waited for: waiting takes a while too


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """As XLA counts them in an accelerator's program; nothing is compiled or run.

    XLA counts on the CPU, whatever the devices are: on others it doesn't count at all,
    or leaves out the convolutions that a library computes. What it counts is lowered
    for a TPU: of a loop, as the CPU's gradients of filters have, it counts one turn.

    `arguments`: arrays or `jax.ShapeDtypeStruct`s, in trees.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments
    )  # without the devices that arrays are on
    with jax.default_device(jax.devices("cpu")[0]):
        traced = jax.jit(function).trace(*shapes)
        costs: Any = traced.lower(lowering_platforms=("tpu",)).cost_analysis()
    return float(costs["flops"])


def measured_peak(dtype: Any = "float32") -> float:
    """FLOP/s of the fastest large matrix product, a multiply-add counted as two.

    `dtype`: of both factors and of the product, at JAX's default precision: on an
    NVIDIA GPU a product of float32 is one of TF32, as are its convolutions.
    """
    product = jax.jit(jnp.matmul)
    best, side = 0.0, 512
    while True:
        # Random: multiplying equal numbers takes less power, so clocks are higher.
        a = jax.random.normal(jax.random.key(0), (side, side), dtype)
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
    """The least seconds of a call, of several, after one that compiles."""
    jax.block_until_ready(call())

    def seconds(calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / calls

    calls = math.ceil(min(100, AT_LEAST / seconds(1)))
    return min(seconds(calls) for _ in range(REPEATS))
