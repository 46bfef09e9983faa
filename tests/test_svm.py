"""SVMs on features are tested as Caltech101 and VOC 2007 have it."""

import json
import math

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from sppnet_jax.classification import svm
from sppnet_jax.classification.ranking import mean_average_precision
from sppnet_jax.classification.svm import (
    caltech_protocol,
    l2_normalize,
    multi_label_protocol,
    random_splits,
    train_linear_svms,
)


def clusters(counts, noise=0.1, dimensions=12, seed=0):
    """Features scattered around one corner of a cube for each class, and classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = np.eye(len(counts), dimensions)
    features = centres[labels] + noise * rng.normal(size=(len(labels), dimensions))
    return features.astype(np.float32), labels


def one_against_rest(labels):
    return np.where(labels[:, None] == np.arange(labels.max() + 1), 1, -1).astype(
        np.int8
    )


def objective(weights, bias, features, signs, C):
    hinge = np.maximum(0, 1 - signs * (features @ weights + bias))
    return 0.5 * (weights @ weights + bias**2) + C * (hinge**2).sum()


def test_rows_get_length_one_and_zeros_stay_zeros():
    features = np.array([[3, 4], [0, 0], [1e-30, 0], [-1e30, 1e30]], np.float32)
    normalized = l2_normalize(features)
    root = math.sqrt(0.5)
    expected = [[0.6, 0.8], [0, 0], [1, 0], [-root, root]]
    np.testing.assert_allclose(normalized, expected, rtol=1e-6)
    assert normalized.dtype == np.float32
    with pytest.raises(ValueError, match=r"features \(2, 1\) .* first in row 1"):
        l2_normalize(np.array([[1.0], [np.nan]]))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [0.1, 10.0])
def test_each_svm_is_the_best_for_its_class(classes, C):
    features, labels = clusters((25,) * classes, noise=0.5)
    svms = train_linear_svms(features, labels, C=C)
    assert svms.weights.shape == (classes, 12)
    for number, signs in enumerate(one_against_rest(labels).T):
        plain = LinearSVC(C=C, dual=False, tol=1e-9).fit(features, signs)
        best = objective(plain.coef_[0], plain.intercept_[0], features, signs, C)
        weights, bias = svms.weights[number], svms.biases[number]
        assert objective(weights, bias, features, signs, C) <= best * (1 + 1e-5)
        slack = np.maximum(0, 1 - signs * svms.scores(features)[:, number])
        gradient = weights - 2 * C * (slack * signs) @ features
        np.testing.assert_allclose(gradient, 0, atol=2e-3 * max(1, C))


def test_one_label_an_image_and_a_row_of_labels_train_the_same():
    features, labels = clusters((20, 20, 20), noise=0.5)
    for part in (slice(None), labels < 2):
        one = train_linear_svms(features[part], labels[part])
        several = train_linear_svms(features[part], one_against_rest(labels[part]))
        np.testing.assert_allclose(one.weights, several.weights, atol=1e-3)
        np.testing.assert_allclose(one.biases, several.biases, atol=1e-3)


def test_an_image_with_only_difficult_instances_does_not_train_its_class():
    features, classes = clusters((20, 20, 20), noise=0.5)
    labels = one_against_rest(classes)
    labels[:15, 1] = 0
    svms = train_linear_svms(features, labels)
    full = train_linear_svms(features, one_against_rest(classes))
    without = train_linear_svms(features[15:], labels[15:])
    np.testing.assert_array_equal(svms.weights[1], without.weights[1])
    np.testing.assert_array_equal(svms.weights[[0, 2]], full.weights[[0, 2]])
    assert np.abs(svms.weights[1] - full.weights[1]).max() > 0.01


def test_few_features_and_a_large_c_converge_too(caplog):
    features, labels = clusters((40, 40, 40), noise=0.7, dimensions=4)
    svms = train_linear_svms(features, labels, C=1000.0)
    assert not caplog.records
    for number, signs in enumerate(one_against_rest(labels).T):
        hinge = np.maximum(0, 1 - signs * svms.scores(features)[:, number])
        gradient = svms.weights[number] - 2000 * (hinge * signs) @ features
        assert np.abs(gradient).max() < 1e-3 * 2000 * hinge.sum()


def test_the_log_says_what_to_do_when_an_svm_does_not_converge(monkeypatch, caplog):
    features, labels = clusters((20, 20), noise=0.5)
    train_linear_svms(features, labels)
    assert not caplog.records
    monkeypatch.setattr(svm, "MAX_ITERATIONS", 1)
    train_linear_svms(features, labels, C=100.0)
    assert "class 1 (C = 100) did not converge in 1 iterations" in caplog.text
    assert "L2-normalise the features (l2_normalize), or lower C" in caplog.text


def test_separable_classes_are_all_told_apart():
    features, labels = clusters((40, 60, 35))
    result = caltech_protocol(features * 1000, labels, splits=3)
    for name in ("accuracy", "mean_class_accuracy"):
        assert result[name] == {"mean": 1.0, "sd": 0.0, "splits": [1.0] * 3}
    assert result["headline"] == "mean_class_accuracy"
    json.dumps(result)


def test_accuracy_is_a_mean_over_classes_and_over_images():
    # Class 2 looks like class 0, so one of both is always missed.
    features, labels = clusters((40, 45, 100), noise=0.0)
    features[labels == 2] = features[labels == 0][0]
    result = caltech_protocol(features, labels, splits=2)
    assert result["test_per_class"] == [10, 15, 50]
    assert (result["train_images"], result["test_images"]) == (90, 75)
    assert result["mean_class_accuracy"]["mean"] == pytest.approx(2 / 3)
    assert result["accuracy"]["mean"] in (
        *(pytest.approx(25 / 75), pytest.approx(65 / 75)),
    )


def test_the_spread_is_that_of_the_splits():
    features, labels = clusters((45, 45, 45), noise=0.7)
    accuracies = caltech_protocol(features, labels, splits=4)["accuracy"]
    mean = sum(accuracies["splits"]) / 4
    squares = sum((value - mean) ** 2 for value in accuracies["splits"])
    assert 0.4 < mean == pytest.approx(accuracies["mean"])
    assert 0 < math.sqrt(squares / 3) == pytest.approx(accuracies["sd"])
    assert caltech_protocol(features, labels, splits=1)["accuracy"]["sd"] is None
    assert caltech_protocol(features, labels, splits=4)["accuracy"] == accuracies


def test_splits_have_the_papers_counts_and_share_no_image():
    _, labels = clusters((31, 60, 80, 300))
    drawn = random_splits(labels)
    assert len(drawn) == 10
    for train, test in drawn:
        assert np.bincount(labels[train]).tolist() == [30, 30, 30, 30]
        assert np.bincount(labels[test]).tolist() == [1, 30, 50, 50]
        assert len({*train.tolist(), *test.tolist()}) == len(train) + len(test)
    assert len({train.tobytes() for train, _ in drawn}) == 10


def test_splits_follow_from_the_seed():
    _, labels = clusters((40, 50))
    drawn = random_splits(labels, splits=4)
    for again in (random_splits(labels, splits=4), random_splits(labels, splits=9)[:4]):
        for pair, expected in zip(again, drawn, strict=True):
            np.testing.assert_array_equal(pair[0], expected[0])
            np.testing.assert_array_equal(pair[1], expected[1])
    other = random_splits(labels, splits=4, seed=1)
    assert all((a[0] != b[0]).any() for a, b in zip(drawn, other, strict=True))


def test_a_class_with_too_few_images_is_named():
    features, labels = clusters((40, 30, 31, 7))
    with pytest.raises(
        ValueError, match=r"31 images of every class, but class 1 has 30, class 3 has 7"
    ):
        caltech_protocol(features, labels)


def test_the_protocol_is_its_parts():
    features, classes = clusters((30, 30, 30), noise=0.6)
    labels = one_against_rest(classes)
    labels[::7, 1] = 0
    result = multi_label_protocol(
        features[:50], labels[:50], features[50:], labels[50:], C=2.0, rule="area"
    )
    scores = train_linear_svms(l2_normalize(features[:50]), labels[:50], C=2.0).scores(
        l2_normalize(features[50:])
    )
    expected = mean_average_precision(scores, labels[50:], rule="area")
    assert result == {**expected, "train_images": 50, "test_images": 40}
    assert 0.5 < result["mean_average_precision"] < 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5, int), r"features \(6, 2\) must be \[N, D\], and labels \(5,\)"),
        (np.zeros(6), "whole numbers from 0 on, not float64"),
        (np.array([0, 1, 0, 1, -1, 1]), "with minimum -1"),
        (np.array([0, 1, 0, 3, 0, 1]), r"of the classes 0…3, \[2\] have no images"),
        (np.zeros(6, int), r"of the classes 0…1, \[1\] have no images"),
        (np.full((6, 2), 2), r"there are \[2\]"),
        (np.full((6, 2), 1), "class 0 has 6 positive and 0 negative training images"),
    ],
)
def test_labels_that_train_nothing_are_errors(labels, message):
    with pytest.raises(ValueError, match=message):
        train_linear_svms(np.ones((6, 2)), labels)


def test_other_arguments_that_make_no_sense_are_errors():
    features, labels = clusters((40, 40))
    with pytest.raises(ValueError, match="must be at least 1"):
        caltech_protocol(features, labels, splits=0)
    with pytest.raises(ValueError, match=r"\(80, 2\); for several use multi_label"):
        caltech_protocol(features, one_against_rest(labels))
