"""Any folder in Pascal VOC layout as a source of images and boxes, read in place.

    root/JPEGImages/000005.jpg   root/Annotations/000005.xml   …
    root/ImageSets/Main/trainval.txt   root/ImageSets/Main/test.txt   …

What its annotations may hold, and what becomes of it: `voc_annotations`.
"""

import codecs
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sppnet_jax.data import folders
from sppnet_jax.data.sources import HOW_TO_OPEN_SEVERAL, Objects, Source, class_labels
from sppnet_jax.data.voc_annotations import EVENTS, AnnotatedImage, read_image
from sppnet_jax.run.progress import map_in_threads

_LAYOUT = (
    "Expected JPEGImages/ID.jpg and Annotations/ID.xml in it, and in ImageSets/Main "
    "lists of IDs, such as trainval.txt and test.txt."
)


class ImageFiles(NamedTuple):
    """An image and its annotation, as paths relative to the folder's root."""

    image: str
    annotation: str


class VocFolder(NamedTuple):
    """Which images a folder in VOC layout has, and in which splits."""

    root: Path  # the folder of JPEGImages and Annotations
    splits: dict[str, list[ImageFiles]]
    notes: tuple[str, ...]  # what the user should know: absent files, ignored lists


class FolderAnnotations(NamedTuple):
    """What the annotations of a folder hold."""

    class_names: tuple[str, ...]
    images: dict[str, AnnotatedImage]  # by their paths in the root
    notes: tuple[str, ...]  # what was put right, dropped or left out, with counts


def open_folder(
    root: str, split: str, multi_label: bool = True, with_boxes: bool = False
) -> Source:
    """Opens a split of a folder in VOC layout; see `open_detection_source`.

    All annotations are read once in a process, until a file changes.
    """
    if not multi_label:
        raise ValueError(
            "'voc_folder' is not a data set of images with one class each"
            f"{HOW_TO_OPEN_SEVERAL}"
        )
    scan = scan_folder(root)
    class_names, images, notes = _read_once(scan)
    for note in scan.notes + notes:
        folders.warn_once(note)
    splits = {
        name: [files for files in listed if files.image in images]
        for name, listed in scan.splits.items()
    }
    chosen = folders.read_split(
        splits, split, lambda files: _below(files.image), scan.root
    )
    shown = [images[files.image] for files in chosen]
    said = [(files.image, "") for files in chosen]
    said += [(f.annotation, repr(one)) for f, one in zip(chosen, shown, strict=True)]
    folder = scan.root / chosen[0].image.partition(os.sep)[0]
    return Source(
        folders.FileRecords(
            folder,
            [_below(files.image) for files in chosen],
            [_to_record(one, class_names, with_boxes) for one in shown],
        ),
        class_names,
        "voc_folder",
        split,
        multi_label=True,
        digest=folders.digest(scan.root, said),
    )


def scan_folder(root: str | os.PathLike[str]) -> VocFolder:
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
    return VocFolder(folder, splits, tuple(notes))


def read_annotations(scan: VocFolder, threads: int = 8) -> FolderAnnotations:
    """Reads every annotation and every image's size, putting right what can be.

    Returns: the classes, sorted; the images that can be used, with boxes inside the
    image; notes on all that isn't as it was in the files.
    Raises: ValueError if most annotations or images of a split can't be read, or no
    object is left.
    """
    files = sorted({files for split in scan.splits.values() for files in split})

    def read(one: ImageFiles) -> tuple[AnnotatedImage | None, list[str]]:
        return read_image(scan.root / one.image, scan.root / one.annotation)

    results = map_in_threads(read, files, "reading annotations", threads)
    found = dict(zip(files, results, strict=True))
    notes: list[str] = []
    for event, what in EVENTS.items():
        who = [
            files.image if event == "broken image" else files.annotation
            for files, (_, events) in found.items()
            for happened in events
            if happened == event
        ]
        _note(notes, scan.root, who, what)
    images = {one.image: image for one in files if (image := found[one][0])}
    for split, listed in scan.splits.items():
        kept = sum(one.image in images for one in listed)
        _check_most(scan.root, f"split {split!r}", kept, len(listed), notes)
    names = {one.name for image in images.values() for one in image.objects}
    if not names:
        raise ValueError(
            f"the {len(files)} annotations in {str(scan.root)!r} hold no object with a "
            f"name and a box. {'; '.join(notes)}"
        )
    counts = Counter(name.lower() for name in names)
    notes += [
        f"{scan.root}: {sorted(n for n in names if n.lower() == lower)} differ only by "
        "case, and are different classes"
        for lower, count in counts.items()
        if count > 1
    ]
    return FolderAnnotations(tuple(sorted(names)), images, tuple(notes))


# What was read of each root, and the sizes and times of the files it was read from.
_kept: dict[Path, tuple[Any, FolderAnnotations]] = {}


