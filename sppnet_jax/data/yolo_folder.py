"""Any folder in YOLO's layout as a source of images and boxes, read in place.

    root/images/1.jpg        root/labels/1.txt         root/data.yaml   or
    root/images/train/1.jpg  root/labels/train/1.txt   root/classes.txt   or
    root/train/images/1.jpg  root/train/labels/1.txt   or
    root/1.jpg               root/1.txt                root/train.txt, a list of images

A line of a label file is `class cx cy width height`, or `class x1 y1 x2 y2 x3 y3 …`,
the corners of a polygon, of which the extent is taken: all as shares of the sides of
the image as it is shown. `EVENTS` says what the files may hold and what becomes of it.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

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
    fit_box,
    number,
)
from sppnet_jax.data.images import image_size
from sppnet_jax.data.sources import Source

EVENTS = annotations.EVENTS | {
    "no name": "objects were of a class that has no name in the list: dropped",
    "broken line": (
        "lines were no class with a box or a polygon of finite numbers: dropped"
    ),
    "no share": (
        "boxes lay far beyond the image, as pixels do that were meant to be shares of "
        "its sides: dropped"
    ),
    "score": "lines had a sixth number, most likely a score: it was ignored",
    "extent": "objects were polygons: their extents were taken",
    "no label file": "images have no label file: kept, all of them background",
}

_LAYOUT = (
    "Expected images/1.jpg and labels/1.txt in it, the same in split folders "
    "(images/train or train/images), or labels beside the images, and the names of the "
    "classes in data.yaml or classes.txt."
)
_FARTHEST = 2.0  # share of a side that a box may reach; beyond, it is in other units


class Yaml(NamedTuple):
    """What a data.yaml says.

    `splits`: the folders or lists of each, as they stand there. `keypoints`: whether
    lines go on with keypoints behind the box.
    """

    names: dict[int, str]
    splits: dict[str, list[str]]
    keypoints: bool


def open_folder(
    root: str, split: str, multi_label: bool = True, with_boxes: bool = False
) -> Source:
    """Opens a split of a folder in YOLO's layout; see `open_detection_source`."""
    how = (scan_folder, read_annotations, split, multi_label, with_boxes)
    return open_annotated("yolo_folder", root, *how)


def scan_folder(root: str | os.PathLike[str]) -> AnnotatedFolder:
    """Finds the splits and images of a folder in YOLO's layout, opening no image.

    Splits are what data.yaml names, folders or lists; else the lists train.txt, val.txt
    and test.txt; else folders such as train, val2017, valid and test at any depth.
    Without, every fifth image, in the order of a hash of its name, is "test", and the
    others "trainval". A path in data.yaml or in a list may begin elsewhere: the file of
    this folder is meant that ends so. A folder that holds one folder and nothing else
    is taken for that.

    An image without a label file is without objects.

    Raises: FileNotFoundError if there is no such folder; ValueError if it has no images
    or no label files, if data.yaml can't be read, and if most images of a list, but
    not all, are absent.
    """
    folder = folders.existing_folder(root, "YOLO folder", _LAYOUT)
    # Archives are often unpacked into a folder of their own.
    while len((listing := folders.list_folder(folder))[0]) == 1 and not listing[1]:
        folder = folder / listing[0][0]
    index = index_paths(folder)
    notes: list[str] = []
    told, names, lists = _names(folder, index, notes)
    splits = _find_splits(folder, index, told, lists, notes)
    labels = _label_files(index, {i for images in splits.values() for i in images})
    if not any(labels.values()):
        raise ValueError(
            f"{str(folder)!r} has {len(index.images)} images, and a label file (.txt) "
            f"of none. {_LAYOUT}"
        )
    used = {*labels.values(), *lists}
    alone = [p for p in index.others if p.endswith(".txt") and p not in used]
    alone = [p for p in alone if _in_labels(p)]
    note(notes, folder, alone, "label files have no image in a split: left out")
    base = common_folder(labels)
    found = {
        name: [ImageFiles(image, labels[image]) for image in images]
        for name, images in splits.items()
    }
    return AnnotatedFolder(
        folder,
        base,
        make_splits(folder, base, found, notes, total=len(index.images)),
        tuple(dict.fromkeys(names.values())),
        tuple(notes),
    )


def read_annotations(scan: AnnotatedFolder, threads: int = 8) -> FolderAnnotations:
    """Reads every label file and every image's size, putting right what can be.

    Returns and raises what `read_all` does.
    """
    told, names, _ = _names(scan.root, index_paths(scan.root), [])

    def read(files: ImageFiles) -> tuple[AnnotatedImage | None, list[str]]:
        labels = scan.root / files.annotation if files.annotation else None
        return read_image(scan.root / files.image, labels, names, told.keypoints)

    return read_all(scan, read, EVENTS, threads)


