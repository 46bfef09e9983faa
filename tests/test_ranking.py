"""Rankings are judged as PASCAL VOC's own programs judge them."""

import math

import numpy as np
import pytest

from sppnet_jax.classification.ranking import (
    ELEVEN_RECALLS,
    average_precision,
    mean_average_precision,
)


def colon(start, step, stop):
    """MATLAB's start:step:stop, symmetric about its middle."""
    count = round((stop - start) / step)
    values = [math.nan] * (count + 1)
    for k in range(count // 2 + 1):
        values[k] = start + k * step
        values[count - k] = stop - k * step
    if count % 2 == 0:
        values[count // 2] = (start + stop) / 2
    return values


def test_the_eleven_recalls_are_matlabs():
    assert list(ELEVEN_RECALLS) == colon(0, 0.1, 1)


def brute_force(scores, labels, rule):
    """VOC's definition, threshold by threshold."""
    pairs = [(s, y) for s, y in zip(scores, labels, strict=True) if y != 0]
    total = sum(y == 1 for _, y in pairs)
    curve = []  # positives found so far, precision
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        above = [y for s, y in pairs if s >= threshold]
        hits = sum(y == 1 for y in above)
        curve.append((hits, hits / len(above)))

    def best(recall):
        return max(p for hits, p in curve if hits / total >= recall)

    if rule == "11":
        return sum(best(recall) for recall in colon(0, 0.1, 1)) / 11
    return sum(best(hit / total) for hit in range(1, total + 1)) / total


@pytest.mark.parametrize("rule", ["11", "area"])
def test_average_precision_is_vocs(rule):
    rng = np.random.default_rng(0)
    for trial in range(40):
        size = int(rng.integers(2, 60))
        scores = rng.normal(size=size) if trial % 2 else rng.integers(0, 9, size)
        labels = rng.integers(-1, 2, size)
        labels[0] = 1
        found = average_precision(scores, labels, rule=rule)
        assert found == pytest.approx(brute_force(scores, labels, rule), abs=1e-12)


@pytest.mark.parametrize(
    ("ranking", "eleven", "area"),
    [
        ([1, 1, -1, -1], 1.0, 1.0),
        # The second positive comes third, at precision 2/3.
        ([1, -1, 1], (6 * 1 + 5 * 2 / 3) / 11, (1 + 2 / 3) / 2),
        # Precision only rises: 1/2, then 2/3 is the best everywhere.
        ([-1, 1, 1], 2 / 3, 2 / 3),
        # An image that isn't counted changes nothing, wherever it ranks.
        ([0, 1, 0, -1, 1, 0], (6 * 1 + 5 * 2 / 3) / 11, (1 + 2 / 3) / 2),
        ([-1, -1, -1, 1], 0.25, 0.25),
        # 3 of 10 found fall short of MATLAB's 0.3: three points at precision 1.
        (
            [1] * 3 + [-1] * 7 + [1] * 7,
            (3 + 8 * 10 / 17) / 11,
            (3 + 7 * 10 / 17) / 10,
        ),
    ],
)
def test_average_precision_by_hand(ranking, eleven, area):
    scores = -np.arange(len(ranking))
    assert average_precision(scores, np.array(ranking)) == pytest.approx(eleven)
    assert average_precision(scores, np.array(ranking), rule="area") == pytest.approx(
        area
    )


def test_a_class_that_no_image_shows_is_left_out_of_the_mean(caplog):
    labels = np.array([[1, -1, -1], [-1, 0, 1], [1, -1, 1]], np.int8)
    scores = np.array([[3.0, 1, 3], [1, 2, 2], [2, 3, 1]])
    result = mean_average_precision(scores, labels, rule="area")
    assert result["average_precision"] == [1.0, None, pytest.approx(2 / 3)]
    assert result["mean_average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["classes_without_positives"] == [1]
    assert "classes [1] have no positive image" in caplog.text
    assert math.isnan(average_precision(scores[:, 1], labels[:, 1]))
    with pytest.raises(ValueError, match="none of the 1 classes is present"):
        mean_average_precision(scores[:, 1:2], labels[:, 1:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1]), r"scores \(2,\) and labels \(1,\)"),
        (([1.0, np.nan], [1, -1]), r"scores \(2,\) .* finite, first in row 1"),
        (([1.0, 2.0], [1, 5]), r"there are \[1, 5\]"),
    ],
)
def test_rankings_that_make_no_sense_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        average_precision(*arguments)
    with pytest.raises(ValueError, match="unknown rule '2007': use '11' or 'area'"):
        average_precision(np.ones(2), np.ones(2), rule="2007")
    with pytest.raises(ValueError, match=r"both be \[N, classes\]"):
        mean_average_precision(np.ones(2), np.ones(2))
