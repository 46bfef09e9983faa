"""Linear SVMs on a network's features, as the paper tests them (sections 3.2, 3.3).

Features of any layer are L2-normalised and a linear SVM is trained for each class
against the rest. Caltech101 is tested on random splits by accuracy
(`caltech_protocol`), VOC 2007 by mean average precision (`multi_label_protocol`).

Features are float [N, D]. Labels are int [N], the class of each image, or int8
[N, classes]: 1 for a class that is present, -1 if absent, and 0 where VOC's rules leave
the image out of that class, because all its instances are difficult ones.
"""

import logging
import warnings
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sppnet_jax.classification.ranking import (
    check_finite,
    check_ternary,
    mean_average_precision,
)

log = logging.getLogger(__name__)

# On a network's L2-normalised features some 30 are enough with C = 1, 50 with C = 10.
MAX_ITERATIONS = 500


class LinearSVMs(NamedTuple):
    """One linear SVM a class; `features @ weights.T + biases` are the scores."""

    weights: np.ndarray  # float32 [classes, D]
    biases: np.ndarray  # float32 [classes]

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Signed scores of features [N, D] for each class: float [N, classes]."""
        return features @ self.weights.T + self.biases


def l2_normalize(features: np.ndarray) -> np.ndarray:
    """Divides each row by its Euclidean length; rows of zeros stay zeros.

    `features`: float [N, D].

    Returns: float [N, D] of the same dtype.
    Raises: ValueError for numbers that aren't finite, naming the first such row.
    """
    check_finite(features, "features")
    # First by the largest, so that no square overflows or vanishes.
    largest = np.abs(features).max(axis=1, keepdims=True, initial=0)
    scaled = features / np.where(largest > 0, largest, 1)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / np.where(lengths > 0, lengths, 1)


def train_linear_svms(
    features: np.ndarray, labels: np.ndarray, *, C: float = 1.0, seed: int = 0
) -> LinearSVMs:
    """Trains a linear SVM for each class against the rest.

    The loss is the squared hinge, the bias is regularised as another weight is
    (liblinear's defaults). Where one does not converge, the log says so.

    `features`: float [N, D], L2-normalised.
    `labels`: int [N], 0 to classes − 1, or int8 [N, classes] of 1, 0 and -1; images
    with 0 are left out of the training of that class.
    `C`: weight of the loss against the weights' length.
    `seed`: of the order in which the solver visits the images; decides digits far
    behind the point only.

    Returns: the SVMs, in the order of the classes.
    Raises: ValueError for a class without examples or without others to tell it from,
    and for arrays that don't fit together.
    """
    labels = np.asarray(labels)
    _check_arrays(features, labels)
    # The solver works in float64: convert once, not for every class.
    features = np.ascontiguousarray(features, np.float64)
    if labels.ndim == 1 and labels.max() > 1:
        # One call trains a class each against the rest, reading the features once.
        weights, biases = _fit(features, labels, C, seed, "the SVMs")
    else:
        if labels.ndim == 1:
            labels = np.where(labels[:, None] == [0, 1], 1, -1)
        trained = [
            _fit_one(features, labels[:, number], C, seed, number)
            for number in range(labels.shape[1])
        ]
        weights = np.concatenate([weights for weights, _ in trained])
        biases = np.concatenate([biases for _, biases in trained])
    return LinearSVMs(weights.astype(np.float32), biases.astype(np.float32))


def caltech_protocol(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    train_per_class: int = 30,
    max_test_per_class: int = 50,
    splits: int = 10,
    seed: int = 0,
    C: float = 1.0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Tests features as is the custom on Caltech101: accuracy over random splits.

    The number to report is "mean_class_accuracy", the mean over classes of each class's
    accuracy: the classes have different numbers of test images, and the easy ones have
    the most. "accuracy", over all test images, is there for comparison.

    `features`: float [N, D]; they are L2-normalised here.
    `labels`: int [N], 0 to classes − 1.
    `train_per_class`, `max_test_per_class`, `splits`, `seed`: see `random_splits`.
    `C`: see `train_linear_svms`.

    Returns: a dict of plain values, for JSON: "headline", the name of the number to
    report; "mean_class_accuracy" and "accuracy", each with "mean", "sd" (over the
    splits, n − 1 in the denominator; None for one split) and "splits", fractions of 1;
    "num_classes", "train_images", "test_images" (of one split), "test_per_class".
    Raises: ValueError as `random_splits` and `train_linear_svms` do.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(
            f"accuracy takes one class an image, labels [N], not {labels.shape}; for "
            "several use multi_label_protocol"
        )
    _check_arrays(features, labels)
    indices = random_splits(
        labels,
        train_per_class=train_per_class,
        max_test_per_class=max_test_per_class,
        splits=splits,
        seed=seed,
    )
    features = l2_normalize(features)
    num_classes = int(labels.max()) + 1
    accuracies, class_accuracies = [], []
    for train, test in tqdm(indices, desc="splits", disable=not show_progress):
        svms = train_linear_svms(features[train], labels[train], C=C, seed=seed)
        correct = svms.scores(features[test]).argmax(axis=1) == labels[test]
        counts = np.bincount(labels[test], minlength=num_classes)
        hits = np.bincount(labels[test], correct, minlength=num_classes)
        accuracies.append(float(correct.mean()))
        class_accuracies.append(float((hits / counts).mean()))
    return {
        "headline": "mean_class_accuracy",
        "mean_class_accuracy": _summarize(class_accuracies),
        "accuracy": _summarize(accuracies),
        "num_classes": num_classes,
        "train_images": len(indices[0][0]),
        "test_images": len(indices[0][1]),
        "test_per_class": np.bincount(labels[indices[0][1]]).tolist(),
    }


def random_splits(
    labels: np.ndarray,
    *,
    train_per_class: int = 30,
    max_test_per_class: int = 50,
    splits: int = 10,
    seed: int = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws images of every class to train on, and others of it to test on.

    `labels`: int [N], 0 to classes − 1.
    `train_per_class`: images of each class to train on, exactly.
    `max_test_per_class`: of the others, test on all, but on at most so many.
    `splits`: how often to draw; split i is the same whatever their number.

    Returns: for each split, the images to train and to test on, int [n], ascending.
    Raises: ValueError for a class with too few images, naming all such and their
    numbers.
    """
    labels = np.asarray(labels)
    if min(train_per_class, max_test_per_class, splits) < 1:
        raise ValueError(
            f"train_per_class {train_per_class}, max_test_per_class "
            f"{max_test_per_class} and splits {splits} must be at least 1"
        )
    counts = np.bincount(labels)
    few = np.flatnonzero(counts <= train_per_class)
    if len(few):
        found = ", ".join(f"class {number} has {counts[number]}" for number in few)
        raise ValueError(
            f"{train_per_class} training images a class and at least one to test on "
            f"take {train_per_class + 1} images of every class, but {found}; lower "
            "train_per_class, or leave those classes out"
        )
    drawn = []
    for split in range(splits):
        rng = np.random.default_rng((seed, split))
        orders = [
            rng.permutation(np.flatnonzero(labels == c)) for c in range(len(counts))
        ]
        train = [order[:train_per_class] for order in orders]
        test = [order[train_per_class:][:max_test_per_class] for order in orders]
        drawn.append((np.sort(np.concatenate(train)), np.sort(np.concatenate(test))))
    return drawn


def multi_label_protocol(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    C: float = 1.0,
    seed: int = 0,
    rule: str = "11",
) -> dict[str, Any]:
    """Tests features as VOC 2007 does: an SVM a class, mean average precision.

    `train_features`, `test_features`: float [N, D]; they are L2-normalised here.
    `train_labels`, `test_labels`: int8 [N, classes] of 1, 0 (left out) and -1.
    `C`, `seed`: see `train_linear_svms`. `rule`: see `average_precision`.

    Returns: what `mean_average_precision` does, and "train_images", "test_images".
    Raises: ValueError as `train_linear_svms` and `mean_average_precision` do.
    """
    _check_arrays(test_features, np.asarray(test_labels))
    svms = train_linear_svms(l2_normalize(train_features), train_labels, C=C, seed=seed)
    scores = svms.scores(l2_normalize(test_features))
    result = mean_average_precision(scores, test_labels, rule=rule)
    return {
        **result,
        "train_images": len(train_features),
        "test_images": len(test_features),
    }


def _fit_one(
    features: np.ndarray, labels: np.ndarray, C: float, seed: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    positives, negatives = int((labels == 1).sum()), int((labels == -1).sum())
    if not positives or not negatives:
        raise ValueError(
            f"class {number} has {positives} positive and {negatives} negative "
            "training images; an SVM needs both. Leave the class out, or train on more "
            "images"
        )
    counted = labels != 0
    if not counted.all():
        features, labels = features[counted], labels[counted]
    return _fit(features, labels, C, seed, f"the SVM of class {number}")


def _fit(
    features: np.ndarray, labels: np.ndarray, C: float, seed: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    # Here, not above: a start has no need of it, and it takes a while.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    # As a rule the dual solver is faster and more exact; where it crawls (few features,
    # a large C), the primal one does not.
    for dual in (True, False):
        svm = LinearSVC(C=C, dual=dual, max_iter=MAX_ITERATIONS, random_state=seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            svm.fit(features, labels)
        if not any(issubclass(w.category, ConvergenceWarning) for w in caught):
            break
    else:
        log.warning(
            "%s (C = %g) did not converge in %d iterations, so results may be off: "
            "L2-normalise the features (l2_normalize), or lower C",
            what,
            C,
            MAX_ITERATIONS,
        )
    return svm.coef_, svm.intercept_


def _summarize(values: list[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "splits": values}


def _check_arrays(features: np.ndarray, labels: np.ndarray) -> None:
    if features.ndim != 2 or labels.ndim not in (1, 2) or len(features) != len(labels):
        raise ValueError(
            f"features {features.shape} must be [N, D], and labels {labels.shape} [N] "
            "or [N, classes], of the same N"
        )
    if labels.ndim == 2:
        check_ternary(labels)
        return
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ValueError(
            f"labels [N] must be whole numbers from 0 on, not {labels.dtype} with "
            f"minimum {labels.min(initial=0)}"
        )
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        missing = np.flatnonzero(counts == 0).tolist()
        raise ValueError(
            f"of the classes 0…{len(counts) - 1}, {missing} have no images; number the "
            "classes without gaps, and give at least two"
        )
