"""Overlaps, suppression and regression targets are those of plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.detection import boxes as module
from sppnet_jax.detection.boxes import (
    clip_boxes,
    decode_boxes,
    encode_boxes,
    iou,
    nms,
    nms_per_class,
)


def whole_boxes(rng, count, side=12):
    """Boxes of whole pixels, some of them equal, a few of them empty."""
    corners = np.sort(rng.integers(0, side, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float64)


def any_boxes(rng, count):
    starts = rng.uniform(0, 300, (count, 2))
    return np.concatenate([starts, starts + rng.uniform(5, 200, (count, 2))], axis=1)


def pixels(box):
    top, left, bottom, right = map(int, box)
    return {(y, x) for y in range(top, bottom) for x in range(left, right)}


def greedy(boxes, scores, threshold, valid=None):
    """Suppression as it is defined, one box after the other, in float32."""
    boxes, threshold = boxes.astype(np.float32), np.float32(threshold)
    keep = np.zeros(len(boxes), bool)
    left = [i for i in range(len(boxes)) if valid is None or valid[i]]
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        keep[best] = True
        left = [
            i
            for i in left
            if i != best and not one_iou(boxes[best], boxes[i]) > threshold
        ]
    return keep


def one_iou(one, other):
    zero = np.float32(0)
    height = max(zero, min(one[2], other[2]) - max(one[0], other[0]))
    width = max(zero, min(one[3], other[3]) - max(one[1], other[1]))
    common = height * width
    if common == 0:
        return zero
    area = (one[2] - one[0]) * (one[3] - one[1])
    return common / (area + (other[2] - other[0]) * (other[3] - other[1]) - common)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_an_overlap_is_that_of_the_sets_of_pixels(convert):
    rng = np.random.default_rng(0)
    boxes, others = whole_boxes(rng, 40), whole_boxes(rng, 30)
    found = iou(convert(boxes), convert(others))
    assert found.shape == (40, 30)
    assert found.dtype == (np.float64 if convert is np.asarray else np.float32)
    for i, box in enumerate(boxes):
        for j, other in enumerate(others):
            union = len(pixels(box) | pixels(other))
            common = len(pixels(box) & pixels(other))
            assert found[i, j] == found.dtype.type(common / union if common else 0)


def test_empty_and_inverted_boxes_overlap_nothing():
    boxes = np.array([[2, 2, 2, 5], [5, 5, 2, 2], [0, 0, 0, 0], [0, 0, 9, 9.0]])
    for found in (iou(boxes, boxes), iou(jnp.asarray(boxes), boxes)):
        np.testing.assert_array_equal(found, np.diag([0, 0, 0, 1.0]))
    assert iou(boxes, boxes[:0]).shape == (4, 0)


def test_clipping_leaves_the_part_inside_the_image():
    boxes = np.array([[-3, -4.5, 5, 6], [2, 3, 99, 98], [20, 30, 25, 35.0]])
    expected = [[0, 0, 5, 6], [2, 3, 10, 20], [10, 20, 10, 20]]
    np.testing.assert_array_equal(clip_boxes(boxes, 10, 20), expected)
    on_device = jax.jit(clip_boxes)(boxes, 10, 20)
    np.testing.assert_array_equal(on_device, expected)


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_suppression_is_the_plain_greedy_loop_on_whole_boxes(count):
    rng = np.random.default_rng(count)
    for threshold in (0.0, 0.3, 0.5, 1.0):
        boxes = whole_boxes(rng, count)
        scores = rng.integers(-3, 4, count).astype(float)
        expected = greedy(boxes, scores, threshold)
        np.testing.assert_array_equal(nms(boxes, scores, threshold), expected)


def test_suppression_is_the_plain_greedy_loop_on_any_boxes():
    rng = np.random.default_rng(0)
    for threshold in (0.1, 0.3, 0.7):
        boxes, scores = any_boxes(rng, 200), rng.normal(size=200).astype(np.float32)
        valid = rng.random(200) < 0.7
        expected = greedy(boxes, scores, threshold, valid)
        found = nms(boxes, scores, threshold, valid)
        np.testing.assert_array_equal(found, expected)
        assert 0 < expected.sum() < valid.sum()


def test_an_overlap_of_just_the_threshold_is_kept():
    # 2 of 4 pixels and 3 of 10 are shared.
    boxes = np.array([[0, 0, 1, 4], [0, 0, 1, 2], [9, 0, 10, 10], [9, 0, 10, 3.0]])
    scores = np.array([4, 3, 2, 1.0])
    assert nms(boxes[:2], scores[:2], 0.5).all()
    assert nms(boxes[2:], scores[2:], 0.3).all()
    assert nms(boxes, scores, 0.29).tolist() == [True, False, True, False]


def test_a_chain_longer_than_a_block_is_settled_to_its_end():
    # Each box drops the next one if it stays itself, so every other one stays.
    count = 3 * module.BLOCK + 1
    start = 5.0 * np.arange(count)
    boxes = np.stack([start, 0 * start, start + 10, 0 * start + 10], axis=1)
    keep = nms(boxes, -start, 0.3)
    np.testing.assert_array_equal(keep, np.arange(count) % 2 == 0)


def test_of_equal_scores_the_earlier_box_stays():
    boxes = np.tile([0.0, 0, 5, 5], (100, 1))
    for scores in (np.zeros(100), np.full(100, -np.inf)):
        assert np.flatnonzero(nms(boxes, scores, 0.3)).tolist() == [0]
    zeros = np.where(np.arange(100) % 2, 0.0, -0.0)
    assert np.flatnonzero(nms(boxes, zeros, 0.3)).tolist() == [0]


def test_a_box_that_is_not_valid_neither_stays_nor_drops_others():
    boxes = np.tile([0.0, 0, 5, 5], (3, 1))
    scores = np.array([3.0, 2, 1])
    valid = np.array([False, True, True])
    assert nms(boxes, scores, 0.3, valid).tolist() == [False, True, False]
    assert not nms(boxes, scores, 0.3, np.zeros(3, bool)).any()
    not_numbers = jnp.array([jnp.nan, 2, -jnp.inf])
    traced = jax.jit(nms)(boxes, not_numbers, 0.3)
    assert traced.tolist() == [False, True, False]


def test_classes_suppress_by_themselves():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(90, 3)).astype(np.float32)
    valid = rng.random((90, 3)) < 0.8
    shared, own = any_boxes(rng, 90), any_boxes(rng, 270).reshape(90, 3, 4)
    for boxes, each, axis in (
        (shared, [shared] * 3, None),
        (own, own.swapaxes(0, 1), 1),
    ):
        for mask, mask_axis in ((None, None), (valid, 1), (valid[:, 0], None)):
            found = nms_per_class(boxes, scores, 0.3, mask)
            for c in range(3):
                chosen = mask if mask_axis is None else mask[:, c]
                expected = greedy(each[c], scores[:, c], 0.3, chosen)
                np.testing.assert_array_equal(found[:, c], expected)
        mapped = jax.vmap(nms, (axis, 1, None), out_axes=1)
        expected = nms_per_class(boxes, scores, 0.3)
        np.testing.assert_array_equal(mapped(boxes, scores, 0.3), expected)


def test_no_boxes_and_no_classes_give_empty_answers():
    assert nms(np.zeros((0, 4)), np.zeros(0), 0.3).shape == (0,)
    assert nms_per_class(np.zeros((0, 4)), np.zeros((0, 2)), 0.3).shape == (0, 2)
    assert nms_per_class(np.ones((5, 4)), np.zeros((5, 0)), 0.3).shape == (5, 0)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_encoding_and_decoding_are_inverse(convert):
    rng = np.random.default_rng(0)
    boxes, targets = convert(any_boxes(rng, 100)), convert(any_boxes(rng, 100))
    tolerance = {"atol": 1e-10} if convert is np.asarray else {"atol": 1e-3}
    deltas = encode_boxes(boxes, targets)
    np.testing.assert_allclose(decode_boxes(boxes, deltas), targets, **tolerance)
    again = encode_boxes(boxes, decode_boxes(boxes, deltas))
    np.testing.assert_allclose(again, deltas, rtol=1e-4, atol=1e-4)


def test_deltas_are_those_of_the_formula():
    # Height 10, width 20, centre (5, 10); target of height 20, width 5, centre (20, 8).
    deltas = encode_boxes([[0.0, 0, 10, 20]], [[10.0, 5.5, 30, 10.5]])
    expected = [[15 / 10, -2 / 20, np.log(2), np.log(1 / 4)]]
    np.testing.assert_allclose(deltas, expected)
    np.testing.assert_array_equal(
        decode_boxes([[3.0, 4, 5, 6]], np.zeros((1, 4))), [[3, 4, 5, 6]]
    )


BOX = np.array([[0.0, 0, 4, 4], [1, 1, 5, 5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iou(BOX[0], BOX), r"boxes must be float \[N, 4\] .* shape \(4,\)"),
        (lambda: iou(BOX, BOX[:, :3]), r"others must be .* got shape \(2, 3\)"),
        (lambda: iou(BOX * np.nan, BOX), r"boxes\[0\] is not finite"),
        (lambda: clip_boxes(jnp.asarray(BOX) / 0, 4, 4), r"boxes\[0\] is not finite"),
        (lambda: encode_boxes(BOX, BOX[:1]), "are 2 boxes but 1 targets"),
        (lambda: encode_boxes(BOX, BOX[:, [2, 1, 0, 3]]), r"targets\[0\] is empty"),
        (lambda: decode_boxes(BOX * [[1], [0]], BOX), r"boxes\[1\] is empty: \[0"),
        (lambda: decode_boxes(BOX, BOX[:, :2]), r"deltas must be .*differences"),
        (lambda: nms(BOX, [1.0], 0.3), r"got \(2, 4\) and \(1,\)"),
        (lambda: nms(BOX, np.ones((2, 1)), 0.3), r"got \(2, 4\) and \(2, 1\)"),
        (lambda: nms_per_class(BOX, [1.0, 2], 0.3), r"got \(2, 4\) and \(2,\)"),
        (lambda: nms(BOX, [1.0, np.nan], 0.3), r"NaN, first at \(1,\)"),
        (lambda: nms(BOX / [[1], [0]], [1.0, 2], 0.3), r"boxes\[1\] is not finite"),
        (lambda: nms(BOX, [1.0, 2], 30), "IoU from 0 to 1, got 30"),
        (lambda: nms(BOX, [1.0, 2], 0.3, np.ones(3, bool)), r"\(2,\).*got \(3,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_arguments_that_make_no_sense_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mask_of_numbers_is_an_error():
    with pytest.raises(TypeError, match="valid must be bool, got int32"):
        nms(BOX, [1.0, 2], 0.3, np.array([0, 1], np.int32))
