"""What a folder of images holds, classes or boxes: to be looked at before training."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib.axes import Axes

from sppnet_jax.data import box_folder, image_folder
from sppnet_jax.data.annotated_folders import read_once
from sppnet_jax.data.folders import existing_folder, printable
from sppnet_jax.data.images import decode_image, image_size
from sppnet_jax.data.sources import Objects, Source, open_detection_source, open_source
from sppnet_jax.run.figures import (
    color_of,
    draw_box,
    draw_label,
    panels,
    save_figure,
    show_image,
)
from sppnet_jax.run.progress import map_in_threads

SHOWN = 24  # images in the contact sheet
_LONGEST = 500  # pixels of an image there
_ORDER = ("train", "trainval", "validation", "val", "test")  # of splits
_LARGE = ("small, below 32²", "medium", "large, 96² or more")


class Inspected(NamedTuple):
    """What the splits of a folder hold.

    `kind`: "image_folder", "voc_folder", "coco_folder" or "yolo_folder". `sizes`: by
    split, each image's height and width, int [N, 2], −1 where it can't be opened.
    `objects`: by split, those of each image; a class folder's have no boxes.
    """

    root: Path
    kind: str
    sources: dict[str, Source]
    sizes: dict[str, np.ndarray]
    objects: dict[str, list[Objects]]
    notes: tuple[str, ...]


def inspect_folder(root: str | Path, kind: str = "", threads: int = 8) -> Inspected:
    """Reads all splits of a folder of class folders or of boxes.

    `kind`: of the folder, where it could be several; "" finds it out.

    Raises: FileNotFoundError if there is no such folder; ValueError if it is of no
    known kind, or of several, and as its kind's `scan_folder` does.
    """
    folder = existing_folder(
        root, "folder", f"Give class folders. {box_folder.LAYOUTS}"
    )
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
    sources = {split: open_any(kind, split, root=str(root)) for split in splits}
    sizes, objects = {}, {}
    for split, source in sources.items():

        def read(index: int, source: Source = source) -> tuple[tuple, Objects]:
            record = source.records[index]
            label = np.array([record["label"]] if "label" in record else [], np.int32)
            none = Objects(np.zeros((0, 4)), label, np.zeros(len(label), bool))
            try:
                size = image_size(record["image"])
            except ValueError:
                size = (-1, -1)
            return size, record.get("objects", none)

        indices = range(len(source.records))
        read_all = map_in_threads(read, indices, f"reading {split}", threads)
        sizes[split] = np.array([size for size, _ in read_all])
        objects[split] = [found for _, found in read_all]
    return Inspected(folder, kind, sources, sizes, objects, notes)


def report(found: Inspected) -> str:
    """A folder's kind, counts by class and split, sizes and notes, as text."""
    boxes = found.kind != "image_folder"
    what = "objects" if boxes else "images"
    class_names = next(iter(found.sources.values())).class_names
    lines = [
        f"{printable(str(found.root))}: {found.kind}, "
        f"{len(class_names)} {'class' if len(class_names) == 1 else 'classes'}",
        "",
        f"| {what} of each class | {' | '.join(found.sources)} |",
        f"|---|{'---|' * len(found.sources)}",
    ]
    columns = [_counts(objects, class_names) for objects in found.objects.values()]
    rows = {name: [column[name] for column in columns] for name in class_names}
    rows[f"all {what}"] = [sum(column.values()) for column in columns]
    if boxes:
        every = found.objects.values()
        rows["difficult"] = [sum(int(o.difficult.sum()) for o in one) for one in every]
        rows["images"] = [len(one) for one in every]
        rows["images without objects"] = [
            sum(not len(objects.labels) for objects in one) for one in every
        ]
    broken = [int((sizes < 0).any(axis=1).sum()) for sizes in found.sizes.values()]
    if any(broken):
        rows["images that can't be opened"] = broken
    lines += [
        f"| {name} | {' | '.join(f'{n:,}' for n in row)} |"
        for name, row in rows.items()
    ]
    lines += [
        "",
        "| pixels | least | 5 % | median | 95 % | most |",
        "|---|---|---|---|---|---|",
    ]
    sizes = np.concatenate([*found.sizes.values()])
    sizes = sizes[(sizes > 0).all(axis=1)]
    lines += _quantiles("images' height", sizes[:, 0])
    lines += _quantiles("images' width", sizes[:, 1])
    if boxes:
        corners = np.concatenate(
            [objects.boxes for one in found.objects.values() for objects in one]
        )
        sides = corners[:, 2:] - corners[:, :2]
        lines += _quantiles("boxes' height", sides[:, 0])
        lines += _quantiles("boxes' width", sides[:, 1])
        areas = np.digitize(sides.prod(axis=1), [32**2, 96**2])
        shares = [f"{(areas == k).mean():.0%} {name}" for k, name in enumerate(_LARGE)]
        lines += ["", f"boxes by their area in pixels: {', '.join(shares)}"]
    here = f"{found.root}: "
    notes = [printable(note.replace(here, "")) for note in found.notes]
    lines += (
        ["", *(f"- {note}" for note in notes)] if notes else ["", "nothing was odd"]
    )
    return "\n".join(lines)


