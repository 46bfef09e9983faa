"""Memory that is freed is used again by the process, not given back at once.

On Linux, the C library returns large blocks to the operating system as soon as they are
freed, and takes them from it anew, page by page: a third to half of the time of a
training step or of pooling 2,000 windows on a CPU. See docs/speed.md.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator

# The environment variable that turns it off, as "0".
VARIABLE = "SPPNET_JAX_KEEP_MEMORY"

# Of glibc's malloc.h, with values: no blocks from anywhere but the heap, which does not
# shrink; one heap, so that what one thread has freed serves all.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_SETTINGS = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
# What `large_blocks_go_back` sets: glibc's largest threshold and its default number.
_LARGE, _MANY = 32 * 2**20, 65_536

_kept = False  # whether this process keeps memory


def keep_memory() -> str:
    """Lets this process keep the memory that it frees, for its own next use.

    Every command does so. In a notebook or program of your own call it before the first
    computation: results are the same, and steps and windows take about two thirds of
    the time on a CPU. What the process has used stays with it until it ends, or until
    `give_back`; where it frees and takes blocks of many sizes, that can be twice as
    much as otherwise. The environment variable SPPNET_JAX_KEEP_MEMORY=0 turns it off.
    Nothing changes where the C library isn't glibc (macOS, Alpine Linux).

    Returns: what it did, in a sentence.
    """
    global _kept
    if os.environ.get(VARIABLE) == "0":
        return f"freed memory goes back to the operating system: {VARIABLE} is 0"
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return "nothing changed: this C library has no mallopt"
    if not all(library.mallopt(name, value) for name, value in _SETTINGS):
        return "nothing changed: the C library's mallopt refused"
    _kept = True
    return (
        "freed memory stays with this process, for its next use; the environment "
        f"variable {VARIABLE}=0 turns it off"
    )


def give_back() -> None:
    """Gives freed memory back to the operating system now, for others or other sizes.

    Called after what frees much and does not come again: making a network, compiling a
    step, a stage of a detector's training.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@contextlib.contextmanager
def large_blocks_go_back() -> Iterator[None]:
    """Inside, blocks of 32 MiB or more go back as soon as they are freed.

    Where arrays of gigabytes grow, what is kept of the smaller ones would fit none of
    the larger. Nothing changes in a process that doesn't keep memory.
    """
    if not _kept:
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_MMAP_MAX, _MANY)
    give_back()
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, 0)
