"""What all pictures share."""

import subprocess
import sys

import cv2
import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from sppnet_jax.run import figures
from sppnet_jax.run.figures import COLORS, color_of, draw_label, panels, save_figure
from sppnet_jax.run.figures import show_image as show


def test_no_picture_of_the_package_needs_pyplot(tmp_path):
    """It would keep every figure, and choose a screen to show them on."""
    code = (
        "import sys; sys.modules['matplotlib.pyplot'] = None\n"
        "from pathlib import Path; import numpy as np\n"
        "from sppnet_jax.classification.pictures import Prediction, plot_predictions\n"
        "from sppnet_jax.detection.pictures import plot_times\n"
        "import sppnet_jax.training.curves, notebooks.pictures.detection\n"
        "import notebooks.pictures.buckets, notebooks.pictures.levels\n"
        "image = np.zeros((5, 9, 3), np.uint8)\n"
        "plot_predictions([Prediction(image, 'a', 1.0, 'b')], Path(sys.argv[1]))\n"
    )
    path = tmp_path / "drawn.png"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert cv2.imread(str(path)).shape[1] == 240


def test_a_figure_of_pyplot_is_closed_once_written(tmp_path):
    figure = matplotlib.pyplot.figure(figsize=(2, 1))
    assert matplotlib.pyplot.fignum_exists(figure.number)
    path = save_figure(figure, tmp_path / "new" / "drawn.png")
    assert not matplotlib.pyplot.fignum_exists(figure.number)
    assert cv2.imread(str(path)).shape == (150, 300, 3)


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".pdf", ""])
def test_a_figure_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    starts = {".png": b"\x89PNG", ".JPG": b"\xff\xd8", ".pdf": b"%PDF", "": b"\x89PNG"}
    path = save_figure(Figure((1, 1)), tmp_path / f"drawn{suffix}")
    assert path.read_bytes().startswith(starts[suffix])


def test_a_figure_that_can_not_be_written_leaves_nothing(tmp_path):
    path = tmp_path / "drawn.png"
    path.write_text("an earlier one")
    figure = Figure()
    figure.add_subplot().set_title("$\\wrong$")
    with pytest.raises(ValueError, match="wrong"):
        save_figure(figure, path)
    with pytest.raises(ValueError, match="xyz"):
        save_figure(Figure(), path.with_suffix(".xyz"))
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]


def test_colours_are_distinct_and_begin_again():
    assert len(set(COLORS)) == len(COLORS) == 20
    assert color_of(np.int64(21)) == color_of(1) == COLORS[1]


def test_pixel_k_lies_between_k_and_k_plus_1():
    figure, (axes,) = panels(1, 1, 0.5)
    image = np.zeros((10, 20, 3), np.uint8)
    image[4, 7] = 255
    show(axes, image, "$_<")
    axes.axis("off")
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())
    inside = axes.transData.transform([[7.1, 4.9], [7.9, 4.1]])
    (left, low), (right, high) = inside
    top, bottom = len(drawn) - high, len(drawn) - low
    assert (drawn[round(top) : round(bottom), round(left) : round(right)] == 255).all()


@pytest.mark.parametrize("dpi", [50, 200])
@pytest.mark.parametrize(
    ("box", "place"),
    [((50, 20, 80, 180), "above"), ((3, 20, 80, 180), "below its edge")],
)
def test_a_label_has_its_box_s_left_side_in_any_resolution(box, place, dpi):
    figure, (axes,) = panels(1, 1, 0.5, width=6.0)
    show(axes, np.zeros((100, 200, 3), np.uint8))
    figure.draw_without_rendering()
    draw_label(axes, np.array(box, float), "a", "#ffe119", [], value="1")
    figure.set_dpi(dpi)
    figure.canvas.draw()
    paper = axes.texts[0].get_bbox_patch().get_window_extent()
    (left, low), (_, high) = axes.transData.inverted().transform(paper)
    assert left == pytest.approx(20, abs=1)
    assert (low if place == "above" else high) == pytest.approx(box[0], abs=1)
    assert axes.texts[0].get_text() == "a 1"


def test_letters_that_the_usual_font_lacks_are_drawn_in_one_that_has_them(
    recwarn, caplog
):
    """U+E000, of private use, is in a font that comes with matplotlib."""
    usual = figures.font_of("traffic_light $5")
    assert figures.font_of("Bär") == usual
    found = figures.font_of("a \ue000")
    assert found[: len(usual)] == usual
    (other,) = found[len(usual) :]
    path = font_manager.findfont(other)
    assert 0xE000 in FT2Font(path).get_charmap()
    figures._tell_boxes.cache_clear()
    for text in ("\U000f1234", "\U000f1235"):  # in none
        assert figures.font_of(text) == usual
    assert len([line for line in caplog.messages if "boxes are drawn" in line]) == 1
    figure, (axes,) = figures.panels(1, 1, 1.0)
    figures.show_image(axes, np.zeros((9, 9, 3), np.uint8), "a \ue000 \U000f1234")
    figure.canvas.draw()


@pytest.mark.parametrize(
    "name", ["Ünïcode" * 40, "a/b" * 99, " \n ", "$", "x" * 255, "ワ" * 85]
)
def test_a_name_is_in_one_line_and_short_enough(name):
    short = figures.shortened(name, 20)
    assert len(short) <= 20
    assert len(short.splitlines()) <= 1
    assert " ".join(name.split()).startswith(short.removesuffix("…"))


def test_a_picture_shows_so_many_panels_at_most_and_says_so(caplog):
    caplog.set_level("INFO")
    assert figures.some_of(range(64), "images") == range(64)
    assert not caplog.messages
    assert figures.some_of(range(2000), "images") == range(64)
    assert caplog.messages == ["the picture shows the first 64 of 2000 images"]