def draw_contact_sheet(found: Inspected, path: Path) -> Path:
    """Draws images of all classes in turn, with their boxes or under their classes.

    Of each class the largest box of an image is named; difficult ones are dotted.

    Returns: the path of the picture.
    Raises: ValueError if no image can be decoded.
    """
    class_names = next(iter(found.sources.values())).class_names
    shown: list[tuple[np.ndarray, Objects, str]] = []
    for split, index in _choose(found.objects, len(class_names)):
        record = found.sources[split].records[index]
        try:
            image = decode_image(record["image"])
        except ValueError:
            continue
        shown.append((image, found.objects[split][index], record["name"]))
        if len(shown) == SHOWN:
            break
    if not shown:
        raise ValueError(f"none of the images in {str(found.root)!r} can be decoded")
    columns = min(6, len(shown))
    ratio = float(np.median([image.shape[0] / image.shape[1] for image, *_ in shown]))
    figure, grid = panels(len(shown), columns, ratio, width=2.0 * columns, title=0.25)
    for axes, (image, objects, name) in zip(grid, shown, strict=True):
        height, width = image.shape[:2]
        times = min(1.0, _LONGEST / max(height, width))
        size = max(1, round(width * times)), max(1, round(height * times))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        boxes = len(objects.boxes) or found.kind != "image_folder"
        title = Path(name).name if boxes else class_names[objects.labels[0]]
        show_image(axes, small, _short(title), extent=(0, width, height, 0))
        axes.axis("off")
    figure.draw_without_rendering()
    for axes, (_, objects, _) in zip(grid, shown, strict=True):
        _draw_objects(axes, objects, class_names)
    return save_figure(figure, path)


def _scan_classes(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    try:
        scan = image_folder.scan_folder(folder)
    except ValueError as error:
        raise ValueError(
            f"{error} Nor has it boxes in a known layout. {box_folder.LAYOUTS}"
        ) from error
    return list(scan.splits), scan.notes


def _counts(objects: Sequence[Objects], class_names: Sequence[str]) -> Counter[str]:
    """How many objects of each class there are."""
    labels = np.concatenate([np.zeros(0, int), *(one.labels for one in objects)])
    counts = np.bincount(labels.astype(int), minlength=len(class_names))
    return Counter(dict(zip(class_names, counts.tolist(), strict=True)))


def _quantiles(name: str, values: np.ndarray) -> list[str]:
    if not len(values):
        return []
    found = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return [f"| {name} | {' | '.join(f'{value:.0f}' for value in found)} |"]


def _choose(
    objects: Mapping[str, Sequence[Objects]], classes: int
) -> list[tuple[str, int]]:
    """Images by split and number, such that all classes come up, by turns."""
    images = [(split, i) for split, one in objects.items() for i in range(len(one))]
    labels = [set(objects[split][i].labels.tolist()) for split, i in images]
    # Spread over the splits: neighbours come late.
    order = sorted(range(len(images)), key=lambda n: n * 0.618034 % 1)
    queues = [[n for n in order if label in labels[n]] for label in range(classes)]
    queues.append([n for n in order if not labels[n]])
    turns = [
        (turn, label, n)
        for label, queue in enumerate(queues)
        for turn, n in enumerate(queue)
    ]
    return [images[n] for n in dict.fromkeys(n for *_, n in sorted(turns))]


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


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
