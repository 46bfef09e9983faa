"""Pictures of a detector: what is drawn is where it should be, and inside."""

import cv2
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from sppnet_jax.detection import pictures
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


def some_detections(height, width, count=12, seed=0):
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


@pytest.fixture
def figures(monkeypatch):
    """Collects what is drawn, as matplotlib holds it."""
    kept = []
    save = pictures.save_figure

    def canvas_of(figure):
        kept.append(figure)
        return FigureCanvasAgg(figure)

    def save_and_keep(figure, path):
        kept.append(figure)
        return save(figure, path)

    monkeypatch.setattr(pictures, "FigureCanvasAgg", canvas_of)
    monkeypatch.setattr(pictures, "save_figure", save_and_keep)
    return kept


def labels(axes):
    """Each label's paper, in pixels of the figure."""
    return {
        text.get_text(): text.get_bbox_patch().get_window_extent()
        for text in axes.texts
    }


def drawn_truth(path, *shown):
    return cv2.imread(str(plot_detections(shown, NAMES, path / "grid.png")))


def changed(image, drawn):
    return (image != drawn).any(axis=-1)


def test_a_box_is_drawn_along_its_outermost_pixels():
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
def test_boxes_at_and_beyond_the_border_are_drawn(box):
    image = np.full((60, 80, 3), 128, np.uint8)
    boxes = np.array([box], float)
    drawn = draw_detections(image, boxes, np.array([1]), np.array([-0.5]), NAMES)
    assert drawn.shape == image.shape
    assert changed(image, drawn).any()


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("size", [(300, 400), (48, 64), (500, 40), (3, 2), (900, 1200)])
def test_labels_lie_inside_the_image(size, figures):
    drawn = draw_detections(*some_detections(*size, count=20)[:4], NAMES)
    assert drawn.shape == (*size, 3)
    (axes,) = figures[0].axes
    assert len(axes.texts) == 20 or size[1] < 40
    for place in labels(axes).values():
        assert -0.5 <= place.x0 <= place.x1 <= size[1] + 0.5
        assert -0.5 <= place.y0 <= place.y1 <= size[0] + 0.5


def test_labels_avoid_each_other_where_there_is_room(figures):
    boxes = np.array([[100, 100, 200, 300]] * 4, float)
    draw_detections(
        picture(300, 400), boxes, np.arange(4) % 2, np.arange(4) / 10, NAMES
    )
    places = list(labels(figures[0].axes[0]).values())
    assert len(places) == 4
    for number, one in enumerate(places):
        for other in places[:number]:
            shared = Bbox.intersection(one, other)
            assert shared is None or min(shared.size) < 1


