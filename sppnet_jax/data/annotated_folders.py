"""What folders of images with annotations have in common, whatever the format.

A format finds the images and their splits (`scan_folder` of its module) and reads one
image's objects; splits, notes, classes, records and digests are made here.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from sppnet_jax.data import folders
from sppnet_jax.data.annotations import AnnotatedImage
from sppnet_jax.data.sources import HOW_TO_OPEN_SEVERAL, Objects, Source, class_labels
from sppnet_jax.run.progress import map_in_threads


class ImageFiles(NamedTuple):
    """An image and its annotation, as paths relative to the folder's root.

    `annotation`: "" for an image without.
    """

    image: str
    annotation: str


class AnnotatedFolder(NamedTuple):
    """Which images a folder has, and in which splits.

    `base`: the folder in the root, "" for the root itself, from which on an image's
    path is its name. `listed_names`: the classes that the folder names. `entries`: of
    annotation files that are of many images, for each image those that list it, and its
    ids there.
    """

    root: Path
    base: str
    splits: dict[str, list[ImageFiles]]
    listed_names: tuple[str, ...]
    notes: tuple[str, ...]  # what the user should know: absent files, ignored lists
    entries: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType({})

    def name_of(self, files: ImageFiles) -> str:
        """What the image is called in records and results."""
        return files.image[len(self.base) + 1 :] if self.base else files.image


class FolderAnnotations(NamedTuple):
    """What the annotations of a folder hold."""

    class_names: tuple[str, ...]
    images: dict[str, AnnotatedImage]  # by their paths in the root
    notes: tuple[str, ...]  # what was put right, dropped or left out, with counts


# An image, or None if it is left out, and what happened to it as keys of the events.
ReadImage = Callable[[ImageFiles], tuple[AnnotatedImage | None, list[str]]]


def open_annotated(
    kind: str,
    root: str,
    scan_folder: Callable[[str], AnnotatedFolder],
    read_annotations: Callable[[AnnotatedFolder], FolderAnnotations],
    split: str,
    multi_label: bool,
    with_boxes: bool,
) -> Source:
    """Opens a split of a folder; see `open_detection_source`.

    All annotations are read once in a process, until a file changes.

    `kind`: of the folder, such as "voc_folder", of whose module `scan_folder` and
    `read_annotations` are.
    """
    if not multi_label:
        raise ValueError(
            f"{kind!r} is not a data set of images with one class each"
            f"{HOW_TO_OPEN_SEVERAL}"
        )
    scan = scan_folder(root)
    class_names, images, notes = read_once(scan, read_annotations)
    for note in scan.notes + notes:
        folders.warn_once(note)
    splits = {
        name: [files for files in listed if files.image in images]
        for name, listed in scan.splits.items()
    }
    chosen = folders.read_split(splits, split, scan.name_of, scan.root)
    shown = [images[files.image] for files in chosen]
    said = [(files.image, "") for files in chosen]
    said += [
        (files.annotation or files.image, repr(one))
        for files, one in zip(chosen, shown, strict=True)
    ]
    return Source(
        folders.FileRecords(
            scan.root / scan.base,
            [scan.name_of(files) for files in chosen],
            [_to_record(one, class_names, with_boxes) for one in shown],
        ),
        class_names,
        kind,
        split,
        multi_label=True,
        digest=folders.digest(scan.root, said),
    )


def read_all(
    scan: AnnotatedFolder, read: ReadImage, events: Mapping[str, str], threads: int = 8
) -> FolderAnnotations:
    """Reads every image's annotation and size.

    `read`: of one image. `events`: of this format, and what the notes say of each.

    Returns: the classes that have objects, sorted; the images that can be used, with
    boxes inside the image; notes on all that isn't as it was in the files.
    Raises: ValueError if most annotations or images of a split can't be read, or no
    object is left.
    """
    files = sorted({files for split in scan.splits.values() for files in split})
    results = map_in_threads(read, files, "reading annotations", threads)
    found = dict(zip(files, results, strict=True))
    notes: list[str] = []
    for event, what in events.items():
        who = [
            one.image
            if event == "broken image" or scan.entries or not one.annotation
            else one.annotation
            for one, (_, happened) in found.items()
            for _ in range(happened.count(event))
        ]
        note(notes, scan.root, who, what)
    images = {one.image: image for one in files if (image := found[one][0])}
    for split, listed in scan.splits.items():
        kept = sum(one.image in images for one in listed)
        check_most(scan.root, f"split {split!r}", kept, len(listed), notes)
    names = {one.name for image in images.values() for one in image.objects}
    if not names:
        told = "; ".join([*scan.notes, *notes])
        raise ValueError(
            f"the {len(files)} annotations in {str(scan.root)!r} hold no object with a "
            f"name and a box. {told}"
        )
    without = [name for name in scan.listed_names if name not in names]
    note(notes, scan.root, without, "classes that are listed have no object: left out")
    counts = Counter(name.lower() for name in names)
    notes += [
        f"{scan.root}: {sorted(n for n in names if n.lower() == lower)} differ only by "
        "case, and are different classes"
        for lower, count in counts.items()
        if count > 1
    ]
    return FolderAnnotations(tuple(sorted(names)), images, tuple(notes))


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


# What was read of each root, and the sizes and times of the files it was read from.
_kept: dict[Path, tuple[Any, FolderAnnotations]] = {}


def read_once(
    scan: AnnotatedFolder, read: Callable[[AnnotatedFolder], FolderAnnotations]
) -> FolderAnnotations:
    """What `read` makes of a folder, again only after one of its files has changed."""
    found = {}
    listed = {files for split in scan.splits.values() for files in split}
    paths = {path for files in listed for path in (files.image, files.annotation)}
    paths |= {path for entries in scan.entries.values() for path, _ in entries}
    for path in paths - {""}:
        stat = os.stat(scan.root / path)
        found[path] = stat.st_size, stat.st_mtime_ns
    state = scan, found
    if scan.root not in _kept or _kept[scan.root][0] != state:
        _kept[scan.root] = state, read(scan)
    return _kept[scan.root][1]


def make_splits(
    root: Path,
    base: str,
    found: Mapping[str, Sequence[ImageFiles]],
    notes: list[str],
    *,
    total: int,
) -> dict[str, list[ImageFiles]]:
    """The splits of a folder, by names that a slice may have; notes on them.

    Splits of the very same images are one. If no more than one is left, every fifth
    image is "test", and the others are "trainval".

    `found`: the images of each split as it was found. `total`: of images there are.
    """
    distinct: dict[frozenset[ImageFiles], str] = {}
    for name, files in found.items():
        first = distinct.setdefault(frozenset(files), name)
        if not files:
            notes.append(f"{root}: {name!r} has no image that can be used: no split")
        elif first != name:
            notes.append(f"{root}: {name!r} has the images of {first!r}: one split")
    names = [name for files, name in distinct.items() if files]
    splits: dict[str, list[ImageFiles]] = {}
    if len(names) > 1:
        for name in names:
            splits[split_name(name, splits)] = list(found[name])
    else:
        files = [one for name in names for one in found[name]]
        splits = hold_out(
            root,
            files,
            lambda one: one.image[len(base) + 1 if base else 0 :],
            f"{root} has no splits",
            notes,
        )
    note_overlaps(root, splits, total, "", notes)
    return splits


def hold_out(
    root: Path,
    files: Iterable[ImageFiles],
    name_of: Callable[[ImageFiles], str],
    why: str,
    notes: list[str],
) -> dict[str, list[ImageFiles]]:
    """Every fifth image, by its name without the suffix, as "test"; "trainval"."""
    named: dict[str, ImageFiles] = {}
    for one in files:
        name = name_of(one)
        stem = os.path.splitext(name)[0]
        named[name if stem in named else stem] = one
    test = folders.hold_out(named)
    notes.append(
        f"{why}: every {folders.HOLD_OUT_EVERY}th image, {len(test)} of {len(named)}, "
        "is held out as split 'test'"
    )
    splits = {
        "trainval": [one for name, one in named.items() if name not in test],
        "test": [one for name, one in named.items() if name in test],
    }
    return {split: listed for split, listed in splits.items() if listed}


def split_name(name: str, taken: Iterable[str]) -> str:
    """A split's name as a slice may have it: letters, digits, "_", "-"; and unused."""
    name = re.sub(r"[^\w-]+", "_", folders.printable(name))
    while name in taken or name.lower() == "all":  # TFDS's word for all splits
        name += "_"
    return name


