"""The solver for all classes against scikit-learn's, and its own certificate."""

import logging

import numpy as np
import pytest
from sklearn.svm import LinearSVC

from sppnet_jax.detection.svm_solver import solve_svms


def windows_of_classes(count=400, classes=4, dimensions=60, seed=0):
    """Sparse features as after a ReLU, mean length 20, that overlap between classes."""
    rng = np.random.default_rng(seed)
    owner = np.where(rng.random(count) < 0.1, rng.integers(0, classes, count), -1)
    hidden = rng.normal(size=(count, 8))
    hidden += (owner >= 0)[:, None] * rng.normal(size=(classes, 8))[owner]
    features = np.maximum(0, hidden @ rng.normal(size=(8, dimensions)) - 1)
    features *= 20 / np.linalg.norm(features, axis=1).mean()
    labels = np.where(owner[:, None] == np.arange(classes), 1, -1)
    # An object of one class trains some of the others, and every class leaves some out.
    labels[rng.random(labels.shape) < 0.2] = 0
    return features.astype(np.float32), labels.astype(np.int8)


def primal_and_dual(
    solved, features, labels, number, C, positive_weight, bias_multiplier
):
    """Both objectives of one class, term by term from their definitions, in float64."""
    w = solved.svms.weights[number].astype(np.float64)
    v = float(solved.svms.biases[number]) / bias_multiplier
    primal, dual = 0.5 * (w @ w) + 0.5 * v * v, 0.0
    combined = np.zeros(len(w) + 1)
    for x, y, a in zip(
        features, labels[:, number], solved.duals[:, number], strict=True
    ):
        if y == 0:
            assert a == 0
            continue
        weight = C * (positive_weight if y > 0 else 1)
        assert 0 <= a <= weight * (1 + 1e-6)
        score = w @ x + v * bias_multiplier
        primal += weight * max(0.0, 1 - int(y) * score)
        dual += a
        combined += a * int(y) * np.append(x, bias_multiplier)
    return primal, dual - 0.5 * (combined @ combined)


def hinge_objective(w, b, features, signs, C, positive_weight, bias_multiplier):
    """The objective of one class, from its definition."""
    hinge = np.maximum(0, 1 - signs * (features @ w + b))
    weights = np.where(signs > 0, positive_weight, 1.0)
    return 0.5 * (w @ w + (b / bias_multiplier) ** 2) + C * (weights @ hinge)


def scikit_learns(features, labels, C, positive_weight, bias_multiplier):
    """The least objective of one class that liblinear finds."""
    own, signs = features[labels != 0].astype(np.float64), labels[labels != 0]
    model = LinearSVC(
        loss="hinge",
        C=C,
        intercept_scaling=bias_multiplier,
        class_weight={1: positive_weight, -1: 1.0},
        tol=1e-7,
        max_iter=200_000,
        random_state=0,
    ).fit(own, signs)
    settings = (C, positive_weight, bias_multiplier)
    return hinge_objective(model.coef_[0], model.intercept_[0], own, signs, *settings)


@pytest.mark.parametrize(
    ("C", "positive_weight", "bias_multiplier"),
    [(1e-3, 2.0, 10.0), (1e-4, 1.0, 1.0), (1e-2, 5.0, 3.0)],
)
def test_every_class_is_as_good_as_scikit_learns(C, positive_weight, bias_multiplier):
    features, labels = windows_of_classes()
    solved = solve_svms(
        features,
        labels,
        C=C,
        positive_weight=positive_weight,
        bias_multiplier=bias_multiplier,
    )
    settings = (C, positive_weight, bias_multiplier)
    for number in range(4):
        best = scikit_learns(features, labels[:, number], *settings)
        primal, _ = primal_and_dual(solved, features, labels, number, *settings)
        assert best * (1 - 1e-6) <= primal <= best * 1.001


def test_objectives_and_gaps_are_what_their_definitions_give():
    features, labels = windows_of_classes()
    for tolerance in (0.3, 1e-4):
        solved = solve_svms(features, labels, tolerance=tolerance)
        for number in range(4):
            primal, dual = primal_and_dual(
                solved, features, labels, number, 1e-3, 2.0, 10.0
            )
            assert solved.objectives[number] == pytest.approx(primal, rel=1e-5)
            gap = solved.gaps[number]
            assert gap == pytest.approx(primal - dual, abs=1e-5 * primal)
            assert gap <= tolerance * primal


