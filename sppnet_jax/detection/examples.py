"""Which boxes of an image are examples of what, by their overlap with its objects.

Boxes of an image are its objects' own boxes first, then its proposals: so the windows
of the ground truth are at hand wherever those of the proposals are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.boxes import iou


class Examples(NamedTuple):
    """Rows of an image's boxes to fine-tune on.

    `positives`, `negatives`: int [n], rows. `labels`: int [positives], their classes.
    """

    positives: np.ndarray
    labels: np.ndarray
    negatives: np.ndarray


def with_objects(
    objects: Sequence[Objects], proposals: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The boxes of every image: those of its objects, then its proposals."""
    return [
        np.concatenate([own.boxes.reshape(-1, 4), found.reshape(-1, 4)])
        for own, found in zip(objects, proposals, strict=True)
    ]


def finetuning_examples(
    boxes: np.ndarray,
    objects: Objects,
    *,
    positive: float = 0.5,
    negative: Sequence[float] = (0.1, 0.5),
) -> Examples:
    """Positives overlap an object by at least `positive`, and take the class of that
    which they overlap the most; negatives overlap every object by less than
    `negative[1]`, and some object by at least `negative[0]` (section 4.2).

    Difficult objects make no positives, and a box that overlaps one by `negative[1]` or
    more is no negative either.
    """
    positives, _, labels = regression_examples(boxes, objects, overlap=positive)
    highest = iou(boxes, objects.boxes.reshape(-1, 4)).max(axis=1, initial=-1)
    is_negative = (highest >= negative[0]) & (highest < negative[1])
    return Examples(positives, labels, np.flatnonzero(is_negative))


def regression_examples(
    boxes: np.ndarray, objects: Objects, *, overlap: float = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes to learn from how an object's box is reached, with what they should become.

    Each box that overlaps an object (not a difficult one) by at least `overlap` is
    paired with the one that it overlaps the most. The objects' own boxes are among them
    if they are among `boxes`.

    Returns: rows int [n], target boxes float [n, 4], classes int [n].
    """
    overlaps = iou(boxes, objects.boxes.reshape(-1, 4))
    if not overlaps.shape[1]:
        none = np.zeros(0, np.int64)
        return none, np.zeros((0, 4)), none
    certain = np.where(objects.difficult, -1.0, overlaps)
    rows = np.flatnonzero(certain.max(axis=1) >= overlap)
    best = certain[rows].argmax(axis=1)
    return rows, objects.boxes[best], objects.labels[best]


def check_labels(labels: np.ndarray, num_classes: int, what: str = "labels") -> None:
    """Raises ValueError for labels, at least one, that aren't numbers of classes."""
    known = np.issubdtype(labels.dtype, np.integer)
    if not known or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{what} must be whole numbers from 0 to {num_classes - 1}, not "
            f"{labels.dtype} from {labels.min()} to {labels.max()}"
        )
