"""Pictures of a detector at work: what they draw is what the arrays say."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from notebooks.pictures.detection import (
    plot_agreement,
    plot_channels,
    plot_found,
    plot_proposals,
    plot_pyramid,
    plot_scenes,
    plot_scores,
    plot_windows,
)
from sppnet_jax.detection.detector import Detections
from sppnet_jax.detection.scales import boxes_to_atlas
from sppnet_jax.pyramid.geometry import Sliding, stack_geometry
from sppnet_jax.pyramid.pooling import spatial_pyramid_pool
from sppnet_jax.run.figures import COLORS
from tests.data_helpers import overlap, picture

# Stride 4; unit 0's centre is pixel 3; a unit sees 9 pixels.
GEOMETRY = stack_geometry([Sliding(5, 2, 1), Sliding(3, 2, 0)])
SIZE = (40, 60)
LEVELS = (3, 2, 1)


def some_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    starts = rng.uniform(0, 0.6, (count, 2)) * SIZE
    return np.concatenate([starts, starts + rng.uniform(8, 16, (count, 2))], axis=1)


def some_map(image, channels=5, seed=0):
    rows, columns = (GEOMETRY.map_size(side) for side in image.shape[:2])
    rng = np.random.default_rng(seed)
    return rng.random((rows, columns, channels)).astype(np.float32)


def frames(axes):
    """The boxes of the frames that were drawn, (ymin, xmin, ymax, xmax)."""
    found = [patch.get_bbox() for patch in axes.patches if isinstance(patch, Rectangle)]
    return [np.array([frame.y0, frame.x0, frame.y1, frame.x1]) for frame in found]


def dots(axes, color):
    """The (x, y) of the dots of a colour."""
    return {
        tuple(map(float, place))
        for points in axes.collections
        if np.allclose(points.get_facecolor()[0][:3], to_rgba(color)[:3])
        for place in points.get_offsets()
    }


def panels(figure):
    figure.canvas.draw()  # so that nothing goes wrong when it is shown
    return [axes for axes in figure.axes if axes.axison]


def test_proposals_are_counted_as_in_a_recall():
    proposals, objects = some_boxes(30), some_boxes(4, seed=0)[[3, 1]] + 1.5
    objects = np.concatenate([objects, [[0.0, 0.0, 2.0, 2.0]]])
    _, middle, right = panels(plot_proposals(picture(*SIZE), proposals, objects))
    overlaps = np.array([[overlap(p, o) for o in objects] for p in proposals])
    found = (overlaps.max(axis=0) >= 0.5).sum()
    assert 0 < found < 3
    assert middle.get_title() == f"{found} of 3 objects found"
    drawn = frames(middle)
    assert len(drawn) == 6
    for number in range(3):
        np.testing.assert_array_equal(drawn[2 * number], objects[number])
        best = proposals[overlaps[:, number].argmax()]
        np.testing.assert_allclose(drawn[2 * number + 1], best, rtol=1e-6)
        line = right.lines[number].get_ydata()
        expected = [overlaps[: n + 1, number].max() for n in range(30)]
        np.testing.assert_allclose(line, expected)


def test_a_channels_dot_is_its_strongest_unit_amid_what_it_sees():
    image = picture(*SIZE)
    features = some_map(image)
    strongest = np.argsort(-features.max(axis=(0, 1)))
    axes = panels(plot_channels(image, features, GEOMETRY, channels=3))
    assert len(axes) == 4
    for number, channel in enumerate(strongest[:3]):
        panel = axes[1 + number]
        assert panel.get_title() == f"channel {channel}"
        np.testing.assert_array_equal(
            panel.images[0].get_array(), features[..., channel]
        )
        peak = [float(value[0]) for value in panel.lines[0].get_data()]
        row, column = int(peak[1]), int(peak[0])
        assert features[row, column, channel] == features[..., channel].max()
        # Pixels 4r − 1 to 4r + 7: nine around 4r + 3.
        field = [4 * row - 1, 4 * column - 1, 4 * row + 8, 4 * column + 8]
        np.testing.assert_allclose(frames(axes[0])[number], field)


def test_windows_hold_the_units_whose_centres_are_in_their_boxes():
    images = [picture(*SIZE), picture(2 * SIZE[0], 2 * SIZE[1])]
    maps = [some_map(image, seed=number) for number, image in enumerate(images)]
    boxes = some_boxes(7)
    sizes = [image.shape[:2] for image in images]
    windows = boxes_to_atlas(boxes, SIZE, sizes, GEOMETRY, area=20.0**2)
    figure = plot_windows(images, maps, boxes, windows, SIZE, GEOMETRY)
    axes = panels(figure)
    on_larger = windows[:, 0] >= len(maps[0])
    assert 0 < on_larger.sum() < 7
    for number, box in enumerate(boxes):
        scale = int(on_larger[number])
        at_scale = box * (1 + scale)
        assert any(np.allclose(at_scale, frame) for frame in frames(axes[scale]))
        rows, columns = maps[scale].shape[:2]
        inside = {
            (4.0 * column + 3.5, 4.0 * row + 3.5)
            for row in range(rows)
            for column in range(columns)
            if at_scale[0] < 4 * row + 3 < at_scale[2]
            and at_scale[1] < 4 * column + 3 < at_scale[3]
        }
        assert inside
        assert dots(axes[scale], COLORS[number]) == inside
    below = [frame for axes_below in axes[2:] for frame in frames(axes_below)]
    assert len(below) == 7
    for axes_below, features in zip(axes[2:], maps, strict=True):
        shown = axes_below.images[0].get_array()
        np.testing.assert_array_equal(shown, features.mean(axis=2))
        for frame in frames(axes_below):
            assert (frame[:2] >= 0).all()
            assert (frame[2:] <= features.shape[:2]).all()


def test_the_vector_of_a_window_is_that_of_the_cropped_map():
    features = some_map(picture(*SIZE), channels=4)
    axes = panels(plot_pyramid(features, np.array([2, 3, 8, 10]), LEVELS))
    expected = np.asarray(spatial_pyramid_pool(features[2:8, 3:10], LEVELS))
    cells, *levels, vector = axes
    np.testing.assert_array_equal(vector.images[0].get_array(), expected)
    assert "14 bins × 4 channels = 56 numbers" in vector.get_title()
    shown = cells.images[0].get_array()
    np.testing.assert_array_equal(shown, features[2:8, 3:10].mean(axis=2))
    start = 0
    for level, panel in zip(LEVELS, levels, strict=True):
        bins = expected[start : start + level * level].mean(axis=1)
        shown = panel.images[0].get_array()
        np.testing.assert_allclose(shown, bins.reshape(level, level), rtol=1e-6)
        start += level * level


@pytest.mark.parametrize("change", [0.0, 0.25])
def test_the_largest_difference_is_told(change):
    first = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    second = first.copy()
    second[3, 2] += change
    (axes,) = panels(plot_agreement(first, second, ("one", "other")))
    assert axes.get_title() == f"30 values, largest difference {change:.2g}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("one", "other")


def test_a_pixel_has_the_best_score_of_the_boxes_around_it():
    boxes = np.round(some_boxes(6))
    scores = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    names = ["a", "b", "c"]
    axes = panels(plot_scores(picture(*SIZE), boxes, scores, names, classes=2))
    order = np.argsort(-scores.max(axis=0))[:2]
    for panel, label in zip(axes, order, strict=False):
        assert (
            panel.get_title() == f"{names[label]}: at best {scores[:, label].max():.2f}"
        )
        heat = np.ma.filled(panel.images[1].get_array(), np.nan)
        for y, x in [(0, 0), (12, 20), (20, 33), (25, 15), (39, 59)]:
            around = [
                scores[k, label]
                for k, (ymin, xmin, ymax, xmax) in enumerate(boxes)
                if ymin <= y < ymax and xmin <= x < xmax
            ]
            np.testing.assert_array_equal(heat[y, x], max(around, default=np.nan))
        best = boxes[scores[:, label].argmax()]
        np.testing.assert_array_equal(frames(panel)[0], best)


def some_found(count):
    scores = np.sort(np.random.default_rng(2).normal(size=count))[::-1]
    return Detections(some_boxes(count), np.arange(count) % 3, scores)


def test_steps_are_beside_each_other_with_what_they_overlap():
    few, many = some_found(3), some_found(20)
    objects = few.boxes[:2] + 1.0
    steps = {"many": many, "few": few}
    left, right = panels(plot_found(picture(*SIZE), steps, ["x", "$y_", "z"], objects))
    expected = np.mean([max(overlap(b, o) for o in objects) for b in few.boxes])
    assert right.get_title() == (
        f"few: 3 boxes\nmean IoU with their objects {expected:.2f}"
    )
    assert len(frames(left)) == 22
    assert len(frames(right)) == 5
    assert len(left.texts) == 0
    told = {text.get_text() for text in right.texts}
    names = ["x", "$y_", "z"]
    assert told == {f"{n} {s:.1f}" for n, s in zip(names, few.scores, strict=True)}


def test_nothing_found_is_drawn_too():
    none = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    (axes,) = panels(
        plot_found(picture(*SIZE), {"nothing": none}, ["x"], some_boxes(2))
    )
    assert axes.get_title() == "nothing: 0 boxes"


def test_each_scene_has_its_own_boxes():
    images = [picture(*SIZE), picture(80, 50)]
    found, objects = [some_found(2), some_found(4)], [some_boxes(1), np.zeros((0, 4))]
    axes = panels(plot_scenes(images, found, objects, ["x", "y", "z"]))
    for panel, image, one, truth in zip(axes, images, found, objects, strict=True):
        np.testing.assert_array_equal(panel.images[0].get_array(), image)
        np.testing.assert_allclose(frames(panel), [*truth, *one.boxes[::-1]])


IMAGE, BOXES, NONE = picture(*SIZE), some_boxes(3), np.zeros((0, 4))
MAP, WINDOW, SCORES = some_map(IMAGE), np.array([0, 0, 2, 2]), np.zeros((3, 2))
TO_SHOW = BOXES, WINDOW[None], SIZE, GEOMETRY


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (plot_proposals, (IMAGE, NONE, BOXES), "proposals must be float [N, 4]"),
        (plot_proposals, (IMAGE, BOXES, NONE), "objects must be float [N, 4]"),
        (plot_proposals, (IMAGE / 255.0, BOXES, BOXES), "image must be uint8"),
        (
            plot_channels,
            (IMAGE, MAP[1:], GEOMETRY),
            "has a map of 9×14, but the features are 8×14",
        ),
        (plot_channels, (IMAGE, MAP, GEOMETRY), "channels must be 1 to 5, got 6"),
        (plot_pyramid, (MAP[0], WINDOW, LEVELS), "features must be one map"),
        (plot_pyramid, (MAP, WINDOW * 49.5, LEVELS), "windows must be int [N, 4]"),
        (
            plot_pyramid,
            (MAP, np.array([0, 0, 99, 2]), LEVELS),
            "window 0, [0, 0, 99, 2], must",
        ),
        (plot_windows, ([IMAGE], [MAP], *TO_SHOW), "3 boxes have 1 windows"),
        (plot_windows, ([IMAGE], [MAP] * 2, *TO_SHOW), "1 images have 2 maps"),
        (plot_agreement, (SCORES, SCORES[1:], ("a", "b")), "the same shape"),
        (plot_scores, (IMAGE, BOXES, SCORES, ["x"]), "scores must be [3, 1]"),
        (plot_scores, (IMAGE, BOXES, SCORES, ["x", "y"]), "must be 1 to 2, got 4"),
        (plot_scenes, ([IMAGE] * 2, [], [BOXES] * 2, ["x"]), "got 2, 0 and 2"),
        (plot_found, (IMAGE, {}, ["x"]), "no detections to draw"),
    ],
)
def test_what_does_not_fit_is_refused(draw, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(*arguments)
