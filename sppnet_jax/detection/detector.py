"""From pooled features to detections: scores, regressed boxes, suppression (4.2, 4.3).

    head, weights = scoring_head(...)
    scored = score_boxes(features, program, weights, image, image_size)
    found = suppress([scored], Suppression(nms=0.3))

Several detectors are combined by suppressing the union of their scored boxes (4.4).
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.detection.box_layer import BOX, predict_boxes
from sppnet_jax.detection.box_regression import BoxRegressors, regress_boxes
from sppnet_jax.detection.boxes import iou, nms_per_class
from sppnet_jax.detection.hard_negatives import NEVER
from sppnet_jax.detection.window_features import CHUNK, Head, WindowFeatures, rows_of
from sppnet_jax.network.model import SPPNet
from sppnet_jax.run.settings import at_least, share

# How much a box counts in a vote: e^(score / this), with margins of SVMs in mind.
VOTE_SOFTNESS = 0.3
# A side of a detection, at least, in pixels: written with two digits it is not 0.
LEAST_SIDE = 0.01


class Suppression(NamedTuple):
    """What is left of an image's scored boxes.

    `nms`: a box that overlaps a better one of its class by more goes (IoU).
    `max_per_class`: the best so many of each class stay.
    `vote`: a box that stays moves to the mean of all those of its class that overlap it
    by at least so much (IoU), by their scores; 0 leaves it where it is.
    """

    nms: Annotated[float, share()] = 0.3
    max_per_class: Annotated[int, at_least(1)] = 100
    vote: Annotated[float, share()] = 0.0


class Scored(NamedTuple):
    """An image's boxes for every class, before suppression.

    `boxes`: float32 [N, classes, 4] in the image's pixels. `scores`: float32
    [N, classes].
    """

    boxes: np.ndarray
    scores: np.ndarray


class Detections(NamedTuple):
    """What was found in an image, best first.

    `boxes`: float32 [D, 4], (ymin, xmin, ymax, xmax) in the image's pixels. `labels`:
    int [D]. `scores`: float32 [D].
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def above(self, least: float) -> "Detections":
        """Those of at least a score."""
        return Detections(*(part[self.scores >= least] for part in self))


def layer_head(model: SPPNet, layer: str) -> Head:
    """The head that gives a layer's activations: "pyramid", "fc6" or "fc7".

    Its params are those of the fc layers, whole or truncated (low_rank.py).
    """

    def head(params: Any, pooled: jax.Array) -> jax.Array:
        if layer == "pyramid":
            return pooled
        return _classify(model, params, pooled)[1][layer].astype(jnp.float32)

    return head


