"""FLOPs of a function, the same whatever device it runs on."""

from collections.abc import Callable
from typing import Any

import jax


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """As XLA counts them in the program for a CPU; nothing is compiled or run.

    For an accelerator XLA doesn't count at all, or leaves out the convolutions that a
    library computes. The CPU's own algorithms are counted, where the package has some.

    `arguments`: arrays or `jax.ShapeDtypeStruct`s, in trees.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments
    )  # without the devices that arrays are on
    with jax.default_device(jax.devices("cpu")[0]):
        costs: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return float(costs["flops"])
