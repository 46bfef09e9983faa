"""Detections are evaluated as PASCAL VOC's own programs evaluate them."""

import logging
import math

import numpy as np
import pytest

from sppnet_jax.classification.ranking import ELEVEN_RECALLS
from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.average_precision import (
    evaluate_class,
    evaluate_detections,
)
from sppnet_jax.detection.detection_table import join_detections
from sppnet_jax.detection.detector import Detections

A, B, C = [0.0, 0, 10, 10], [20.0, 20, 30, 30], [50.0, 0, 60, 10]
NOWHERE = [80.0, 80, 90, 90]


def evaluate(detections, truth):
    """Of (image, score, box), and for each image its objects (box, difficult)."""
    columns = list(zip(*detections, strict=True)) or [[], [], np.zeros((0, 4))]
    return evaluate_class(
        *(np.array(column) for column in columns),
        [np.array([box for box, _ in objects]).reshape(-1, 4) for objects in truth],
        [np.array([hard for _, hard in objects], bool) for objects in truth],
    )


def counts(result):
    return result.true_positives, result.false_positives


def devkit(detections, truth):
    """VOCevaldet and VOCap, statement by statement, on VOC's boxes.

    Boxes are 1-based inclusive (xmin, ymin, xmax, ymax). Where MATLAB's max would
    return NaN, because no detection counts, the average precision is NaN here too.
    """
    npos = sum(not hard for objects in truth for _, hard in objects)
    taken = [[False] * len(objects) for objects in truth]
    order = sorted(range(len(detections)), key=lambda d: -detections[d][1])
    tp, fp = [0.0] * len(order), [0.0] * len(order)
    for d, row in enumerate(order):
        image, _, bb = detections[row]
        ovmax, jmax = -math.inf, -1
        for j, (bbgt, _) in enumerate(truth[image]):
            bi = [
                max(bb[0], bbgt[0]),
                max(bb[1], bbgt[1]),
                min(bb[2], bbgt[2]),
                min(bb[3], bbgt[3]),
            ]
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1)
                ua += (bbgt[2] - bbgt[0] + 1) * (bbgt[3] - bbgt[1] + 1)
                ua -= iw * ih
                if iw * ih / ua > ovmax:
                    ovmax, jmax = iw * ih / ua, j
        if ovmax >= 0.5:
            if not truth[image][jmax][1]:
                if not taken[image][jmax]:
                    tp[d] = 1
                    taken[image][jmax] = True
                else:
                    fp[d] = 1
        else:
            fp[d] = 1
    cum_tp = [sum(tp[: d + 1]) for d in range(len(tp))]
    cum_fp = [sum(fp[: d + 1]) for d in range(len(fp))]
    rec = [t / npos for t in cum_tp]
    prec = [
        t / (t + f) if t + f else math.nan for t, f in zip(cum_tp, cum_fp, strict=True)
    ]
    eleven = 0.0
    for t in ELEVEN_RECALLS:  # MATLAB's 0:0.1:1, as test_ranking.py has it
        reached = [p for r, p in zip(rec, prec, strict=True) if r >= t]
        numbers = [p for p in reached if not math.isnan(p)]
        p = max(numbers) if numbers else (math.nan if reached else 0.0)
        eleven += p / 11
    mrec, mpre = [0.0, *rec, 1.0], [0.0, *prec, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        if math.isnan(mpre[i]) or mpre[i + 1] > mpre[i]:
            mpre[i] = mpre[i + 1]
    area = sum(
        (mrec[i] - mrec[i - 1]) * mpre[i]
        for i in range(1, len(mrec))
        if mrec[i] != mrec[i - 1]
    )
    return eleven, area, rec, prec, sum(tp), sum(fp)


def random_case(rng):
    """A few images of VOC's boxes, and detections near them, twice, or nowhere."""
    truth = []
    for _ in range(int(rng.integers(1, 6))):
        objects = []
        for _ in range(int(rng.integers(0, 4))):
            x, y = rng.integers(1, 20, 2)
            w, h = rng.integers(1, 12, 2)
            box = [float(v) for v in (x, y, x + w - 1, y + h - 1)]
            objects.append((box, bool(rng.random() < 0.3)))
        truth.append(objects)
    detections = []
    for _ in range(int(rng.integers(0, 25))):
        image = int(rng.integers(len(truth)))
        box = [float(v) for v in (*rng.integers(1, 12, 2), *rng.integers(12, 24, 2))]
        if truth[image] and rng.random() < 0.8:
            box = list(truth[image][rng.integers(len(truth[image]))][0])
            kind = rng.random()
            if kind < 0.3:  # exactly half or twice the object: IoU 1/2
                width = box[2] - box[0] + 1
                box[2] = box[0] + (width / 2 if kind < 0.15 else 2 * width) - 1
            elif kind < 0.7:
                box = [v + float(rng.integers(-2, 3)) for v in box]
            elif kind < 0.8:
                box = [v + float(rng.normal()) for v in box]
        detections.append((image, float(rng.integers(0, 8)) / 8, box))
    return detections, truth


def ours(box):
    xmin, ymin, xmax, ymax = box
    return [ymin - 1, xmin - 1, ymax, xmax]


def test_every_number_is_the_devkits_on_random_cases():
    rng = np.random.default_rng(0)
    compared, differing_aps = 0, set()
    while compared < 500:
        detections, truth = random_case(rng)
        if all(hard for objects in truth for _, hard in objects):
            continue
        eleven, area, rec, prec, tp, fp = devkit(detections, truth)
        result = evaluate(
            [(image, score, ours(box)) for image, score, box in detections],
            [[(ours(box), hard) for box, hard in objects] for objects in truth],
        )
        assert counts(result) == (tp, fp)
        assert result.recall.tolist() == rec
        np.testing.assert_array_equal(result.precision, np.nan_to_num(prec))
        eleven = 0.0 if math.isnan(eleven) else eleven
        assert result.ap_11_point == pytest.approx(eleven, abs=1e-13)
        assert result.ap_area == pytest.approx(area, abs=1e-13)
        compared += 1
        differing_aps.add(round(area, 9))
    assert len(differing_aps) > 100


def test_average_precision_by_hand():
    # Found, wrong, found, of three: recall 1/3, 1/3, 2/3; precision 1, 1/2, 2/3.
    result = evaluate(
        [(0, 0.9, A), (0, 0.8, NOWHERE), (1, 0.7, B)],
        [[(A, False)], [(B, False), (C, False)]],
    )
    assert counts(result) == (2, 1)
    np.testing.assert_allclose(result.recall, [1 / 3, 1 / 3, 2 / 3])
    np.testing.assert_allclose(result.precision, [1, 1 / 2, 2 / 3])
    # Recalls 0 to 0.3 at precision 1, 0.4 to 0.6 at 2/3, none above.
    assert result.ap_11_point == pytest.approx((4 + 3 * 2 / 3) / 11)
    # A third of the recall at precision 1, a third at 2/3.
    assert result.ap_area == pytest.approx(1 / 3 + 2 / 9)


def test_a_detection_of_a_difficult_object_counts_neither_way():
    truth = [[(A, True), (B, False)]]
    without = evaluate([(0, 0.8, NOWHERE), (0, 0.5, B)], truth)
    with_it = evaluate(
        [(0, 0.9, A), (0, 0.8, NOWHERE), (0, 0.7, A), (0, 0.5, B)], truth
    )
    assert counts(with_it) == counts(without) == (1, 1)
    assert (with_it.ground_truths, with_it.difficult, with_it.detections) == (1, 1, 4)
    assert with_it.ap_11_point == without.ap_11_point == 1 / 2
    assert with_it.ap_area == without.ap_area == 1 / 2
    # VOC's program divides 0 by 0 at the first.
    assert with_it.precision.tolist() == [0, 0, 0, 1 / 2]


def test_only_the_object_of_largest_overlap_counts():
    # It overlaps the difficult object by 2/3, the other by more than a half as well.
    detection = [0.0, 0, 10, 15]
    truth = [[([0.0, 5, 10, 15], False), ([0.0, 0, 10, 15], True)]]
    assert counts(evaluate([(0, 1.0, detection)], truth)) == (0, 0)
    # The taken object is the closest: no second choice.
    truth = [[([0.0, 0, 10, 15], False), ([0.0, 2, 10, 15], False)]]
    both = [(0, 1.0, detection), (0, 0.9, detection)]
    assert counts(evaluate(both, truth)) == (1, 1)


def test_of_equal_overlaps_the_first_object_counts():
    left, right, between = [0.0, 0, 10, 10], [0.0, 5, 10, 15], [0.0, 0, 10, 15]
    assert counts(evaluate([(0, 1.0, between)], [[(left, False), (right, True)]])) == (
        1,
        0,
    )
    assert counts(evaluate([(0, 1.0, between)], [[(right, True), (left, False)]])) == (
        0,
        0,
    )


def test_no_detections_have_a_precision_of_zero():
    result = evaluate([], [[(A, False)], []])
    assert (result.ap_11_point, result.ap_area) == (0, 0)
    assert result.recall.shape == result.precision.shape == (0,)
    # VOC 2007's program answers NaN where nothing counts at all.
    ignored = evaluate([(0, 1.0, A)], [[(A, True), (B, False)]])
    assert (ignored.ap_11_point, ignored.ap_area) == (0, 0)


def scene():
    """Two images; nobody shows a cow, and the only tree is difficult."""
    found = [
        Detections(
            np.array([A, B, C]), np.array([0, 0, 1]), np.float32([0.9, 0.8, 0.7])
        ),
        Detections(np.array([A, NOWHERE]), np.array([1, 2]), np.float32([0.4, 0.3])),
    ]
    truth = [
        Objects(np.array([A, C]), np.array([0, 1]), np.array([False, False])),
        Objects(np.array([B, C]), np.array([3, 1]), np.array([True, False])),
    ]
    return found, truth


NAMES = ("dog", "horse", "cow", "tree")


def test_classes_are_evaluated_one_by_one_and_the_empty_ones_named(caplog):
    caplog.set_level(logging.WARNING)
    found, truth = scene()
    result = evaluate_detections(join_detections(found), truth, NAMES)
    dog, horse, cow, tree = result.classes
    # The dog at recall 1; of two horses the first is found, at precision 1.
    assert (dog.ap_11_point, dog.ap_area, *counts(dog)) == (1, 1, 1, 1)
    assert horse.ap_11_point == pytest.approx(6 / 11)
    assert (horse.ap_area, *counts(horse)) == (1 / 2, 1, 1)
    assert (cow.ap_area, cow.ap_11_point, *counts(cow)) == (None, None, 0, 1)
    assert (tree.ap_area, tree.ground_truths, tree.difficult) == (None, 0, 1)
    assert tree.recall.shape == (0,)
    assert result.map_11_point == pytest.approx((1 + 6 / 11) / 2)
    assert result.map_area == pytest.approx(3 / 4)
    assert result.left_out == ["cow", "tree"]
    assert "no object to find of cow, tree: left out" in caplog.text


def test_the_detections_of_all_images_join_to_one_table():
    table = join_detections(scene()[0])
    assert table.images.tolist() == [0, 0, 0, 1, 1]
    assert table.labels.tolist() == [0, 0, 1, 1, 2]
    assert table.scores.dtype == np.float32
    assert table.boxes.tolist() == [A, B, C, A, NOWHERE]
    nothing = join_detections([])
    assert [column.shape for column in nothing] == [(0,), (0,), (0,), (0, 4)]


def table(**changes):
    return join_detections(scene()[0])._replace(**changes)


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        (table(scores=np.ones(4)), r"got \(5,\), \(5,\), \(4,\), \(5, 4\)"),
        (table(boxes=np.ones((5, 5))), r"boxes \[D, 4\], got .* \(5, 5\)"),
        (table(images=np.array([0, 1, 2, 0, 0])), "images must be from 0 to 1"),
        (table(labels=np.array([0, 1, -1, 0, 0])), "labels must be from 0 to 3"),
        (table(images=np.ones(5)), "whole numbers, not float64"),
        (table(scores=np.array([1, 2, np.nan, 4, 5])), "scores must be finite, row 2"),
        (table(boxes=np.full((5, 4), np.inf)), "boxes must be finite, row 0"),
    ],
)
def test_detections_that_make_no_sense_are_errors(detections, message):
    with pytest.raises(ValueError, match=message):
        evaluate_detections(detections, scene()[1], NAMES)


def test_ground_truth_that_makes_no_sense_is_an_error():
    found, (first, second) = scene()
    detections = join_detections(found)
    short = second._replace(difficult=np.zeros(1, bool))
    with pytest.raises(ValueError, match=r"in image 1 there are \(2, 4\), \(2,\), \(1"):
        evaluate_detections(detections, [first, short], NAMES)
    with pytest.raises(ValueError, match="labels in image 1 must be from 0 to 2"):
        evaluate_detections(detections, [first, second], NAMES[:3])
    no_objects = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    with pytest.raises(ValueError, match="the 2 images show no object of the 4 cl"):
        evaluate_detections(detections, [no_objects] * 2, NAMES)
    with pytest.raises(ValueError, match="IoU above 0 and up to 1, got 50"):
        evaluate_detections(detections, [first, second], NAMES, threshold=50)