def test_an_example_left_out_of_a_class_is_as_good_as_absent():
    features, labels = windows_of_classes()
    together = solve_svms(features, labels, tolerance=1e-5)
    for number in range(4):
        own = labels[:, number] != 0
        alone = solve_svms(features[own], labels[own, number, None], tolerance=1e-5)
        np.testing.assert_allclose(
            alone.objectives[0], together.objectives[number], rtol=2e-5
        )
        # Strong convexity: half the squared distance is at most the sum of the gaps.
        distance = alone.svms.weights[0] - together.svms.weights[number]
        gaps = alone.gaps[0] + together.gaps[number] + 1e-5 * alone.objectives[0]
        assert distance @ distance / 4 <= gaps


def test_a_start_from_the_solution_needs_no_epoch_and_one_with_more_rows_fewer():
    features, labels = windows_of_classes(count=600)
    solved = solve_svms(features, labels)
    assert solve_svms(features, labels, start=solved.duals).epochs == 0
    some = solve_svms(features[:500], labels[:500])
    start = np.concatenate([some.duals, np.zeros((100, 4), np.float32)])
    warm = solve_svms(features, labels, start=start)
    assert warm.epochs <= solved.epochs
    np.testing.assert_allclose(warm.objectives, solved.objectives, rtol=2e-3)


def test_equal_seeds_give_equal_svms():
    features, labels = windows_of_classes()
    first, again = (solve_svms(features, labels, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.svms.weights, again.svms.weights)
    np.testing.assert_array_equal(first.duals, again.duals)


def test_a_class_without_examples_gets_zeros_and_the_others_do_not_notice():
    features, labels = windows_of_classes()
    labels[:, 2] = 0
    solved = solve_svms(features, labels)
    assert not solved.svms.weights[2].any()
    assert solved.svms.biases[2] == solved.objectives[2] == solved.gaps[2] == 0
    assert solved.svms.weights[[0, 1, 3]].any(axis=1).all()


def test_blank_and_equal_examples_do_no_harm():
    features = np.zeros((6, 3), np.float32)
    features[4:] = 1
    labels = np.array([[1], [1], [-1], [-1], [1], [-1]], np.int8)
    for bias_multiplier in (0.0, 10.0):
        solved = solve_svms(features, labels, C=1.0, bias_multiplier=bias_multiplier)
        assert np.isfinite(solved.svms.weights).all()
        assert solved.gaps[0] <= 1e-3 * solved.objectives[0]


def test_the_log_names_classes_that_are_not_solved(caplog):
    caplog.set_level(logging.WARNING)
    features, labels = windows_of_classes()
    solve_svms(features, labels)
    assert not caplog.records
    solved = solve_svms(features, labels, C=10.0, max_epochs=2)
    assert solved.epochs == 2
    assert "after 2 epochs: class 0 (gap" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.ones(5)}, r"labels \(5,\) \[N, classes\]"),
        ({"labels": np.full((5, 2), 3)}, r"there are \[3\]"),
        ({"features": np.full((5, 3), np.nan)}, "first in row 0"),
        ({"labels": np.ones((5, 0))}, "nothing to train on"),
        ({"start": np.zeros((4, 2))}, "append rows of zeros"),
    ],
)
def test_arguments_that_make_no_sense_are_errors(change, message):
    arguments = {
        "features": np.ones((5, 3)),
        "labels": np.ones((5, 2), np.int8),
    }
    with pytest.raises(ValueError, match=message):
        solve_svms(**(arguments | change))


def test_several_arrays_of_features_are_taken_as_one():
    features, labels = windows_of_classes(count=150)
    whole = solve_svms(features, labels, C=0.01)
    parts = solve_svms(np.split(features, [40, 40, 131]), labels, C=0.01)
    np.testing.assert_array_equal(parts.svms.weights, whole.svms.weights)
    np.testing.assert_array_equal(parts.duals, whole.duals)
    with pytest.raises(ValueError, match=r"features \(40, 60\), \(110, 59\) must be"):
        solve_svms([features[:40], features[40:, 1:]], labels)
