"""Detections in the files of PASCAL VOC, COCO and YOLO, for evaluation by other tools.

VOC has a text file for each class, comp4_det_SPLIT_CLASS.txt, and in it a line for each
detection: `image_id score xmin ymin xmax ymax`, the pixels 1-based, the last ones
included. Numbers have all the digits that it takes to rank and overlap the same when
they are read. A space can't be in an image's id there, nor a slash in a class's file
name: whitespace, control characters, / and \\ are written as in URLs, "a b" as "a%20b",
and so is % itself. Other names stay as they are; a file's name of more than 255 bytes
is cut, and marked by a hash.

COCO has JSON: boxes [x, y, width, height] are 0-based, and images and classes are
numbers, here 1 for the first.

YOLO has a text file for each image, and in it a line for each detection:
`class cx cy width height score`, the class a number from 0, the centre and the sides as
shares of the image's.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.detection_table import (
    DetectionTable,
    check_detections,
    check_ground_truth,
)
from sppnet_jax.run.files import fitting, whole_file, write_text


def write_voc_results(
    folder: Path,
    detections: DetectionTable,
    image_ids: Sequence[str],
    class_names: Sequence[str],
    *,
    split: str = "test",
) -> list[Path]:
    """Writes VOC's results files, one for each class, also where nothing was found.

    `folder`: is made if it is not there.
    `detections`: of all images and classes.
    `image_ids`: of each image; in VOC the file's name without its suffix.
    `class_names`: in the order of the labels.
    `split`: part of the files' names.

    Returns: the files, in the order of the classes.
    Raises: ValueError for ids or names that are empty or there twice, and for
    detections that make no sense.
    """
    table = check_detections(detections, len(image_ids), len(class_names))
    ids = _encode_names(image_ids, "image ids")
    (start,) = _encode_names([f"comp4_det_{split}"], "the split")
    names = _encode_names(class_names, "class names")
    paths = [fitting(folder / f"{start}_{name}.txt") for name in names]
    for label, path in enumerate(paths):
        rows = np.flatnonzero(table.labels == label)
        _write_lines(path, _voc_lines(table, rows, ids))
    return paths


def write_coco_results(path: Path, detections: DetectionTable) -> None:
    """Writes detections as a COCO results file.

    `path`: of the JSON file; its folder is made if it is not there.
    `detections`: of all images and classes; image i is COCO's i + 1, class c its c + 1.

    Raises: ValueError for detections that make no sense.
    """
    _write_lines(path, _json_list(coco_records(detections)))


def coco_records(detections: DetectionTable) -> Iterator[dict[str, Any]]:
    """Each detection as COCO's results have it; see `write_coco_results`."""
    # How many images and classes there are, the file doesn't say.
    limits = (1 + int(np.max(c, initial=0)) for c in detections[:2])
    table = check_detections(detections, *limits)

    boxes = _coco_boxes(table.boxes)
    columns = (table.images.tolist(), table.labels.tolist(), table.scores.tolist())
    return (
        {
            "image_id": image + 1,
            "category_id": label + 1,
            "bbox": box,
            "score": score,
        }
        for image, label, score, box in zip(*columns, boxes, strict=True)
    )


def write_coco_ground_truth(
    path: Path,
    file_names: Sequence[str],
    sizes: np.ndarray,
    ground_truth: Sequence[Objects],
    class_names: Sequence[str],
) -> None:
    """Writes the objects of all images as a COCO annotation file.

    `path`: of the JSON file; its folder is made if it is not there.
    The others as for `coco_ground_truth`, with its errors.
    """
    value = coco_ground_truth(file_names, sizes, ground_truth, class_names)
    write_text(path, json.dumps(value))


