"""What all pictures share: colours, panels, images, boxes with labels, and files.

Figures are matplotlib's own, never pyplot's, which keeps them.
Boxes are half-open (ymin, xmin, ymax, xmax) in pixels of the image that they lie on.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from sppnet_jax.run.files import whole_file

log = logging.getLogger(__name__)
_Item = TypeVar("_Item")

# `font_of` says once what matplotlib says of each letter each time.
warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)

# As far from each other as 20 colours can be, those that can be read on white first.
COLORS = (
    *("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#aa6e28"),
    *("#808000", "#f032e6", "#00a2ff", "#800000", "#000080", "#ffe119", "#46f0f0"),
    *("#d2f53c", "#fabebe", "#e6beff", "#fffac8", "#aaffc3", "#ffd7b4"),
)
DARK = "#202020"
DPI = 150  # of files
TITLE, SMALL = 9, 7  # points
MOST = 64  # panels in a picture


def color_of(number: Any) -> str:
    """The colour of the class, level or bucket of a number; beyond 20 they repeat."""
    return COLORS[int(number) % len(COLORS)]


def panels(
    count: int, columns: int, ratio: float, *, width: float = 9.0, title: float = 0.35
) -> tuple[Figure, np.ndarray]:
    """A figure of panels for images, and their axes [count], line by line.

    `ratio`: height by width of the images; very long ones get smaller panels. `width`:
    of the figure, `title`: what a panel is higher than its image, in inches.
    """
    lines = -(-count // columns)
    high = width / columns * float(np.clip(ratio, 0.4, 2.0)) + title
    figure = Figure(figsize=(width, lines * high), layout="constrained")
    FigureCanvasAgg(figure)  # keeps what measures labels
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for empty in axes[count:]:
        empty.axis("off")
    return figure, axes[:count]


def show_image(axes: Axes, image: np.ndarray, title: str = "", **style: Any) -> None:
    """Shows an image [height, width, …]; pixel k goes from k to k + 1, as boxes count.

    `style`: of matplotlib's `imshow`.
    """
    height, width = image.shape[:2]
    axes.imshow(image, **{"extent": (0, width, height, 0), **style})
    axes.autoscale(False)
    axes.set(xticks=[], yticks=[])
    style = {"fontsize": TITLE, "fontfamily": font_of(title)}
    axes.set_title(title, parse_math=False, **style)


def some_of(items: Sequence[_Item], what: str) -> Sequence[_Item]:
    """The first `MOST` of what is to be drawn; the log says so where there are more.

    Thousands of panels would take minutes and gigabytes.
    """
    if len(items) > MOST:
        log.info("the picture shows the first %d of %d %s", MOST, len(items), what)
    return items[:MOST]


def shortened(name: str, most: int) -> str:
    """A name in one line of at most so many letters, with … where it goes on."""
    name = " ".join(name.split())
    return name if len(name) <= most else f"{name[: most - 1]}…"


def font_of(text: str) -> list[str]:
    """The families of fonts to draw a text with: the usual, and others of this system.

    These have letters that the usual one lacks. Where no font has them, the log says
    so, and they are boxes.
    """
    usual = list(matplotlib.rcParams["font.family"])
    if text.isascii():
        return usual
    known = _letters_of(font_manager.findfont(FontProperties(family=usual)))
    lacking = frozenset(text) - known - set("\n")
    return usual + _families_with(lacking) if lacking else usual


@functools.cache
def _families_with(letters: frozenset[str]) -> list[str]:
    """Families of the system's fonts that have the letters between them."""
    families: list[str] = []
    fonts = [one for one in font_manager.fontManager.ttflist if "Last" not in one.name]
    # Fonts with serifs, or of one language's forms, come after those for all.
    fonts.sort(key=lambda one: ("Sans" not in one.name, one.weight != 400, one.name))
    for font in fonts:
        found = letters & _letters_of(font.fname)
        if found and font.name not in families:
            families.append(font.name)
            letters -= found
    if letters:
        _tell_boxes()
    return families


