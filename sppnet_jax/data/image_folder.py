"""Any folder of class folders as a source, read in place.

root/train/cat/1.jpg   root/val/cat/2.jpg   …      with split folders, or
root/cat/1.jpg         root/dog/2.jpg       …      without
"""

import os
from pathlib import Path
from typing import NamedTuple

from sppnet_jax.data import folders
from sppnet_jax.data.sources import Source

_LAYOUT = (
    "Expected class folders, ROOT/cat/1.jpg and ROOT/dog/2.jpg, or the same within "
    "split folders, ROOT/train/cat/1.jpg and ROOT/test/cat/2.jpg."
)


class ImageFolder(NamedTuple):
    """What a folder of class folders holds."""

    root: Path
    class_names: tuple[str, ...]
    splits: dict[str, list[tuple[str, str]]]  # split → (class name, relative path)
    notes: tuple[str, ...]  # what the user should know: ignored files, held-out images


def open_folder(
    root: str, split: str, multi_label: bool = False, with_boxes: bool = False
) -> Source:
    """Opens a split of a folder of class folders; see `sources.open_source`."""
    if multi_label or with_boxes:
        raise ValueError(
            "'image_folder' is not a data set of images with several classes each. It "
            "has one class an image: leave multi_label out"
        )
    scan = scan_folder(root)
    for note in scan.notes:
        folders.warn_once(note)
    files = folders.read_split(scan.splits, split, lambda file: file[1], scan.root)
    told = {name: {"label": label} for label, name in enumerate(scan.class_names)}
    paths = [path for _, path in files]
    return Source(
        folders.FileRecords(scan.root, paths, [told[name] for name, _ in files]),
        scan.class_names,
        "image_folder",
        split,
        digest=folders.digest(scan.root, ((path, name) for name, path in files)),
    )


def scan_folder(root: str | os.PathLike[str]) -> ImageFolder:
    """Finds the splits, classes and images of a folder, without opening an image.

    Split folders are named train|training, val|valid|validation, test|testing, in any
    case. Without them, or with only a train folder, every fifth image of each class, in
    the order of a hash of its name, becomes "test". Folders within a class folder
    belong to that class, linked folders are followed, hidden ones are not.

    Returns: the scan; splits are named "train", "validation", "test"; classes sorted.
    Raises: FileNotFoundError if there is no such folder; ValueError if it has no class
    folders or only one, lacks a train split, or has a class folder or a split without
    images, or a class that train lacks.
    """
    folder = folders.existing_folder(root, "image folder", _LAYOUT)
    classes: dict[str, dict[str, list[str]]] = {}
    ignored: list[str] = []
    for split, split_folder in _split_folders(folder).items():
        classes[split] = _scan_classes(split_folder, folder, ignored)
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
            f"{folder} has no test folder: every {folders.HOLD_OUT_EVERY}th image of "
            f"each class, {held_out} of {total}, is held out as split 'test'"
        )
    splits = {
        split: [(name, path) for name in sorted(found) for path in found[name]]
        for split, found in classes.items()
    }
    return ImageFolder(folder, class_names, splits, tuple(notes))


def _split_folders(folder: Path) -> dict[str, Path]:
    """Maps splits to folders; {"train": folder} where there are no split folders."""
    subfolders, files = folders.list_folder(folder)
    if not subfolders:
        found = f"{len(files)} files" if files else "nothing"
        images = sum(folders.is_image(folder / name) for name in files)
        if images:
            found = f"{images} images that are in no class folder"
        raise ValueError(f"no class folders in {str(folder)!r}, but {found}. {_LAYOUT}")
    named = [name for name in subfolders if name.lower() in folders.SPLIT_OF]
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
        split = folders.SPLIT_OF[name.lower()]
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
        if any(folders.is_image(path) for path in folders.walk_files(folder / name)):
            raise ValueError(
                f"{str(folder)!r} has split folders {sorted(splits)}, but beside them "
                f"{name!r} holds images that are in no class folder of a split; move "
                f"it elsewhere. {_LAYOUT}"
            )
    order = dict.fromkeys(folders.SPLIT_OF.values())
    return {split: found_splits[split] for split in order if split in found_splits}


def _scan_classes(
    split_folder: Path, root: Path, ignored: list[str]
) -> dict[str, list[str]]:
    """The images of each class folder, as paths; other files are `ignored`."""
    subfolders, files = folders.list_folder(split_folder)
    if not subfolders:
        raise ValueError(
            f"the split folder {str(split_folder)!r} is empty: it holds no class "
            f"folders. {_LAYOUT}"
        )
    classes: dict[str, list[str]] = {}
    ignored += [os.path.relpath(split_folder / name, root) for name in files]
    for name in subfolders:
        images: list[str] = []
        others: list[str] = []
        for path in folders.walk_files(split_folder / name):
            kind = images if folders.is_image(path) else others
            kind.append(os.path.relpath(path, root))
        if not images:
            raise ValueError(
                f"the class folder {str(split_folder / name)!r} holds no images "
                f"({len(others)} other files). Remove it, or add images named "
                f"{', '.join('*' + suffix for suffix in folders.IMAGE_SUFFIXES)}"
            )
        classes.setdefault(folders.printable(name), []).extend(sorted(images))
        ignored += others
    return classes


def _check_classes(folder: Path, classes: dict[str, dict[str, list[str]]]) -> None:
    train = classes["train"]
    if len(train) == 1:
        (name,) = train
        nested = (folder / name).is_dir() and folders.list_folder(folder / name)[0]
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
    held_out = {name: folders.hold_out(paths) for name, paths in train.items()}
    test = {name: sorted(paths) for name, paths in held_out.items() if paths}
    if not test:
        raise ValueError(
            f"{str(folder)!r} has no test folder, and no class has the "
            f"{folders.HOLD_OUT_EVERY} images it takes to hold one out: the test split "
            "would be empty. Add images, or split folders train/ and test/"
        )
    kept = {
        name: [path for path in paths if path not in held_out[name]]
        for name, paths in train.items()
    }
    return {"train": kept, "test": test}


def _holds_only_images(folder: Path) -> bool:
    below, files = folders.list_folder(folder)
    return not below and any(folders.is_image(folder / name) for name in files)
