"""Where the scores of a class part its objects from all else, by held-out images.

A regularised SVM can rank windows well and still score all of them below 0: then a
threshold of 0 shows nothing. So SVMs are trained again without a share of the images,
on the windows that mining found, and score the proposals of those images. The threshold
of each class is where what is left after suppression has the best F1, the harmonic mean
of precision and recall.
"""

from collections.abc import Callable, Sequence

import numpy as np

from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.average_precision import evaluate_class
from sppnet_jax.detection.detection_table import DetectionTable, join_detections
from sppnet_jax.detection.detector import Scored, suppress
from sppnet_jax.detection.hard_negatives import NEVER, Mining, MiningState, signs_of
from sppnet_jax.detection.svm_solver import solve_svms
from sppnet_jax.run.progress import progress_bar


def train_without_each_part(
    positives: np.ndarray,
    labels: np.ndarray,
    images: np.ndarray,
    state: MiningState,
    mining: Mining,
    parts: int,
    seed: int,
) -> LinearSVMs:
    """SVMs of each class without images 0, `parts`, 2·`parts`, …, then without 1, ….

    `positives`, `labels`, `images`: float [P, D], int [P] each. `state`: of mining.

    Returns: `parts` · classes SVMs, those of the first part first.
    """
    signs = signs_of(labels, state.members)
    part_of = np.concatenate([images, state.images]) % parts
    kept = part_of[:, None] != np.arange(parts)  # [rows, parts]
    own = np.where(kept[:, :, None], signs[:, None], 0).reshape(len(signs), -1)
    start = np.where(own != 0, np.tile(state.duals, (1, parts)), 0)
    svms = solve_svms(
        [positives, state.features],
        own.astype(np.int8),
        C=mining.C,
        positive_weight=mining.positive_weight,
        bias_multiplier=mining.bias_multiplier,
        tolerance=mining.tolerance,
        start=start,
        seed=seed,
    ).svms
    trained = np.any(own > 0, axis=0)
    return LinearSVMs(svms.weights, np.where(trained, svms.biases, np.float32(NEVER)))


def held_out_detections(
    scores_of: Callable[[int, np.ndarray], np.ndarray],
    boxes: Sequence[np.ndarray],
    objects: Sequence[Objects],
    parts: int,
) -> DetectionTable:
    """What the SVMs that have not seen an image find among its proposals.

    `scores_of`: from an image and rows of its boxes to float [n, parts · classes].
    `boxes`: of each image, the objects' own first; these are left out.
    """
    found = []
    with progress_bar("held-out scores", len(boxes)) as bar:
        for image, (own, truth) in enumerate(zip(boxes, objects, strict=True)):
            rows = np.arange(len(truth.labels), len(own))
            scores: np.ndarray = np.zeros((0, 1), np.float32)
            if len(rows):
                scores = scores_of(image, rows).reshape(len(rows), parts, -1)
                scores = scores[:, image % parts]
            places = np.broadcast_to(own[rows][:, None], (*scores.shape, 4))
            found.append(suppress([Scored(places, scores)]))
            bar.update()
    return join_detections(found)


def best_thresholds(
    detections: DetectionTable, objects: Sequence[Objects], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The score above which the detections of each class have the best F1, and that.

    Returns: float64 [classes] each; 0 for a class of which no object is found.
    """
    thresholds, best = np.zeros(num_classes), np.zeros(num_classes)
    for label in range(num_classes):
        rows = detections.labels == label
        result = evaluate_class(
            detections.images[rows],
            detections.scores[rows],
            detections.boxes[rows],
            [found.boxes[found.labels == label] for found in objects],
            [found.difficult[found.labels == label] for found in objects],
        )
        if not result.true_positives:
            continue
        both = result.precision + result.recall
        f1 = 2 * result.precision * result.recall / np.maximum(both, 1e-12)
        ranked = np.sort(detections.scores[rows].astype(np.float64))[::-1]
        last = int(f1.argmax())
        thresholds[label] = ranked[last : last + 2].mean()
        best[label] = f1[last]
    return thresholds, best