def note_overlaps(
    root: Path,
    splits: Mapping[str, Sequence[ImageFiles]],
    total: int,
    where: str,
    notes: list[str],
) -> None:
    """Notes images both to train and to test on, and those in no split."""
    for name in (name for name in splits if name != "test"):
        both = sorted(set(splits[name]) & set(splits.get("test", [])))
        who = [files.image for files in both]
        note(notes, root, who, f"images are both in {name!r} and 'test'")
    used = len({files.image for files in chain(*splits.values())})
    if splits and used < total:
        notes.append(f"{root}: {total - used} of {total} images{where} are in no split")


def check_most(root: Path, what: str, kept: int, total: int, notes: list[str]) -> None:
    """Raises ValueError if fewer than half of some images can be used."""
    if 2 * kept < total:
        raise ValueError(
            f"only {kept} of the {total} images of {what} in {str(root)!r} can be "
            f"used; complete the folder, or take the others out of the list. "
            f"{'; '.join(notes)}"
        )


def note(notes: list[str], root: Path, who: Sequence[str], what: str) -> None:
    """Adds to the notes what happened to some files, if any."""
    if who:
        examples = ", ".join(map(folders.printable, list(dict.fromkeys(who))[:3]))
        notes.append(f"{root}: {len(who)} {what} (such as {examples})")