def coco_ground_truth(
    file_names: Sequence[str],
    sizes: np.ndarray,
    ground_truth: Sequence[Objects],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """The objects of all images as COCO's annotations have them.

    A difficult object is a crowd, "iscrowd" 1, so that pycocotools counts it neither
    way, and has "ignore" 1, too, as is the custom for VOC in this format.

    `file_names`, `sizes`: of each image; int [images, 2], height and width in pixels.
    `ground_truth`: for each image its objects.
    `class_names`: in the order of the labels.

    Raises: ValueError for arrays that don't fit together.
    """
    sizes = np.asarray(sizes)
    if sizes.shape != (len(ground_truth), 2) or len(file_names) != len(ground_truth):
        raise ValueError(
            f"for {len(ground_truth)} images sizes must be [images, 2] and file_names "
            f"as many, got {sizes.shape} and {len(file_names)}"
        )
    check_ground_truth(ground_truth, len(class_names))
    named = zip(file_names, sizes.tolist(), strict=True)
    images = [
        {"id": number, "file_name": name, "height": int(height), "width": int(width)}
        for number, (name, (height, width)) in enumerate(named, start=1)
    ]
    objects = [
        {
            "image_id": image,
            "category_id": int(label) + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(hard),
            "ignore": int(hard),
        }
        for image, truth in enumerate(ground_truth, start=1)
        for label, box, hard in zip(
            truth.labels, _coco_boxes(truth.boxes), truth.difficult, strict=True
        )
    ]
    return {
        "info": {"description": "written by sppnet_jax"},
        "licenses": [],
        "images": images,
        "annotations": [{"id": n, **one} for n, one in enumerate(objects, start=1)],
        "categories": [{"id": n, "name": c} for n, c in enumerate(class_names, 1)],
    }


def write_yolo_results(
    folder: Path,
    detections: DetectionTable,
    image_ids: Sequence[str],
    sizes: np.ndarray,
    class_names: Sequence[str],
) -> list[Path]:
    """Writes a label file for each image, with scores, and the classes' names.

    `folder`: gets labels/ID.txt, empty where nothing was found, and classes.txt.
    `detections`: of all images and classes.
    `image_ids`: of each image, its file's name without its suffix; those with slashes
    lie in folders.
    `sizes`: of each image; int [images, 2], height and width in pixels.
    `class_names`: in the order of the labels.

    Returns: the label files, in the order of the images.
    Raises: ValueError for ids that lead out of the folder or are there twice, and for
    detections that make no sense.
    """
    table = check_detections(detections, len(image_ids), len(class_names))
    _check_names(image_ids, "image ids")
    for name in image_ids:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"image ids must be paths in a folder, got {name!r}")
    lines = (" ".join(name.split()) for name in class_names)
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in lines))
    boxes = np.asarray(table.boxes, np.float64)
    sides = np.asarray(sizes, float)[table.images][:, ::-1]
    centres = (boxes[:, 1::-1] + boxes[:, :1:-1]) / 2 / sides
    extents = (boxes[:, :1:-1] - boxes[:, 1::-1]) / sides
    shares = np.concatenate([centres, extents], axis=1).tolist()
    scores = table.scores.astype(str)
    order = np.argsort(table.images, kind="stable")
    ends = np.searchsorted(table.images[order], np.arange(len(image_ids) + 1))
    paths = [folder / "labels" / f"{name}.txt" for name in image_ids]
    for path, first, end in zip(paths, ends[:-1], ends[1:], strict=True):
        lines = (
            f"{table.labels[k]} {' '.join(map(repr, shares[k]))} {scores[k]}\n"
            for k in order[first:end]
        )
        _write_lines(path, lines)
    return paths


def _encode_names(names: Sequence[str], what: str) -> list[str]:
    """The names as they can stand in a line or in a file's name."""
    _check_names(names, what)
    unsafe = re.compile(r"[\s\x00-\x1f\x7f%/\\]")
    return [unsafe.sub(lambda found: quote(found[0], safe=""), name) for name in names]


def _check_names(names: Sequence[str], what: str) -> None:
    names = list(names)
    bad = next((name for name in names if not isinstance(name, str) or not name), None)
    if bad is not None:
        raise ValueError(f"{what} must be strings that aren't empty, got {bad!r}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{what} must be different, {twice!r} is there twice")


def _voc_lines(
    table: DetectionTable, rows: np.ndarray, ids: Sequence[str]
) -> Iterator[str]:
    boxes = table.boxes[rows].astype(np.float64)
    corners = boxes[:, [1, 0, 3, 2]] + [1, 1, 0, 0]
    # The fewest digits that say which number of the scores' own precision it is.
    scores = table.scores[rows].astype(str)
    images = table.images[rows].tolist()
    for image, score, corner in zip(images, scores, corners.tolist(), strict=True):
        pixels = " ".join(repr(value).removesuffix(".0") for value in corner)
        yield f"{ids[image]} {score} {pixels}\n"


def _coco_boxes(boxes: np.ndarray) -> list[list[float]]:
    corners = np.asarray(boxes, np.float64).reshape(-1, 4)
    sides = corners[:, 2:] - corners[:, :2]
    columns = np.stack([corners[:, 1], corners[:, 0], sides[:, 1], sides[:, 0]], axis=1)
    return columns.tolist()


def _json_list(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A list with a line for each record, without the whole in memory."""
    yield "["
    for number, record in enumerate(records):
        yield (",\n" if number else "\n") + json.dumps(record)
    yield "\n]\n"


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a file that is whole or not there."""
    with whole_file(path) as file:
        file.writelines(line.encode() for line in lines)
