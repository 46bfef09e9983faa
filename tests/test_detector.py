"""Detections are what a plain loop leaves of the scored boxes of one or more."""

import math

import numpy as np
import pytest
from test_boxes import greedy

from sppnet_jax.detection.box_regression import regress_boxes
from sppnet_jax.detection.detector import Scored, Suppression, suppress, vote
from sppnet_jax.detection.hard_negatives import NEVER

CLASSES = 3


def scored(seed, count):
    """Boxes with corners in whole pixels, a different one for each class."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 40, (count, CLASSES, 2))
    ends = starts + rng.integers(5, 30, (count, CLASSES, 2))
    boxes = np.concatenate([starts, ends], axis=2).astype(np.float32)
    return Scored(boxes, rng.normal(size=(count, CLASSES)).astype(np.float32))


def plain_suppress(boxes, scores, threshold, most):
    """The (label, score, *box) that the greedy loop leaves of each class."""
    found = set()
    for label in range(CLASSES):
        kept = np.flatnonzero(greedy(boxes[:, label], scores[:, label], threshold))
        kept = sorted(kept, key=lambda row, label=label: -scores[row, label])
        for row in kept[:most]:
            box = boxes[row, label].tolist()
            found.add((label, float(scores[row, label]), *box))
    return found


def as_set(found):
    rows = zip(
        found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True
    )
    return {(label, score, *box) for label, score, box in rows}


@pytest.mark.parametrize("counts", [(30,), (30, 45), (20, 0, 25)])
def test_detectors_are_combined_by_suppressing_the_union_of_their_boxes(counts):
    parts = [scored(seed, count) for seed, count in enumerate(counts)]
    boxes = np.concatenate([part.boxes for part in parts])
    scores = np.concatenate([part.scores for part in parts])
    for most in (5, 100):
        found = suppress(parts, Suppression(0.3, most))
        expected = plain_suppress(boxes, scores, 0.3, most)
        assert as_set(found) == expected
        assert CLASSES < len(found.scores) == len(expected) < CLASSES * len(boxes)
        assert (np.diff(found.scores) <= 0).all()


def plain_vote(box, boxes, scores, overlap):
    """The weighted mean, from its definition."""
    total, mean = 0.0, np.zeros(4)
    for other, score in zip(boxes.astype(float), scores.astype(float), strict=True):
        shared = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
        inside = shared.clip(0).prod()
        areas = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod()
        if inside >= overlap * (areas - inside):
            total += math.exp(score / 0.3)
            mean += math.exp(score / 0.3) * other
    return mean / total


def test_boxes_that_stay_move_to_the_mean_of_those_that_overlap_them():
    part = scored(0, 40)
    alone = suppress([part], Suppression(0.3, 5))
    moved = suppress([part], Suppression(0.3, 5, vote=0.4))
    np.testing.assert_array_equal(moved.labels, alone.labels)
    np.testing.assert_array_equal(moved.scores, alone.scores)
    assert np.abs(moved.boxes - alone.boxes).max() > 1
    for label, box, voted in zip(alone.labels, alone.boxes, moved.boxes, strict=True):
        of_class = part.boxes[:, label], part.scores[:, label]
        expected = plain_vote(box.astype(float), *of_class, 0.4)
        np.testing.assert_allclose(voted, expected, rtol=1e-5)


def test_a_vote_counts_any_score_and_leaves_lonely_and_empty_boxes():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 60, 60], [7, 7, 7, 9]])
    boxes = boxes.astype(np.float32)
    for scores in ([-500.0, -500, 3, 4], [500.0, 500, 3, 4]):
        found = vote(boxes, boxes, np.array(scores, np.float32), 0.5)
        np.testing.assert_array_equal(found[:2], [[0, 0, 10, 11]] * 2)
        np.testing.assert_array_equal(found[2:], boxes[2:])


def test_a_class_that_was_never_trained_is_never_detected():
    """Also where nothing else is, and where another detector knows it."""
    one, other = scored(0, 20), scored(1, 20)
    one.scores[:, 1] = NEVER
    found = suppress([one], Suppression(0.3, 100))
    assert set(found.labels.tolist()) == {0, 2}
    alone = plain_suppress(one.boxes, one.scores, 0.3, 100)
    assert as_set(found) == {row for row in alone if row[0] != 1}
    both = suppress([one, other], Suppression(0.3, 100))
    known = suppress([other], Suppression(0.3, 100))
    of_it = {row for row in as_set(known) if row[0] == 1}
    assert {row for row in as_set(both) if row[0] == 1} == of_it != set()
    one.scores[:] = NEVER
    nothing = suppress([one], Suppression(0.3, 100))
    assert [part.shape for part in nothing] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize("side", range(4))
def test_a_box_that_regression_moved_out_of_the_image_is_no_detection(side):
    """Nor does it take the place of one in the image; one that only crosses stays."""
    start = np.array([[10, 10, 20, 20]] * 3, np.float32)
    away = np.zeros(4, np.float32)
    away[side % 2] = 9 if side < 2 else -9  # heights or widths of the box
    deltas = np.zeros((3, CLASSES, 4), np.float32)
    deltas[0] = away
    deltas[1] = away * (1.5 if side < 2 else 1) / 9  # half of it is left, or all
    boxes = regress_boxes(start, deltas, 30, 30).astype(np.float32)
    scores = np.repeat([[9], [5], [7]], CLASSES, axis=1).astype(np.float32)
    found = suppress([Scored(boxes, scores)], Suppression(1.0, 2))
    assert found.scores.tolist() == [7] * CLASSES + [5] * CLASSES
    assert (found.boxes[:, 2:] - found.boxes[:, :2] >= 5).all()
