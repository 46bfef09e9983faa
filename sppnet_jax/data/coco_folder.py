"""Any folder of images with COCO's JSON as a source of images and boxes, read in place.

    root/train2017/1.jpg   root/annotations/instances_train2017.json   …   or
    root/train/1.jpg       root/train/_annotations.coco.json           …   or
    root/images/1.jpg      root/annotations.json

Boxes are [x, y, width, height] in 0-based pixels and become (y, x, y + height,
x + width). `EVENTS` says what the files may hold and what becomes of it.
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sppnet_jax.data import annotations, folders
from sppnet_jax.data.annotated_folders import (
    AnnotatedFolder,
    FolderAnnotations,
    ImageFiles,
    PathIndex,
    by_name,
    check_most,
    common_folder,
    find_listed,
    index_paths,
    make_splits,
    note,
    open_annotated,
    read_all,
)
from sppnet_jax.data.annotations import (
    AnnotatedImage,
    AnnotatedObject,
    Change,
    change_of_size,
    fit_box,
    number,
    truth,
)
from sppnet_jax.data.images import image_size
from sppnet_jax.data.sources import Source

EVENTS = annotations.EVENTS | {
    "no name": "objects were of a category that is not listed or has no name: dropped",
    "extent": "objects had no box, but a segmentation: its extent was taken",
    "listed again": (
        "images were listed more than once: taken once, with the objects of all entries"
    ),
}

_LAYOUT = (
    "Expected images, and beside them, in the folder above or in annotations/, JSON "
    "with the lists images, annotations and categories, such as "
    "annotations/instances_train.json or train/_annotations.coco.json."
)


class Told(NamedTuple):
    """An object as it stands in the file."""

    name: str  # "" where its category has none
    sides: tuple[float | None, ...]  # ymin, xmin, ymax, xmax
    difficult: bool | None  # None where the file doesn't say so clearly
    is_extent: bool  # of a segmentation


class CocoFile(NamedTuple):
    """What a file in COCO's format holds.

    `images`: by their ids, their file names, heights and widths. `objects`: by the ids
    of their images.
    """

    images: dict[str, tuple[str, float | None, float | None]]
    objects: dict[str, list[Told]]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def open_folder(
    root: str, split: str, multi_label: bool = True, with_boxes: bool = False
) -> Source:
    """Opens a split of a folder with COCO's JSON; see `open_detection_source`."""
    how = (scan_folder, read_annotations, split, multi_label, with_boxes)
    return open_annotated("coco_folder", root, *how)


def scan_folder(root: str | os.PathLike[str]) -> AnnotatedFolder:
    """Finds the splits and images of a folder with COCO's JSON, opening no image.

    Each JSON is a split, named train, validation or test after its own name or its
    folder's, or else by its own name; where one is named `instances_…`, only those so
    named count. With one JSON in all, every fifth image, in the order of a hash of its
    name, is "test", and the others "trainval". An image that several list has the
    objects of all.

    Listed images that are absent are left out and noted; an image without objects
    stays.

    Raises: FileNotFoundError if there is no such folder; ValueError if it holds no JSON
    of COCO's, if most images of one are absent, and if there is no image at all.
    """
    folder = folders.existing_folder(root, "COCO folder", _LAYOUT)
    index = index_paths(folder)
    notes: list[str] = []
    files = _find_files(folder, index, notes)
    found: dict[str, list[str]] = {}
    entries: dict[str, list[tuple[str, str]]] = {}
    for path, name in _name_splits(list(files)).items():
        own = [f"{folder / path}: {text}" for text in files[path].notes]
        images = _find_images(folder, path, files[path], index, own)
        notes += own
        found[name] = list(dict.fromkeys(images.values()))
        for key, image in images.items():
            entries.setdefault(image, []).append((path, key))
    if not entries:
        raise ValueError(
            f"{str(folder)!r} has none of the images that its JSON lists. "
            f"{'; '.join(notes)}. {_LAYOUT}"
        )
    splits = {
        name: [ImageFiles(image, entries[image][0][0]) for image in images]
        for name, images in found.items()
    }
    names = dict.fromkeys(name for file in files.values() for name in file.class_names)
    base = common_folder(entries)
    splits = make_splits(folder, base, splits, notes, total=len(index.images))
    return AnnotatedFolder(
        folder,
        base,
        splits,
        tuple(names),
        tuple(notes),
        {image: tuple(given) for image, given in entries.items()},
    )


def read_annotations(scan: AnnotatedFolder, threads: int = 8) -> FolderAnnotations:
    """Reads every image's size and fits its objects into it.

    Returns and raises what `read_all` does.
    """
    paths = {path for entries in scan.entries.values() for path, _ in entries}
    holding = {path: read_file(scan.root / path) for path in paths}

    def read(files: ImageFiles) -> tuple[AnnotatedImage | None, list[str]]:
        entries = [(holding[path], key) for path, key in scan.entries[files.image]]
        return _read_image(scan.root / files.image, entries)

    return read_all(scan, read, EVENTS, threads)