def _read_once(scan: VocFolder) -> FolderAnnotations:
    found = {}
    for path in {path for files in scan.splits.values() for path in chain(*files)}:
        stat = os.stat(scan.root / path)
        found[path] = stat.st_size, stat.st_mtime_ns
    state = scan.splits, found
    if scan.root not in _kept or _kept[scan.root][0] != state:
        _kept[scan.root] = state, read_annotations(scan)
    return _kept[scan.root][1]


def _to_record(
    image: AnnotatedImage, class_names: Sequence[str], with_boxes: bool
) -> dict[str, Any]:
    """What a record has beside its image and its name."""
    labels = np.array([class_names.index(one.name) for one in image.objects], np.int32)
    difficult = np.array([one.is_difficult for one in image.objects], bool)
    told = {"labels": class_labels(labels, labels[~difficult], len(class_names))}
    if not with_boxes:
        return told
    boxes = np.array([one.box for one in image.objects], np.float64).reshape(-1, 4)
    return {**told, "objects": Objects(boxes, labels, difficult)}


def _below(path: str) -> str:
    """A path in the root as one in JPEGImages."""
    return path.partition(os.sep)[2]


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
        key = os.path.splitext(os.path.relpath(path, subfolder))[0]
        if not wanted(path):
            ignored.append(relative)
        elif index.setdefault(key, relative) != relative:
            doubled.append(relative)
    _note(notes, folder, ignored, f"files in {name} are not images: ignored")
    _note(notes, folder, doubled, f"files in {name} have the id of another: ignored")
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
        ids = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
        if not ids:
            empty.append(path.name)
        elif _is_of_a_class(path, ids, names, folder, images, annotations):
            of_a_class.append(path.name)
        else:
            lists[path] = ids
    what = "lists in ImageSets are of one class each: no splits"
    _note(notes, folder, of_a_class, what)
    _note(notes, folder, empty, "lists in ImageSets are empty: no splits")
    return lists


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return os.fsdecode(data.removeprefix(codecs.BOM_UTF8))


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
        _note(own, folder, no_image, what)
        what = f"images that {path.name} lists have no XML in Annotations: left out"
        _note(own, folder, no_annotation, what)
        what = f"images are in {path.name} more than once: taken once"
        _note(own, folder, doubled, what)
        notes += own
        # A list of which nothing is there was most likely not downloaded.
        if not files:
            notes.append(
                f"{folder}: none of the images in {path.name} can be used: no split"
            )
            continue
        total = len(files) + len(no_image) + len(no_annotation)
        _check_most(folder, path.name, len(files), total, own)
        # As a slice may have it: letters, digits, "_", "-"; "all" is all splits.
        name = re.sub(r"[^\w-]+", "_", folders.printable(path.stem))
        while name in splits or name.lower() == "all":
            name += "_"
        splits[name] = list(files.values())
        if name != path.stem:
            notes.append(f"{folder}: the list {path.name} is split {name!r}")
    for name in (name for name in splits if name != "test"):
        both = sorted(set(splits[name]) & set(splits.get("test", [])))
        who = [files.image for files in both]
        _note(notes, folder, who, f"images are both in {name!r} and 'test'")
    used = len(set(chain(*splits.values())))
    if splits and used < len(images):
        notes.append(
            f"{folder}: {len(images) - used} of {len(images)} images in JPEGImages are "
            "in no split"
        )
    return splits


def _check_most(
    folder: Path, what: str, kept: int, total: int, notes: list[str]
) -> None:
    if 2 * kept < total:
        raise ValueError(
            f"only {kept} of the {total} images of {what} in {str(folder)!r} can be "
            f"used; complete the folder, or take the others out of the list. "
            f"{'; '.join(notes)}"
        )


def _split_by_hash(
    folder: Path, images: dict[str, str], annotations: dict[str, str], notes: list[str]
) -> dict[str, list[ImageFiles]]:
    found, _, _, missing = _find_files(images, images, annotations)
    test = folders.hold_out(found)
    notes.append(
        f"{folder} has no lists of images in ImageSets/Main: every "
        f"{folders.HOLD_OUT_EVERY}th image, {len(test)} of {len(found)}, is held out "
        "as split 'test'"
    )
    _note(notes, folder, missing, "images have no XML in Annotations: left out")
    used = {files.annotation for files in found.values()}
    alone = [path for path in annotations.values() if path not in used]
    _note(notes, folder, alone, "annotations have no image in JPEGImages: left out")
    splits = {
        "trainval": [files for key, files in found.items() if key not in test],
        "test": [files for key, files in found.items() if key in test],
    }
    return {split: files for split, files in splits.items() if files}


def _note(notes: list[str], folder: Path, who: Sequence[str], what: str) -> None:
    """Adds to the notes what happened to some files, if any."""
    if who:
        examples = ", ".join(map(folders.printable, list(dict.fromkeys(who))[:3]))
        notes.append(f"{folder}: {len(who)} {what} (such as {examples})")