def read_image(
    image: Path, labels: Path | None, names: dict[int, str], keypoints: bool = False
) -> tuple[AnnotatedImage | None, list[str]]:
    """Reads an image file's size, and from its label file the objects in it.

    `labels`: None for an image without. `names`: of the classes, by their numbers; if
    empty, the numbers are the names. `keypoints`: whether they follow the box.

    Returns: the image, or None if it is left out; and what happened on the way, as keys
    of `EVENTS`, one for each box, object or file.
    """
    try:
        size = image_size(folders.read_image_file(image))
    except ValueError:
        return None, ["broken image"]
    if labels is None:
        return AnnotatedImage(size, ()), ["no label file"]
    events: list[str] = []
    lines = (line.split() for line in folders.read_text(labels).splitlines())
    read = (_read_line(words, names, keypoints, size, events) for words in lines)
    objects = tuple(one for one in read if one)
    return AnnotatedImage(size, objects), events + ([] if objects else ["no object"])


def _read_line(
    words: Sequence[str],
    names: dict[int, str],
    keypoints: bool,
    size: tuple[int, int],
    events: list[str],
) -> AnnotatedObject | None:
    if not words:
        return None
    words = words[:5] if keypoints else words
    values = [number(word) for word in words]
    finite = [v for v in values if v is not None and np.isfinite(v)]
    is_polygon = len(words) > 6 and len(words) % 2 == 1
    whole = len(finite) == len(words) and finite[0].is_integer()
    if not whole or not (len(words) in (5, 6) or is_polygon):
        events.append("broken line")
        return None
    label, shares = int(finite[0]), finite[1 : None if is_polygon else 5]
    name = names.get(label, "") if names else str(label)
    if not name or label < 0:
        events.append("no name")
        return None
    if max(map(abs, shares)) > _FARTHEST:
        events.append("no share")
        return None
    # What the last digit leaves open: pixels that were whole are so again.
    digits = min(len(word.partition(".")[2]) for word in words[1 : len(shares) + 1])
    sides = _to_pixels(shares, is_polygon, size, 10.0**-digits)
    box = fit_box(sides, size, events, in_pixels=False)
    if box is None:
        return None
    events += ["score"] * (len(words) == 6) + ["extent"] * is_polygon
    return AnnotatedObject(name, box)


def _to_pixels(
    shares: Sequence[float], is_polygon: bool, size: tuple[int, int], precision: float
) -> list[float]:
    """ymin, xmin, ymax, xmax in pixels, of a centre with sides or of a polygon."""
    if is_polygon:
        xs, ys = shares[::2], shares[1::2]
        corners = [min(ys), min(xs), max(ys), max(xs)]
    else:
        x, y, width, height = shares
        corners = [y - height / 2, x - width / 2, y + height / 2, x + width / 2]
    sides = np.array([*size, *size], float)
    pixels = np.array(corners) * sides
    # Half a digit of the centre and a quarter of the side; and float64's own.
    close = np.abs(pixels - np.round(pixels)) <= sides * (
        0.75 * min(precision, 1e-5) + 1e-12
    )
    return np.where(close, np.round(pixels), pixels).tolist()


def label_sign(folder: Path, index: PathIndex) -> str | None:
    """A file that tells that a folder is in YOLO's layout; None for none."""
    labels = [p for p in index.others if _in_labels(p) and p.endswith(".txt")]
    beside = set(index.others) & {os.path.splitext(i)[0] + ".txt" for i in index.images}
    named = names_file(index) and min(beside, default=None)
    return find_yaml(folder, index) or next(iter(labels), None) or named


def find_yaml(folder: Path, index: PathIndex) -> str | None:
    """The YAML of a folder that names classes, data.yaml before others."""
    found = [p for p in index.others if p.lower().endswith((".yaml", ".yml"))]
    found.sort(
        key=lambda p: (not os.path.basename(p).startswith("data"), p.count("/"), p)
    )
    named = re.compile(r"^\s*[\"']?names[\"']?\s*:", re.MULTILINE)
    return next((p for p in found if named.search(folders.read_text(folder / p))), None)


def read_yaml(path: Path) -> Yaml:
    """Reads what a data.yaml says of classes and splits.

    Raises: ValueError for a file that can't be read, or whose names are none.
    """
    try:
        # All scalars as text: else a class "no" would be False.
        value = yaml.load(folders.read_text(path), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"can't read {str(path)!r}: {error}") from error
    told = value if isinstance(value, dict) else {}
    names = told.get("names") or {}
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    try:
        named = {int(key): _text(name) for key, name in dict(names).items()}
        splits = {
            split: [_text(path) for path in _listed(told.get(key))]
            for key, split in folders.SPLIT_OF.items()
            if _listed(told.get(key))
        }
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} must have names of classes as a list or by numbers, and "
            f"train, val and test as paths: {error}"
        ) from error
    return Yaml(named, splits, "kpt_shape" in told)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} in place of text")
    return folders.printable(" ".join(value.split()))


