"""Pictures of a detector: images with its boxes, precision and recall, and times.

Boxes are drawn by Pillow on images of the size that is shown, so that lines and labels
are as wide on a thumbnail as on a photo of 12 megapixels. Boxes are half-open (ymin,
xmin, ymax, xmax) in pixels of the image, and may cross its border.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sppnet_jax.detection.boxes import iou
from sppnet_jax.run.figures import save_figure

# As far from each other as 20 colours can be; further classes begin again.
COLORS = (
    *("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#46f0f0", "#f032e6"),
    *("#d2f53c", "#fabebe", "#008080", "#e6beff", "#aa6e28", "#fffac8", "#aaffc3"),
    *("#800000", "#808000", "#ffd7b4", "#911eb4", "#000080", "#00a2ff"),
)
DARK = "#202020"
PAGE_WIDTH, MARGIN = 1800, 8
SUFFIXES = (".png", ".jpg", ".jpeg")

Rectangle = tuple[int, int, int, int]  # left, top, right, bottom; the last two included


class Shown(NamedTuple):
    """An image [h, w, 3], the detections to draw on it, and the truth where known.

    `boxes` and `truth_boxes` are float [N, 4]; `labels` and `truth_labels`, int [N],
    are numbers of classes; `scores` is float [N], `difficult` bool [N].
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    truth_boxes: np.ndarray = np.zeros((0, 4))
    truth_labels: np.ndarray = np.zeros(0, int)
    difficult: np.ndarray | None = None


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

    Lines and letters grow with the image. Labels lie inside it, as far as possible not
    on each other; names that are too long for the image are shortened.

    `image`: uint8 [h, w, 3]. `boxes`: float [N, 4]. `labels`: int [N], numbers of
    `class_names`. `scores`: float [N].

    Returns: uint8 [h, w, 3].
    Raises: ValueError for arguments that do not fit.
    """
    shown = Shown(image, boxes, labels, scores)
    _check_shown(shown, len(class_names))
    return _draw(shown, class_names)


def save_image(image: np.ndarray, path: Path) -> Path:
    """Writes an RGB image, uint8 [h, w, 3], as PNG or JPEG; returns its path.

    Raises: ValueError for other suffixes.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"can't write {path}: its suffix must be one of {SUFFIXES}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of JPEG alone; PNG takes no notice.
    PIL.Image.fromarray(image).save(path, quality=92)
    return path


