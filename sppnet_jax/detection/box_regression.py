"""From a window to the object that it shows: ridge regression for each class.

From the pooled convolutional features of a window, four numbers are predicted: by how
much of its own height and width its centre has to move, and the logarithms of the
factors of its height and width (`boxes.encode_boxes`). They are learned from windows
that overlap an object of the class well (section 4; R-CNN's appendix C).

The R-CNN release whitens the four targets before the regression and undoes it
afterwards. Ridge regression is linear in its targets, so with one `ridge` for all four
and a bias that is not penalised both cancel out exactly, and are left out here. The
release does penalise the bias, as the weight of a feature of ones; ours is free, so
that a class whose windows are all off by the same is corrected in full.
"""

import logging
import math
from typing import Annotated, NamedTuple

import numpy as np
from tqdm import tqdm

from sppnet_jax.classification.ranking import check_finite
from sppnet_jax.detection.boxes import clip_boxes, decode_boxes, encode_boxes
from sppnet_jax.detection.examples import check_labels
from sppnet_jax.run import parallel
from sppnet_jax.run.settings import above, at_least, share

log = logging.getLogger(__name__)

# A box grows or shrinks at most so much in one step; exp would overflow before long.
MAX_LOG_RATIO = math.log(1000 / 16)


class BoxRegression(NamedTuple):
    """How box regression is learnt, if it is `enabled`.

    `overlap`: of the boxes to learn from with an object, at least. `ridge`: see
    `train_box_regressors`. `max_examples`: drawn at random if there are more.
    """

    enabled: bool = True
    overlap: Annotated[float, share(above_zero=True)] = 0.5
    ridge: Annotated[float, above(0)] = 4000.0
    max_examples: Annotated[int, at_least(1)] = 20_000


class BoxRegressors(NamedTuple):
    """One regressor a class, from features to `boxes.encode_boxes` of their boxes."""

    weights: np.ndarray  # float32 [classes, D, 4]
    biases: np.ndarray  # float32 [classes, 4]


def train_box_regressors(
    features: np.ndarray,
    boxes: np.ndarray,
    targets: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    ridge: float = 4000.0,
) -> BoxRegressors:
    """Trains the box regressor of every class.

    A class without examples leaves boxes as they are, and is named in the log.

    `features`: float [N, D], of the boxes; the default `ridge` is for a mean length of
    20 (see `hard_negatives.feature_scale`).
    `boxes`, `targets`: float [N, 4], (ymin, xmin, ymax, xmax) in pixels: the examples
    and the objects' boxes that they should become. `labels`: int [N], the objects'
    classes, 0 to `num_classes` − 1. A box may come several times, with other targets.
    `ridge`: the weight of the squared weights against the squared errors, above 0.

    Returns: the regressors, in the order of the classes.
    Raises: ValueError for arguments that do not fit, and for boxes without an area.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    boxes, targets = np.asarray(boxes, np.float64), np.asarray(targets, np.float64)
    _check(features, boxes, targets, labels, num_classes)
    deltas = np.asarray(encode_boxes(boxes, targets), features.dtype)
    weights = np.zeros((num_classes, features.shape[1], 4), np.float32)
    # Here, not above: a start has no need of it, and it takes a while.
    from sklearn.linear_model import Ridge

    biases = np.zeros((num_classes, 4), np.float32)
    for number in tqdm(
        np.unique(labels),
        desc="box regression",
        unit="class",
        disable=not parallel.is_first_process(),
    ):
        own = labels == number
        # It solves in as many unknowns as there are examples, if those are the fewer.
        model = Ridge(alpha=ridge, solver="cholesky").fit(features[own], deltas[own])
        weights[number], biases[number] = model.coef_.T, model.intercept_
    missing = np.setdiff1d(np.arange(num_classes), labels)
    if len(missing):
        log.warning(
            "classes %s have no examples for box regression: their boxes stay as they "
            "are",
            missing.tolist(),
        )
    return BoxRegressors(weights, biases)


def regress_boxes(
    boxes: np.ndarray, deltas: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Moves boxes by predicted deltas and clips them to the image.

    `boxes`: float [N, 4], (ymin, xmin, ymax, xmax) in pixels.
    `deltas`: float [N, 4], or [N, classes, 4], those of each class.
    Sides change by a factor of 1000/16 at most.
    `height`, `width`: of the image, in pixels.

    Returns: float of the shape of `deltas`. A box that is moved out of the image
    altogether becomes one without an area on its border.
    Raises: ValueError for shapes that do not fit.
    """
    boxes, deltas = np.asarray(boxes), np.asarray(deltas)
    fits = deltas.ndim in (2, 3) and (len(deltas), deltas.shape[-1]) == boxes.shape
    if not fits or boxes.shape[1:] != (4,):
        raise ValueError(
            f"boxes {boxes.shape} must be [N, 4], and deltas {deltas.shape} [N, 4] or "
            "[N, classes, 4], of the same N"
        )
    shifts, ratios = deltas[..., :2], deltas[..., 2:]
    capped = np.clip(ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    flat = np.concatenate([shifts, capped], axis=-1).reshape(-1, 4)
    repeated = np.repeat(boxes, len(flat) // max(len(boxes), 1), axis=0)
    moved = clip_boxes(decode_boxes(repeated, flat), height, width)
    return np.asarray(moved).reshape(deltas.shape)


def _check(
    features: np.ndarray,
    boxes: np.ndarray,
    targets: np.ndarray,
    labels: np.ndarray,
    classes: int,
) -> None:
    count, box_shape = labels.shape[:1], (*labels.shape[:1], 4)
    shapes = features.shape[:1], boxes.shape, targets.shape
    fits = shapes == (count, box_shape, box_shape)
    if (features.ndim, labels.ndim) != (2, 1) or not fits:
        raise ValueError(
            f"features {features.shape} must be [N, D], boxes {boxes.shape} and "
            f"targets {targets.shape} [N, 4], labels {labels.shape} [N], of the same N"
        )
    if not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"features must be floating point, not {features.dtype}")
    if not len(labels):
        raise ValueError(
            "there is nothing to train box regression on: no window overlaps an object"
        )
    check_finite(features, "features")
    check_labels(labels, classes)