def json_files(index: PathIndex) -> tuple[list[str], list[str]]:
    """The JSON of a folder that is named as COCO's is, and the other JSON."""
    found = [path for path in index.others if path.lower().endswith(".json")]
    instances = [p for p in found if os.path.basename(p).startswith("instances_")]
    return instances or found, [p for p in found if instances and p not in instances]


def read_file(path: Path) -> CocoFile:
    """Reads a file in COCO's format, once in a process until it changes.

    Raises: ValueError for a file that isn't in COCO's format, saying why.
    """
    stat = os.stat(path)
    return _read_file(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_file(path: Path, size: int, mtime: int) -> CocoFile:
    lists = _load(path)
    images, objects, categories = (
        [one for one in given if isinstance(one, dict)] for given in lists
    )
    names: dict[str, str] = {}
    for category in categories:
        key, given = _key(category.get("id")), category.get("name")
        name = " ".join(str(given).split()) if isinstance(given, str | int) else ""
        if key is not None and name:
            names.setdefault(key, folders.printable(name))
    listed: dict[str, tuple[str, float | None, float | None]] = {}
    for image in images:
        key, file_name = _key(image.get("id")), image.get("file_name")
        if key is not None and isinstance(file_name, str) and file_name.strip():
            sides = number(image.get("height")), number(image.get("width"))
            listed.setdefault(key, (file_name, *sides))
    found: dict[str, list[Told]] = {key: [] for key in listed}
    for one in objects:
        if (key := _key(one.get("image_id"))) in found:
            found[key].append(_read_object(one, names))
    total = sum(map(len, found.values()))
    counts = {
        "entries are no objects of JSON: ignored": (
            sum(map(len, lists)) - len(images) - len(objects) - len(categories)
        ),
        "categories have no id, no name, or the id of another: ignored": (
            len(categories) - len(names)
        ),
        "entries of images have no id, no file_name, or the id of another: left out": (
            len(images) - len(listed)
        ),
        "annotations are of images that are not listed: left out": len(objects) - total,
    }
    notes = tuple(f"{count} {what}" for what, count in counts.items() if count)
    return CocoFile(listed, found, tuple(dict.fromkeys(names.values())), notes)


def _load(path: Path) -> list[list[Any]]:
    """The lists images, annotations and categories of a file."""
    try:
        # Thousands of digits would be an error of the whole file.
        value = json.loads(
            folders.read_text(path).strip(folders.BLANK),
            parse_int=lambda t: int(t) if len(t) < 400 else math.inf,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"no JSON of COCO's, but a {type(value).__name__}")
    names = ("images", "annotations", "categories")
    lacks = [name for name in names if not isinstance(value.get(name), list)]
    if lacks:
        raise ValueError(f"no JSON of COCO's, it has no list {', '.join(lacks)}")
    return [value[name] for name in names]


def _key(value: Any) -> str | None:
    """An id as text, whether it is a number or text in the file."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip() or None


def _read_object(value: dict[str, Any], names: dict[str, str]) -> Told:
    name = names.get(_key(value.get("category_id")) or "", "")
    crowd, ignored = truth(value.get("iscrowd")), truth(value.get("ignore"))
    difficult = True if ignored else crowd
    box, extent = value.get("bbox"), None
    if box in (None, [], [0, 0, 0, 0]):
        extent = _extent(value.get("segmentation"))
    if extent:
        return Told(name, extent, difficult, True)
    sides = [number(side) for side in box] if isinstance(box, list) else []
    if len(sides) != 4 or None in sides:
        return Told(name, (None,) * 4, difficult, False)
    x, y, width, height = (side or 0.0 for side in sides)
    return Told(name, (y, x, y + height, x + width), difficult, False)


def _extent(value: Any) -> tuple[float, ...] | None:
    """The box (ymin, xmin, ymax, xmax) around polygons or a run-length mask."""
    if isinstance(value, dict):
        return _extent_of_runs(value.get("counts"), value.get("size"))
    polygons = value if isinstance(value, list) else []
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]
    points = [number(n) for one in polygons if isinstance(one, list) for n in one]
    given = [n for n in points if n is not None and math.isfinite(n)]
    if not given or len(given) < len(points) or len(given) % 2:
        return None
    xs, ys = given[::2], given[1::2]
    return min(ys), min(xs), max(ys), max(xs)


def _extent_of_runs(counts: Any, size: Any) -> tuple[float, ...] | None:
    """Of a mask [height, width] in runs of 0 and 1 by turns, down its columns."""
    if isinstance(counts, str):
        counts = _decode_runs(counts)
    if not (isinstance(counts, list) and isinstance(size, list) and len(size) == 2):
        return None
    if not all(type(n) is int and 0 <= n < 2**53 for n in [*counts, *size]):
        return None
    height, width = size
    if sum(counts) != height * width or height * width >= 2**53:
        return None
    ends = np.cumsum(np.array(counts, np.int64))
    first, last = ends[:-1:2], ends[1::2] - 1
    first, last = first[first <= last], last[first <= last]
    if not len(first):
        return None
    # A run that goes on in the next column touches the lowest and the highest row.
    across = bool((first // height != last // height).any())
    rows = np.concatenate([first, last]) % height
    top, bottom = (0, height) if across else (int(rows.min()), int(rows.max()) + 1)
    return top, int(first[0]) // height, bottom, int(last[-1]) // height + 1


def _decode_runs(text: str) -> list[int]:
    """COCO's compressed runs: 5 bits a character, from the third on as differences."""
    counts: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:  # no run is so long
            return [-1]
        if code & 32:
            continue
        value -= (1 << shift) if code & 16 else 0
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _find_files(
    folder: Path, index: PathIndex, notes: list[str]
) -> dict[str, CocoFile]:
    """The files of a folder that are in COCO's format, by their paths."""
    found: dict[str, CocoFile] = {}
    reasons: list[str] = []
    paths, beside = json_files(index)
    for path in paths:
        try:
            found[path] = read_file(folder / path)
        except ValueError as error:
            if names_lists(folder / path):
                raise ValueError(
                    f"can't read {str(folder / path)!r}: it is {error}. Repair the "
                    "file, or move it elsewhere"
                ) from error
            reasons.append(f"{path} is {error}")
    if not found:
        told = "; ".join(reasons[:3]) or "it has no JSON"
        raise ValueError(
            f"{str(folder)!r} has no annotations of COCO's: {told}. {_LAYOUT}"
        )
    note(notes, folder, reasons, "files of JSON are not COCO's: ignored")
    note(notes, folder, beside, "files of JSON are not named instances_…: ignored")
    return found


def names_lists(path: Path) -> bool:
    """Whether a file has the words of COCO's lists in it, be it whole or not."""
    text = folders.read_text(path)
    return all(f'"{name}"' in text for name in ("images", "annotations"))


def _name_splits(paths: Sequence[str]) -> dict[str, str]:
    """What each JSON's split is called."""
    named = {path: _split_of(path) for path in paths}
    chosen: dict[str, str] = {}
    for path, name in named.items():
        stem = os.path.splitext(os.path.basename(path))[0].removeprefix("instances_")
        # Two that would have one name keep their own.
        alone = name and list(named.values()).count(name) == 1
        own = name if alone and name else stem
        chosen[path] = own if own not in chosen.values() else path
    return chosen


def _split_of(path: str) -> str:
    """train, validation or test, as the last part of a path that says so; else ""."""
    parts = os.path.splitext(path)[0].split(os.sep)
    return next(filter(None, map(folders.split_of, reversed(parts))), "")


def _find_images(
    folder: Path, path: str, file: CocoFile, index: PathIndex, notes: list[str]
) -> dict[str, str]:
    """The images of a JSON that are there, by their ids."""
    stem = os.path.splitext(os.path.basename(path))[0].removeprefix("instances_")
    split = _split_of(path)
    of = {name: _split_of(name) for name in {os.path.dirname(i) for i in index.images}}
    # Not those of another split, which may have the same names.
    candidates = [
        i for i in index.images if not split or of[os.path.dirname(i)] in ("", split)
    ]
    words = [word for word, name in folders.SPLIT_OF.items() if name == split]
    own = os.path.basename(os.path.dirname(path))
    named = by_name(candidates, [name for name in (own, stem, *words) if name])
    found = {key: find_listed(one[0], named) for key, one in file.images.items()}
    absent = [file.images[key][0] for key, image in found.items() if image is None]
    what = f"images that {path} lists are not there, or several of that name: left out"
    note(notes, folder, absent, what)
    images = {key: image for key, image in found.items() if image is not None}
    # Where nothing is there, it was most likely not downloaded.
    check_most(folder, path, len(images), len(found) if images else 0, notes)
    return images


def _read_image(
    path: Path, entries: Sequence[tuple[CocoFile, str]]
) -> tuple[AnnotatedImage | None, list[str]]:
    """An image's size, and the objects of all its entries, files and ids in them."""
    encoded = folders.read_image_file(path)
    try:
        size = image_size(encoded)
    except ValueError:
        return None, ["broken image"]
    events = ["listed again"] * (len(entries) > 1)
    objects: list[AnnotatedObject] = []
    for file, key in entries:
        _, height, width = file.images[key]
        change, size_event = change_of_size((height, width), size, encoded)
        fitted = [_fit(one, size, change, events) for one in file.objects[key]]
        events += [size_event] if size_event and any(fitted) else []
        # An object that another entry has, too, is the same.
        objects += [one for one in fitted if one and one not in objects]
    events += [] if objects else ["no object"]
    return AnnotatedImage(size, tuple(objects)), events


def _fit(
    told: Told, size: tuple[int, int], change: Change | None, events: list[str]
) -> AnnotatedObject | None:
    if not told.name:
        events.append("no name")
        return None
    box = fit_box(told.sides, size, events, change)
    if box is None:
        return None
    events += ["extent"] if told.is_extent else []
    events += ["no difficult"] if told.difficult is None else []
    return AnnotatedObject(told.name, box, is_difficult=bool(told.difficult))
