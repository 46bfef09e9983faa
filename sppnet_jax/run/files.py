"""Files that are whole or not there, whoever else writes or reads them."""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

_LONGEST_NAME = 255  # bytes
# An underscore within a word, as in traffic_light, is none.
_MARKUP = re.compile(r"[\\`*<|$~\[\]]|(?<![^\W_])_|_(?![^\W_])")


@contextlib.contextmanager
def whole_file(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """Opens a file to write, which is put in its place when all is written.

    Makes its folder. A process that is killed leaves no more than a hidden `.partial`.
    `size`: in bytes, where it is known.

    Raises: OSError that names the file, and its size where the disk is full.
    """
    partial = _partial(path)
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path, size)
        try:
            with partial.open("wb") as file:
                yield file
            os.replace(partial, path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                check_space(path, max(size, partial.stat().st_size + 1), "more than ")
            raise
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the system say which file or folder could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # says so by itself
            raise
        raise OSError(f"{path} can't be written: {error.strerror}") from error


def check_can_write(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises OSError if a file can't be written, before the work that it is made by.

    Makes its folder. `suffixes`: ValueError for a name with none of these.
    """
    if suffixes and path.suffix.lower() not in suffixes and not path.is_dir():
        raise ValueError(
            f"can't write {str(path)!r}: give a file {' or '.join(suffixes)}"
        )
    with named(path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # refuses a name that is too long
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raises OSError if no file can be written into a folder; makes it."""
    with named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = _partial(folder / "any")
        try:
            partial.write_bytes(bytes(4096))  # a full disk takes empty files
        finally:
            partial.unlink(missing_ok=True)


def check_space(path: Path, size: int, words: str = "") -> None:
    """Raises OSError if the disk has fewer bytes left than a file or folder takes.

    The folder that it lies in is there. `words`: in the message, before the size.
    """
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(
            f"{path} can't be written: it takes {words}{size / 1e6:,.1f} MB, and the "
            f"disk has {free / 1e6:,.1f} MB left. Make room there, or write elsewhere"
        )


@contextlib.contextmanager
def all_tried() -> Iterator[Callable[..., Any]]:
    """Gives `attempt(write, *arguments)`: files of which one that fails loses no other.

    It returns what `write` does, or None where that raises an OSError, which is raised
    when all are tried.
    """
    errors: list[str] = []

    def attempt(write: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return write(*arguments, **options)
        except OSError as error:
            errors.append(str(error))
            return None

    yield attempt
    if errors:
        raise OSError("; ".join(dict.fromkeys(errors)))


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
    with whole_file(path, array.nbytes) as file:
        np.save(file, array)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays by name as an .npz file."""
    size = sum(np.asarray(array).nbytes for array in arrays.values())
    with whole_file(path, size) as file:
        np.savez(file, **arrays)


def read_array(path: Path, **options: Any) -> np.ndarray:
    """The array of an .npy file; `options` of `np.load`.

    Raises: FileNotFoundError; ValueError for a damaged file.
    """
    with _damage_named(path):
        found: np.ndarray = np.load(path, **options)
        return found


def read_arrays(path: Path, kind: Callable[..., Any] = dict) -> Any:
    """The arrays of an .npz file by name, or what `kind` makes of them so named.

    Raises: FileNotFoundError; ValueError for a damaged file.
    """
    with _damage_named(path), np.load(path) as arrays:
        return kind(**arrays)


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # of zip, zlib, struct, pickle, a missing name, …
        raise ValueError(f"{path} is damaged: {error}: restore or remove it") from error


def remove_all_but(*folders: Path) -> None:
    """Removes whatever lies beside folders, all of them in one folder."""
    beside = folders[0].parent.glob("*") if folders else ()
    for path in beside:
        if path not in folders:
            shutil.rmtree(path, ignore_errors=True)


def absolute(path: str) -> str:
    """A path as text that is found again from any folder; "" stays ""."""
    return str(Path(path).expanduser().absolute()) if path else ""


def _partial(path: Path) -> Path:
    """Where a file is written at first; its name fits wherever the file's own does."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}.partial")


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
