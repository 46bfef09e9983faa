"""Which boxes are examples of what is what a loop over boxes and objects says."""

import numpy as np
import pytest
from data_helpers import overlap

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.examples import (
    finetuning_examples,
    regression_examples,
    with_objects,
)


def random_image(seed):
    """Boxes scattered around a few objects, some of them difficult."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 40, (4, 2))
    own = np.concatenate([corners, corners + rng.integers(20, 50, (4, 2))], axis=1)
    found = own[rng.integers(4, size=150)] + rng.normal(0, 8, (150, 4))
    stops = np.maximum(found[:, 2:], found[:, :2] + 1)
    boxes = np.concatenate([found[:, :2], stops], axis=1)
    objects = Objects(own.astype(float), rng.integers(0, 5, 4), rng.random(4) < 0.4)
    return np.concatenate([own, boxes]), objects


@pytest.mark.parametrize("seed", range(5))
def test_examples_to_finetune_on_are_those_of_a_loop(seed):
    boxes, objects = random_image(seed)
    positives, labels, negatives = [], [], []
    for row, box in enumerate(boxes):
        overlaps = [overlap(box, other) for other in objects.boxes]
        certain = [
            o for o, hard in zip(overlaps, objects.difficult, strict=True) if not hard
        ]
        if certain and max(certain) >= 0.5:
            best = max(
                (i for i in range(4) if not objects.difficult[i]),
                key=lambda i: overlaps[i],
            )
            positives.append(row)
            labels.append(int(objects.labels[best]))
        if 0.1 <= max(overlaps) < 0.5:
            negatives.append(row)
    found = finetuning_examples(boxes, objects)
    assert found.positives.tolist() == positives
    assert found.labels.tolist() == labels
    assert found.negatives.tolist() == negatives
    assert positives
    assert negatives


def test_the_overlaps_are_settings():
    boxes, objects = random_image(0)
    objects = objects._replace(difficult=np.zeros(4, bool))
    best = [max(overlap(box, other) for other in objects.boxes) for box in boxes]
    found = finetuning_examples(boxes, objects, positive=0.7, negative=(0.0, 0.3))
    assert found.positives.tolist() == [i for i, o in enumerate(best) if o >= 0.7]
    assert found.negatives.tolist() == [i for i, o in enumerate(best) if o < 0.3]


def test_an_overlap_of_exactly_the_bounds():
    objects = Objects(np.array([[0.0, 0, 10, 10]]), np.array([3]), np.array([False]))
    # IoU 1/2, 1/10, and below both.
    boxes = np.array([[0.0, 0, 5, 10], [0, 0, 1, 10], [0, 0, 0.9, 10], [0, 0, 4.9, 10]])
    found = finetuning_examples(boxes, objects)
    assert found.positives.tolist() == [0]
    assert found.labels.tolist() == [3]
    assert found.negatives.tolist() == [1, 3]


def test_difficult_objects_make_neither_positives_nor_negatives():
    own = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    objects = Objects(own, np.array([1, 2]), np.array([True, False]))
    near = np.array(
        [[0.0, 0, 10, 8], [0, 0, 10, 4], [20, 20, 30, 28], [20, 20, 30, 24]]
    )
    found = finetuning_examples(near, objects)
    assert found.positives.tolist() == [2]
    assert found.labels.tolist() == [2]
    assert found.negatives.tolist() == [1, 3]
    rows, targets, labels = regression_examples(near, objects)
    assert rows.tolist() == [2]
    assert targets.tolist() == [own[1].tolist()]
    assert labels.tolist() == [2]
    only = Objects(own[:1], np.array([1]), np.array([True]))
    assert not len(finetuning_examples(near, only).positives)
    assert not len(regression_examples(near, only)[0])


@pytest.mark.parametrize("seed", range(5))
def test_box_regression_pairs_boxes_as_a_loop_does(seed):
    boxes, objects = random_image(seed)
    expected = []
    for row, box in enumerate(boxes):
        best, most = None, 0.0
        for other, label, hard in zip(*objects, strict=True):
            if not hard and overlap(box, other) > most:
                best, most = (other.tolist(), int(label)), overlap(box, other)
        if most >= 0.6:
            expected.append((row, *best))
    rows, targets, labels = regression_examples(boxes, objects, overlap=0.6)
    found = zip(rows.tolist(), targets.tolist(), labels.tolist(), strict=True)
    assert list(found) == expected
    own = np.flatnonzero(~objects.difficult)
    assert set(own) <= set(rows.tolist())


def test_an_image_without_objects_or_boxes_has_no_examples():
    boxes, objects = random_image(0)
    none = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    assert all(not len(part) for part in finetuning_examples(boxes, none))
    rows, targets, labels = regression_examples(boxes, none)
    assert (rows.shape, targets.shape, labels.shape) == ((0,), (0, 4), (0,))
    assert all(not len(part) for part in finetuning_examples(none.boxes, objects))
    assert all(not len(part) for part in regression_examples(none.boxes, objects))


def test_an_images_boxes_are_its_objects_and_then_its_proposals():
    boxes, objects = random_image(0)
    none = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    found = with_objects([objects, none, none], [boxes, boxes, np.zeros((0, 4))])
    np.testing.assert_array_equal(found[0][:4], objects.boxes)
    np.testing.assert_array_equal(found[0][4:], boxes)
    np.testing.assert_array_equal(found[1], boxes)
    assert found[2].shape == (0, 4)
    with pytest.raises(ValueError, match="shorter"):
        with_objects([objects, none], [boxes])
