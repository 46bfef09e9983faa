"""Any folder of class folders as a TFDS data set.

    root/train/cat/1.jpg   root/val/cat/2.jpg   …      with split folders, or
    root/cat/1.jpg         root/dog/2.jpg       …      without

The files' own bytes are copied once into ArrayRecord, undecoded. The prepared data set
is named after the folder's contents, so a changed folder is prepared anew.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    *(".gif", ".tif", ".tiff"),
)
# Every fifth image of a class is held out where the folder has no test images.
HOLD_OUT_EVERY = 5

_SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_LAYOUT = (
    "Expected class folders, ROOT/cat/1.jpg and ROOT/dog/2.jpg, or the same within "
    "split folders, ROOT/train/cat/1.jpg and ROOT/test/cat/2.jpg."
)


class FolderScan(NamedTuple):
    """What a folder of class folders holds."""

    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, list[tuple[str, str]]]  # split → (class name, relative path)
    fingerprint: str  # of every image's relative path, size and time of change
    notes: tuple[str, ...]  # what the user should know: ignored files, held-out images

    @property
    def config_name(self) -> str:
        """Names the folder and the state it is in."""
        return name_config(self.root, self.fingerprint)


class ImageFolder(
    tfds.core.GeneratorBasedBuilder,
    skip_registration=True,  # type: ignore[call-arg]
):
    """TFDS builder `image_folder` for the folder that a `FolderScan` describes.

    Features: `image` (the file's bytes), `label`, `file_name` (relative to the root).
    """

    name = "image_folder"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded: without a path, TFDS doesn't look for checksums beside it.
    code_path = None

    def __init__(self, scan: FolderScan, data_dir: str | None = None) -> None:
        self._scan = scan
        config = tfds.core.BuilderConfig(
            name=scan.config_name,
            version=self.VERSION,
            description=f"Images of {scan.root}",
        )
        super().__init__(data_dir=data_dir, config=config)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="A folder of class folders.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=self._scan.class_names),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._scan.splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for class_name, path in self._scan.splits[split]:
            name = printable(path)
            yield (
                name,
                {
                    "image": io.BytesIO((self._scan.root / path).read_bytes()),
                    "label": self._scan.class_names.index(class_name),
                    "file_name": name,
                },
            )


def scan_folder(root: str | os.PathLike[str]) -> FolderScan:
    """Finds the splits, classes and images of a folder, without opening an image.

    Split folders are named train|training, val|valid|validation, test|testing, in any
    case. Without them, or with only a train folder, every fifth image of each class, in
    the order of a hash of its name, becomes "test". Folders within a class folder
    belong to that class, linked folders are followed, hidden ones are not.

    Returns: the scan; splits are named "train", "validation", "test"; classes sorted.
    Raises: FileNotFoundError if there is no such folder; ValueError if it is a file,
    has no class folders or only one, lacks a train split, or has a class folder or a
    split without images, or a class that train lacks.
    """
    folder = existing_folder(root, "image folder", _LAYOUT)
    split_folders = _split_folders(folder)
    classes: dict[str, dict[str, list[str]]] = {}
    ignored: list[str] = []
    for split, split_folder in split_folders.items():
        classes[split], others = _scan_classes(split_folder, folder)
        ignored += others
    _check_classes(folder, classes)
    class_names = tuple(sorted(classes["train"]))
    notes = []
    if ignored:
        examples = ", ".join(sorted(ignored)[:3])
        notes.append(
            f"{folder}: ignored {len(ignored)} files that are not images in a class "
            f"folder, such as {examples}"
        )
    if set(classes) == {"train"}:
        total = sum(map(len, classes["train"].values()))
        classes = _hold_out(folder, classes["train"])
        held_out = sum(map(len, classes["test"].values()))
        notes.append(
            f"{folder} has no test folder: every {HOLD_OUT_EVERY}th image of each "
            f"class, {held_out} of {total}, is held out as split 'test'"
        )
    splits = {
        split: [(name, path) for name in sorted(found) for path in found[name]]
        for split, found in classes.items()
    }
    files = ((split, path) for split in splits for _, path in splits[split])
    state = fingerprint(folder, files)
    return FolderScan(folder, class_names, splits, state, tuple(notes))


def existing_folder(root: str | os.PathLike[str], kind: str, layout: str) -> Path:
    """The folder's absolute path, links resolved.

    `kind`: what to call it in an error. `layout`: a sentence on what it should hold.

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


def name_config(root: Path, state: str) -> str:
    """Names a folder and the state it is in, which is its `fingerprint`."""
    folder = re.sub(r"[^A-Za-z0-9_-]+", "_", root.name) or "root"
    return f"{folder}-{state}"


def fingerprint(folder: Path, files: Iterable[tuple[str, str]]) -> str:
    """A hash of files' uses, paths, sizes and times of change.

    `files`: for each file what it is for, such as its split, and its path in `folder`.

    Returns: 12 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for use, path in files:
        stat = os.stat(folder / path)
        line = f"{use}\0{printable(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:12]


def hold_out(paths: Iterable[str]) -> set[str]:
    """Every fifth of the paths, in the order of a hash of each."""
    # By a hash, because neighbouring names are often shots of one scene.
    order = sorted(paths, key=_hash)
    return set(order[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY])


def walk_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields every visible file at any depth, following links, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    folders, files = list_folder(folder)
    yield from (folder / name for name in files)
    for name in folders:
        yield from walk_files(folder / name, (*above, real))


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of a folder's visible folders and files, sorted."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not _is_hidden(entry.name)]
    folders = sorted(entry.name for entry in visible if entry.is_dir())
    return folders, sorted(entry.name for entry in visible if not entry.is_dir())


def is_image(path: Path) -> bool:
    """Whether there is a file of this path with the suffix of an image."""
    # A broken link or a pipe is no image, whatever its name.
    return path.name.lower().endswith(IMAGE_SUFFIXES) and path.is_file()


def printable(path: str) -> str:
    """A path as text: file names are bytes, and TFDS stores text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _split_folders(folder: Path) -> dict[str, Path]:
    """Maps splits to folders; {"train": folder} where there are no split folders."""
    subfolders, files = list_folder(folder)
    if not subfolders:
        found = f"{len(files)} files" if files else "nothing"
        images = sum(is_image(folder / name) for name in files)
        if images:
            found = f"{images} images that are in no class folder"
        raise ValueError(f"no class folders in {str(folder)!r}, but {found}. {_LAYOUT}")
    named = [name for name in subfolders if name.lower() in _SPLIT_OF_FOLDER]
    # A folder "train" with nothing but images is a class, say in {bus, car, train}.
    splits = [name for name in named if not _holds_only_images(folder / name)]
    if not splits:
        if len(named) == len(subfolders):
            raise ValueError(
                f"{str(folder / named[0])!r} holds images, but no class folders. "
                f"{_LAYOUT}"
            )
        return {"train": folder}
    found_splits: dict[str, Path] = {}
    for name in sorted(splits):
        split = _SPLIT_OF_FOLDER[name.lower()]
        if split in found_splits:
            raise ValueError(
                f"{str(folder)!r} has two folders for the {split} split, "
                f"{found_splits[split].name!r} and {name!r}; keep one"
            )
        found_splits[split] = folder / name
    if "train" not in found_splits:
        raise ValueError(
            f"{str(folder)!r} has split folders {sorted(splits)}, but none named "
            f"'train'. {_LAYOUT}"
        )
    for name in sorted(set(subfolders) - set(splits)):
        # Annotations and the like may lie there, but images must not be overlooked.
        if any(is_image(path) for path in walk_files(folder / name)):
            raise ValueError(
                f"{str(folder)!r} has split folders {sorted(splits)}, but beside them "
                f"{name!r} holds images that are in no class folder of a split; move "
                f"it elsewhere. {_LAYOUT}"
            )
    return {
        split: found_splits[split]
        for split in ("train", "validation", "test")
        if split in found_splits
    }


def _scan_classes(
    split_folder: Path, root: Path
) -> tuple[dict[str, list[str]], list[str]]:
    """The images of each class folder, and the other files, as paths."""
    subfolders, files = list_folder(split_folder)
    if not subfolders:
        raise ValueError(
            f"the split folder {str(split_folder)!r} is empty: it holds no class "
            f"folders. {_LAYOUT}"
        )
    classes: dict[str, list[str]] = {}
    ignored = [os.path.relpath(split_folder / name, root) for name in files]
    for name in subfolders:
        images: list[str] = []
        others: list[str] = []
        for path in walk_files(split_folder / name):
            (images if is_image(path) else others).append(os.path.relpath(path, root))
        if not images:
            raise ValueError(
                f"the class folder {str(split_folder / name)!r} holds no images "
                f"({len(others)} other files). Remove it, or add images named "
                f"{', '.join('*' + suffix for suffix in IMAGE_SUFFIXES)}"
            )
        classes[printable(name)] = sorted(images)
        ignored += others
    return classes, ignored


def _check_classes(folder: Path, classes: dict[str, dict[str, list[str]]]) -> None:
    train = classes["train"]
    if len(train) == 1:
        (name,) = train
        nested = (folder / name).is_dir() and list_folder(folder / name)[0]
        hint = f"Did you mean {str(folder / name)!r}? " if nested else ""
        raise ValueError(
            f"{str(folder)!r} has only one class, {name!r}; a classifier needs at "
            f"least two class folders. {hint}{_LAYOUT}"
        )
    for split, found in classes.items():
        unknown = sorted(set(found) - set(train))
        if unknown:
            raise ValueError(
                f"the {split} split of {str(folder)!r} has classes that train lacks: "
                f"{unknown[:5]}; train has {len(train)}: {sorted(train)[:10]}"
            )


def _hold_out(
    folder: Path, train: dict[str, list[str]]
) -> dict[str, dict[str, list[str]]]:
    kept: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for name, paths in train.items():
        test = hold_out(paths)
        kept[name] = [path for path in paths if path not in test]
        if test:
            held_out[name] = sorted(test)
    if not held_out:
        raise ValueError(
            f"{str(folder)!r} has no test folder, and no class has the "
            f"{HOLD_OUT_EVERY} images it takes to hold one out: the test split would "
            f"be empty. Add images, or split folders train/ and test/"
        )
    return {"train": kept, "test": held_out}


def _holds_only_images(folder: Path) -> bool:
    folders, files = list_folder(folder)
    return not folders and any(is_image(folder / name) for name in files)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _hash(text: str) -> bytes:
    return hashlib.sha256(printable(text).encode()).digest()
