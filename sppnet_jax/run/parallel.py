"""Data parallelism over every device of every process; the only module that uses pmap.

A replicated value has one copy on each local device, along a leading axis. The state
stays replicated from step to step, so that it can be donated: the fc layers make it
large, and one copy of it is enough.
"""

import atexit
import ctypes
import hashlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar("Tree")
AXIS = "devices"
LOST = (
    "another process has ended, did not come, or can't be reached: its own output says "
    "why. The same command in all processes goes on from the newest checkpoint"
)

_ALIVE_SECONDS = 15  # without a sign of life, after which a process counts as ended
_OWN_ERROR_SECONDS = 3  # for a process to end by itself, or to say why all end
_MEET_SECONDS = 300  # for all processes to come
_TOLD_BYTES = 1 << 15  # for all values that are compared
_SHORT = 60  # characters of a value that is told whole
_ENDED: list[bool] = []  # something, once this process has come to its end

log = logging.getLogger(__name__)


def join_processes(coordinator: str, process_index: int, process_count: int) -> None:
    """Joins the processes that train together; call it before any other use of JAX.

    From then on a process ends, with a sentence, soon after another has.

    `coordinator`: host:port of process 0, the same in all of them; "auto" where the
    cluster (TPU pod, Slurm, Open MPI) tells JAX all three; "" for a single process.

    Raises: ValueError for an address that is none, or that is taken.
    """
    if not coordinator:
        if process_count > 1:
            raise ValueError(
                f"--process_count={process_count} processes must find each other: give "
                "--coordinator=HOST:PORT of the first"
            )
        return
    given: dict[str, Any] = {}
    if coordinator != "auto":
        _check_address(coordinator)
        given = {
            "coordinator_address": coordinator,
            "num_processes": process_count,
            "process_id": process_index,
        }
        log.info("waiting for %d processes at %s", process_count, coordinator)
        if process_index == 0:
            _check_port(coordinator)
    ctypes.CDLL(None).signal(signal.SIGABRT, _END_WITH_ANOTHER)
    # In a thread, for JAX hears no Ctrl-C while it waits.
    joined = ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        **given,
        initialization_timeout=_MEET_SECONDS,
        heartbeat_timeout_seconds=_ALIVE_SECONDS,
    )
    joined.result()
    atexit.register(_note_end)


def end_together(code: int) -> None:
    """Ends this process at once if others train with it; they find out, and end too.

    The usual end would wait for them, and they wait for this one.
    """
    if jax.distributed.is_initialized():
        os._exit(code)


def reason(error: BaseException) -> str:
    """An error in words; where it may come from another process, this is said."""
    if jax.distributed.is_initialized() and "gloo" in str(error).lower():
        return LOST
    if isinstance(error, MemoryError):  # those of C++ say no more than "bad_alloc"
        return f"out of memory ({error})".removesuffix(" ()")
    return str(error) or type(error).__name__


def check_alike(what: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError, in all processes, where one of them has other values.

    They would wait for each other forever. `what`: they are, in words. `values`: by
    name; long ones are compared by their digests.
    """
    if jax.process_count() == 1:
        return
    values = {**values, "devices of its own": jax.local_device_count()}
    own = np.zeros(_TOLD_BYTES, np.uint8)
    text = json.dumps({name: _short(value) for name, value in values.items()}).encode()
    own[: len(text)] = np.frombuffer(text, np.uint8)
    first, *others = (
        json.loads(row.tobytes().rstrip(b"\0"))
        for row in multihost_utils.process_allgather(own)
    )
    for index, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the processes have different {what}: {name} is "
                    f"{first.get(name)} in process 0, but {other.get(name)} in process "
                    f"{index}; all must have the same"
                )


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
    if jax.lax.axis_size(AXIS) == 1:  # where XLA would copy the tree all the same
        return tree
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


def _check_address(coordinator: str) -> None:
    host, _, port = coordinator.rpartition(":")
    try:
        if not host or not port.isascii() or not 0 < int(port) < 2**16:
            raise ValueError("it is no HOST:PORT")
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--coordinator={coordinator} is no address of process 0, such as "
            f"localhost:1234: {error}"
        ) from None


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    with socket.socket(socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"process 0 can't listen at --coordinator={coordinator} ({error}): "
                "give another port, and each process its own --process_index"
            ) from None


def _note_end() -> None:
    if getattr(sys, "last_value", None) is None:  # no error that nobody caught
        sys.stdout.flush()
        sys.stderr.flush()
        _ENDED.append(True)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _END_WITH_ANOTHER(_: int) -> None:
    """Where JAX aborts this process, for another has ended or can't be reached."""
    if jax.distributed.is_initialized():
        time.sleep(_OWN_ERROR_SECONDS)
        if _ENDED:  # its work is done; the other was only sooner to leave
            os._exit(0)
        print(f"error: {LOST}", file=sys.stderr, flush=True)
        os._exit(1)


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) < _SHORT:
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:8]
