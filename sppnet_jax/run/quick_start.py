"""Python's collector of garbage, out of the way of a command's start and end.

Commands import this before other modules of ours. Hundreds of imported modules are no
garbage, but are searched for it time and again while they come, and once more when all
is over: 30 % of the CPU time of `predict` with one photograph and a small network.
"""

import atexit
import gc
import sys


def collect_from_here() -> None:
    """Turns the collector on, for what is made from now on."""
    gc.freeze()
    gc.enable()


def _is_of_a_command() -> bool:
    """Whether this process is `python -m sppnet_jax.…`, and not a user's program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("sppnet_jax.")


if _is_of_a_command():
    gc.disable()
    # Registered first, so called last.
    atexit.register(gc.freeze)