def scoring_head(
    model: SPPNet,
    fc: Any,
    *,
    layer: str = "fc7",
    svms: LinearSVMs | None = None,
    regressors: BoxRegressors | None = None,
    move_boxes: bool = False,
) -> tuple[Head, Any]:
    """The head that gives the scores of all classes and how boxes should move.

    `fc`: the fc layers, whole or truncated. `layer`: that the SVMs see. `svms`: with
    the features' scale in their weights; None scores by the softmax of fc8, whose last
    class is background. `move_boxes`: by the box layer among the fc layers.

    Returns: the head, (weights, pooled) → (scores [n, classes], deltas [n, classes, 4]
    or None), and the weights.
    """
    weights = {"fc": fc, "svms": svms, "regressors": regressors}

    def head(weights: Any, pooled: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        svms, regressors = weights["svms"], weights["regressors"]
        if svms is None:
            logits, _ = _classify(model, weights["fc"], pooled)
            scores = jax.nn.softmax(logits)[:, :-1]
        else:
            seen = layer_head(model, layer)(weights["fc"], pooled)
            scores = seen.astype(jnp.float32) @ svms.weights.T + svms.biases
        if move_boxes:
            fc7 = layer_head(model, "fc7")(weights["fc"], pooled)
            return scores, predict_boxes(weights["fc"], fc7)
        if regressors is None:
            return scores, None
        deltas = jnp.einsum("nd,cdk->nck", pooled, regressors.weights)
        return scores, deltas + regressors.biases

    return head, weights


def score_boxes(
    features: WindowFeatures,
    program: Callable[..., Any],
    weights: Any,
    image: int,
    image_size: tuple[int, int],
    num_classes: int,
) -> Scored:
    """The scores of all boxes of an image, and where each class would move them.

    `program`: `make_program` of a `scoring_head`, whose weights come with it.
    """
    boxes = np.asarray(features.boxes[image], np.float32)
    if not len(boxes):
        return Scored(
            np.zeros((0, num_classes, 4), np.float32),
            np.zeros((0, num_classes), np.float32),
        )
    chosen = np.arange(len(boxes))
    scores, deltas = rows_of(features, program, weights, image, chosen)
    if deltas is None:
        moved = np.broadcast_to(boxes[:, None], (*scores.shape, 4))
    else:
        moved = np.asarray(regress_boxes(boxes, deltas, *image_size), np.float32)
    return Scored(moved, scores)


def suppress(
    scored: Sequence[Scored],
    settings: Suppression = Suppression(),  # noqa: B008, it can't be changed
) -> Detections:
    """Greedy non-maximum suppression for each class over the union of scored boxes.

    `scored`: of one image, by one detector or several. A box of which less than 0.01
    pixels is left in the image, as where regression moved it out, is no detection.
    """
    boxes = np.concatenate([part.boxes for part in scored])
    scores = np.concatenate([part.scores for part in scored])
    count, classes = scores.shape
    # Few sizes, few programs.
    padded = -(-count // CHUNK) * CHUNK
    all_boxes = np.zeros((padded, classes, 4), np.float32)
    all_scores = np.zeros((padded, classes), np.float32)
    all_boxes[:count], all_scores[:count] = boxes, scores
    # A class that was never trained is not there, whatever is asked of it.
    valid = (np.arange(padded) < count)[:, None] & (all_scores > NEVER / 2)
    sides = all_boxes[..., 2:] - all_boxes[..., :2]
    valid &= (sides >= LEAST_SIDE).all(axis=-1)
    kept = _suppress(all_boxes, all_scores, settings.nms, valid)
    rows, labels = np.nonzero(np.asarray(kept)[:count])
    order = np.argsort(-scores[rows, labels], kind="stable")
    rows, labels = rows[order], labels[order]
    most = settings.max_per_class
    best = [np.flatnonzero(labels == label)[:most] for label in range(classes)]
    kept_order = np.sort(np.concatenate(best))
    rows, labels = rows[kept_order], labels[kept_order]
    left = boxes[rows, labels]
    if settings.vote:
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            left[own] = vote(
                left[own], boxes[:, label], scores[:, label], settings.vote
            )
    return Detections(left, labels, scores[rows, labels])


def vote(
    left: np.ndarray, boxes: np.ndarray, scores: np.ndarray, overlap: float
) -> np.ndarray:
    """The mean of the boxes that overlap each one, weighted by e^(score / 0.3).

    Box voting of Gidaris and Komodakis (2015), but with weights above 0 for any score.

    `left`: float [K, 4], each one of `boxes`, float [N, 4]. `scores`: float [N].
    `overlap`: of those that are counted, at least (IoU).

    Returns: float32 [K, 4].
    """
    counted = np.asarray(iou(left, boxes)) >= overlap
    # A box without an area overlaps nothing, not even itself.
    counted |= (left[:, None] == boxes).all(axis=2)
    logits = np.where(counted, scores / VOTE_SOFTNESS, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return (weights @ boxes.astype(np.float64)).astype(np.float32)


def _classify(model: SPPNet, fc: Any, pooled: jax.Array) -> Any:
    # Fine-tuning may have given fc8 other classes than the model's.
    model = model.clone(num_classes=len(fc["fc8"]["bias"]))
    fc = {name: own for name, own in fc.items() if name != BOX}
    return model.apply({"params": fc}, pooled, method="classify")


@jax.jit
def _suppress(
    boxes: jax.Array, scores: jax.Array, threshold: float, valid: jax.Array
) -> jax.Array:
    return nms_per_class(boxes, scores, threshold, valid)
