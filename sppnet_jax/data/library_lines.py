"""What image libraries print themselves, caught for whoever made them print it.

libjpeg and libpng write lines such as "Corrupt JPEG data: premature end" to C's stream
`stderr`, and name no file. Only that stream is exchanged, and only while an image is
decoded: what Python and other threads write goes where it always does. Where the C
library has no streams to be exchanged (any but glibc), nothing is caught.
"""

import atexit
import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

_WRITE = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)
_UNBUFFERED = 2

_own = threading.local()  # .pieces: what this thread's libraries have written


@contextlib.contextmanager
def caught() -> Iterator[list[bytes]]:
    """A list that gets all that this thread's libraries write meanwhile, in pieces."""
    pieces: list[bytes] = []
    _own.pieces = pieces
    _stream.count(1)
    try:
        yield pieces
    finally:
        _stream.count(-1)
        _own.pieces = None


class _Functions(ctypes.Structure):
    """glibc's cookie_io_functions_t."""

    _fields_ = (
        ("read", ctypes.c_void_p),
        ("write", _WRITE),
        ("seek", ctypes.c_void_p),
        ("close", ctypes.c_void_p),
    )


@_WRITE
def _write(cookie: Any, text: Any, size: int) -> int:
    pieces = getattr(_own, "pieces", None)
    if pieces is None:
        os.write(2, text[:size])
    else:
        pieces.append(text[:size])
    return size


class _Stream:
    """C's `stderr`, which is `_write` while any thread decodes."""

    def __init__(self) -> None:
        self._lock, self._inside, self._made = threading.Lock(), 0, None
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            libc = ctypes.CDLL(None)
            libc.fopencookie.restype = ctypes.c_void_p
            libc.setvbuf.argtypes = (
                *(ctypes.c_void_p, ctypes.c_void_p),
                *(ctypes.c_int, ctypes.c_size_t),
            )
            self._stderr = ctypes.c_void_p.in_dll(libc, "stderr")
            self._usual = self._stderr.value
            functions = _Functions(None, _write, None, None)
            self._made = libc.fopencookie(None, b"w", functions)
            libc.setvbuf(self._made, None, _UNBUFFERED, 0)

    def count(self, change: int) -> None:
        """One thread more or less that decodes."""
        with self._lock:
            self._inside += change
            if self._made:
                self._stderr.value = self._made if self._inside else self._usual

    def reset(self) -> None:
        """In a forked process, where no other thread decodes any more."""
        self._lock, self._inside = threading.Lock(), 0
        if self._made:
            self._stderr.value = self._usual

    def end(self) -> None:
        """Before Python ends, without which nothing can be caught."""
        self.reset()
        self._made = None


_stream = _Stream()
os.register_at_fork(after_in_child=_stream.reset)
atexit.register(_stream.end)
