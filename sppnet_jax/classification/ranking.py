"""How good a ranking is: average precision by the rules of PASCAL VOC.

`eleven_point_ap` and `area_ap` are of any curve of recall and precision, so detections
are tested by the same two; `average_precision` is of images ranked by their scores.
"""

import logging
import math
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

# MATLAB's 0:0.1:1, as VOC's program has it. Values below the middle are k·0.1, those
# above 1 − k·0.1: so a recall of 3/10 misses the fourth, but 6/10 and 7/10 reach theirs
# (k·0.1 throughout, as NumPy's arange computes, would put those out of reach as well).
ELEVEN_RECALLS = (0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC 2007's average precision: the mean of the best at eleven recalls or above.

    `recall`, `precision`: float [D], recall ascending.

    Returns: 0 to 1; 0 without detections.
    """
    best = np.append(_envelope(precision), 0.0)
    reached = best[np.searchsorted(recall, ELEVEN_RECALLS)]
    return float((reached / len(ELEVEN_RECALLS)).sum())


def area_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """The average precision of VOC 2010 on: the area under the best precisions.

    `recall`, `precision`: float [D], recall ascending.

    Returns: 0 to 1; 0 without detections.
    """
    return float(np.diff(recall, prepend=0.0) @ _envelope(precision))


def mean_average_precision(
    scores: np.ndarray, labels: np.ndarray, *, rule: str = "11"
) -> dict[str, Any]:
    """The mean over classes of `average_precision`.

    A class that no image shows has no precision; it is left out, and named.

    `scores`: float [N, classes]. `labels`: int8 [N, classes] of 1, 0 and -1.
    `rule`: "11" or "area".

    Returns: a dict of plain values, for JSON: "mean_average_precision",
    "average_precision" (a list, None for a class left out) and
    "classes_without_positives" (their numbers).
    Raises: ValueError if no class has a positive, and as `average_precision` does.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"scores {scores.shape} and labels {labels.shape} must both be [N, classes]"
        )
    precisions = [
        average_precision(scores[:, number], labels[:, number], rule=rule)
        for number in range(labels.shape[1])
    ]
    empty = [number for number, value in enumerate(precisions) if math.isnan(value)]
    if len(empty) == len(precisions):
        raise ValueError(
            f"none of the {labels.shape[1]} classes is present in any of the "
            f"{labels.shape[0]} images: there is no average precision"
        )
    if empty:
        log.warning("classes %s have no positive image: left out of the mean", empty)
    return {
        "mean_average_precision": float(np.nanmean(precisions)),
        "average_precision": [None if math.isnan(v) else v for v in precisions],
        "classes_without_positives": empty,
    }


def average_precision(
    scores: np.ndarray, labels: np.ndarray, *, rule: str = "11"
) -> float:
    """Average precision of images ranked by their scores.

    Images of equal score enter the ranking together, so their order can't matter;
    VOC's own program takes them one by one, in the order of its files. By the eleven
    points, 3 of 10 found fall short of a recall of 0.3, as in VOC's program; who
    compares in whole numbers counts that point as well.

    `scores`: float [N]. `labels`: int [N]; 1 present, -1 absent, 0 not counted at all.
    `rule`: "11", `eleven_point_ap`, or "area", `area_ap`.

    Returns: the average precision, 0 to 1; NaN if no label is 1.
    Raises: ValueError for another rule, other labels, and scores that aren't finite.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores {scores.shape} and labels {labels.shape} must both be [N]"
        )
    if rule not in ("11", "area"):
        raise ValueError(f"unknown rule {rule!r}: use '11' or 'area'")
    check_ternary(labels)
    check_finite(scores, "scores")
    counted = labels != 0
    scores, present = scores[counted], labels[counted] == 1
    total = int(present.sum())
    if not total:
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, present = scores[order], present[order]
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    found = np.cumsum(present)[ends]
    ap = eleven_point_ap if rule == "11" else area_ap
    return ap(found / total, found / (ends + 1))


def check_ternary(labels: np.ndarray) -> None:
    """Raises ValueError for labels other than 1, 0 and -1."""
    if not np.isin(labels, (-1, 0, 1)).all():
        raise ValueError(
            f"labels must be 1 (present), 0 (left out) or -1 (absent), but there are "
            f"{np.unique(labels)[:10].tolist()}"
        )


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises ValueError for numbers that aren't finite, naming the first such row."""
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{what} {array.shape} have numbers that aren't finite, first in row "
            f"{finite.argmin()}"
        )


def _envelope(precision: np.ndarray) -> np.ndarray:
    """The best precision from each detection on."""
    return np.maximum.accumulate(precision[::-1])[::-1]
