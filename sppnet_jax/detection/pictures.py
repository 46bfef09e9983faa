"""Pictures of a detector: images with its boxes, precision and recall, and times.

Lines and labels grow with the picture, so that they are as wide on a thumbnail as on a
photo of 12 megapixels. Boxes are half-open (ymin, xmin, ymax, xmax) in pixels of the
image, and may cross its border.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator, PercentFormatter

from sppnet_jax.data.images import check_image
from sppnet_jax.detection.boxes import iou
from sppnet_jax.run.figures import (
    DARK,
    DPI,
    TITLE,
    color_of,
    draw_box,
    draw_label,
    font_of,
    panels,
    save_figure,
    shortened,
    show_image,
    some_of,
    tidy,
)
from sppnet_jax.run.files import fitting, whole_file

log = logging.getLogger(__name__)

PAGE_WIDTH = 12.0  # inches
POINTS = 72 / DPI  # of a pixel
MOST_BOXES = 300  # in an image; nobody can tell more apart


class Shown(NamedTuple):
    """An image [h, w, 3], the detections to draw on it, and the truth where known.

    Boxes are float [N, 4]; labels, int [N], are numbers of classes; `scores` is float
    [N], `difficult` bool [N] or empty.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    truth_boxes: np.ndarray = np.zeros((0, 4))
    truth_labels: np.ndarray = np.zeros(0, int)
    difficult: np.ndarray = np.zeros(0, bool)


class Curve(NamedTuple):
    """A class's recall and precision [N] down the ranking; its AP, None without one."""

    name: str
    recall: np.ndarray
    precision: np.ndarray
    average_precision: float | None


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
) -> np.ndarray:
    """A copy of an image with boxes in their classes' colours, each with its score.

    Labels lie inside the image, as far as possible not on each other; names that are
    too long for it are shortened. Of more than 300 boxes the best are drawn.

    `image`: uint8 [h, w, 3]. `boxes`: float [N, 4]. `labels`: int [N], numbers of
    `class_names`. `scores`: float [N].

    Returns: uint8 [h, w, 3].
    Raises: ValueError for arguments that do not fit.
    """
    shown = _checked(Shown(image, boxes, labels, scores), len(class_names))
    height, width = image.shape[:2]
    # The canvas rounds down. Ink alone: matplotlib takes seconds for a large image.
    figure = Figure(((width + 1e-3) / DPI, (height + 1e-3) / DPI), DPI, frameon=False)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    _draw(axes, shown, class_names)
    canvas.draw()
    sheet, drawn = np.asarray(canvas.buffer_rgba()), image.copy()
    inked = sheet[..., 3] > 0
    ink, alpha = sheet[inked][:, :3], sheet[inked][:, 3:] / np.float32(255)
    drawn[inked] = np.round(alpha * ink + (1 - alpha) * image[inked])
    return drawn


def save_image(image: np.ndarray, path: Path) -> Path:
    """Writes an RGB image, uint8 [h, w, 3], as PNG or JPEG; returns its path.

    A name that is too long for a file is cut, see `fitting`.

    Raises: ValueError for other suffixes.
    """
    path = fitting(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"can't write {path}: its suffix must be .png, .jpg or .jpeg")
    quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
    with whole_file(path) as file:
        file.write(cv2.imencode(path.suffix, image[..., ::-1], quality)[1].tobytes())
    return path