def test_letters_grow_with_the_image(figures):
    for height in (75, 300, 3000):
        scale = height / 300
        box = np.array([[150.0, 100.0, 250.0, 300.0]]) * scale
        image = np.zeros((height, height * 4 // 3, 3), np.uint8)
        draw_detections(image, box, np.array([0]), np.array([0.5]), NAMES)
    small, middle, large = (
        labels(figure.axes[0])["cat 0.50"].height for figure in figures
    )
    assert 10 < small < 20  # as small as can be read
    assert middle < 25
    assert large == pytest.approx(3000 * middle / 300, rel=0.2)


def test_a_name_too_long_for_the_image_keeps_its_score(figures):
    names = ["a rather\nlong $name"]
    for width in (100, 400, 5):
        image, box = np.zeros((60, width, 3), np.uint8), np.array([[20.0, 0, 40, 5]])
        draw_detections(image, box, np.array([0]), np.array([0.71]), names)
    short, whole, none = (list(labels(figure.axes[0])) for figure in figures)
    assert short[0].startswith("a r")
    assert short[0].endswith("… 0.71")
    assert whole == ["a rather long $name 0.71"]
    assert none == []


def test_the_truth_is_thinner_than_detections_and_named_only_if_missed(
    tmp_path, figures
):
    image = np.full((600, 900, 3), 128, np.uint8)
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    box = np.array([[150.0, 150.0, 450.0, 600.0]])
    solid, dashed, dotted = (
        np.abs(drawn_truth(tmp_path, shown)[250:].astype(int) - 128).max(axis=2) > 9
        for shown in (
            Shown(image, box, [0], [0.5]),
            Shown(image, *none, box, [0]),
            Shown(image, *none, box, [0], [True]),
        )
    )
    # The middle row of the box meets two lines, each as wide as it is drawn.
    widths = [frame[50, 100:800].sum() for frame in (solid, dashed, dotted)]
    assert widths[0] > widths[1] == widths[2] > 0
    assert [list(labels(figure.axes[0])) for figure in figures] == [
        ["cat 0.50"],
        ["cat"],
        ["cat"],
    ]
    styles = [p.get_linestyle() for f in figures[1:] for p in f.axes[0].patches]
    assert styles[0] == styles[2] == "-"  # dark, below
    assert styles[1] != styles[3]
    found = Shown(image, box + 5, [0], [0.5], box, [0])
    # Half of either box is shared: an IoU of a third.
    far = found._replace(boxes=box + np.array([0, 225, 0, 225]))
    for shown in (found, found._replace(truth_labels=[1]), far):
        drawn_truth(tmp_path, shown)
    assert [list(labels(figure.axes[0])) for figure in figures[3:]] == [
        ["cat 0.50"],
        ["cat 0.50", "diningtable"],
        ["cat 0.50", "cat"],
    ]


@pytest.mark.parametrize(
    ("count", "columns", "lines"), [(1, 1, 1), (3, 2, 2), (7, 3, 3), (17, 4, 5)]
)
def test_a_grid_holds_every_image_in_its_order(tmp_path, count, columns, lines):
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


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_grid_of_any_images_is_drawn(tmp_path):
    sizes = [(60, 100), (100, 60), (9, 900), (2500, 9), (1, 1), (40, 40)]
    page = drawn_truth(tmp_path, *(some_detections(*size, count=5) for size in sizes))
    assert page.shape[1] <= 1800


@pytest.mark.parametrize("scale", [1, 100])
def test_a_grid_scales_boxes_with_their_image(tmp_path, scale, figures):
    image = np.full((30 * scale, 40 * scale, 3), 128, np.uint8)
    box = np.array([[10.0, 12.0, 20.0, 36.0]]) * scale
    page = drawn_truth(tmp_path, Shown(image, box, np.array([0]), np.array([0.5])))
    gray = (abs(page.astype(int) - 128) < 3).all(axis=2)
    rows, columns = np.flatnonzero(gray.any(axis=1)), np.flatnonzero(gray.any(axis=0))
    top, left = rows.min(), columns.min()
    pixel = (np.ptp(columns) + 1) / 40
    # Below the label, along a row and a column inside the box: its outermost pixels.
    row, column = int(top + 17 * pixel), int(left + 33 * pixel)
    across = np.flatnonzero(~gray[row, left : columns.max()])
    down = np.flatnonzero(~gray[row : rows.max(), column]) + row - top
    edges = [across.min(), across.max() + 1, down.max() + 1]
    np.testing.assert_allclose(edges, np.multiply([12, 36, 20], pixel), atol=1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_a_picture_is_saved_at_its_own_size(tmp_path, suffix):
    image = picture(37, 53)
    path = save_image(image, tmp_path / "new" / f"drawn{suffix}")
    saved = cv2.imread(str(path))[..., ::-1].astype(int)
    assert saved.shape == image.shape
    assert abs(saved - image).max() <= (0 if suffix == ".png" else 40)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(("classes", "size"), [(1, 900), (6, 900), (7, 1320)])
def test_precision_is_drawn_over_recall(tmp_path, classes, size):
    recall = np.linspace(0, 0.7, 30)
    curves = [
        Curve(NAMES[k % 4], recall, 1 - recall * k / 9, 0.1 * k) for k in range(classes)
    ]
    curves[-1] = Curve("_none", np.zeros(0), np.zeros(0), None)
    drawn = cv2.imread(str(plot_precision_recall(curves, tmp_path / "curves.png")))
    assert drawn.shape[1] == size
    assert drawn.std() > 5


@pytest.mark.parametrize("others", [0, 8])
def test_the_eleven_points_are_the_highest_precision_from_there_on(
    tmp_path, others, figures
):
    curve = Curve("cat", np.array([0.2, 0.2, 0.4]), np.array([1, 0.5, 0.6]), 0.4)
    plot_precision_recall([curve] * (1 + others), tmp_path / "curves.png")
    line, points = (line.get_xydata() for line in figures[0].axes[0].lines)
    np.testing.assert_array_equal(line.T, curve[1:3])
    np.testing.assert_allclose(points[:, 0], np.arange(11) / 10)
    np.testing.assert_allclose(points[:, 1], [1, 1, 1, 0.6, 0.6, *[0] * 6])


@pytest.mark.parametrize("slowest", [1.0, 14.37])
def test_a_bar_ends_at_the_sum_of_its_parts(tmp_path, figures, slowest):
    rows = {
        "one $scale_": {"convolution": 0.053, "fc": 0.089, "nothing": 0.0},
        "R-CNN": {"warping": 0.2, "convolution": slowest},
    }
    drawn = cv2.imread(str(plot_times(rows, tmp_path / "times.png")))
    assert drawn.shape[1] == 1350
    (axes,) = figures[0].axes
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]
    np.testing.assert_allclose([ends[2], ends[4]], [0.142, 0.2 + slowest])
    assert axes.get_xscale() == ("log" if slowest > 10 else "linear")
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["0.142 s", "convolution 0.053, fc 0.089, nothing 0"]


def test_arguments_that_do_not_fit_are_errors(tmp_path):
    image, path = picture(20, 30), tmp_path / "drawn.png"
    box, label, score = np.ones((1, 4)), np.array([0]), np.array([0.5])
    with pytest.raises(ValueError, match=r"uint8 .*, got float64"):
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
    with pytest.raises(ValueError, match=r"drawn\.gif: its suffix must be"):
        save_image(image, path.with_suffix(".gif"))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_thousands_of_boxes_are_the_best_few_hundred(figures, caplog, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_BOXES", 20)
    caplog.set_level("INFO")
    shown = some_detections(40, 50, count=21)
    boxes, numbers, scores = shown.boxes, shown.labels, shown.scores
    best = np.argsort(-scores)[:-1]
    drawn = draw_detections(shown.image, boxes, numbers, scores, NAMES)
    assert "best 20 of an image's 21 detections" in caplog.text
    caplog.clear()
    of_best = boxes[best], numbers[best], scores[best]
    fewer = draw_detections(shown.image, *of_best, NAMES)
    assert not caplog.messages
    np.testing.assert_array_equal(drawn, fewer)


def test_a_name_of_any_length_can_be_saved(tmp_path):
    for stem in ("熊" * 84, "x" * 251):
        path = save_image(picture(8, 9), tmp_path / f"{stem}_detections.jpg")
        assert path.suffix == ".jpg"
        assert len(path.name.encode()) <= 255