def plot_detections(
    shown: Sequence[Shown], class_names: Sequence[str], path: Path
) -> Path:
    """Draws images in a grid, with their detections and, thin and dashed, the truth.

    Difficult objects are dotted. An object is named where no detection of its class
    overlaps it by an IoU of 0.5.

    Returns: the path of the picture, PNG or JPEG.
    Raises: ValueError without an image, and for arguments that do not fit.
    """
    if not shown:
        raise ValueError("there is no image to draw")
    for one in shown:
        _check_shown(one, len(class_names))
    columns = next((n for n in (1, 2, 3) if len(shown) <= n * n), 4)
    cell = min(900, (PAGE_WIDTH - MARGIN) // columns - MARGIN)
    tiles = [_draw(_resize(one, cell), class_names) for one in shown]
    lines = [tiles[k : k + columns] for k in range(0, len(tiles), columns)]
    heights = [max(len(tile) for tile in line) for line in lines]
    notes = _notes(shown)
    footer = 30 if notes else 0
    size = (
        columns * (cell + MARGIN) + MARGIN,
        sum(heights) + MARGIN * (len(lines) + 1) + footer,
    )
    page = PIL.Image.new("RGB", size, "white")
    top = MARGIN
    for line, height in zip(lines, heights, strict=True):
        for column, tile in enumerate(line):
            left = MARGIN + column * (cell + MARGIN) + (cell - tile.shape[1]) // 2
            page.paste(
                PIL.Image.fromarray(tile), (left, top + (height - len(tile)) // 2)
            )
        top += height + MARGIN
    PIL.ImageDraw.Draw(page).text((MARGIN, top), notes, fill=DARK, font=_font(18))
    return save_image(np.asarray(page), path)


def plot_precision_recall(curves: Sequence[Curve], path: Path) -> Path:
    """Draws precision over recall, up to six classes in one diagram, more in a grid.

    Light dots are VOC 2007's 11 points: the highest precision at each recall or beyond.

    Returns: the path of the picture.
    Raises: ValueError without a curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    if len(curves) <= 6:
        figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
        handles = [_curve(axes, c, f"C{n}") for n, c in enumerate(curves)]
        _precision_recall_axes(axes)
        legend = figure.legend(
            handles,
            [f"{_percent(c.average_precision)}  {c.name}" for c in curves],
            title="average precision",
            loc="outside right upper",
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        axes.set(xlabel="recall", ylabel="precision")
        return save_figure(figure, path)
    lines = -(-len(curves) // 5)
    columns = -(-len(curves) // lines)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(2.2 * columns, 2.1 * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axes in grid.flat[len(curves) :]:
        axes.axis("off")
    for axes, curve in zip(grid.flat, curves, strict=False):
        _curve(axes, curve, "C0")
        _precision_recall_axes(axes)
        axes.tick_params(labelsize=8)
        title = f"{curve.name}\n{_percent(curve.average_precision)}"
        axes.set_title(title, fontsize=9, parse_math=False)
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    return save_figure(figure, path)


def plot_times(rows: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draws the seconds that systems take for an image, as bars of their parts.

    Where the slowest takes over ten times as long as the fastest, bars are logarithmic
    and each is divided by its parts' shares; the axis says so.

    `rows`: for each system's name, the seconds of its parts by name, 0 or more.

    Returns: the path of the picture.
    Raises: ValueError for no rows, and for times that are negative or not finite.
    """
    _check_times(rows)
    totals = {name: sum(parts.values()) for name, parts in rows.items()}
    least, most = min(totals.values()), max(totals.values())
    logarithmic = 0 < 10 * least < most
    start = 10.0 ** np.floor(np.log10(least / 2)) if logarithmic else 0.0
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    figure, axes = plt.subplots(
        figsize=(9, 1.3 + 0.7 * len(rows)), layout="constrained"
    )
    note = functools.partial(
        axes.annotate, textcoords="offset points", va="center", parse_math=False
    )
    for number, (name, row) in enumerate(rows.items()):
        total, ends = totals[name], np.cumsum([0.0, *row.values()])
        if logarithmic:
            ends = start * (total / start) ** (ends / total)
        colors = [f"C{parts.index(part) % 10}" for part in row]
        axes.barh(number, np.diff(ends), left=ends[:-1], height=0.5, color=colors)
        note(_seconds(total) + " s", (ends[-1], number), (5, 0), fontsize=9)
        texts = [f"{part} {_seconds(seconds)}" for part, seconds in row.items()]
        # Below the bar, in a space that the next one leaves.
        note(", ".join(texts), (start, number + 0.25), (2, -8), fontsize=8)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=f"C{n % 10}") for n in range(len(parts))
    ]
    figure.legend(
        handles, parts, ncols=4, loc="outside upper left", frameon=False, fontsize=9
    )
    axes.set_yticks(range(len(rows)), list(rows))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(rows) - 0.3, -0.45)
    axes.set_xlabel("seconds an image")
    if logarithmic:
        axes.set_xlabel(
            "seconds an image (logarithmic; a bar is divided by its parts' shares)"
        )
        axes.set_xscale("log")
        axes.set_xlim(start, most * 1.2)
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


