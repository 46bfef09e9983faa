"""What folders of images have in common, however they are laid out.

Their files are read where they lie: nothing is copied, and nothing is kept.
"""

import codecs
import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from sppnet_jax.data.encoded_images import EncodedImage
from sppnet_jax.data.sources import Record, split_spans

log = logging.getLogger(__name__)

_SAMPLED = 4096  # bytes, three times, of files that share their size
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
)
# What systems and tools leave in folders, in lower case, beside names with a dot.
LITTER = {
    *("__macosx", "desktop.ini", "thumbs.db", "ehthumbs.db", "icon\r", "__pycache__"),
    *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("$recycle.bin", "system volume information", "lost+found"),
}
# What may lie around the text of a file: its mark, blanks, and zeros, which fill what
# was never written.
BLANK = "\ufeff\0 \t\r\n\f"
# Splits by the folders, lists or files that they are in.
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Every fifth image of a class is held out where the folder has no test images.
HOLD_OUT_EVERY = 5

_File = TypeVar("_File")


class FileRecords:
    """Image files at paths in a root as records of these names, read when asked for.

    `told`: what else is in each record, such as {"label": 3}; records may share it.
    """

    def __init__(
        self, root: Path, paths: Sequence[str], told: Sequence[Mapping[str, Any]]
    ) -> None:
        self._root, self._paths, self._told = root, paths, told

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        image = read_image_file(self._root / path)
        told = {"image": image, "name": printable(path), **self._told[index]}
        return cast(Record, told)


def existing_folder(root: str | os.PathLike[str], kind: str, layout: str) -> Path:
    """The folder's absolute path, links resolved.

    `kind`, `layout`: for an error, what to call it and a sentence on its contents.

    Raises: FileNotFoundError if there is no such folder; ValueError if it is a file.
    """
    folder = Path(root).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"there is no {kind} {str(folder)!r}. {layout}")
    if not folder.is_dir():
        raise ValueError(
            f"the {kind} {str(folder)!r} is a file. If it is an archive, unpack it "
            f"first. {layout}"
        )
    return folder.resolve()


def read_split(
    splits: Mapping[str, Sequence[_File]],
    split: str,
    path: Callable[[_File], str],
    root: Path,
) -> list[_File]:
    """The files of a split, a slice of one or a sum of these.

    A split is in the order of a hash of its files' paths, the one that TFDS would give
    it: so each slice of it holds all classes. Raises ValueError for a split that there
    is not, or that is empty.
    """
    lengths = {key: [len(files)] for key, files in splits.items()}
    files: list[_File] = []
    for key, first, end in split_spans(split, lengths, str(root)):

        def order(file: _File, key: str = key) -> bytes:
            text = key + printable(path(file)).replace("\\", "/")
            return hashlib.md5(text.encode(), usedforsecurity=False).digest()

        files += sorted(splits[key], key=order)[first:end]
    return files


def digest(root: Path, files: Iterable[tuple[str, str]]) -> str:
    """A hash of files' paths below a root, their sizes, and what is said of each.

    Of files that share their size with another, as uncompressed images do, some of
    their bytes as well.

    `files`: for each file its path, and the text, such as its class.

    Returns: 32 hexadecimal digits.
    """
    files = list(files)
    sizes = [os.stat(root / path).st_size for path, _ in files]
    times, found = Counter(sizes), hashlib.sha256()
    for (path, text), size in zip(files, sizes, strict=True):
        found.update(f"{printable(path)}\0{size}\0{text}\n".encode())
        if times[size] > 1:
            found.update(_sample(root / path, size))
    return found.hexdigest()[:32]


