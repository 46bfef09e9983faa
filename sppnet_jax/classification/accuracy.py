"""Testing a classifier: exact counts over a whole split, on any number of devices."""

import math
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
    values, labels = scores.scores[scores.valid], scores.labels[scores.valid]
    best = np.argsort(-values, axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    report: dict[str, Any] = {}
    for name, right in (("top1", hits[:, 0]), ("top5", hits.any(axis=1))):
        correct = int(right.sum())
        report[name] = correct / count
        report[f"{name}_correct"] = correct
        report[f"{name}_interval"] = wilson_interval(correct, count)
    of_truth = values[np.arange(count), labels].astype(np.float64)
    report["loss"] = float(-np.log(np.maximum(of_truth, 1e-38)).mean())
    return {**report, "count": count, "broken": len(scores.valid) - count}


def wilson_interval(
    correct: int, count: int, deviations: float = 1.959964
) -> tuple[float, float]:
    """Where the true share lies with 95 % confidence (Wilson 1927), both in 0 to 1.

    `deviations`: of the normal distribution; 1.96 for 95 %.
    """
    share, square = correct / count, deviations**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = share * (1 - share) / count + square / (4 * count**2)
    half = deviations * math.sqrt(spread) / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)