def _draw(shown: Shown, class_names: Sequence[str]) -> np.ndarray:
    """The image with boxes: the truth above the detections, labels above all."""
    height, width = shown.image.shape[:2]
    length = np.sqrt(height * width)
    line, font = max(1, round(length / 220)), _font(max(11, round(length / 30)))
    page = PIL.Image.fromarray(shown.image)
    pen = PIL.ImageDraw.Draw(page)
    boxes = _rectangles(shown.boxes, height, width)
    # The best box is drawn last, above the others, but chooses its label's place first.
    order = np.argsort(-np.asarray(shown.scores, float), kind="stable")
    for k in order[::-1]:
        pen.rectangle(boxes[k], outline=_color(shown.labels[k]), width=line)
    truths = _rectangles(shown.truth_boxes, height, width)
    difficult = _difficult(shown)
    for truth, label, dotted in zip(truths, shown.truth_labels, difficult, strict=True):
        _draw_dashes(pen, truth, _color(label), max(1, line // 2), dotted)
    taken: list[Rectangle] = []
    for k in order:
        color, name = _color(shown.labels[k]), class_names[shown.labels[k]]
        ink = DARK if _is_light(color) else "white"
        text = _fit(name, f" {shown.scores[k]:.2f}", font, width)
        _draw_label(pen, text, font, (width, height), boxes[k], taken, ink, color)
    for k in np.flatnonzero(~_found(shown)):
        color = _color(shown.truth_labels[k])
        paper = DARK if _is_light(color) else "white"
        text = _fit(class_names[shown.truth_labels[k]], "", font, width)
        _draw_label(pen, text, font, (width, height), truths[k], taken, color, paper)
    return np.array(page)


def _rectangles(boxes: np.ndarray, height: int, width: int) -> list[Rectangle]:
    """The outermost pixels of half-open boxes, inside the image, at least one."""
    last = np.array([width, height] * 2) - 1
    edges = np.asarray(boxes, float).reshape(-1, 4)[:, [1, 0, 3, 2]]
    starts, stops = np.floor(edges[:, :2]), np.ceil(edges[:, 2:]) - 1
    inside = np.concatenate([starts, np.maximum(starts, stops)], axis=1)
    return [
        (left, top, right, bottom)
        for left, top, right, bottom in np.clip(inside, 0, last).astype(int).tolist()
    ]


def _draw_dashes(
    pen: PIL.ImageDraw.ImageDraw,
    rectangle: Rectangle,
    color: str,
    line: int,
    dotted: bool,
) -> None:
    """A dashed or dotted frame; its gaps are dark, to be seen on its own colour."""
    left, top, right, bottom = rectangle
    pen.rectangle(rectangle, outline=DARK, width=line)
    dash, step = (line, 3 * line) if dotted else (6 * line, 10 * line)
    for x in range(left, right + 1, step):
        end = min(x + dash - 1, right)
        pen.rectangle((x, top, end, min(top + line - 1, bottom)), fill=color)
        pen.rectangle((x, max(bottom - line + 1, top), end, bottom), fill=color)
    for y in range(top, bottom + 1, step):
        end = min(y + dash - 1, bottom)
        pen.rectangle((left, y, min(left + line - 1, right), end), fill=color)
        pen.rectangle((max(right - line + 1, left), y, right, end), fill=color)


def _draw_label(
    pen: PIL.ImageDraw.ImageDraw,
    text: str,
    font: PIL.ImageFont.FreeTypeFont,
    size: tuple[int, int],
    rectangle: Rectangle,
    taken: list[Rectangle],
    ink: str,
    paper: str,
) -> None:
    """Writes a label of a box where it covers the fewest others; notes its place."""
    if not text:
        return
    border = max(1, round(font.size / 8))
    ascent, descent = font.getmetrics()
    wide = min(int(np.ceil(font.getlength(text))) + 2 * border, size[0])
    place = _place(rectangle, wide, min(ascent + descent, size[1]), size, taken)
    taken.append(place)
    pen.rectangle(place, fill=paper)
    pen.text((place[0] + border, place[1]), text, fill=ink, font=font)


def _place(
    rectangle: Rectangle,
    wide: int,
    high: int,
    size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """The first of a label's places inside the image that covers the least of others.

    Above the box, below its upper edge, beneath it, above its lower edge; first at its
    left, then at its right.
    """
    left, top, right, bottom = rectangle
    best, least = None, np.inf
    for x in (left, right + 1 - wide):
        x = min(max(x, 0), size[0] - wide)
        for y in (top - high, top, bottom + 1, bottom + 1 - high):
            if not 0 <= y <= size[1] - high:
                continue
            place = (x, y, x + wide - 1, y + high - 1)
            covered = sum(_overlap(place, other) for other in taken)
            if covered < least:
                best, least = place, covered
    if best is None:
        x, y = min(left, size[0] - wide), min(top, size[1] - high)
        best = (x, y, x + wide - 1, y + high - 1)
    return best


def _overlap(one: Rectangle, other: Rectangle) -> int:
    """The pixels that two rectangles share."""
    wide = min(one[2], other[2]) - max(one[0], other[0]) + 1
    high = min(one[3], other[3]) - max(one[1], other[1]) + 1
    return max(wide, 0) * max(high, 0)


def _fit(name: str, rest: str, font: PIL.ImageFont.FreeTypeFont, width: int) -> str:
    """The name and what follows it, the name shortened until both fit; "" if never."""
    name = " ".join(name.split())
    room = width - 2 * max(1, round(font.size / 8))
    for length in range(len(name), -1, -1):
        text = (name if length == len(name) else name[:length] + "…") + rest
        if font.getlength(text) <= room:
            return text
    return rest.strip() if font.getlength(rest.strip()) <= room else ""


def _found(shown: Shown) -> np.ndarray:
    """Which objects a detection of their class overlaps by at least 0.5: bool [N]."""
    if not len(shown.truth_boxes) or not len(shown.boxes):
        return np.zeros(len(shown.truth_boxes), bool)
    same = np.asarray(shown.truth_labels)[:, None] == np.asarray(shown.labels)
    overlaps = iou(np.asarray(shown.truth_boxes), np.asarray(shown.boxes))
    return (same & (np.asarray(overlaps) >= 0.5)).any(axis=1)


def _difficult(shown: Shown) -> np.ndarray:
    if shown.difficult is None:
        return np.zeros(len(shown.truth_boxes), bool)
    return np.asarray(shown.difficult, bool)


def _resize(shown: Shown, side: int) -> Shown:
    """The image and its boxes, `side` pixels wide or three quarters of it high."""
    height, width = shown.image.shape[:2]
    factor = side / max(4 / 3 * height, width)
    new = (max(1, round(height * factor)), max(1, round(width * factor)))
    shrink, enlarge = cv2.INTER_AREA, cv2.INTER_CUBIC
    image = cv2.resize(
        shown.image, new[::-1], interpolation=shrink if factor < 1 else enlarge
    )
    scales = np.array([new[0] / height, new[1] / width] * 2)
    return shown._replace(
        image=image,
        boxes=np.asarray(shown.boxes, float).reshape(-1, 4) * scales,
        truth_boxes=np.asarray(shown.truth_boxes, float).reshape(-1, 4) * scales,
    )


def _notes(shown: Sequence[Shown]) -> str:
    """What the lines below a grid say; nothing where no truth is known."""
    if not any(len(one.truth_boxes) for one in shown):
        return ""
    notes = "solid: detection and its score; dashed: ground truth, named if not found"
    if any(_difficult(one).any() for one in shown):
        notes += "; dotted: difficult"
    return notes


def _color(label: int) -> str:
    return COLORS[int(label) % len(COLORS)]


def _is_light(color: str) -> bool:
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


@functools.cache
def _font(size: int) -> PIL.ImageFont.FreeTypeFont:
    # matplotlib brings it along, with more alphabets than OpenCV's and Pillow's own.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return PIL.ImageFont.truetype(str(path), size)


def _curve(axes: Axes, curve: Curve, color: str) -> Line2D:
    recall, precision = np.asarray(curve.recall), np.asarray(curve.precision)
    (line,) = axes.plot(recall, precision, color=color, linewidth=1.5)
    if curve.average_precision is None:
        return line
    points = np.linspace(0, 1, 11)
    highest = [precision[recall >= t].max(initial=0) for t in points]
    axes.plot(points, highest, "o", color=color, alpha=0.35, markersize=3.5, mew=0)
    return line


def _precision_recall_axes(axes: Axes) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(matplotlib.ticker.MultipleLocator(0.5))
        axis.set_minor_locator(matplotlib.ticker.MultipleLocator(0.1))
        axis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(value: float | None) -> str:
    return "no AP" if value is None else f"{value:.1%}"


def _seconds(value: float) -> str:
    """Three digits, but none before the point dropped: 0.0529, 14.4, 1234."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _check_shown(shown: Shown, classes: int) -> None:
    image = shown.image
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 [h, w, 3], got {image.dtype} {image.shape}"
        )
    if 0 in image.shape:
        raise ValueError(f"the image has no pixels: shape {image.shape}")
    groups = {
        "detections": (shown.boxes, shown.labels, shown.scores),
        "truth": (shown.truth_boxes, shown.truth_labels, _difficult(shown)),
    }
    for name, (boxes, labels, values) in groups.items():
        count = len(labels)
        shapes = [np.shape(array) for array in (boxes, labels, values)]
        if shapes[1:] != [(count,)] * 2 or (shapes[0] != (count, 4) and count):
            raise ValueError(
                f"{name} must be boxes [N, 4] with N numbers each, got shapes {shapes}"
            )
        if not np.isfinite(np.asarray(boxes, float)).all():
            raise ValueError(f"{name} hold a box that is not finite")
        wrong = [int(label) for label in labels if not 0 <= label < classes]
        if wrong:
            raise ValueError(f"{name} hold class {wrong[0]}; there are {classes} names")


def _check_times(rows: Mapping[str, Mapping[str, float]]) -> None:
    if not any(rows.values()):
        raise ValueError("there are no times to draw")
    for name, row in rows.items():
        for part, seconds in row.items():
            if not 0 <= seconds < np.inf:
                raise ValueError(f"{name} took {seconds} seconds for {part}")
