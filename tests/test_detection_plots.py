"""Pictures of a detector: what is drawn is where it should be, and inside."""

from typing import Any

import cv2
import numpy as np
import pytest

from sppnet_jax.detection import pictures as detection_plots
from sppnet_jax.detection.pictures import (
    Curve,
    Shown,
    draw_detections,
    plot_detections,
    plot_precision_recall,
    plot_times,
    save_image,
)
from tests.data_helpers import picture

NAMES = ["cat", "diningtable", "a class with quite a long name", "ワニ $x_"]


def some_detections(height: int, width: int, count: int = 12, seed: int = 0) -> Shown:
    """Boxes in and over the border of an image, some objects without a detection."""
    rng = np.random.default_rng(seed)
    middles = rng.uniform(-0.1, 1.1, (count, 2)) * [height, width]
    sizes = rng.uniform(0.1, 0.5, (count, 2)) * [height, width]
    boxes = np.concatenate([middles - sizes, middles + sizes], axis=1)
    return Shown(
        picture(height, width, seed),
        boxes,
        rng.integers(0, len(NAMES), count),
        rng.normal(size=count),
        boxes[::2] + 3,
        rng.integers(0, len(NAMES), len(boxes[::2])),
        rng.random(len(boxes[::2])) < 0.5,
    )


def spy_on_labels(monkeypatch: Any) -> list[tuple[Any, tuple[int, int]]]:
    """Collects each label's rectangle and the (width, height) of its image."""
    seen = []
    place = detection_plots._place

    def spy(rectangle: Any, wide: int, high: int, size: Any, taken: Any) -> Any:
        found = place(rectangle, wide, high, size, taken)
        seen.append((found, size))
        return found

    monkeypatch.setattr(detection_plots, "_place", spy)
    return seen


def changed(image: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return (image != drawn).any(axis=-1)


def test_a_box_is_drawn_along_its_outermost_pixels() -> None:
    image = np.full((200, 300, 3), 128, np.uint8)
    box = np.array([[40.0, 60.0, 150.0, 220.0]])
    drawn = draw_detections(image, box, np.array([0]), np.array([0.5]), NAMES)
    frame = changed(image, drawn)
    # One pixel wide at this size; the label lies above.
    expected = np.zeros((200, 300), bool)
    expected[40:150, 60:220] = True
    expected[41:149, 61:219] = False
    np.testing.assert_array_equal(frame[40:], expected[40:])
    assert frame[:40].any()
    assert not frame[:, :60].any()
    assert (image == 128).all()


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 60, 80),
        (-30, -20, 90, 100),
        (59, 79, 60, 80),
        (10, 10, 10, 10),
        (70, 90, 80, 99),
        (-9, -9, -5, -5),
        (20.4, 30.2, 20.6, 30.3),
    ],
)
def test_boxes_at_and_beyond_the_border_are_drawn(box: tuple[float, ...]) -> None:
    image = np.full((60, 80, 3), 128, np.uint8)
    boxes = np.array([box], float)
    drawn = draw_detections(image, boxes, np.array([1]), np.array([-0.5]), NAMES)
    assert drawn.shape == image.shape
    assert changed(image, drawn).any()
    shown = Shown(image, boxes, [1], [0.5], boxes, [0], [True])
    assert changed(image, detection_plots._draw(shown, NAMES)).any()


@pytest.mark.parametrize("size", [(300, 400), (48, 64), (500, 40), (3, 2)])
def test_labels_lie_inside_the_image(size: tuple[int, int], monkeypatch: Any) -> None:
    seen = spy_on_labels(monkeypatch)
    shown = some_detections(*size, count=20)
    detection_plots._draw(shown, NAMES)
    assert len(seen) >= 20 or size[1] < 40
    for (left, top, right, bottom), (width, height) in seen:
        assert 0 <= left <= right < width
        assert 0 <= top <= bottom < height


def test_labels_avoid_each_other_where_there_is_room(monkeypatch: Any) -> None:
    seen = spy_on_labels(monkeypatch)
    image = picture(300, 400)
    boxes = np.array([[100, 100, 200, 300]] * 4, float)
    draw_detections(image, boxes, np.arange(4) % 2, np.arange(4.0), NAMES)
    pixels = np.zeros((300, 400), int)
    for (left, top, right, bottom), _ in seen:
        pixels[top : bottom + 1, left : right + 1] += 1
    assert len(seen) == 4
    assert pixels.max() == 1


