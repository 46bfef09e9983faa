"""Files that are whole or not there, whoever else writes or reads them."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

_LONGEST_NAME = 255  # bytes
# An underscore within a word, as in traffic_light, is none.
_MARKUP = re.compile(r"[\\`*<|$~\[\]]|(?<![^\W_])_|_(?![^\W_])")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, which is put in its place when all is written.

    Makes its folder. A process that is killed leaves no more than a hidden `.partial`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes text."""
    with whole_file(path) as file:
        file.write(text.encode())


def fitting(path: Path) -> Path:
    """A path whose last part is cut, and marked by a hash, where it has over 255 bytes.

    File systems have none that are longer.
    """
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_NAME:
        return path
    mark = f"~{hashlib.sha256(name).hexdigest()[:8]}{path.suffix}"
    kept = name[: _LONGEST_NAME - len(os.fsencode(mark))]
    return path.with_name(kept.decode("utf-8", "ignore") + mark)


def table_cell(text: str) -> str:
    """Text as it stands in a cell of a Markdown table, which takes none for markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as an .npy file."""
    with whole_file(path) as file:
        np.save(file, array)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays by name as an .npz file."""
    with whole_file(path) as file:
        np.savez(file, **arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name; ValueError for a damaged one."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def remove_all_but(*folders: Path) -> None:
    """Removes whatever lies beside folders, all of them in one folder."""
    beside = folders[0].parent.glob("*") if folders else ()
    for path in beside:
        if path not in folders:
            shutil.rmtree(path, ignore_errors=True)


def absolute(path: str) -> str:
    """A path as text that is found again from any folder; "" stays ""."""
    return str(Path(path).expanduser().absolute()) if path else ""


def own_version() -> str:
    """The version of this project, to be noted in what it writes."""
    try:
        return importlib.metadata.version("sppnet_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (run from a folder that is not installed)"


@functools.cache
def own_code() -> str:
    """A name for this project's code, another if any file of it is."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
