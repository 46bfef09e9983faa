"""What is found in photographs, written as it is found, as JSON or CSV."""

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sppnet_jax.run.files import named

SUFFIXES = (".json", ".csv")
_END = b"\n]\n"

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def photo_results(path: Path | None, columns: Sequence[str]) -> Iterator[Write]:
    """Opens a file, and gives a function that writes what was found in a photograph.

    The file is whole after each photograph, however the run ends. A photograph is
    {"path", "width", "height", "found": [...]}, sizes in pixels, with a dict for each
    thing that was found; or {"path", "error"} where it could not be read.

    `path`: `.json`, a list of these dicts; or `.csv`, a line for each thing that was
    found, and one for a photograph without any. What was there is written over. None
    writes nothing.
    `columns`: the keys of what is found, in the order of the columns of CSV.

    Raises: ValueError for another suffix; OSError that names the file, here and where a
    photograph can't be written; KeyboardInterrupt with how many photographs
    were written before it.
    """
    count = 0
    with contextlib.ExitStack() as stack:
        put = None
        if path is not None:
            check_suffix(path)
            with named(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, file)
                _take(file, path)
                as_json = path.suffix.lower() == ".json"
                put = _json_writer(file) if as_json else _csv_writer(file, columns)

        def write(photo: Mapping[str, Any]) -> None:
            nonlocal count
            if path is not None and put is not None:
                with named(path):
                    put(photo)
            count += 1

        try:
            yield write
        except KeyboardInterrupt:
            kept = f", kept in {path}" if path else ""
            raise KeyboardInterrupt(
                f"interrupted; photographs done: {count}{kept}"
            ) from None


def check_suffix(path: Path) -> None:
    """Raises ValueError for a file that `photo_results` does not write."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"results are written to {' or '.join(SUFFIXES)}, not to {str(path)!r}"
        )


def _take(file: int, path: Path) -> None:
    """Empties a file that no other process writes; OSError where one does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(
            f"{path} is being written by another process: give another --out"
        ) from None
    with contextlib.suppress(OSError):  # of a device
        os.ftruncate(file, 0)


def _appender(file: int, tail: bytes) -> Callable[[bytes], None]:
    """Appends bytes to a file, that always ends with `tail`.

    What can't be written in whole is taken back.
    """
    end = 0

    def append(data: bytes) -> None:
        nonlocal end
        rest, place = memoryview(data + tail), end
        try:
            while rest:
                written = os.pwrite(file, rest, place)
                rest, place = rest[written:], place + written
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
                os.pwrite(file, tail, end)
            raise
        end += len(data)

    return append


def _json_writer(file: int) -> Write:
    append = _appender(file, _END)
    append(b"[")
    parts = itertools.chain([b"\n"], itertools.repeat(b",\n"))

    def write(photo: Mapping[str, Any]) -> None:
        append(next(parts) + json.dumps(photo).encode())

    return write


def _csv_writer(file: int, columns: Sequence[str]) -> Write:
    append = _appender(file, b"")
    names = ("path", "width", "height", *columns, "error")

    def put(rows: Sequence[Mapping[str, Any]], header: bool = False) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        append(text.getvalue().encode("utf-8", "backslashreplace"))

    put([], header=True)

    def write(photo: Mapping[str, Any]) -> None:
        told = {name: photo[name] for name in photo if name != "found"}
        put([{**told, **one} for one in photo.get("found") or [{}]])

    return write
