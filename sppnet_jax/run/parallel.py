"""Data parallelism over every device of every process; the only module that uses pmap.

A replicated value has one copy on each local device, along a leading axis. The state
stays replicated from step to step, so that it can be donated: the fc layers make it
large, and one copy of it is enough.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")
AXIS = "devices"


def join_processes(coordinator: str, process_index: int, process_count: int) -> None:
    """Joins the processes that train together; call it before any other use of JAX.

    `coordinator`: host:port of process 0, the same in all of them; "auto" where the
    cluster (TPU pod, Slurm, Open MPI) tells JAX all three; "" for a single process.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    elif process_count > 1 and not coordinator:
        raise ValueError(
            f"--process_count={process_count} processes must find each other: give "
            "--coordinator=HOST:PORT of the first"
        )
    elif coordinator:
        jax.distributed.initialize(coordinator, process_count, process_index)


def is_first_process() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return jax.process_index() == 0


def wait_for_all_processes(name: str) -> None:
    """Returns once every process has come to the point of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def data_parallel(
    step: Callable[..., Any], *, scalars: int = 0, donate_state: bool = False
) -> Callable[..., Any]:
    """Runs `step(replicated state, sharded batch, *scalars)` on every device.

    The scalars are the same everywhere. Inside, `sum_over_devices` adds up.
    """
    return jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(0, 0, *(None,) * scalars),
        donate_argnums=(0,) if donate_state else (),
    )


def sum_over_devices(tree: Tree) -> Tree:
    """The sum over the devices of all processes, inside a data-parallel step."""
    return jax.lax.psum(tree, AXIS)


def sum_over_processes(tree: Tree) -> Tree:
    """The sums of host arrays over all processes, the same on each."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(
        lambda x: multihost_utils.process_allgather(x).sum(axis=0, dtype=x.dtype), tree
    )


def device_index() -> jax.Array:
    """The number of the device among those of all processes, inside a step."""
    return jax.lax.axis_index(AXIS)


def make_replicated(make: Callable[..., Tree], *arguments: Any) -> Tree:
    """What `make(*arguments)` returns, made on each local device anew.

    Where the result is large, this needs neither a first copy nor a program to copy it.
    """
    axes = (0, *(None,) * len(arguments))
    made = jax.pmap(lambda _, *args: make(*args), in_axes=axes, axis_name=AXIS)
    return made(np.arange(jax.local_device_count()), *arguments)


def replicate(tree: Tree) -> Tree:
    """A copy of every array on each local device."""
    return make_replicated(lambda copy: copy, tree)


def unreplicate(tree: Tree) -> Tree:
    """The first local copy of every array, as NumPy arrays of their own.

    Copied, not viewed: a view would change when the device's memory is donated.
    """
    return jax.tree.map(
        lambda x: np.array(x.addressable_shards[0].data[0], copy=True), tree
    )


def shard(batch: Tree) -> Tree:
    """Splits the rows of a host batch over the local devices."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


def round_up_to_devices(batch_size: int) -> int:
    """The least batch size, not below this one, that splits evenly over all devices."""
    devices = jax.device_count()
    return -(-batch_size // devices) * devices


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless the global batch splits evenly over all devices."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise ValueError(
            f"batch_size must be a multiple of the number of devices, {devices}; got "
            f"{batch_size}"
        )