def _sample(path: Path, size: int) -> bytes:
    """The first, the middle and the last bytes of a file; b"" of one that is none."""
    if not path.is_file():  # a pipe would wait for its writer
        return b""
    parts = []
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        for start in (0, (size - _SAMPLED) // 2, size - _SAMPLED):
            file.seek(max(0, start))
            parts.append(file.read(_SAMPLED))
    return b"".join(parts)


@functools.cache
def warn_once(note: str) -> None:
    """Logs a note on a folder, unless this process did; commands open one often."""
    log.warning("%s", printable(note))


@functools.cache
def inform_once(note: str) -> None:
    """As `warn_once`, of what is as it should be."""
    log.info("%s", printable(note))


def split_of(name: str) -> str:
    """train, validation or test, if a name has just one of these words; else "".

    Such as "train2017", "valid", "instances_val" and "my-test".
    """
    words = re.split(r"[^a-z]+", name.lower())
    splits = {SPLIT_OF[word] for word in words if word in SPLIT_OF}
    return splits.pop() if len(splits) == 1 else ""


def hold_out(paths: Iterable[str]) -> set[str]:
    """Every fifth of the paths, in the order of a hash of each."""
    # By a hash, because neighbouring names are often shots of one scene.
    order = sorted(paths, key=lambda p: hashlib.sha256(printable(p).encode()).digest())
    return set(order[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY])


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields every visible file at any depth, following links, but not in circles."""
    folders, files = list_folder(folder)
    yield from (folder / name for name in files)
    if not folders and not files and folder.name.lower().endswith(IMAGE_SUFFIXES):
        yield folder  # to be counted with what is no image
    for name in folders:
        yield from walk_files(folder / name)


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of a folder's visible folders and files, sorted.

    Without what systems and tools leave there (`LITTER`), and without links to a folder
    that this one lies in. One that can't be listed is empty, and the log says so.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if e.name[0] != "."]
    except PermissionError as error:
        warn_once(f"{folder} can't be listed ({error.strerror}): left out")
        return [], []
    visible = [entry for entry in visible if entry.name.lower() not in LITTER]
    folders = {entry.name for entry in visible if _is_folder(entry)}
    files = sorted(entry.name for entry in visible if entry.name not in folders)
    links = [entry for entry in visible if entry.is_symlink() and entry.name in folders]
    if links:
        own = Path(os.path.abspath(folder))
        above = {os.path.realpath(path) for path in (own, *own.parents)}
        above |= set(map(str, own.resolve().parents))
        folders -= {link.name for link in links if os.path.realpath(link) in above}
    return sorted(folders), files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where nobody may look
        return False


def is_image(path: Path) -> bool:
    """Whether there is a file of this path with the suffix of an image."""
    # A broken link or a pipe is no image, whatever its name.
    return path.name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path)


def read_file(path: Path) -> bytes:
    """The bytes of a file; OSError for what is none, as a pipe may have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise OSError(errno.EINVAL, f"it is no file, but {what}", str(path))
    return path.read_bytes()


def read_image_file(path: Path) -> EncodedImage:
    """The bytes of an image's file with its path, or with why it can't be read.

    Raises: FileNotFoundError for a file that is not there.
    """
    name = printable(str(path))
    try:
        return EncodedImage(read_file(path), name)
    except FileNotFoundError:
        raise
    except OSError as error:
        return EncodedImage(b"", name, error.strerror or str(error))


def read_text(path: Path) -> str:
    """A file's text; see `text_of`."""
    return text_of(read_file(path))


def text_of(data: bytes) -> str:
    """Text by its bytes: UTF-16, with a mark or not, or UTF-8; see `os.fsdecode`.

    Marks and zeros around it are no part of it.
    """
    pairs = data[: len(data) // 2 * 2]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = pairs.decode("utf-16", "replace")
    elif 0 in pairs[:2] and any(pairs[:2]):  # every other byte of plain letters
        text = pairs.decode("utf-16-le" if data[0] else "utf-16-be", "replace")
    else:
        text = os.fsdecode(data)
    return text.strip("\ufeff\0")


def printable(path: str) -> str:
    """A path as text: file names are bytes, and names are text, in one form (NFC).

    So names are the same on systems that store the accents of letters by themselves.
    """
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:  # half a character, as JSON may hold
        encoded = path.encode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", encoded.decode("utf-8", "backslashreplace"))
