"""What is found in photographs, written as it is found, as JSON or CSV."""

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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
                file = path.open("wb")
            stack.callback(_close, file, path)
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


def _close(file: IO[bytes], path: Path) -> None:
    with named(path):
        file.close()


def _json_writer(file: IO[bytes]) -> Write:
    file.write(b"[" + _END)
    file.flush()
    parts = itertools.chain([b"\n"], itertools.repeat(b",\n"))

    def write(photo: Mapping[str, Any]) -> None:
        file.seek(-len(_END), io.SEEK_END)  # each writes over the end before it
        file.write(next(parts) + json.dumps(photo).encode() + _END)
        file.flush()

    return write


def _csv_writer(file: IO[bytes], columns: Sequence[str]) -> Write:
    text = io.TextIOWrapper(file, "utf-8", "backslashreplace", newline="")
    names = ("path", "width", "height", *columns, "error")
    rows = csv.DictWriter(text, names, restval="")
    rows.writeheader()
    text.flush()

    def write(photo: Mapping[str, Any]) -> None:
        told = {name: photo[name] for name in photo if name != "found"}
        rows.writerows([{**told, **one} for one in photo.get("found") or [{}]])
        text.flush()

    return write
