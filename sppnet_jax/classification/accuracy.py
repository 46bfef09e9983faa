"""Testing a classifier: exact counts over a whole split, on any number of devices."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sppnet_jax.classification.scores import Scores


def mean_scores(networks: Sequence[Scores]) -> Scores:
    """The mean of several networks' scores of the same records.

    Raises: ValueError if they are not of the same records and classes.
    """
    first = networks[0]
    for other in networks[1:]:
        if (
            other.scores.shape != first.scores.shape
            or ((other.labels != first.labels) | (other.valid != first.valid)).any()
        ):
            raise ValueError(
                "the networks were tested on other records: scores of shape "
                f"{other.scores.shape} and {first.scores.shape}"
            )
    mean = np.stack([network.scores for network in networks]).mean(axis=0)
    views = np.stack([network.views for network in networks]).sum(axis=0)
    return first._replace(scores=mean, views=views)


def summarize(scores: Scores) -> dict[str, Any]:
    """Top-1 and top-5 accuracy with their intervals, and exact counts.

    Of equal scores the lower class comes first.

    Returns: "top1" and "top5" as shares in 0 to 1, each with its "_correct" (a count)
    and "_interval" (95 %, Wilson), "count", "broken", "loss" (mean cross entropy).
    Raises: ValueError if no record could be tested.
    """
    count = int(scores.valid.sum())
    if not count:
        raise ValueError("there is no valid example to test: every image is broken")
    # Here, not above: its import takes 0.6 s, and a training tests without it.
    from scipy.stats import binomtest

    values, labels = scores.scores[scores.valid], scores.labels[scores.valid]
    best = np.argsort(-values, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    report: dict[str, Any] = {}
    for name, right in (("top1", hits[:, 0]), ("top5", hits.any(axis=1))):
        correct = int(right.sum())
        report[name] = correct / count
        report[f"{name}_correct"] = correct
        between = binomtest(correct, count).proportion_ci(0.95, method="wilson")
        report[f"{name}_interval"] = float(between.low), float(between.high)
    of_truth = values[np.arange(count), labels].astype(np.float64)
    report["loss"] = float(-np.log(np.maximum(of_truth, 1e-38)).mean())
    return {**report, "count": count, "broken": len(scores.valid) - count}
