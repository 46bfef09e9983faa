"""How good detections are, by the rules of PASCAL VOC: average precision at IoU 0.5.

The numbers are those of VOC's own programs (VOCevaldet, VOCap) on the same detections:

- Detections of a class are ranked by score; of equal scores, the given order counts.
- Each is compared with the object of its image that it overlaps the most, difficult
  ones included; of equal overlaps, with the first.
- At IoU 0.5 or more: with a difficult object, it counts neither way; with one that no
  higher-ranked detection has found, it is a true positive; otherwise a false positive.
- Recall is among the objects that aren't difficult.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sppnet_jax.classification.ranking import area_ap, eleven_point_ap
from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.boxes import iou
from sppnet_jax.detection.detection_table import (
    DetectionTable,
    check_detections,
    check_ground_truth,
)

log = logging.getLogger(__name__)


class ClassResult(NamedTuple):
    """How the detections of one class fare.

    `ap_11_point`: VOC 2007's average precision; `ap_area`: that of VOC 2010 on; 0 to 1,
    None where every object of the class is difficult, or there is none.
    `recall`, `precision`: float64 [D], after each detection in the order of their
    scores; both empty where the average precision is None.
    `ground_truths`: objects that aren't difficult; `difficult`: those that are.
    """

    ap_11_point: float | None
    ap_area: float | None
    recall: np.ndarray
    precision: np.ndarray
    ground_truths: int
    difficult: int
    detections: int
    true_positives: int
    false_positives: int


class DetectionResult(NamedTuple):
    """The results of all classes, and their means; `left_out` names those without."""

    map_11_point: float
    map_area: float
    classes: list[ClassResult]
    left_out: list[str]


def evaluate_detections(
    detections: DetectionTable,
    ground_truth: Sequence[Objects],
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
) -> DetectionResult:
    """The average precision of each class, and the mean over classes.

    A class without objects to find, or with difficult ones only, has no average
    precision; it is left out of the mean, and the log names it.

    `detections`: of all images and classes. `ground_truth`: the objects of each image.
    `class_names`: in the order of the labels.
    `threshold`: the IoU at which an object is found, inclusive.

    Raises: ValueError for arrays that don't fit together, for numbers that aren't
    finite, and if no class has anything to find.
    """
    table = check_detections(detections, len(ground_truth), len(class_names))
    check_ground_truth(ground_truth, len(class_names))
    results = []
    for label in range(len(class_names)):
        rows = table.labels == label
        of_class = [np.asarray(truth.labels) == label for truth in ground_truth]
        pairs = list(zip(ground_truth, of_class, strict=True))
        results.append(
            evaluate_class(
                table.images[rows],
                table.scores[rows],
                table.boxes[rows],
                [np.asarray(truth.boxes)[mine] for truth, mine in pairs],
                [np.asarray(truth.difficult)[mine] for truth, mine in pairs],
                threshold=threshold,
            )
        )
    elevens = [r.ap_11_point for r in results if r.ap_11_point is not None]
    areas = [r.ap_area for r in results if r.ap_area is not None]
    named = zip(class_names, results, strict=True)
    left_out = [name for name, result in named if result.ap_area is None]
    if not areas:
        raise ValueError(
            f"the {len(ground_truth)} images show no object of the {len(class_names)} "
            "classes that isn't difficult: there is no average precision"
        )
    if left_out:
        log.warning(
            "no object to find of %s: left out of the mean", ", ".join(left_out)
        )
    means = float(np.mean(elevens)), float(np.mean(areas))
    return DetectionResult(*means, results, left_out)


def evaluate_class(
    images: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray,
    truth_boxes: Sequence[np.ndarray],
    difficult: Sequence[np.ndarray],
    *,
    threshold: float = 0.5,
) -> ClassResult:
    """The average precision of one class's detections.

    `images`: int [D], the image of each detection. `scores`: float [D]. `boxes`: float
    [D, 4].
    `truth_boxes`, `difficult`: float [N, 4] and bool [N] for each image.
    `threshold`: see `evaluate_detections`.

    Raises: ValueError for a threshold that is no IoU.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is an IoU above 0 and up to 1, got {threshold}")
    hard = np.concatenate(
        [*(np.asarray(d, bool) for d in difficult), np.zeros(0, bool)]
    )
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    found = _best_objects(images, boxes, truth_boxes, threshold)[order]
    ignored = (found >= 0) & np.append(hard, False)[found]
    candidates = np.flatnonzero((found >= 0) & ~ignored)
    hits = np.zeros(len(found), bool)
    # np.unique gives the first detection of each object.
    hits[candidates[np.unique(found[candidates], return_index=True)[1]]] = True
    misses = ~hits & ~ignored
    ground_truths = int((~hard).sum())
    counts = {
        "ground_truths": ground_truths,
        "difficult": int(hard.sum()),
        "detections": len(found),
        "true_positives": int(hits.sum()),
        "false_positives": int(misses.sum()),
    }
    if not ground_truths:
        return ClassResult(None, None, np.zeros(0), np.zeros(0), **counts)
    true, false = np.cumsum(hits), np.cumsum(misses)
    recall = true / ground_truths
    # Before anything counts, 0 for VOC's 0/0, which no maximum over it would take.
    precision = true / np.maximum(true + false, 1)
    return ClassResult(
        eleven_point_ap(recall, precision),
        area_ap(recall, precision),
        recall,
        precision,
        **counts,
    )


def _best_objects(
    images: np.ndarray,
    boxes: np.ndarray,
    truth_boxes: Sequence[np.ndarray],
    threshold: float,
) -> np.ndarray:
    """The object that each detection overlaps the most, −1 if below the threshold.

    Objects are numbered through all images.
    """
    best = np.full(len(images), -1)
    by_image = np.argsort(images, kind="stable")
    bounds = np.searchsorted(images[by_image], np.arange(len(truth_boxes) + 1))
    first = 0
    for image, objects in enumerate(truth_boxes):
        rows = by_image[bounds[image] : bounds[image + 1]]
        if len(rows) and len(objects):
            # In float64, so that an overlap of just the threshold is found.
            overlaps = iou(boxes[rows].astype(np.float64), np.asarray(objects))
            nearest = overlaps.argmax(axis=1)
            highest = overlaps[np.arange(len(rows)), nearest]
            best[rows] = np.where(highest >= threshold, first + nearest, -1)
        first += len(objects)
    return best