def plot_detections(
    shown: Sequence[Shown], class_names: Sequence[str], path: Path
) -> Path:
    """Draws images in a grid, with their detections and, thin and dashed, the truth.

    Difficult objects are dotted. An object is named where no detection of its class
    overlaps it by an IoU of 0.5. Of more than 64 images the first are drawn.

    Returns: the path of the picture.
    Raises: ValueError without an image, and for arguments that do not fit.
    """
    if not shown:
        raise ValueError("there is no image to draw")
    shown = [_checked(one, len(class_names)) for one in some_of(shown, "images")]
    columns = next((n for n in (1, 2, 3) if len(shown) <= n * n), 4)
    ratio = float(np.median([np.divide(*one.image.shape[:2]) for one in shown]))
    page = min(PAGE_WIDTH, columns * PAGE_WIDTH / 2)
    figure, grid = panels(len(shown), columns, ratio, width=page, title=0.0)
    figure.set_dpi(DPI)
    notes = "solid: detection and its score; dashed: ground truth, named if not found"
    notes += "; dotted: difficult" if any(one.difficult.any() for one in shown) else ""
    if any(len(one.truth_boxes) for one in shown):
        figure.supxlabel(notes, fontsize=TITLE)
    for axes, one in zip(grid, shown, strict=True):
        height, width = one.image.shape[:2]
        # Matplotlib takes seconds and a gigabyte to shrink large photographs.
        times = max(1, max(height, width) // 1000)
        size = max(1, width // times), max(1, height // times)
        small = cv2.resize(one.image, size, interpolation=cv2.INTER_AREA)
        show_image(axes, small, extent=(0, width, height, 0))
        axes.axis("off")
    figure.draw_without_rendering()
    for axes, one in zip(grid, shown, strict=True):
        _draw(axes, one, class_names)
    return save_figure(figure, path)


def plot_precision_recall(curves: Sequence[Curve], path: Path) -> Path:
    """Draws precision over recall, up to six classes in one diagram, more in a grid.

    Light dots are VOC 2007's 11 points: the highest precision at each recall or beyond.
    Of more than 64 classes the first are drawn.

    Returns: the path of the picture.
    Raises: ValueError without a curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    curves = some_of(curves, "classes")
    together = len(curves) <= 6
    lines = 1 if together else -(-len(curves) // 5)
    columns = 1 if together else -(-len(curves) // lines)
    size = (6.0, 4.5) if together else (2.2 * columns, 2.1 * lines)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    handles, names = [], []
    for number, curve in enumerate(curves):
        axes, color = grid.flat[0 if together else number], f"C{number * together}"
        recall, precision = np.asarray(curve.recall), np.asarray(curve.precision)
        handles += axes.plot(recall, precision, color=color, linewidth=1.5)
        ap, points = curve.average_precision, np.linspace(0, 1, 11)
        if ap is not None:
            highest = [precision[recall >= t].max(initial=0) for t in points]
            style = {"color": color, "alpha": 0.35, "markersize": 3.5, "mew": 0}
            axes.plot(points, highest, "o", **style)
        percent = "no AP" if ap is None else f"{ap:.1%}"
        name = shortened(curve.name, 40 if together else 24)
        names.append(f"{percent}  {name}")
        if not together:
            style = {"fontsize": TITLE, "fontfamily": font_of(name)}
            axes.set_title(f"{name}\n{percent}", parse_math=False, **style)
    if together:
        legend = figure.legend(
            handles,
            names,
            title="average precision",
            loc="outside right upper",
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
            text.set_fontfamily(font_of(text.get_text()))
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    for axes in grid.flat:
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
        axes.set(xlabel="recall", ylabel="precision")
        axes.label_outer()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MultipleLocator(0.5))
            axis.set_minor_locator(MultipleLocator(0.1))
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
        tidy(axes)
    return save_figure(figure, path)


def plot_times(rows: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draws the seconds that systems take for an image, as bars of their parts.

    Where the slowest takes over ten times as long as the fastest, bars are logarithmic
    and each is divided by its parts' shares; the axis says so.

    `rows`: for each system's name, the seconds of its parts by name, 0 or more.

    Returns: the path of the picture.
    Raises: ValueError for no rows, and for times that are negative or not finite.
    """
    if not any(rows.values()):
        raise ValueError("there are no times to draw")
    for name, row in rows.items():
        for part, seconds in row.items():
            if not 0 <= seconds < np.inf:
                raise ValueError(f"{name} took {seconds} seconds for {part}")
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    least, most = min(totals.values()), max(totals.values())
    logarithmic = 0 < 10 * least < most
    start = 10.0 ** np.floor(np.log10(least / 2)) if logarithmic else 0.0
    colors: dict[str, str] = {}
    figure = Figure((9, 1.3 + 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots()
    note = functools.partial(
        axes.annotate, textcoords="offset points", va="center", parse_math=False
    )
    for number, (name, row) in enumerate(rows.items()):
        total, ends = totals[name], np.cumsum([0.0, *row.values()])
        if logarithmic:
            ends = start * (total / start) ** (ends / total)
        own = [colors.setdefault(part, f"C{len(colors) % 10}") for part in row]
        axes.barh(number, np.diff(ends), left=ends[:-1], height=0.5, color=own)
        note(_seconds(total) + " s", (ends[-1], number), (5, 0), fontsize=9)
        texts = [f"{part} {_seconds(seconds)}" for part, seconds in row.items()]
        # Below the bar, in a space that the next one leaves.
        note(", ".join(texts), (start, number + 0.25), (2, -8), fontsize=8)
    handles = [Patch(color=color) for color in colors.values()]
    figure.legend(
        handles, colors, ncols=4, loc="outside upper left", frameon=False, fontsize=9
    )
    axes.set_yticks(range(len(rows)), list(rows), parse_math=False)
    axes.set(ylim=(len(rows) - 0.3, -0.45), xlabel="seconds an image")
    if logarithmic:
        shares = " (logarithmic; a bar is divided by its parts' shares)"
        axes.set(xscale="log", xlim=(start, most * 1.2))
        axes.set_xlabel(axes.get_xlabel() + shares)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    tidy(axes)
    return save_figure(figure, path)


def _draw(axes: Axes, shown: Shown, class_names: Sequence[str]) -> None:
    """Boxes on a picture of DPI: the truth above the detections, labels above all."""
    pixels = np.sqrt(np.prod(axes.bbox.size))
    line, size = max(1, round(pixels / 220)), max(11, pixels / 30) * POINTS
    height, width = shown.image.shape[:2]

    def frame(box: np.ndarray, color: str, line: int, dashes: Any = "-") -> None:
        inside = np.clip(box, 0, [height, width] * 2).reshape(2, 2)[:, ::-1]
        # Lines lie inside their box, on whole pixels of the picture.
        corners = np.round(axes.transData.transform(inside))
        corners += line / 2 * np.array([[1, -1], [-1, 1]])
        edges = axes.transData.inverted().transform(corners)[:, ::-1].ravel()
        style = {"linewidth": line * POINTS, "linestyle": dashes, "snap": False}
        draw_box(axes, edges, color, **style)

    # The best box is drawn last, above the others, but chooses its label's place first.
    order = np.argsort(-shown.scores, kind="stable")
    if len(order) > MOST_BOXES:
        told = "the picture shows the best %d of an image's %d detections"
        log.info(told, MOST_BOXES, len(order))
    order = order[:MOST_BOXES]
    for k in order[::-1]:
        frame(shown.boxes[k], color_of(shown.labels[k]), line)
    thin = max(1, line // 2)
    truths = zip(shown.truth_boxes, shown.truth_labels, shown.difficult, strict=True)
    for box, label, dotted in truths:
        # Gaps are dark, to be seen on a frame of the same colour.
        frame(box, DARK, thin)
        frame(box, color_of(label), thin, (0, (1, 2) if dotted else (6, 4)))
    write = functools.partial(draw_label, axes, taken=[], size=size)
    for k in order:
        name, color = class_names[shown.labels[k]], color_of(shown.labels[k])
        write(shown.boxes[k], name, color, value=f"{shown.scores[k]:.2f}")
    same = shown.truth_labels[:, None] == shown.labels
    found = same & (np.asarray(iou(shown.truth_boxes, shown.boxes)) >= 0.5)
    for k in np.flatnonzero(~found.any(axis=1)):
        label = shown.truth_labels[k]
        name, color = class_names[label], color_of(label)
        write(shown.truth_boxes[k], name, color, inverse=True)


def _seconds(value: float) -> str:
    """Three digits, but none before the point dropped: 0.0529, 14.4, 1234."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _checked(shown: Shown, classes: int) -> Shown:
    """The same as arrays, with nothing left out; ValueError where they do not fit."""
    check_image(shown.image)
    arrays: list[np.ndarray] = []
    difficult = shown.difficult
    if not len(difficult):
        difficult = np.zeros(len(shown.truth_labels), bool)
    for name, *given in (
        ("detections", shown.boxes, shown.labels, shown.scores),
        ("truth", shown.truth_boxes, shown.truth_labels, difficult),
    ):
        boxes, labels, values = (np.asarray(array) for array in given)
        count = len(labels)
        shapes = [boxes.shape, labels.shape, values.shape]
        if shapes[1:] != [(count,)] * 2 or (shapes[0] != (count, 4) and count):
            raise ValueError(
                f"{name} must be boxes [N, 4] with N numbers each, got shapes {shapes}"
            )
        if not np.isfinite(boxes).all():
            raise ValueError(f"{name} hold a box that is not finite")
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"{name} hold class {wrong[0]}; there are {classes} names")
        arrays += [boxes.reshape(-1, 4), labels.astype(int), values]
    return Shown(shown.image, *arrays)
