"""Pictures of a detector at work, step by step: from proposals to boxes with labels.

They are for notebooks: a function takes plain arrays and returns a matplotlib figure,
which a notebook shows as it is and `figure.savefig` writes.

    plot_proposals     the boxes where objects may be, and which objects they find
    plot_channels      the features, and how much of the image a unit sees
    plot_windows       boxes on the image, and their windows on the features
    plot_pyramid       what is pooled from one window, level by level
    plot_agreement     two arrays that should be equal, value by value
    plot_scores        the best score of a box around each pixel, class by class
    plot_found         an image's detections at several steps, beside each other
    plot_scenes        the detections of several images

Images are uint8 [height, width, 3]. Boxes are float [N, 4], half-open (ymin, xmin,
ymax, xmax) in pixels of the image that they are drawn on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from notebooks.pictures.maps import (
    SCORES_COLORS,
    centers,
    check_features,
    check_fits,
    show_map,
    show_vector,
)
from sppnet_jax.detection.boxes import iou
from sppnet_jax.detection.detector import Detections
from sppnet_jax.detection.scales import Size, scale_factors
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.pyramid.pooling import check_levels, num_bins
from sppnet_jax.pyramid.windows import window_pyramid_pool
from sppnet_jax.run.figures import (
    SMALL,
    TITLE,
    color_of,
    draw_box,
    draw_label,
    panels,
    show_image,
    tidy,
)

FOUND = 0.5  # the IoU from which a box counts as an object's
WIDTH = 7.5  # of a figure, in inches
PIXELS = {"interpolation": "nearest"}  # smoothed scenes take twice the bytes
# Where (top, left, bottom, right) counts rows.
_ROWS = np.array([1, 0, 1, 0])


def plot_proposals(image: np.ndarray, proposals: np.ndarray, objects: Any) -> Figure:
    """Draws proposals, the best of them for each object, and how many it took.

    The last panel has a line for each object: the IoU with the best of the first n
    proposals. Where it is above 0.5, the object can be found.

    `proposals`: boxes, the most promising first. `objects`: boxes of the objects, at
    least one.

    Raises: ValueError for arguments that do not fit.
    """
    proposals = _check_boxes(proposals, "proposals")
    objects = _check_boxes(objects, "objects")
    overlaps = np.asarray(iou(proposals, objects))
    best, found = overlaps.max(axis=0), (overlaps.max(axis=0) >= FOUND).sum()
    figure, (left, middle, right) = _panels(image, 3)
    show_image(left, image, f"{len(proposals):,} proposals", **PIXELS)
    for box in proposals:
        draw_box(left, box, "white", linewidth=0.5, alpha=0.15)
    title = f"{found} of {len(objects)} objects found"
    show_image(middle, image, title, **PIXELS)
    for number, box in enumerate(objects):
        draw_box(middle, box, "white", linestyle="--")
        color = color_of(number)
        nearest = proposals[overlaps[:, number].argmax()]
        draw_box(middle, nearest, color)
        so_far = np.maximum.accumulate(overlaps[:, number])
        right.step(
            np.arange(1, len(proposals) + 1), so_far, where="post", color=color, lw=2
        )
    right.axhline(FOUND, color="0.5", linestyle=":", linewidth=1)
    height, width = image.shape[:2]
    right.set(xscale="log", ylim=(0, 1), box_aspect=np.clip(height / width, 0.5, 1.4))
    right.set_xlabel("proposals", fontsize=SMALL)
    right.set_title("IoU with the best so far", fontsize=TITLE)
    right.grid(alpha=0.3)
    tidy(right, labelsize=SMALL)
    figure.draw_without_rendering()
    taken: list[np.ndarray] = []
    for number, box in enumerate(proposals[overlaps.argmax(axis=0)]):
        draw_label(middle, box, f"{best[number]:.2f}", color_of(number), taken)
    return figure


def plot_channels(
    image: np.ndarray, features: Any, geometry: Geometry, channels: int = 6
) -> Figure:
    """Draws channels of a map, and what their strongest units see of the image.

    A dot is the unit with the channel's largest value; on the image the square around
    its receptive-field centre is what it sees (cut off at the border).

    `image`: as the network sees it. `features`: float [rows, columns, channels].
    `channels`: how many, those with the largest values.

    Raises: ValueError for arguments that do not fit.
    """
    features = check_features(features)
    check_fits(features, image, geometry)
    count = features.shape[2]
    if not 1 <= channels <= count:
        raise ValueError(f"channels must be 1 to {count}, got {channels}")
    strongest = np.argsort(-features.max(axis=(0, 1)), kind="stable")[:channels]
    figure, axes = _panels(image, 1 + channels)
    rows, columns = features.shape[:2]
    show_image(axes[0], image, f"receptive field: {geometry.receptive_field} pixels")
    for number, channel in enumerate(strongest):
        color = color_of(number)
        peak = np.unravel_index(features[:, :, channel].argmax(), (rows, columns))
        y, x = centers(geometry, rows)[peak[0]], centers(geometry, columns)[peak[1]]
        half = geometry.receptive_field / 2
        field = np.array([y - half, x - half, y + half, x + half])
        draw_box(axes[0], field, color, linewidth=1)
        axes[0].plot(x, y, "o", color=color, markersize=4)
        panel = axes[1 + number]
        show_map(panel, features[:, :, channel], f"channel {channel}")
        panel.plot(peak[1] + 0.5, peak[0] + 0.5, "o", color=color, markersize=4)
    return figure


def plot_windows(
    images: Sequence[np.ndarray],
    maps: Sequence[Any],
    boxes: np.ndarray,
    windows: np.ndarray,
    image_size: Size,
    geometry: Geometry,
) -> Figure:
    """Draws boxes on an image at each scale, above their windows on its features.

    A box is drawn at the scale that its window is of, in the same colour. Dots on the
    image are the receptive-field centres of all units; a window holds those inside its
    box (the paper's appendix). Features are shown by their mean over the channels.

    `images`: the image at each scale, as the network sees it. `maps`: its features at
    each scale, float [rows, columns, channels]. `boxes`: in pixels of the image itself.
    `windows`: int [N, 4] for each box, on the stacked maps; see `boxes_to_atlas`.
    `image_size`: (height, width) of the image itself.

    Raises: ValueError for arguments that do not fit.
    """
    maps = [check_features(features) for features in maps]
    boxes = _check_boxes(boxes, "boxes")
    if len(images) != len(maps) or not images:
        raise ValueError(f"{len(images)} images have {len(maps)} maps: give pairs")
    for image, features in zip(images, maps, strict=True):
        check_fits(features, image, geometry)
    tops = np.cumsum([0, *(len(features) for features in maps)])
    windows = _check_windows(windows, (int(tops[-1]), max(m.shape[1] for m in maps)))
    if len(windows) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes have {len(windows)} windows: give pairs")
    scales = np.searchsorted(tops, windows[:, 0], side="right") - 1
    factors = scale_factors(image_size, [image.shape[:2] for image in images])
    figure, axes = _panels(images[0], 2 * len(maps), columns=max(2, len(maps)))
    for scale, (image, features) in enumerate(zip(images, maps, strict=True)):
        above, below = axes[scale], axes[len(maps) + scale]
        show_image(above, image, "{}×{} pixels".format(*image.shape[:2]))
        title = "{}×{} cells".format(*features.shape[:2])
        show_map(below, features.mean(axis=2), title)
    figure.draw_without_rendering()
    for scale, features in enumerate(maps):
        above, below = axes[scale], axes[len(maps) + scale]
        ys, xs = (centers(geometry, count) for count in features.shape[:2])
        x, y = np.meshgrid(xs, ys)
        above.scatter(x, y, s=1, color="white", alpha=0.7)
        taken: list[np.ndarray] = []
        for number in np.flatnonzero(scales == scale):
            color = color_of(number)
            draw_box(above, boxes[number] * np.tile(factors[scale], 2), color)
            top, left, bottom, right = windows[number] - tops[scale] * _ROWS
            x, y = np.meshgrid(xs[left:right], ys[top:bottom])
            above.scatter(x, y, s=6, color=color)
            # A little smaller: windows with an edge in common can be told apart.
            inset = 0.06 * (1 + number % 3) * np.array([1, 1, -1, -1])
            cells = np.array([top, left, bottom, right]) + inset
            draw_box(below, cells, color)
            draw_label(below, cells, f"{bottom - top}×{right - left}", color, taken)
    return figure


def plot_pyramid(features: Any, window: np.ndarray, levels: Sequence[int]) -> Figure:
    """Draws a window's cells, the bins of each level, and the vector that they make.

    The upper row shows means over the channels; a window of few cells has bins that
    overlap. Below is every pooled number, a row for each bin, in fc6's order.

    `features`: float [rows, columns, channels]. `window`: int [4], half-open cells
    (top, left, bottom, right). `levels`: of the pyramid.

    Raises: ValueError for arguments that do not fit.
    """
    features, levels = check_features(features), check_levels(levels)
    window = _check_windows(np.asarray(window).reshape(-1, 4), features.shape[:2])
    if len(window) != 1:
        raise ValueError(f"window must be one window, int [4], got {len(window)}")
    pooled = np.asarray(window_pyramid_pool(features, window, levels))[0]
    top, left, bottom, right = window[0]
    cells = features[top:bottom, left:right]
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, 1 + len(levels), height_ratios=(1, 1.7))
    means = pooled.mean(axis=1)
    high = max(means.max(), cells.mean(axis=2).max())
    limits = {"vmin": 0.0, "vmax": float(high) or 1.0}
    title = f"window: {bottom - top}×{right - left} cells"
    show_map(figure.add_subplot(grid[0, 0]), cells.mean(axis=2), title, **limits)
    ends = np.cumsum([0, *(level * level for level in levels)])
    for column, level in enumerate(levels):
        axes = figure.add_subplot(grid[0, 1 + column])
        bins = means[ends[column] : ends[column + 1]].reshape(level, level)
        show_map(axes, bins, f"{level}×{level} bins", **limits)
    axes = figure.add_subplot(grid[1, :])
    show_vector(axes, pooled, levels)
    tidy(axes, labelsize=SMALL)
    axes.set_xlabel("channel", fontsize=SMALL)
    axes.set_title(
        f"pooled: {num_bins(levels)} bins × {pooled.shape[1]} channels = "
        f"{pooled.size:,} numbers for fc6",
        fontsize=TITLE,
    )
    return figure


def plot_agreement(first: Any, second: Any, names: tuple[str, str]) -> Figure:
    """Draws two arrays against each other, value by value, and says how they differ.

    `first`, `second`: float arrays of the same shape. `names`: what they are.

    Raises: ValueError for other shapes, and for arrays without a value.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or not first.size:
        raise ValueError(
            f"the arrays must have the same shape and hold something, got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    x, y = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1)
    figure = Figure(figsize=(3.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="0.8", linewidth=5, solid_capstyle="round")
    axes.plot(x, y, ".", color="C0", markersize=4)
    axes.set(xlabel=names[0], ylabel=names[1], aspect="equal")
    difference = np.abs(first.astype(np.float64) - second).max()
    axes.set_title(
        f"{first.size:,} values, largest difference {difference:.2g}", fontsize=TITLE
    )
    tidy(axes, labelsize=SMALL)
    return figure


def plot_scores(
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
    classes: int = 4,
) -> Figure:
    """Draws where the boxes with the best scores of each class are.

    A pixel has the colour of the best score of all boxes that hold it; colours are
    common to all classes, and the worst quarter of the pixels is dark. The best box is
    framed.

    `boxes`: float [N, 4]. `scores`: float [N, number of classes], of SVMs or of a
    softmax. `classes`: how many are drawn, those with the best boxes first.

    Raises: ValueError for arguments that do not fit.
    """
    boxes = _check_boxes(boxes, "boxes")
    scores = np.asarray(scores)
    if scores.shape != (len(boxes), len(class_names)):
        raise ValueError(
            f"scores must be [{len(boxes)}, {len(class_names)}], one for each box and "
            f"class, got {list(scores.shape)}"
        )
    if not 1 <= classes <= len(class_names):
        raise ValueError(f"classes must be 1 to {len(class_names)}, got {classes}")
    chosen = np.argsort(-scores.max(axis=0), kind="stable")[:classes]
    heats = [_best_around(image.shape[:2], boxes, scores[:, k]) for k in chosen]
    shown = np.concatenate([heat[np.isfinite(heat)] for heat in heats])
    limits = {"vmin": float(np.quantile(shown, 0.25)), "vmax": float(shown.max())}
    figure, axes = _panels(image, classes)
    for panel, label, heat in zip(axes, chosen, heats, strict=True):
        best = scores[:, label].argmax()
        title = f"{class_names[label]}: at best {scores[best, label]:.2f}"
        gray = image.mean(axis=2)
        show_image(panel, gray, cmap="gray", vmin=0, vmax=255, **PIXELS)
        style = {"cmap": SCORES_COLORS, "alpha": 0.6, **limits, **PIXELS}
        show_image(panel, heat, title, **style)
        draw_box(panel, boxes[best], "white")
    colors = axes[0].images[-1]
    bar = figure.colorbar(colors, ax=axes, shrink=0.8, pad=0.01, extend="min")
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def plot_found(
    image: np.ndarray,
    found: Mapping[str, Detections],
    class_names: Sequence[str],
    objects: Any = None,
) -> Figure:
    """Draws an image's detections at several steps, beside each other, under its names.

    `found`: the detections of each step by its name. `class_names`: by label.
    `objects`: float [M, 4], boxes that are drawn dashed; then each panel tells the mean
    IoU of its detections with the objects that they overlap most.

    Raises: ValueError for arguments that do not fit.
    """
    if not found:
        raise ValueError("there are no detections to draw: give at least one step")
    truth = np.zeros((0, 4)) if objects is None else _check_boxes(objects, "objects")
    figure, axes = _panels(image, len(found))
    for panel, (name, step) in zip(axes, found.items(), strict=True):
        title = f"{name}: {len(step.boxes)} boxes"
        if len(truth) and len(step.boxes):
            overlaps = np.asarray(iou(step.boxes, truth)).max(axis=1)
            title += f"\nmean IoU with their objects {overlaps.mean():.2f}"
        show_image(panel, image, title, **PIXELS)
    figure.draw_without_rendering()
    for panel, step in zip(axes, found.values(), strict=True):
        _draw_found(panel, step, class_names, truth)
    return figure


def plot_scenes(
    images: Sequence[np.ndarray],
    found: Sequence[Detections],
    objects: Sequence[np.ndarray],
    class_names: Sequence[str],
) -> Figure:
    """Draws the detections of several images, and their objects dashed.

    `found`: the detections in each image. `objects`: float [M, 4], the boxes of its
    objects, for each image. `class_names`: by label.

    Raises: ValueError for arguments that do not fit.
    """
    if not images or not len(images) == len(found) == len(objects):
        raise ValueError(
            "there must be detections and objects for each image, and an image, got "
            f"{len(images)}, {len(found)} and {len(objects)}"
        )
    tallest = max(images, key=lambda image: image.shape[0] / image.shape[1])
    figure, axes = _panels(tallest, len(images))
    for panel, image in zip(axes, images, strict=True):
        show_image(panel, image, **PIXELS)
    figure.draw_without_rendering()
    for panel, step, truth in zip(axes, found, objects, strict=True):
        _draw_found(panel, step, class_names, truth)
    return figure


def _draw_found(
    axes: Axes, found: Detections, class_names: Sequence[str], truth: np.ndarray
) -> None:
    """Draws detections, with labels if they are few, and the objects' boxes dashed."""
    for box in truth:
        draw_box(axes, box, "white", linestyle="--", linewidth=1)
    few, order = len(found.boxes) <= 12, np.argsort(-found.scores, kind="stable")
    for k in order[::-1]:  # the best above the others
        color = color_of(found.labels[k])
        draw_box(axes, found.boxes[k], color, linewidth=2.0 if few else 1.0)
    taken: list[np.ndarray] = []
    for k in order if few else []:
        name, color = class_names[found.labels[k]], color_of(found.labels[k])
        draw_label(
            axes, found.boxes[k], name, color, taken, value=f"{found.scores[k]:.1f}"
        )


def _best_around(
    size: tuple[int, ...], boxes: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """The best score of all boxes around each pixel; NaN where there is none."""
    heat = np.full(size, np.nan)
    starts = np.clip(np.floor(boxes[:, :2]), 0, size).astype(int)
    stops = np.clip(np.ceil(boxes[:, 2:]), 0, size).astype(int)
    for k in np.argsort(scores, kind="stable"):  # better ones cover worse ones
        heat[starts[k, 0] : stops[k, 0], starts[k, 1] : stops[k, 1]] = scores[k]
    return heat


def _panels(
    image: np.ndarray, count: int, columns: int = 4
) -> tuple[Figure, list[Axes]]:
    """A figure of panels for an image, at most so many beside each other."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 [height, width, 3], got {image.dtype} "
            f"{list(image.shape)}"
        )
    ratio = image.shape[0] / image.shape[1]
    figure, axes = panels(count, min(columns, count), ratio, width=WIDTH)
    return figure, list(axes)


def _check_boxes(boxes: Any, name: str) -> np.ndarray:
    boxes = np.asarray(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise ValueError(
            f"{name} must be float [N, 4], (ymin, xmin, ymax, xmax) in pixels, with "
            f"N at least 1, got shape {boxes.shape}"
        )
    return boxes


def _check_windows(windows: np.ndarray, map_size: Size) -> np.ndarray:
    windows = np.asarray(windows)
    if windows.ndim != 2 or windows.shape[1] != 4 or windows.dtype.kind not in "iu":
        raise ValueError(
            "windows must be int [N, 4], (top, left, bottom, right), got "
            f"{windows.dtype} {windows.shape}"
        )
    starts, stops = windows[:, :2], windows[:, 2:]
    bad = (starts < 0) | (stops > map_size) | (starts >= stops)
    if bad.any():
        first = int(bad.any(axis=1).argmax())
        raise ValueError(
            f"window {first}, {windows[first].tolist()}, must hold a cell and lie "
            f"inside the map of {map_size[0]}×{map_size[1]}"
        )
    return windows
