"""Any folder in Pascal VOC layout as a source of images and boxes, read in place.

    root/JPEGImages/000005.jpg   root/Annotations/000005.xml   …
    root/ImageSets/Main/trainval.txt   root/ImageSets/Main/test.txt   …

What its annotations may hold, and what becomes of it: `voc_annotations`.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from sppnet_jax.data import folders
from sppnet_jax.data.annotated_folders import (
    AnnotatedFolder,
    FolderAnnotations,
    ImageFiles,
    check_most,
    hold_out,
    note,
    note_overlaps,
    open_annotated,
    read_all,
    split_name,
)
from sppnet_jax.data.annotations import AnnotatedImage
from sppnet_jax.data.sources import Source
from sppnet_jax.data.voc_annotations import EVENTS, read_image

_LAYOUT = (
    "Expected JPEGImages/ID.jpg and Annotations/ID.xml in it, and in ImageSets/Main "
    "lists of IDs, such as trainval.txt and test.txt."
)


def open_folder(
    root: str, split: str, multi_label: bool = True, with_boxes: bool = False
) -> Source:
    """Opens a split of a folder in VOC layout; see `open_detection_source`."""
    how = (scan_folder, read_annotations, split, multi_label, with_boxes)
    return open_annotated("voc_folder", root, *how)


def scan_folder(root: str | os.PathLike[str]) -> AnnotatedFolder:
    """Finds the splits and images of a folder in VOC layout, without opening an image.

    `root`: the folder of JPEGImages and Annotations, or one that has a single such
    folder in it, as VOCdevkit has VOC2007.

    Splits are the lists in ImageSets/Main (or ImageSets), by their names; VOC's lists
    of one class (`ID 1`, `ID -1`, or named CLASS_SPLIT) aren't splits. An id may have a
    suffix or a path before it. Without lists, every fifth image in the order of a hash
    of its name is "test", and the others "trainval".

    Listed images that are absent, or whose annotations are, are left out and noted.

    Raises: FileNotFoundError if there is no such folder; ValueError if it isn't in VOC
    layout or holds several such folders, if most images of a list, but not all, or
    their annotations, are absent, and if no split has an image.
    """
    folder = _find_layout(folders.existing_folder(root, "VOC folder", _LAYOUT))
    notes: list[str] = []
    images = _index(folder, "JPEGImages", folders.is_image, notes)
    annotations = _index(
        folder, "Annotations", lambda path: path.name.lower().endswith(".xml"), []
    )
    if lists := _read_lists(folder, images, annotations, notes):
        splits = _split_by_lists(folder, lists, images, annotations, notes)
    else:
        splits = _split_by_hash(folder, images, annotations, notes)
    if not splits:
        raise ValueError(
            f"{str(folder)!r} has no image with an annotation. {'; '.join(notes)}. "
            f"{_LAYOUT}"
        )
    base = next(iter(images.values())).partition(os.sep)[0]
    return AnnotatedFolder(folder, base, splits, (), tuple(notes))


def read_annotations(scan: AnnotatedFolder, threads: int = 8) -> FolderAnnotations:
    """Reads every annotation and every image's size, putting right what can be.

    Returns and raises what `read_all` does.
    """

    def read(files: ImageFiles) -> tuple[AnnotatedImage | None, list[str]]:
        return read_image(scan.root / files.image, scan.root / files.annotation)

    return read_all(scan, read, EVENTS, threads)


def _find_layout(folder: Path) -> Path:
    """The one folder of JPEGImages and Annotations at or a little below a folder."""
    if _subfolder(folder, "JPEGImages"):
        if _subfolder(folder, "Annotations"):
            return folder
        raise ValueError(
            f"{str(folder)!r} has JPEGImages but no folder Annotations. {_LAYOUT}"
        )
    below = [folder / name for name in folders.list_folder(folder)[0]]
    below += [path / name for path in below for name in folders.list_folder(path)[0]]
    found = [path for path in below if _subfolder(path, "JPEGImages")]
    if len(found) > 1:
        names = ", ".join(repr(str(path)) for path in found)
        raise ValueError(
            f"{str(folder)!r} holds {len(found)} folders in VOC layout: give one of "
            f"{names}"
        )
    if found:
        return _find_layout(found[0])
    above = folder.parent
    hint = f"Did you mean {str(above)!r}? " if _subfolder(above, "JPEGImages") else ""
    raise ValueError(f"{str(folder)!r} has no folder JPEGImages. {hint}{_LAYOUT}")


def _subfolder(folder: Path, name: str) -> Path | None:
    """A folder by its name, in any case."""
    found = [n for n in folders.list_folder(folder)[0] if n.lower() == name.lower()]
    return folder / found[0] if found else None


def _index(
    folder: Path, name: str, wanted: Callable[[Path], bool], notes: list[str]
) -> dict[str, str]:
    """Files below a subfolder, by id: {"000005": "JPEGImages/000005.jpg"}."""
    subfolder = _subfolder(folder, name)
    assert subfolder is not None
    index: dict[str, str] = {}
    ignored, doubled = [], []
    for path in folders.walk_files(subfolder):
        relative = os.path.relpath(path, folder)
        inside = folders.printable(os.path.relpath(path, subfolder))
        key = os.path.splitext(inside)[0]
        if not (wanted(path) and path.is_file()):
            ignored.append(relative)
        elif index.setdefault(key, relative) != relative:
            doubled.append(relative)
    note(notes, folder, ignored, f"files in {name} are not images: ignored")
    note(notes, folder, doubled, f"files in {name} have the id of another: ignored")
    return dict(sorted(index.items()))


def _read_lists(
    folder: Path, images: dict[str, str], annotations: dict[str, str], notes: list[str]
) -> dict[Path, list[str]]:
    """Each list of images with its ids as they stand there, doubled ones too."""
    sets = _subfolder(folder, "ImageSets")
    place = sets and (_subfolder(sets, "Main") or sets)
    names = folders.list_folder(place)[1] if place else []
    lists: dict[Path, list[str]] = {}
    of_a_class, empty = [], []
    for path in [place / name for name in names if place]:
        if path.suffix.lower() != ".txt":
            continue
        ids = [
            line.strip()
            for line in folders.read_text(path).splitlines()
            if line.strip()
        ]
        if not ids:
            empty.append(path.name)
        elif _is_of_a_class(path, ids, names, folder, images, annotations):
            of_a_class.append(path.name)
        else:
            lists[path] = ids
    what = "lists in ImageSets are of one class each: no splits"
    note(notes, folder, of_a_class, what)
    note(notes, folder, empty, "lists in ImageSets are empty: no splits")
    return lists


def _is_of_a_class(
    path: Path,
    ids: list[str],
    names: list[str],
    folder: Path,
    images: dict[str, str],
    annotations: dict[str, str],
) -> bool:
    """Whether lines are "ID 1", "ID 0" or "ID -1", or the list is named CLASS_SPLIT."""
    # A file name may hold a space and end in a number.
    if all(re.search(r"\s[+-]?[01]$", i) and _find(i, images) is None for i in ids):
        return True
    for split in (os.path.splitext(name)[0] for name in names):
        if path.stem.endswith(f"_{split}"):
            name = re.escape(path.stem.removesuffix(f"_{split}").encode())
            named = re.compile(rb"<name>\s*" + name + rb"\s*</name>")
            found = (folder / annotation for annotation in annotations.values())
            return any(named.search(path.read_bytes()) for path in found)
    return False


def _find(listed: str, files: dict[str, str]) -> str | None:
    """The id that a line of a list means: with a suffix or not, with a path or not."""
    listed = folders.printable(listed)
    for name in (listed, re.split(r"[/\\]", listed)[-1]):
        stem, suffix = os.path.splitext(name)
        if name in files:
            return name
        if suffix.lower() in (*folders.IMAGE_SUFFIXES, ".xml") and stem in files:
            return stem
    return None


def _find_files(
    ids: Iterable[str], images: dict[str, str], annotations: dict[str, str]
) -> tuple[dict[str, ImageFiles], list[str], list[str], list[str]]:
    """Files by id; what is listed again, and lacks an image, or an annotation."""
    found: dict[str, ImageFiles] = {}
    doubled, no_image, no_annotation = [], [], []
    for listed in ids:
        key = _find(listed, images)
        if key is None:
            no_image.append(listed)
        elif key in found:
            doubled.append(listed)
        elif (annotation := _find(key, annotations)) is None:
            no_annotation.append(images[key])
        else:
            found[key] = ImageFiles(images[key], annotations[annotation])
    return found, doubled, no_image, no_annotation


def _split_by_lists(
    folder: Path,
    lists: dict[Path, list[str]],
    images: dict[str, str],
    annotations: dict[str, str],
    notes: list[str],
) -> dict[str, list[ImageFiles]]:
    splits: dict[str, list[ImageFiles]] = {}
    for path, ids in lists.items():
        files, doubled, no_image, no_annotation = _find_files(ids, images, annotations)
        own: list[str] = []
        what = f"images that {path.name} lists are not in JPEGImages: left out"
        note(own, folder, no_image, what)
        what = f"images that {path.name} lists have no XML in Annotations: left out"
        note(own, folder, no_annotation, what)
        what = f"images are in {path.name} more than once: taken once"
        note(own, folder, doubled, what)
        notes += own
        # A list of which nothing is there was most likely not downloaded.
        if not files:
            notes.append(
                f"{folder}: none of the images in {path.name} can be used: no split"
            )
            continue
        total = len(files) + len(no_image) + len(no_annotation)
        check_most(folder, path.name, len(files), total, own)
        name = split_name(path.stem, splits)
        splits[name] = list(files.values())
        if name != path.stem:
            notes.append(f"{folder}: the list {path.name} is split {name!r}")
    note_overlaps(folder, splits, len(images), " in JPEGImages", notes)
    return splits


def _split_by_hash(
    folder: Path, images: dict[str, str], annotations: dict[str, str], notes: list[str]
) -> dict[str, list[ImageFiles]]:
    found, _, _, missing = _find_files(images, images, annotations)
    splits = hold_out(
        folder,
        found.values(),
        lambda files: files.image.partition(os.sep)[2],
        f"{folder} has no lists of images in ImageSets/Main",
        notes,
    )
    note(notes, folder, missing, "images have no XML in Annotations: left out")
    used = {files.annotation for files in found.values()}
    alone = [path for path in annotations.values() if path not in used]
    note(notes, folder, alone, "annotations have no image in JPEGImages: left out")
    return splits
