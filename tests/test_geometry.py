"""Boxes to windows, against a search over all receptive-field centres."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax.network.trunks import BACKBONES, PAPER

RULES = ["paper", "closest"]


def search_span(low, high, geometry, size, rule):
    """First and last unit of one side, by looking at every centre; exact numbers."""
    reach = 150  # units beyond the map on either side: further than any box here
    centers = {
        k: geometry.stride * k + geometry.center for k in range(-reach, size + reach)
    }
    if rule == "paper":
        chosen = [k for k, center in centers.items() if low < center < high]
    else:
        # Of two centres equally close, the one further inside the box.
        first = min(centers, key=lambda k: (abs(centers[k] - low), -k))
        last = min(centers, key=lambda k: (abs(centers[k] - high), k))
        chosen = list(range(first, last + 1))
    if not chosen:
        middle = (low + high) / 2
        chosen = [min(centers, key=lambda k: (abs(centers[k] - middle), k))]
    return [min(max(k, 0), size - 1) for k in (chosen[0], chosen[-1])]


def search(boxes, geometry, map_size, scales, rule):
    windows = []
    for box, scale in zip(boxes, scales, strict=True):
        y0, x0, y1, x1 = (Fraction(float(edge)) * scale for edge in box)
        top, bottom = search_span(y0, y1, geometry, map_size[0], rule)
        left, right = search_span(x0, x1, geometry, map_size[1], rule)
        windows.append((top, left, bottom + 1, right + 1))
    return np.array(windows)


def some_boxes(kind, stride, center, seed=0):
    """150 boxes in and around an image of 600×800 pixels."""
    random = np.random.default_rng(seed)
    size = np.array([600, 800])
    corners = np.sort(random.uniform(0, size, (150, 2, 2)), axis=1)
    if kind == "on centres":
        corners = np.round((corners - center) / stride) * stride + center
    elif kind == "on multiples of the stride":
        corners = np.round(corners / stride) * stride
    elif kind == "halfway":
        corners = np.round(corners / stride) * stride + center + stride / 2
    elif kind == "tiny":
        corners[:, 1] = corners[:, 0] + random.uniform(0, stride / 2, (150, 2))
    elif kind == "around the image":
        corners += random.choice([-1, 0, 1], (150, 1, 2)) * size
    elif kind == "inverted":
        corners = corners[:, ::-1]
    return corners.reshape(150, 4)


KINDS = [
    "random",
    "on centres",
    "on multiples of the stride",
    "halfway",
    "tiny",
    "around the image",
    "inverted",
]


@pytest.mark.parametrize("name", [*PAPER, "vgg16", "resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("rule", RULES)
def test_windows_equal_a_search_over_all_centres(name, rule):
    geometry = sn.backbone_geometry(name)
    map_size = geometry.map_size(600), geometry.map_size(800)
    boxes = np.concatenate(
        [some_boxes(kind, geometry.stride, geometry.center)[:40] for kind in KINDS]
    )
    expected = search(boxes, geometry, map_size, [1] * len(boxes), rule)
    windows = sn.boxes_to_windows(boxes, geometry, map_size, rule=rule)
    assert isinstance(windows, np.ndarray)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["zf5", "overfeat5"])
def test_numpy_and_jit_agree_with_exact_numbers_under_rounded_scales(name, rule):
    """Whole pixels times a ratio of sizes: many edges fall on a centre exactly."""
    geometry = sn.backbone_geometry(name)
    map_size = geometry.map_size(1200), geometry.map_size(1600)
    random = np.random.default_rng(0)
    boxes = np.sort(random.integers(0, 500, (200, 2, 2)), axis=1).reshape(200, 4)
    sides = random.choice([300, 333, 344, 375, 400, 500], 200)
    targets = random.choice([480, 576, 688, 864, 1200], 200)
    scales = [Fraction(int(t), int(s)) for t, s in zip(targets, sides, strict=True)]
    expected = search(boxes, geometry, map_size, scales, rule)
    boxes, scale = boxes.astype(float), targets / sides
    in_numpy = sn.boxes_to_windows(boxes, geometry, map_size, scale, rule)
    np.testing.assert_array_equal(in_numpy, expected)
    convert = jax.jit(
        lambda boxes, size, scale: sn.boxes_to_windows(
            boxes, geometry, size, scale, rule
        )
    )
    in_jax = convert(boxes, map_size, scale)
    assert in_jax.dtype == jnp.int32
    np.testing.assert_array_equal(in_jax, expected)


@pytest.mark.parametrize("rule", RULES)
def test_windows_are_never_empty_and_never_leave_the_map(rule):
    random = np.random.default_rng(0)
    boxes = random.normal(0, 1, (500, 4)) * 10.0 ** random.uniform(-3, 12, (500, 1))
    geometry = sn.backbone_geometry("zf5")
    for map_size in [(1, 1), (4, 30)]:
        for array in (boxes, jnp.asarray(boxes)):
            windows = sn.boxes_to_windows(array, geometry, map_size, 1.7, rule)
            starts, stops = np.split(np.asarray(windows), 2, axis=1)
            assert (starts >= 0).all()
            assert (stops <= map_size).all()
            assert (starts < stops).all()


def test_the_paper_s_formula_where_a_window_is_not_empty():
    geometry = sn.backbone_geometry("convnet5")
    box = np.array([[100.0, 50.0, 300.0, 400.0]])
    top, left = (math.floor((x * 1.5 - 15) / 16) + 1 for x in box[0, :2])
    last_row, last_column = (math.ceil((x * 1.5 - 15) / 16) - 1 for x in box[0, 2:])
    windows = sn.boxes_to_windows(box, geometry, (43, 58), scale=1.5)
    assert windows.tolist() == [[top, left, last_row + 1, last_column + 1]]


def test_the_whole_image_is_the_whole_map():
    for name in BACKBONES:
        if name.startswith("resnet"):
            continue  # the centre of its first unit lies on the image's edge
        geometry = sn.backbone_geometry(name)
        for side in range(200, 260):
            size = geometry.map_size(side)
            window = sn.boxes_to_windows([[0, 0, side, side]], geometry, (size, size))
            assert window.tolist() == [[0, 0, size, size]], (name, side)


@pytest.mark.parametrize(
    ("name", "box", "window"),
    [
        # Centres of zf5 lie at 14, 30, 46, …: strictly inside means strictly.
        ("zf5", (14, 14, 46, 46), (1, 1, 2, 2)),
        ("zf5", (13, 13, 47, 47), (0, 0, 3, 3)),
        ("zf5", (15, 15, 29, 21), (0, 0, 1, 1)),
        ("zf5", (15, 24, 29, 29), (0, 1, 1, 2)),
        ("overfeat5", (8, 20, 33, 32), (1, 1, 3, 2)),
    ],
)
def test_cells_worked_by_hand(name, box, window):
    geometry = sn.backbone_geometry(name)
    assert sn.boxes_to_windows([box], geometry, (9, 9)).tolist() == [list(window)]


@pytest.mark.parametrize("rule", RULES)
def test_no_boxes_give_no_windows(rule):
    geometry = sn.backbone_geometry("zf5")
    for boxes in (np.zeros((0, 4)), jnp.zeros((0, 4))):
        windows = sn.boxes_to_windows(boxes, geometry, (5, 5), rule=rule)
        assert windows.shape == (0, 4)
        assert windows.dtype == np.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "round"}, "unknown rule 'round': use 'paper' or 'closest'"),
        ({"boxes": np.zeros(4)}, r"float \[N, 4\].*got shape \(4,\)"),
        ({"boxes": np.zeros((2, 5))}, r"got shape \(2, 5\)"),
        ({"boxes": [[0, 0, 9, np.nan]]}, "box 0 is not finite"),
        ({"scale": np.ones(3)}, r"each of the 1 boxes, got shape \(3,\)"),
        ({"scale": 0}, "scale must be above 0, got 0"),
        ({"map_size": (5, 0)}, r"at least 1×1, got \[5, 0\]"),
        ({"map_size": (5, 5, 5)}, r"\(rows, columns\), got shape \(3,\)"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_seen(arguments, message):
    call = {"boxes": [[0, 0, 9, 9]], "map_size": (5, 5)} | arguments
    with pytest.raises(ValueError, match=message):
        sn.boxes_to_windows(geometry=sn.backbone_geometry("zf5"), **call)