def common_folder(paths: Iterable[str]) -> str:
    """The deepest folder that holds all of some relative paths; "" for the root."""
    parents = {os.path.dirname(path) for path in paths}
    return os.path.commonpath(parents) if parents and "" not in parents else ""


class PathIndex(NamedTuple):
    """The files of a folder, as paths relative to it, sorted."""

    images: tuple[str, ...]
    others: tuple[str, ...]


def index_paths(root: Path) -> PathIndex:
    """Every visible file of a folder, at any depth."""
    images: list[str] = []
    others: list[str] = []
    for path in folders.walk_files(root):
        if folders.is_image(path):
            images.append(os.path.relpath(path, root))
        elif path.is_file():
            others.append(os.path.relpath(path, root))
    named: dict[str, str] = {}
    for image in sorted(images):
        first = named.setdefault(folders.printable(image), image)
        if first != image:
            folders.warn_once(
                f"{root}: two images are {image}: one of them is left out"
            )
    return PathIndex(tuple(named.values()), tuple(sorted(others)))


def by_name(paths: Iterable[str], near: Sequence[str] = ()) -> dict[str, list[str]]:
    """Paths by their last part, `printable`.

    `near`: names of folders; if there are paths in a folder of the first of these
    names, or of the next, they are all that counts.
    """
    paths = list(paths)
    for folder in near:
        inside = [path for path in paths if folder in path.split(os.sep)[:-1]]
        if inside:
            paths = inside
            break
    named: dict[str, list[str]] = {}
    for path in paths:
        name = folders.printable(os.path.basename(path))
        named.setdefault(name, []).append(path)
    return named


def find_listed(listed: str, named: Mapping[str, Sequence[str]]) -> str | None:
    """The one of some paths, `by_name`, that a listed one means; None for none.

    A listed path may begin elsewhere, and have slashes of either kind. Of several that
    end as it does, the one nearest to the root is meant.
    """
    listed = folders.printable(listed.strip())
    wanted = [part for part in re.split(r"[/\\]+", listed) if part != "."]
    for first in range(len(wanted)):
        ending = wanted[first:]
        found = [
            (path.count(os.sep), path)
            for path in named.get(wanted[-1], ())
            if folders.printable(path).split(os.sep)[-len(ending) :] == ending
        ]
        found = [one for one in found if one[0] == min(found)[0]]
        if found:
            return found[0][1] if len(found) == 1 else None
    return None
