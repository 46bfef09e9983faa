"""All detections of a data set in one table, as evaluation and result files take them.

What stands where no detection or object is checked twice: the table's columns are
checked once, by `check_detections`, and the ground truth by `check_ground_truth`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.detector import Detections


class DetectionTable(NamedTuple):
    """One row a detection; of equal scores in a class, the earlier row ranks first.

    `images`: int [D], the numbers of the images, from 0. `labels`: int [D], classes.
    `scores`: float [D]. `boxes`: float [D, 4], (ymin, xmin, ymax, xmax) in pixels.
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray


def join_detections(detections: Sequence[Detections]) -> DetectionTable:
    """The detections of images 0, 1, … one after the other, each in its order."""
    counts = [len(found.scores) for found in detections]
    return DetectionTable(
        np.repeat(np.arange(len(detections)), counts),
        np.concatenate([*(f.labels for f in detections), np.zeros(0, np.int64)]),
        np.concatenate([*(f.scores for f in detections), np.zeros(0, np.float32)]),
        np.concatenate([*(f.boxes for f in detections), np.zeros((0, 4), np.float32)]),
    )


def check_detections(
    detections: DetectionTable, num_images: int, num_classes: int
) -> DetectionTable:
    """The table as NumPy arrays; the dtype of the scores stays.

    Raises: ValueError for columns that don't fit together, for numbers of images or
    classes that there aren't, and for scores and boxes that aren't finite.
    """
    table = DetectionTable(*(np.asarray(column) for column in detections))
    shapes = tuple(column.shape for column in table)
    count = len(table.scores) if table.scores.ndim == 1 else -1
    if shapes != ((count,), (count,), (count,), (count, 4)):
        raise ValueError(
            "detections must be images [D], labels [D], scores [D] and boxes [D, 4], "
            f"got {', '.join(map(str, shapes))}"
        )
    for column, limit in (("images", num_images), ("labels", num_classes)):
        _check_numbers(getattr(table, column), limit, f"the detections' {column}")
    _check_finite(table.scores[:, None], "detections' scores")
    _check_finite(table.boxes, "detections' boxes")
    return table


def check_ground_truth(ground_truth: Sequence[Objects], num_classes: int) -> None:
    """Raises ValueError for an image whose arrays don't fit together, naming it."""
    for image, truth in enumerate(ground_truth):
        shapes, count = tuple(map(np.shape, truth)), len(truth.labels)
        if shapes != ((count, 4), (count,), (count,)):
            raise ValueError(
                "ground truth must be boxes [N, 4], labels [N] and difficult [N], in "
                f"image {image} there are {', '.join(map(str, shapes))}"
            )
        what = f"the ground truth's labels in image {image}"
        _check_numbers(np.asarray(truth.labels), num_classes, what)
        _check_finite(np.asarray(truth.boxes), f"image {image}'s ground-truth boxes")


def _check_numbers(numbers: np.ndarray, limit: int, what: str) -> None:
    if not len(numbers):
        return
    if not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"{what} must be whole numbers, not {numbers.dtype}")
    if numbers.min() < 0 or numbers.max() >= limit:
        raise ValueError(
            f"{what} must be from 0 to {limit - 1}, they are from {numbers.min()} to "
            f"{numbers.max()}"
        )


def _check_finite(rows: np.ndarray, what: str) -> None:
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(
            f"the {what} must be finite, row {first} is {rows[first].tolist()}"
        )
