"""Detections are what a plain loop leaves of the scored boxes of one or more."""

import numpy as np
import pytest
from test_boxes import greedy

from sppnet_jax.detection.detector import Scored, Suppression, suppress
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
