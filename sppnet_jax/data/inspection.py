"""What a folder of images holds, classes or boxes: to be looked at before training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.axes import Axes

from sppnet_jax.data import box_folder, image_folder
from sppnet_jax.data.annotated_folders import read_once
from sppnet_jax.data.encoded_images import odd_images
from sppnet_jax.data.folders import existing_folder, printable
from sppnet_jax.data.images import decode_part, image_size
from sppnet_jax.data.sources import Objects, Source, open_detection_source, open_source
from sppnet_jax.run.figures import (
    color_of,
    draw_box,
    draw_label,
    panels,
    save_figure,
    shortened,
    show_image,
)
from sppnet_jax.run.files import table_cell
from sppnet_jax.run.progress import map_in_threads

SHOWN = 24  # images in the contact sheet
_LONGEST, _TITLE = 500, 28  # of an image there, in pixels; of its title, in letters
_ORDER = ("train", "trainval", "validation", "val", "test")  # of splits
_LARGE = ("small, below 32²", "medium", "large, 96² or more")


class Seen(NamedTuple):
    """An image: its name, its (height, width), None if it can't be opened, its objects.

    In a class folder its class is an object without a box.
    """

    name: str
    size: tuple[int, int] | None
    objects: Objects


class Inspected(NamedTuple):
    """What the splits of a folder hold, train before test.

    `kind`: "image_folder", "voc_folder", "coco_folder" or "yolo_folder". `notes`: what
    was put right or left out, and why.
    """

    root: Path
    kind: str
    class_names: tuple[str, ...]
    sources: dict[str, Source]
    images: dict[str, list[Seen]]
    notes: tuple[str, ...]

    @property
    def distinct(self) -> list[tuple[str, int, Seen]]:
        """Every image once, though splits may share it, with a split and its number."""
        numbered = [
            (split, number, one)
            for split, images in self.images.items()
            for number, one in enumerate(images)
        ]
        return list({one.name: (s, n, one) for s, n, one in numbered[::-1]}.values())


def inspect_folder(root: str | Path, kind: str = "", threads: int = 8) -> Inspected:
    """Reads all splits of a folder of class folders or of boxes.

    `kind`: of the folder, where it could be several; "" finds it out.

    Raises: FileNotFoundError if there is no such folder; ValueError if it is of no
    known kind, or of several, and as its kind's `scan_folder` does.
    """
    layouts = f"Give class folders, or boxes. {box_folder.LAYOUTS}"
    folder, before = existing_folder(root, "folder", layouts), len(odd_images())
    if not kind:
        has_boxes = box_folder.find_kinds(folder)
        kind = box_folder.guess_kind(folder) if has_boxes else "image_folder"
    if kind == "image_folder":
        splits, notes = _scan_classes(folder)
        open_any: Callable[..., Source] = open_source
    else:
        module = box_folder.MODULES[kind]
        scan = module.scan_folder(folder)
        splits, notes = list(scan.splits), scan.notes
        notes += read_once(scan, module.read_annotations).notes
        open_any = open_detection_source
    splits.sort(key=lambda name: (*_ORDER, name).index(name))
    sources = {split: open_any(kind, split, root=str(folder)) for split in splits}
    images = {split: _see(source, threads) for split, source in sources.items()}
    notes += tuple(f"{k}: read, but odd: {v}" for k, v in odd_images()[before:])
    class_names = next(iter(sources.values())).class_names
    return Inspected(folder, kind, class_names, sources, images, notes)


def report(found: Inspected) -> str:
    """A folder's kind, counts by class and split, sizes and notes, as text."""
    boxes = found.kind != "image_folder"
    what = "objects" if boxes else "images"
    count = len(found.class_names)
    splits = found.images.values()
    columns = [_counts(images, count) for images in splits]
    names = map(table_cell, found.class_names)
    rows = list(zip(names, zip(*columns, strict=True), strict=True))

    def add(name: str, count: Callable[[list[Seen]], int]) -> None:
        rows.append((name, tuple(map(count, splits))))

    rows.append((f"all {what}", tuple(map(sum, columns))))
    if boxes:
        add("difficult", lambda s: sum(int(one.objects.difficult.sum()) for one in s))
        add("images", len)
        without = "images without objects"
        add(without, lambda s: sum(not len(one.objects.labels) for one in s))
    if any(one.size is None for images in splits for one in images):
        broken = "images that can't be opened"
        add(broken, lambda s: sum(one.size is None for one in s))
    lines = [
        f"{printable(str(found.root))}: {found.kind}, {count} "
        f"{'class' if count == 1 else 'classes'}",
        "",
        f"| {what} of each class | {' | '.join(found.sources)} |",
        f"|---|{'---|' * len(found.sources)}",
        *(f"| {k} | {' | '.join(f'{n:,}' for n in row)} |" for k, row in rows),
        "",
        "| pixels | least | 5 % | median | 95 % | most |",
        "|---|---|---|---|---|---|",
    ]
    seen = [one for *_, one in found.distinct]
    sizes = np.array([one.size for one in seen if one.size]).reshape(-1, 2)
    lines += _quantiles("images' height", sizes[:, 0])
    lines += _quantiles("images' width", sizes[:, 1])
    if boxes:
        corners = np.concatenate([one.objects.boxes for one in seen])
        sides = corners[:, 2:] - corners[:, :2]
        lines += _quantiles("boxes' height", sides[:, 0])
        lines += _quantiles("boxes' width", sides[:, 1])
        areas = np.digitize(sides.prod(axis=1), [32**2, 96**2])
        shares = [f"{(areas == k).mean():.1%} {name}" for k, name in enumerate(_LARGE)]
        lines += ["", f"boxes by their area in pixels: {', '.join(shares)}"]
    notes = [printable(text.replace(f"{found.root}: ", "")) for text in found.notes]
    lines += ["", *(f"- {text}" for text in notes or ["nothing was odd"])]
    return "\n".join(lines)