@functools.cache
def _tell_boxes() -> None:
    log.warning(
        "no font of this system has some of the letters in the names: boxes are drawn "
        "in their place. Install one that has them, such as Noto Sans CJK"
    )


@functools.cache
def _letters_of(path: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):  # gone, or of a kind that isn't drawn
        return frozenset()


def draw_box(axes: Axes, box: np.ndarray, color: str, **style: Any) -> None:
    """Draws a frame; `style` is that of a matplotlib rectangle."""
    top, left, bottom, right = (float(edge) for edge in box)
    given = {"fill": False, "linewidth": 1.5, "color": color, **style}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **given))


def draw_label(
    axes: Axes,
    box: np.ndarray,
    name: str,
    color: str,
    taken: list[np.ndarray],
    *,
    value: str = "",
    size: float = SMALL,
    inverse: bool = False,
) -> None:
    """Writes a box's name and value inside the picture, if possible on no other label.

    The first place that covers the fewest others: above the box, below its upper edge,
    beneath it, above its lower edge, at its left and at its right. A name that is too
    long for the picture is shortened; where even the value is, nothing is written.

    `taken`: the places of the picture's labels so far; this one's is added. They are
    pixels of the figure as laid out now: `figure.draw_without_rendering()` comes first.
    `size`: of the letters, in points. `inverse`: letters in colour, not the paper.
    """
    contrast = DARK if np.dot(to_rgb(color), (0.299, 0.587, 0.114)) > 0.55 else "white"
    ink, paper = (color, contrast) if inverse else (contrast, color)
    pad = size / 8
    frame = {"facecolor": paper, "edgecolor": "none", "pad": pad}
    style: dict[str, Any] = {"color": ink, "fontsize": size, "bbox": frame}
    style["fontfamily"] = font_of(name)
    label = axes.text(0, 0, "", clip_on=True, parse_math=False, **style)
    border = pad * axes.figure.dpi / 72
    picture, name = axes.bbox, shortened(name, 80)
    for length in range(len(name), -1 if value else 0, -1):
        start = name if length == len(name) else name[:length] + "…"
        label.set_text(f"{start if length else ''} {value}".strip())
        extent = label.get_window_extent().padded(border)
        if extent.width <= picture.width:
            break
    else:
        label.remove()
        return
    corners = axes.transData.transform(np.reshape(box, (2, 2))[:, ::-1])
    (left, top), (right, bottom) = np.clip(corners, picture.min, picture.max)
    wide, high = extent.size
    xs = np.clip([left, right - wide], picture.x0, picture.x1 - wide)
    ys = np.array([top, top - high, bottom - high, bottom])
    inside = ys[(picture.y0 <= ys) & (ys <= picture.y1 - high)]
    # A picture that is lower than a line has none of these places.
    ys = inside if len(inside) else np.array([picture.y1 - high])
    places = np.stack(np.meshgrid(xs, ys, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    others = np.reshape(taken, (-1, 4))
    starts = np.maximum(places, others[:, :2])
    stops = np.minimum(places + extent.size, others[:, 2:])
    covered = np.maximum(stops - starts, 0).prod(axis=2).sum(axis=1)
    place = places[covered.argmin(), 0]
    taken.append(np.concatenate([place, place + extent.size]))
    # From the text's anchor at (0, 0) to where its lower left corner has to be.
    origin = axes.transData.transform((0, 0))
    x, y = axes.transData.inverted().transform(origin + place - extent.min)
    label.set_position((x, y))


def tidy(axes: Axes, **ticks: Any) -> None:
    """Takes away the frame's upper and right side; `ticks` as for `tick_params`."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(**ticks)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure, whole or not at all, and closes it; returns its path."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=DPI, format=path.suffix[1:] or None)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figure)
    return path
