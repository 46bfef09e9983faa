"""Boxes go to the scale and the cells that a search over all of them finds."""

import numpy as np
import pytest
from test_geometry import search_span

from sppnet_jax.detection.scales import (
    atlas_size,
    boxes_to_atlas,
    choose_scales,
    scale_factors,
    share_windows,
    stack_maps,
)
from sppnet_jax.network.stack import table_geometry
from sppnet_jax.network.trunks import get_backbone

GEOMETRY = table_geometry(get_backbone("zf5").layers)
IMAGE = (120, 170)
SIZES = ((96, 136), (141, 200), (240, 340))


def random_boxes(count, seed=0):
    """Boxes of all sizes in, across and outside of the border of the image."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-0.2, 1.2, (count, 2)) * IMAGE
    halves = np.exp(rng.uniform(np.log(0.3), np.log(150), (count, 2)))
    return np.concatenate([centres - halves, centres + halves], axis=1)


def scale_of(box, sizes, area):
    """The scale of a box, one comparison after the other."""
    best, least = 0, float("inf")
    for number, size in enumerate(sizes):
        rows = (box[2] - box[0]) * size[0] / IMAGE[0]
        columns = (box[3] - box[1]) * size[1] / IMAGE[1]
        if abs(rows * columns - area) < least:
            best, least = number, abs(rows * columns - area)
    return best


@pytest.mark.parametrize("area", [64.0**2, 100.0**2])
def test_each_box_goes_to_the_scale_where_its_area_is_closest(area):
    boxes = random_boxes(300)
    found = choose_scales(boxes, scale_factors(IMAGE, SIZES), area)
    assert found.tolist() == [scale_of(box, SIZES, area) for box in boxes]
    assert set(found) == {0, 1, 2}


def test_of_two_scales_equally_close_the_first_is_taken():
    factors = np.array([[1.0, 1.0], [1.0, 3.0]])
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    assert choose_scales(box, factors, 200.0).tolist() == [0]
    assert choose_scales(box, factors[::-1], 200.0).tolist() == [0]


def test_rows_and_columns_have_factors_of_their_own():
    """A needle of an image is squeezed to 4:1."""
    factors = scale_factors((50, 500), [(100, 400)])
    np.testing.assert_allclose(factors, [[2.0, 0.8]])


@pytest.mark.parametrize("rule", ["paper", "closest"])
@pytest.mark.parametrize("sizes", [SIZES, SIZES[:1], SIZES[::-1]])
def test_a_window_is_the_one_that_a_search_over_the_centres_finds(rule, sizes):
    boxes = random_boxes(400, seed=1)
    found = boxes_to_atlas(boxes, IMAGE, sizes, GEOMETRY, area=64.0**2, rule=rule)
    assert found.dtype == np.int32
    for box, window in zip(boxes, found, strict=True):
        scale = scale_of(box, sizes, 64.0**2)
        (height, width), top = sizes[scale], 0
        for size in sizes[:scale]:
            top += GEOMETRY.map_size(size[0])
        y = height / IMAGE[0]
        x = width / IMAGE[1]
        rows = search_span(
            box[0] * y, box[2] * y, GEOMETRY, GEOMETRY.map_size(height), rule
        )
        columns = search_span(
            box[1] * x, box[3] * x, GEOMETRY, GEOMETRY.map_size(width), rule
        )
        expected = [top + rows[0], columns[0], top + rows[1] + 1, columns[1] + 1]
        assert window.tolist() == expected, (box, scale)


def test_no_boxes_have_no_windows():
    none = boxes_to_atlas(np.zeros((0, 4)), IMAGE, SIZES, GEOMETRY, area=64.0**2)
    assert none.shape == (0, 4)
    distinct, which = share_windows(none)
    assert distinct.shape == (0, 4)
    assert which.shape == (0,)


def test_windows_of_the_same_cells_are_shared_and_given_back():
    windows = np.random.default_rng(0).integers(0, 3, (200, 4), np.int32)
    distinct, which = share_windows(windows)
    assert len(distinct) == len({tuple(window) for window in windows.tolist()}) < 81 + 1
    np.testing.assert_array_equal(distinct[which], windows)
    assert len({tuple(window) for window in distinct.tolist()}) == len(distinct)


def test_maps_are_stacked_from_the_top_left_of_zeros():
    rng = np.random.default_rng(0)
    maps = [rng.random((*size, 2)).astype(np.float16) for size in ((2, 5), (3, 4))]
    assert atlas_size([one.shape[:2] for one in maps]) == (5, 5)
    atlas = stack_maps(maps, (7, 6))
    expected = np.zeros((7, 6, 2), np.float32)
    for row in range(2):
        for column in range(5):
            expected[row, column] = maps[0][row, column]
    for row in range(3):
        for column in range(4):
            expected[2 + row, column] = maps[1][row, column]
    np.testing.assert_array_equal(atlas, expected)
    assert atlas.dtype == np.float32