def draw_contact_sheet(found: Inspected, path: Path) -> Path:
    """Draws images of all classes in turn, with their boxes or under their classes.

    Of each class the largest box of an image is named; difficult ones are dotted.

    Returns: the path of the picture.
    Raises: ValueError if no image can be decoded.
    """
    shown: list[tuple[np.ndarray, tuple[int, int], Seen]] = []
    for split, number, one in _choose(found):
        try:
            encoded = found.sources[split].records[number]["image"]
            image, (height, width) = decode_part(encoded, _LONGEST)
        except ValueError:
            continue
        times = min(1.0, _LONGEST / max(height, width))
        size = max(1, round(width * times)), max(1, round(height * times))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        shown.append((small, (height, width), one))
        if len(shown) == SHOWN:
            break
    if not shown:
        raise ValueError(f"none of the images in {str(found.root)!r} can be decoded")
    columns = min(6, len(shown))
    ratio = float(np.median([np.divide(*size) for _, size, _ in shown]))
    figure, grid = panels(len(shown), columns, ratio, width=2.0 * columns, title=0.25)
    for axes, (small, (height, width), one) in zip(grid, shown, strict=True):
        title = Path(one.name).name
        if found.kind == "image_folder":
            title = found.class_names[one.objects.labels[0]]
        title = shortened(title, _TITLE)
        show_image(axes, small, title, extent=(0, width, height, 0))
        axes.axis("off")
    figure.draw_without_rendering()
    for axes, (*_, one) in zip(grid, shown, strict=True):
        _draw_objects(axes, one.objects, found.class_names)
    return save_figure(figure, path)


def _scan_classes(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    try:
        scan = image_folder.scan_folder(folder)
    except ValueError as error:
        raise ValueError(
            f"{error} Nor has it boxes in a known layout. {box_folder.LAYOUTS}"
        ) from error
    return list(scan.splits), scan.notes


def _see(source: Source, threads: int) -> list[Seen]:
    """Every image of a source, its size read from its file."""

    def read(number: int) -> Seen:
        record = source.records[number]
        label = np.array([record["label"]] if "label" in record else [], np.int32)
        nowhere = Objects(np.zeros((0, 4)), label, np.zeros(len(label), bool))
        try:
            size = image_size(record["image"])
        except ValueError:
            size = None
        return Seen(record["name"], size, record.get("objects", nowhere))

    numbers = range(len(source.records))
    return map_in_threads(read, numbers, f"reading {source.split}", threads)


def _counts(images: Sequence[Seen], classes: int) -> list[int]:
    """How many objects of each class there are."""
    labels = [one.objects.labels for one in images]
    every = np.concatenate([np.zeros(0, int), *labels]).astype(int)
    return np.bincount(every, minlength=classes).tolist()


def _quantiles(name: str, values: np.ndarray) -> list[str]:
    if not len(values):
        return []
    found = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return [f"| {name} | {' | '.join(f'{value:.0f}' for value in found)} |"]


def _choose(found: Inspected) -> list[tuple[str, int, Seen]]:
    """Every image once, such that all classes come up by turns, and background."""
    images = found.distinct
    # Spread over the splits: neighbours, often of one scene, come late.
    order = sorted(range(len(images)), key=lambda k: k * 0.618034 % 1)
    labels = [set(one.objects.labels.tolist()) or {-1} for *_, one in images]
    turns = []
    for label in (*range(len(found.class_names)), -1):
        own = [k for k in order if label in labels[k]]
        turns += [(turn, number) for turn, number in enumerate(own)]
    turns.sort(key=lambda turn: turn[0])
    return [images[k] for k in dict.fromkeys(number for _, number in turns)]


def _draw_objects(axes: Axes, objects: Objects, class_names: Sequence[str]) -> None:
    taken: list[np.ndarray] = []
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    order = np.argsort(-sides.prod(axis=1), kind="stable")
    named = set()
    for k in order:
        color = color_of(objects.labels[k])
        style = {"linestyle": ":"} if objects.difficult[k] else {}
        draw_box(axes, objects.boxes[k], color, **style)
    for k in order:
        label = int(objects.labels[k])
        if label not in named:
            named.add(label)
            box, name = objects.boxes[k], class_names[label]
            draw_label(axes, box, name, color_of(label), taken, size=6)
