"""Scores are moved to where the best F1 on images that were not trained on is."""

import numpy as np
import pytest
from test_boxes import greedy

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.calibration import (
    best_thresholds,
    held_out_detections,
    train_without_each_part,
)
from sppnet_jax.detection.detection_table import DetectionTable
from sppnet_jax.detection.hard_negatives import NEVER, Mining, mine_hard_negatives
from sppnet_jax.detection.svm_solver import solve_svms

CLASSES, DIMENSIONS, IMAGES, PARTS = 2, 5, 6, 3


def objects_of(boxes, labels, difficult=None):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    hard = np.zeros(len(boxes), bool) if difficult is None else np.array(difficult)
    return Objects(boxes, np.array(labels, np.int32), hard)


@pytest.fixture(scope="module")
def mined():
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(IMAGES):
        starts = rng.integers(0, 80, (40, 2))
        boxes.append(np.hstack([starts, starts + rng.integers(5, 40, (40, 2))]))
    boxes = [own.astype(np.float32) for own in boxes]
    # The first box of each image is its object; class 1 is in images 0 and 3 alone.
    labels = np.array([1, 0, 0, 1, 0, 0])
    objects = [objects_of(b[:1], [k]) for b, k in zip(boxes, labels, strict=True)]
    features = [rng.normal(size=(40, DIMENSIONS)).astype(np.float32) for _ in boxes]
    for own, label in zip(features, labels, strict=True):
        own[0, label] += 3
    positives = np.stack([own[0] for own in features])
    mining = Mining(C=0.1, initial_per_image=4, hard_per_image=10)
    _, state = mine_hard_negatives(
        lambda image, rows: features[image][rows],
        lambda image, svms: svms.scores(features[image]),
        boxes,
        objects,
        positives,
        labels,
        CLASSES,
        mining,
    )
    given = positives, labels, np.arange(IMAGES), state, mining, PARTS, 0
    return boxes, objects, features, given, train_without_each_part(*given)


def test_an_svm_without_a_part_is_one_trained_on_the_other_images(mined):
    positives, labels, images, state, mining, *_ = mined[3]
    found = mined[4]
    for part in range(PARTS):
        ours = images % PARTS != part
        theirs = state.images % PARTS != part
        for label in range(CLASSES):
            number = part * CLASSES + label
            if not (labels[ours] == label).any():
                assert found.biases[number] == np.float32(NEVER)
                continue
            negatives = state.features[theirs & state.members[:, label]]
            own = positives[ours & (labels == label)]
            signs = np.repeat([1, -1], [len(own), len(negatives)])
            alone = solve_svms(
                np.concatenate([own, negatives]),
                signs[:, None].astype(np.int8),
                C=mining.C,
                tolerance=1e-5,
            ).svms
            apart = np.abs(found.weights[number] - alone.weights[0]).max()
            assert apart < 0.05 * np.abs(alone.weights).max()
            np.testing.assert_allclose(found.biases[number], alone.biases[0], atol=0.05)


def test_an_image_is_scored_by_the_svms_that_have_not_seen_it(mined):
    boxes, objects, features, _, svms = mined

    def scores_of(image, rows):
        return features[image][rows] @ svms.weights.T + svms.biases

    table = held_out_detections(scores_of, boxes, objects, PARTS)
    expected = set()
    for image in range(IMAGES):
        own = slice(image % PARTS * CLASSES, (image % PARTS + 1) * CLASSES)
        # Not the box of the object itself.
        scores = scores_of(image, np.arange(1, 40))[:, own]
        for label in range(CLASSES):
            if scores[0, label] < NEVER / 2:
                continue
            kept = greedy(boxes[image][1:], scores[:, label], 0.3)
            for row in np.flatnonzero(kept):
                expected.add((image, label, *boxes[image][1 + row].tolist()))
    found = zip(table.images, table.labels, table.boxes.tolist(), strict=True)
    assert {(i, k, *b) for i, k, b in found} == expected
    assert (table.scores > NEVER / 2).all()


def plain_f1(found, objects, threshold):
    """Greedy matching from its definition, no difficult objects."""
    true = 0
    for image, truth in enumerate(objects):
        free = list(truth)
        for score, where, box in sorted(found, key=lambda row: -row[0]):
            if where == image and score > threshold and box in free:
                free.remove(box)
                true += 1
    shown = sum(score > threshold for score, _, _ in found)
    return 2 * true / (shown + sum(map(len, objects)))


def test_a_threshold_has_the_best_f1_of_all():
    rng = np.random.default_rng(1)
    places = [[(20 * n, 0, 20 * n + 10, 10) for n in range(4)] for _ in range(5)]
    objects = [objects_of(own[:3], [0, 0, 0]) for own in places]
    found = []
    for image, own in enumerate(places):
        for box in own:
            found.append((float(rng.normal(box in own[:3])) - 5, image, box))
    scores, images, boxes = map(np.array, zip(*found, strict=True))
    labels = np.zeros(len(found), int)
    table = DetectionTable(images, labels, scores, boxes.astype(np.float32))
    thresholds, f1 = best_thresholds(table, objects, 2)
    truth = [own[:3] for own in places]
    tried = [plain_f1(found, truth, at) for at in np.append(scores, -99)]
    assert f1[0] == pytest.approx(max(tried))
    assert plain_f1(found, truth, thresholds[0]) == pytest.approx(max(tried))
    # No detection of the other class: it stays where it is.
    assert (thresholds[1], f1[1]) == (0, 0)


def test_difficult_objects_and_misses_move_no_threshold():
    boxes = [(0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)]
    objects = [objects_of(boxes[:2], [0, 0], [False, True])]
    table = DetectionTable(
        np.zeros(3, int),
        np.zeros(3, int),
        np.array([-1.0, -2.0, -4.0]),
        np.array(boxes, np.float32),
    )
    thresholds, f1 = best_thresholds(table, objects, 1)
    assert -2 <= thresholds[0] < -1
    assert f1[0] == 1
    missed = table._replace(boxes=table.boxes + 100)
    assert best_thresholds(missed, objects, 1)[0] == 0


def test_one_part_is_none():
    with pytest.raises(ValueError, match="calibration_parts is 1"):
        Mining(calibration_parts=1).check()
