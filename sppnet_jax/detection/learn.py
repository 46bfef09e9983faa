"""What is learnt from window features, and kept in a stage's folder: SVMs, regression.

Features are scaled to a mean length before learning, as the R-CNN release does; what is
kept has that scale in its weights, so it takes features as they come.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.box_regression import BoxRegression, train_box_regressors
from sppnet_jax.detection.calibration import (
    best_thresholds,
    held_out_detections,
    train_without_each_part,
)
from sppnet_jax.detection.examples import regression_examples
from sppnet_jax.detection.hard_negatives import (
    Mining,
    MiningState,
    feature_scale,
    mine_hard_negatives,
    mining_report,
)
from sppnet_jax.detection.window_features import (
    Head,
    WindowFeatures,
    make_program,
    pooled_rows,
    rows_of,
)
from sppnet_jax.run.files import read_arrays, write_arrays
from sppnet_jax.run.memory import large_blocks_go_back

SVM_FILE = "svm.npz"
REGRESSION_FILE = "regression.npz"
ROUNDS_FILE = "rounds.npz"

log = logging.getLogger(__name__)


@large_blocks_go_back()
def learn_svms(
    folder: Path,
    features: WindowFeatures,
    objects: Sequence[Objects],
    num_classes: int,
    *,
    head: Head,
    fc: Any,
    mining: Mining,
    seed: int,
) -> dict[str, Any]:
    """Trains an SVM for each class, from the last whole round if there is one.

    `features`: of boxes that begin with each image's objects. `head`, `fc`: give the
    layer that the SVMs see.

    Returns: a report of plain values. The result is `SVM_FILE` in the folder;
    `ROUNDS_FILE` is of no use afterwards.
    Raises: ValueError if there are no objects to train on.
    """
    program, fc = make_program(features, head), jax.device_put(fc)
    labels = np.concatenate([found.labels[~found.difficult] for found in objects])
    positives, done = np.zeros((0, 0), np.float32), 0
    for image, found in enumerate(objects):
        rows = np.flatnonzero(~found.difficult)
        if len(rows):
            own = rows_of(features, program, fc, image, rows)
            if not done:  # one array for all: many small ones would be as large again
                positives = np.empty((len(labels), own.shape[1]), np.float32)
            positives[done : done + len(rows)] = own
            done += len(rows)
    if not done:
        raise ValueError(
            f"the {len(objects)} training images have no objects, or difficult ones "
            "only: there is nothing to train SVMs on"
        )
    scale = feature_scale(positives, mining.feature_norm)
    positives *= scale

    def features_of(image: int, chosen: np.ndarray) -> np.ndarray:
        return rows_of(features, program, fc, image, chosen) * scale

    def scores(given: Any, pooled: jax.Array) -> jax.Array:
        fc, svms = given
        return head(fc, pooled).astype(jnp.float32) @ svms.weights.T + svms.biases

    # Of all boxes: their features would be a hundred megabytes an image, copied twice.
    scoring = make_program(features, scores)

    def for_scoring(svms: LinearSVMs) -> tuple[Any, LinearSVMs]:
        return fc, svms._replace(weights=svms.weights * np.float32(scale))

    def scores_of(image: int, svms: LinearSVMs) -> np.ndarray:
        every = np.arange(len(features.boxes[image]))
        return rows_of(features, scoring, for_scoring(svms), image, every)

    saved = folder / ROUNDS_FILE
    state = None
    if saved.exists():
        state = read_arrays(saved, MiningState)
        log.info("mining goes on after round %d", len(state.seconds) - 1)
    svms, state = mine_hard_negatives(
        features_of,
        scores_of,
        features.boxes,
        objects,
        positives,
        labels,
        num_classes,
        mining,
        seed=seed,
        state=state,
        on_round=lambda state: write_arrays(saved, **state._asdict()),
    )
    report = {"feature_scale": float(scale), **mining_report(state)}
    weights = (svms.weights * scale).astype(np.float32)
    biases = svms.biases
    parts_of_images = min(mining.calibration_parts, len(objects))
    if parts_of_images > 1:
        images = np.repeat(
            np.arange(len(objects)), [(~found.difficult).sum() for found in objects]
        )
        held_out = train_without_each_part(
            positives, labels, images, state, mining, parts_of_images, seed
        )
        given = jax.device_put(for_scoring(held_out))
        detections = held_out_detections(
            lambda image, rows: rows_of(features, scoring, given, image, rows),
            features.boxes,
            objects,
            parts_of_images,
        )
        thresholds, f1 = best_thresholds(detections, objects, num_classes)
        biases = (biases - thresholds).astype(np.float32)
        report["calibration"] = {"moved by": (-thresholds).tolist(), "F1": f1.tolist()}
        log.info(
            "scores moved so that 0 is best on held-out images: F1 %.2f", f1.mean()
        )
    write_arrays(folder / SVM_FILE, weights=weights, biases=biases)
    return report


@large_blocks_go_back()
def learn_regression(
    folder: Path,
    features: WindowFeatures,
    objects: Sequence[Objects],
    num_classes: int,
    settings: BoxRegression,
    *,
    feature_norm: float,
    seed: int,
) -> dict[str, Any]:
    """Trains the box regression of each class on pooled features.

    `feature_norm`: the mean length to scale features to.

    Returns: a report of plain values. The result is `REGRESSION_FILE` in the folder.
    """
    found = [
        regression_examples(own, those, overlap=settings.overlap)
        for own, those in zip(features.boxes, objects, strict=True)
    ]
    counts = np.array([len(rows) for rows, _, _ in found])
    kept = np.arange(counts.sum())
    if len(kept) > settings.max_examples:
        rng = np.random.default_rng((seed, 3))
        kept = np.sort(rng.choice(kept, settings.max_examples, replace=False))
    image_of = np.repeat(np.arange(len(found)), counts)[kept]
    number_of = kept - (np.cumsum(counts) - counts)[image_of]
    program = make_program(features, pooled_rows)
    parts = []
    for image in np.unique(image_of):
        rows, targets, labels = (
            part[number_of[image_of == image]] for part in found[image]
        )
        pooled = rows_of(features, program, None, int(image), rows)
        parts.append((pooled, features.boxes[image][rows], targets, labels))
    if not parts:
        raise ValueError(
            f"no box of the {len(objects)} training images overlaps an object by "
            f"{settings.overlap:g}: lower regression.overlap, or leave regression out"
        )
    values, boxes, targets, labels = map(np.concatenate, zip(*parts, strict=True))
    scale = feature_scale(values, feature_norm)
    regressors = train_box_regressors(
        values * scale, boxes, targets, labels, num_classes, ridge=settings.ridge
    )
    weights = (regressors.weights * scale).astype(np.float32)
    write_arrays(folder / REGRESSION_FILE, weights=weights, biases=regressors.biases)
    return {"examples": len(values), "feature_scale": float(scale)}