def test_a_name_too_long_for_the_image_keeps_its_score() -> None:
    font = detection_plots._font(12)
    text = detection_plots._fit("a rather\nlong name", " 0.71", font, 100)
    assert text.startswith("a r")
    assert text.endswith("… 0.71")
    assert font.getlength(text) <= 100
    whole = detection_plots._fit("a rather\nlong name", " 0.71", font, 400)
    assert whole == "a rather long name 0.71"
    assert detection_plots._fit("cat", " 0.71", font, 5) == ""


def test_the_truth_is_thinner_than_detections_and_named_only_if_missed(
    monkeypatch: Any,
) -> None:
    seen = spy_on_labels(monkeypatch)
    image = np.full((400, 600, 3), 128, np.uint8)
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    box = np.array([[100.0, 100.0, 300.0, 400.0]])
    solid = draw_detections(image, box, np.array([0]), np.array([0.5]), NAMES)
    dashed = detection_plots._draw(Shown(image, *none, box, [0]), NAMES)
    dotted = detection_plots._draw(Shown(image, *none, box, [0], [True]), NAMES)
    assert len(seen) == 3
    frames = [changed(image, drawn)[101:301] for drawn in (solid, dashed, dotted)]
    assert frames[0].sum() > frames[1].sum() > 0
    np.testing.assert_array_equal(frames[1], frames[2])
    assert (dashed != dotted).any()
    found = Shown(image, box + 5, [0], [0.5], box, [0])
    detection_plots._draw(found, NAMES)
    assert len(seen) == 4
    detection_plots._draw(found._replace(truth_labels=[1]), NAMES)
    assert len(seen) == 6
    # Half of either box is shared: an IoU of a third.
    far = found._replace(boxes=box + np.array([0, 150, 0, 150]))
    detection_plots._draw(far, NAMES)
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("count", "columns", "lines"), [(1, 1, 1), (3, 2, 2), (7, 3, 3), (17, 4, 5)]
)
def test_a_grid_holds_every_image_in_its_order(
    tmp_path: Any, count: int, columns: int, lines: int
) -> None:
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    shown = [
        Shown(np.full((30 + 60 * (k % 2), 40, 3), 10 * k, np.uint8), *none)
        for k in range(count)
    ]
    path = plot_detections(shown, NAMES, tmp_path / "new" / "grid.png")
    page = cv2.imread(str(path))
    height, width = page.shape[:2]
    assert 900 <= width <= 1800
    for k in range(columns * lines):
        line, column = divmod(k, columns)
        middle = height * (2 * line + 1) // (2 * lines)
        color = page[middle, width * (2 * column + 1) // (2 * columns)]
        np.testing.assert_array_equal(color, 10 * k if k < count else 255)


def test_a_grid_of_any_images_is_drawn(tmp_path: Any) -> None:
    sizes = [(60, 100), (100, 60), (9, 900), (900, 9), (1, 1), (40, 40)]
    shown = [some_detections(*size, count=5) for size in sizes]
    page = cv2.imread(str(plot_detections(shown, NAMES, tmp_path / "grid.png")))
    assert page.shape[1] <= 1800


def test_a_grid_enlarges_boxes_with_their_image(tmp_path: Any) -> None:
    image = np.full((30, 40, 3), 128, np.uint8)
    box = np.array([[10.0, 12.0, 20.0, 36.0]])
    shown = Shown(image, box, np.array([0]), np.array([0.5]))
    drawn = cv2.imread(str(plot_detections([shown], NAMES, tmp_path / "one.png")))
    tile = drawn[8 : 8 + 675, 8 : 8 + 900].astype(int)
    # 40 pixels became 900: the lower edge is at 20 · 22.5, the right at 36 · 22.5.
    columns = np.flatnonzero(abs(tile[400] - 128).max(axis=-1) > 20)
    rows = np.flatnonzero(abs(tile[:, 700] - 128).max(axis=-1) > 20)
    assert (columns.min(), columns.max()) == (270, 809)
    assert rows.max() == 449


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_a_picture_is_saved_at_its_own_size(tmp_path: Any, suffix: str) -> None:
    image = picture(37, 53)
    path = save_image(image, tmp_path / "new" / f"drawn{suffix}")
    saved = cv2.imread(str(path))[..., ::-1].astype(int)
    assert saved.shape == image.shape
    assert abs(saved - image).max() <= (0 if suffix == ".png" else 40)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(("classes", "size"), [(1, 900), (6, 900), (7, 1320)])
def test_precision_is_drawn_over_recall(tmp_path: Any, classes: int, size: int) -> None:
    recall = np.linspace(0, 0.7, 30)
    curves = [
        Curve(NAMES[k % 4], recall, 1 - recall * k / 9, 0.1 * k) for k in range(classes)
    ]
    curves[-1] = Curve("_none", np.zeros(0), np.zeros(0), None)
    drawn = cv2.imread(str(plot_precision_recall(curves, tmp_path / "curves.png")))
    assert drawn.shape[1] == size
    assert drawn.std() > 5


def test_the_eleven_points_are_the_highest_precision_from_there_on() -> None:
    axes = detection_plots.plt.figure().add_subplot()
    curve = Curve("cat", np.array([0.2, 0.2, 0.4]), np.array([1, 0.5, 0.6]), 0.4)
    detection_plots._curve(axes, curve, "C0")
    points = axes.lines[1].get_xydata()
    np.testing.assert_allclose(points[:, 0], np.arange(11) / 10)
    np.testing.assert_allclose(points[:, 1], [1, 1, 1, 0.6, 0.6, *[0] * 6])
    detection_plots.plt.close(axes.figure)


@pytest.mark.parametrize("slowest", [1.0, 14.37])
def test_a_bar_ends_at_the_sum_of_its_parts(
    tmp_path: Any, monkeypatch: Any, slowest: float
) -> None:
    kept = []
    save = detection_plots.save_figure

    def spy(figure: Any, path: Any) -> Any:
        kept.append(figure.axes[0])
        return save(figure, path)

    monkeypatch.setattr(detection_plots, "save_figure", spy)
    rows = {
        "one $scale_": {"convolution": 0.053, "fc": 0.089, "nothing": 0.0},
        "R-CNN": {"warping": 0.2, "convolution": slowest},
    }
    drawn = cv2.imread(str(plot_times(rows, tmp_path / "times.png")))
    assert drawn.shape[1] == 1350
    (axes,) = kept
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    np.testing.assert_allclose([ends[2], ends[4]], [0.142, 0.2 + slowest])
    assert axes.get_xscale() == ("log" if slowest > 10 else "linear")
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["0.142 s", "convolution 0.053, fc 0.089, nothing 0"]


def test_arguments_that_do_not_fit_are_errors(tmp_path: Any) -> None:
    image, path = picture(20, 30), tmp_path / "drawn.png"
    box, label, score = np.ones((1, 4)), np.array([0]), np.array([0.5])
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\], got float64"):
        draw_detections(image / 255, box, label, score, NAMES)
    with pytest.raises(ValueError, match="no pixels"):
        draw_detections(image[:0], box, label, score, NAMES)
    with pytest.raises(ValueError, match=r"detections must be boxes .* \(2,\)"):
        draw_detections(image, box, label, np.ones(2), NAMES)
    with pytest.raises(ValueError, match="hold class 4; there are 4 names"):
        draw_detections(image, box, label + 4, score, NAMES)
    with pytest.raises(ValueError, match="truth hold a box that is not finite"):
        plot_detections(
            [Shown(image, box, label, score, box * np.nan, label)], NAMES, path
        )
    with pytest.raises(ValueError, match="no image to draw"):
        plot_detections([], NAMES, path)
    with pytest.raises(ValueError, match="no curve to draw"):
        plot_precision_recall([], path)
    with pytest.raises(ValueError, match=r"SPP took -1.* seconds for fc"):
        plot_times({"SPP": {"fc": -1.0}}, path)
    with pytest.raises(ValueError, match="no times to draw"):
        plot_times({}, path)
    with pytest.raises(ValueError, match=r"drawn\.gif: its suffix must be one of"):
        save_image(image, path.with_suffix(".gif"))