def names_file(index: PathIndex) -> str | None:
    """The list of names nearest to the root: classes.txt, obj.names or the like."""
    known = ("classes.txt", "obj.names", "labels.txt", "names.txt", "classes.names")
    found = [p for p in index.others if os.path.basename(p).lower() in known]
    return min(found, key=lambda p: (p.count(os.sep), p), default=None)


def _names(
    folder: Path, index: PathIndex, notes: list[str]
) -> tuple[Yaml, dict[int, str], set[str]]:
    """What data.yaml says, the names of the classes, and the text files of no image."""
    path, listing = find_yaml(folder, index), names_file(index)
    told = read_yaml(folder / path) if path else Yaml({}, {}, False)
    lists = {listing} if listing else set()
    names = told.names
    if not names and listing:
        lines = folders.read_text(folder / listing).splitlines()
        while lines and not lines[-1].strip():
            lines.pop()
        lines = [folders.printable(" ".join(line.split())) for line in lines]
        names = dict(enumerate(lines))
    if not names:
        notes.append(
            f"{folder} has no names of classes, in data.yaml or classes.txt: their "
            "numbers are taken"
        )
    return told, names, lists


def _find_splits(
    folder: Path, index: PathIndex, told: Yaml, lists: set[str], notes: list[str]
) -> dict[str, list[str]]:
    """The images of each split; files that are read as lists are added to `lists`."""
    if not index.images:
        raise ValueError(f"{str(folder)!r} has no images. {_LAYOUT}")
    named = by_name(index.images)
    given = dict(told.splits)
    if not given:
        for path in index.others:
            stem, suffix = os.path.splitext(path)
            if suffix == ".txt" and stem.lower() in folders.SPLIT_OF:
                given.setdefault(folders.SPLIT_OF[stem.lower()], []).append(path)
    splits: dict[str, list[str]] = {}
    for name, paths in given.items():
        images: list[str] = []
        for path in paths:
            found = _images_of(folder, path, index, named, lists, notes)
            if found is None:
                notes.append(f"{folder}: {name} is to be {path!r}, which is not there")
            images += found or []
        if images:
            splits[name] = list(dict.fromkeys(images))
    if splits:
        return splits
    for image in index.images:
        said = filter(None, map(folders.split_of, image.split(os.sep)[:-1]))
        splits.setdefault(next(said, ""), []).append(image)
    if set(splits) != {""}:
        splits.pop("", None)
    return splits


def _images_of(
    folder: Path,
    given: str,
    index: PathIndex,
    named: dict[str, list[str]],
    lists: set[str],
    notes: list[str],
) -> list[str] | None:
    """The images of a folder or of a list, by a path that may begin elsewhere."""
    if given.lower().endswith(".txt"):
        path = find_listed(given, by_name(index.others))
        if path is None:
            return None
        lists.add(path)
        return _read_list(folder, path, named, notes)
    parts = [part for part in re.split(r"[/\\]+", given) if part not in ("", ".", "..")]
    # "." is the root; "../train/images", as Roboflow has it, is train/images.
    for first in range(max(1, len(parts))):
        if first and parts[first - 1].lower() in folders.SPLIT_OF:
            break  # what is left would be another split's
        inside = folders.printable(os.sep.join([*parts[first:], ""]))
        images = [i for i in index.images if folders.printable(i).startswith(inside)]
        if images:
            return images
    return None


def _read_list(
    folder: Path, path: str, named: dict[str, list[str]], notes: list[str]
) -> list[str]:
    lines = [line.strip() for line in folders.read_text(folder / path).splitlines()]
    lines = [line for line in lines if line]
    found = {line: find_listed(line, named) for line in lines}
    absent = [line for line in lines if found[line] is None]
    images = [image for line in lines if (image := found[line]) is not None]
    kept = list(dict.fromkeys(images))
    own: list[str] = []
    what = f"images that {path} lists are not there, or several of that name: left out"
    note(own, folder, absent, what)
    doubled = [image for image, count in Counter(images).items() if count > 1]
    note(own, folder, doubled, f"images are in {path} more than once: taken once")
    notes += own
    if kept:
        check_most(folder, path, len(kept), len(kept) + len(absent), own)
    return kept


def _label_files(index: PathIndex, images: Iterable[str]) -> dict[str, str]:
    """Each image's label file, "" for none: in labels/ for images/, or beside it."""
    there = {folders.printable(path): path for path in index.others}
    found = {}
    for image in sorted(images):
        stem = os.path.splitext(folders.printable(image))[0]
        parts = stem.split(os.sep)
        ways = [stem, os.path.join("labels", stem)]
        for place in (k for k, p in enumerate(parts[:-1]) if p.lower() == "images"):
            ways.insert(0, os.sep.join([*parts[:place], "labels", *parts[place + 1 :]]))
        labels = (there.get(f"{way}.txt", "") for way in ways)
        found[image] = next(filter(None, labels), "")
    return found


def _in_labels(path: str) -> bool:
    return "labels" in path.lower().split(os.sep)[:-1]
