"""Box regression against the normal equations, and against what it should recover."""

import logging
import math

import numpy as np
import pytest

from sppnet_jax.detection.box_regression import (
    BoxRegressors,
    regress_boxes,
    train_box_regressors,
)
from sppnet_jax.detection.boxes import decode_boxes, encode_boxes


def examples(counts=(60, 9, 25), dimensions=12, seed=0):
    """Features, boxes, targets and labels; more and fewer windows than features."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    features = np.maximum(0, rng.normal(size=(len(labels), dimensions)))
    starts = rng.uniform(0, 50, (len(labels), 2))
    boxes = np.concatenate([starts, starts + rng.uniform(10, 60, starts.shape)], axis=1)
    targets = decode_boxes(boxes, 0.2 * rng.normal(size=boxes.shape) + 0.1)
    return features.astype(np.float32), boxes, np.asarray(targets), labels


def normal_equations(features, deltas, ridge):
    """Weights and free bias as one linear system; the bias's own row has no ridge."""
    x = np.concatenate([features.astype(np.float64), np.ones((len(features), 1))], 1)
    penalty = ridge * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    solution = np.linalg.solve(x.T @ x + penalty, x.T @ deltas)
    return solution[:-1], solution[-1]


def predict(trained: BoxRegressors, features: np.ndarray) -> np.ndarray:
    return np.einsum("nd,cdk->nck", features, trained.weights) + trained.biases


@pytest.mark.parametrize("ridge", [0.1, 10.0, 4000.0])
def test_every_class_solves_its_normal_equations(ridge):
    features, boxes, targets, labels = examples()
    trained = train_box_regressors(features, boxes, targets, labels, 3, ridge=ridge)
    assert trained.weights.shape == (3, 12, 4)
    for number in range(3):
        own = labels == number
        deltas = encode_boxes(boxes[own], targets[own])
        weights, biases = normal_equations(features[own], deltas, ridge)
        np.testing.assert_allclose(trained.weights[number], weights, atol=1e-5)
        np.testing.assert_allclose(trained.biases[number], biases, atol=1e-5)


def test_a_linear_relation_is_recovered_and_boxes_reach_their_targets():
    features, boxes, _, labels = examples((80, 70))
    rng = np.random.default_rng(1)
    weights, biases = 0.1 * rng.normal(size=(2, 12, 4)), 0.1 * rng.normal(size=(2, 4))
    deltas = np.stack(
        [x @ weights[c] + biases[c] for x, c in zip(features, labels, strict=True)]
    )
    targets = decode_boxes(boxes, deltas)
    trained = train_box_regressors(features, boxes, targets, labels, 2, ridge=1e-4)
    np.testing.assert_allclose(trained.weights, weights, atol=1e-4)
    np.testing.assert_allclose(trained.biases, biases, atol=1e-4)
    predicted = predict(trained, features)
    moved = regress_boxes(boxes, predicted, 10_000, 10_000)
    own = moved[np.arange(len(labels)), labels]
    np.testing.assert_allclose(own, np.clip(targets, 0, None), atol=0.02)


def test_a_class_without_examples_is_named_and_leaves_boxes_alone(caplog):
    caplog.set_level(logging.WARNING)
    features, boxes, targets, labels = examples()
    train_box_regressors(features, boxes, targets, labels, 3)
    assert not caplog.records
    trained = train_box_regressors(features, boxes, targets, labels, 5)
    assert "classes [3, 4] have no examples for box regression" in caplog.text
    moved = regress_boxes(boxes, predict(trained, features), 200, 200)
    np.testing.assert_allclose(moved[:, 3], boxes)
    assert np.abs(moved[:, 0] - boxes).max() > 1


def test_one_example_is_enough():
    features, boxes, targets, _ = examples((1,))
    trained = train_box_regressors(features, boxes, targets, np.array([0]), 1)
    expected = encode_boxes(boxes, targets)
    np.testing.assert_allclose(predict(trained, features)[:, 0], expected, atol=1e-6)


def test_wild_predictions_stay_finite_and_in_the_image():
    boxes = np.array([[10.0, 20, 30, 60], [0, 0, 5, 5]])
    deltas = np.array([[0, 0, 1e4, -1e4], [1e3, -1e3, 0, 0]])
    moved = regress_boxes(boxes, deltas, 100, 80)
    # 20 pixels high times 62.5 fills the image, 40 wide become 0.64 around 40.
    np.testing.assert_allclose(moved[0], [0, 39.68, 100, 40.32])
    np.testing.assert_array_equal(moved[1], [100, 0, 100, 0])
    ratio = math.log(2)
    doubled = regress_boxes(boxes[:1], np.array([[0, 0.25, ratio, 0]]), 100, 80)
    np.testing.assert_allclose(doubled, [[0, 30, 40, 70]])
    for shape in ((0, 4), (0, 3, 4)):
        assert regress_boxes(np.zeros((0, 4)), np.zeros(shape), 9, 9).shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.ones((93, 4))}, r"boxes \(93, 4\)"),
        ({"labels": np.zeros((94, 1), int)}, r"labels \(94, 1\) \[N\]"),
        ({"features": np.ones((94, 2), int)}, "floating point, not int"),
        ({"features": np.full((94, 2), np.inf)}, "first in row 0"),
        ({"labels": np.full(94, 3)}, "from 0 to 2, not int64 from 3 to 3"),
        ({"boxes": np.zeros((94, 4))}, "empty"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(change, message):
    names = ("features", "boxes", "targets", "labels")
    arguments = dict(zip(names, examples(), strict=True))
    with pytest.raises(ValueError, match=message):
        train_box_regressors(**(arguments | change), num_classes=3)


def test_no_examples_and_shapes_that_do_not_fit_are_errors():
    none = np.zeros((0, 4))
    with pytest.raises(ValueError, match="no window overlaps an object"):
        train_box_regressors(np.zeros((0, 9)), none, none, np.zeros(0, int), 3)
    for deltas in (np.zeros((3, 4)), np.zeros((2, 5)), np.zeros(4)):
        with pytest.raises(ValueError, match=r"boxes \(2, 4\) must be"):
            regress_boxes(np.ones((2, 4)), deltas, 9, 9)
