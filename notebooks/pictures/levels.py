"""Pictures of a pyramid: what each level sees of an image, and where gradients go.

They are for notebooks: a function takes plain arrays and returns a matplotlib figure,
which a notebook shows as it is and `figure.savefig` writes.

    plot_levels      the bins of each level, on the image and on its features
    plot_winners     which cells hold the maxima of each bin
    plot_gradients   where the gradient of a pooled bin lands, for max and for mean
    plot_sizes       images of several sizes, and vectors of one length

`bin_windows`, `bin_boxes`, `winning_cells` and `bin_gradient` give what they draw as
arrays. Images are uint8 [height, width, 3], as the network sees them; features are
float [rows, columns, channels], the map of one image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from notebooks.pictures.maps import (
    SCORES_COLORS,
    centers,
    check_features,
    check_fits,
    show_map,
    show_vector,
)
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.pyramid.pooling import (
    check_levels,
    num_bins,
    pyramid_bins,
    spatial_pyramid_pool,
)
from sppnet_jax.run.figures import TITLE, color_of, draw_box, panels, show_image


def plot_levels(
    image: np.ndarray, features: Any, levels: Sequence[int], geometry: Geometry
) -> Figure:
    """Draws the bins of each level on an image, and below on its features.

    A bin's place on the image is that of its cells: the squares around their
    receptive-field centres, a stride wide. (Each cell sees more than its square.) Bins
    are tinted, twice where they overlap; one bin of each level is filled.

    Raises: ValueError for arguments that do not fit.
    """
    features, levels = check_features(features), check_levels(levels)
    check_fits(features, image, geometry)
    rows, columns = features.shape[:2]
    means = features.mean(axis=2)
    figure, axes = _panels(image, 2, 1 + len(levels))
    show_image(axes[0, 0], image, "{}×{} pixels".format(*image.shape[:2]))
    x, y = np.meshgrid(centers(geometry, columns), centers(geometry, rows))
    axes[0, 0].plot(x.ravel(), y.ravel(), ".", color="white", markersize=4)
    show_map(axes[1, 0], means, f"{rows}×{columns} cells", cmap="gray")
    for number, level in enumerate(levels):
        above, below = axes[:, 1 + number]
        show_image(above, image, f"level {level}: {level}×{level} bins")
        show_map(below, means, "", cmap="gray")
        windows = bin_windows((rows, columns), (level,))
        color = color_of(number)
        _draw_bins(above, bin_boxes((rows, columns), (level,), geometry), level, color)
        _draw_bins(below, windows, level, color)
    return figure


def plot_winners(features: Any, levels: Sequence[int]) -> Figure:
    """Draws how many channels each cell gives the maximum of its bin, level by level.

    Each panel has its own scale, from none to most; white lines are bins. A channel
    that is nowhere above 0 in a bin has no winner there. In the last panel, all levels
    are together: what is dark reaches fc6 by no way.

    Raises: ValueError for arguments that do not fit.
    """
    features, levels = check_features(features), check_levels(levels)
    size, channels = features.shape[:2], features.shape[2]
    cells, won = winning_cells(features, levels), _has_winner(features, levels)
    reached = np.zeros(features.shape, bool)
    figure, axes = _panels(features, 1, 1 + len(levels))
    ends = np.cumsum([0, *(level * level for level in levels)])
    for number, level in enumerate(levels):
        part = slice(ends[number], ends[number + 1])
        _, channel = np.nonzero(won[part])
        rows, columns = cells[part][won[part]].T
        reached[rows, columns, channel] = True
        wins = np.zeros(size)
        np.add.at(wins, (rows, columns), 1 / channels)
        panel = axes[0, number]
        show_map(panel, wins, f"level {level}", cmap=SCORES_COLORS, vmin=0.0)
        for window in bin_windows(size, (level,)):
            draw_box(panel, window, "white", linewidth=0.8)
    share = reached.sum() / max(1, (features > 0).sum())
    title = f"all: {share:.0%} of what is above 0"
    show_map(axes[0, -1], reached.mean(axis=2), title, vmin=0.0)
    return figure


def plot_gradients(
    image: np.ndarray,
    features_of: Callable[[jax.Array], jax.Array],
    levels: Sequence[int],
    bins: Sequence[int],
    geometry: Geometry,
) -> Figure:
    """Draws where the gradient of pooled bins lands: on the features, on the image.

    A row for each bin: with max pooling on the features, with mean pooling, then both
    traced back to the image. What is differentiated is the bin's sum over the channels
    that are somewhere above 0 in it; what is shown are absolute values, summed over the
    channels, on the image in squares of 4×4 pixels. Crosses are the cells that win a
    channel.

    `features_of`: from float [height, width, 3] to features, differentiable.
    `bins`: numbers of the pyramid's bins, in its order.

    Raises: ValueError for arguments that do not fit.
    """
    levels = check_levels(levels)
    pixels = jnp.asarray(image, jnp.float32)
    mapped, back = jax.vjp(features_of, pixels)
    features = check_features(mapped)
    check_fits(features, image, geometry)
    boxes = bin_boxes(features.shape[:2], levels, geometry)
    windows, names = bin_windows(features.shape[:2], levels), _bin_names(levels)
    winners = winning_cells(features, levels)
    won = _has_winner(features, levels)
    figure, axes = _panels(image, len(bins), 5)
    for line, number in zip(axes, bins, strict=True):
        _check_bin(number, levels)
        show_image(line[0], image, names[number])
        draw_box(line[0], boxes[number], "white")
        for column, reducer in enumerate(("max", "mean")):
            on_map = bin_gradient(features, levels, number, reducer=reducer)
            on_map = on_map * won[number]
            (on_image,) = back(jnp.asarray(on_map, mapped.dtype))
            heat = np.abs(np.asarray(on_image)).sum(axis=2)
            style = {"cmap": SCORES_COLORS, "vmin": 0.0}
            left, right = line[1 + column], line[3 + column]
            show_image(left, abs(on_map).sum(axis=2), f"{reducer}, features", **style)
            draw_box(left, windows[number], "white")
            show_image(right, _blocks(heat, 4), f"{reducer}, image", **style)
        rows, columns = np.unique(winners[number][won[number]], axis=0).T
        line[1].plot(columns + 0.5, rows + 0.5, "x", color="white", markersize=5)
    return figure


def plot_sizes(
    images: Sequence[np.ndarray],
    maps: Sequence[Any],
    levels: Sequence[int],
) -> Figure:
    """Draws images of several sizes, their maps, and their pyramids of one size.

    Images are at one scale, and so are maps. The lowest row is what fc6 takes: a line
    for each bin, a column for each channel.

    `maps`: the features of each image.

    Raises: ValueError for arguments that do not fit.
    """
    levels = check_levels(levels)
    checked = [check_features(features) for features in maps]
    if len(images) != len(maps) or not images:
        raise ValueError(
            f"give one map for each image: there are {len(images)} images and "
            f"{len(maps)} maps"
        )
    pooled = [np.asarray(spatial_pyramid_pool(one, levels)) for one in checked]
    figure = Figure((9.0, 6.4), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False, height_ratios=(1.2, 1, 1.4))
    limits = Normalize(0.0, float(max(vector.max() for vector in pooled)) or 1.0)
    tall, wide = (max(image.shape[k] for image in images) for k in (0, 1))
    high, broad = (max(one.shape[k] for one in checked) for k in (0, 1))
    for number, (image, features, vector) in enumerate(
        zip(images, checked, pooled, strict=True)
    ):
        size = "{}×{} pixels".format(*image.shape[:2])
        show_image(axes[0, number], image, size)
        axes[0, number].set(xlim=(0, wide), ylim=(tall, 0))
        cells = "{}×{} cells".format(*features.shape[:2])
        show_map(axes[1, number], features.mean(axis=2), cells)
        axes[1, number].set(xlim=(0, broad), ylim=(high, 0))
        for panel in axes[:2, number]:
            panel.axis("off")
        show_vector(axes[2, number], vector, levels, norm=limits)
        axes[2, number].set_xticks([])
        axes[2, number].tick_params(labelleft=number == 0)
        axes[2, number].set_title("{}×{} numbers".format(*vector.shape), fontsize=TITLE)
    return figure


def bin_windows(map_size: Sequence[int], levels: Sequence[int]) -> np.ndarray:
    """The cells (top, left, bottom, right) of each bin, in the pyramid's order.

    `map_size`: (rows, columns) of the features.

    Returns: int [bins, 4], half-open.
    """
    windows = []
    for level in check_levels(levels):
        rows, columns = (pyramid_bins(int(size), level) for size in map_size)
        windows += [
            (top, left, bottom, right)
            for top, bottom in rows.tolist()
            for left, right in columns.tolist()
        ]
    return np.array(windows)


def bin_boxes(
    map_size: Sequence[int], levels: Sequence[int], geometry: Geometry
) -> np.ndarray:
    """The boxes that stand for each bin on the image, in its pixels.

    A cell stands for the square around its receptive-field centre, a stride wide.
    `boxes_to_windows` leads back to the bin.

    Returns: float [bins, 4], (ymin, xmin, ymax, xmax), half-open.
    """
    edges = bin_windows(map_size, levels) - 0.5
    # A pixel's middle is half a pixel from its edges, where boxes begin.
    return geometry.center + geometry.stride * edges + 0.5


def winning_cells(features: Any, levels: Sequence[int]) -> np.ndarray:
    """The cell (row, column) that holds each bin's maximum in each channel.

    Where cells tie, the first, row by row.

    Returns: int [bins, channels, 2].
    Raises: ValueError for arguments that do not fit.
    """
    features = check_features(features)
    cells = []
    for top, left, bottom, right in bin_windows(features.shape[:2], levels):
        inside = features[top:bottom, left:right]
        best = inside.reshape(-1, inside.shape[2]).argmax(axis=0)
        rows, columns = np.unravel_index(best, inside.shape[:2])
        cells.append(np.stack([top + rows, left + columns], axis=1))
    return np.stack(cells)


def bin_gradient(
    features: Any, levels: Sequence[int], number: int, *, reducer: str = "max"
) -> np.ndarray:
    """The gradient of one pooled bin, summed over its channels, by the features.

    `number`: of the bin, in the pyramid's order. `reducer`: "max" or "mean".

    Returns: float32 [rows, columns, channels].
    Raises: ValueError for arguments that do not fit.
    """
    features, levels = check_features(features), check_levels(levels)
    _check_bin(number, levels)

    def pooled(features: jax.Array) -> jax.Array:
        return spatial_pyramid_pool(features, levels, reducer=reducer)[number].sum()

    return np.asarray(jax.grad(pooled)(jnp.asarray(features)))


def _draw_bins(axes: Axes, boxes: np.ndarray, level: int, color: str) -> None:
    """Frames all bins of a level, neighbours a little apart; fills the middle one."""
    gap = 0.008 * max(np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim()))
    middle = level // 2 * level + level // 2
    for number, box in enumerate(boxes):
        inside = box + gap * np.array([1, 1, -1, -1])
        tint = 0.5 if number == middle else 0.12
        draw_box(axes, inside, color, fill=True, alpha=tint, linewidth=0)
        draw_box(axes, inside, color)


def _has_winner(features: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Whether a bin has a value above 0, for each channel: bool [bins, channels].

    After a ReLU, a channel without one is silent there: all its cells tie.
    """
    windows = bin_windows(features.shape[:2], levels)
    return np.stack(
        [
            (features[top:bottom, left:right] > 0).any(axis=(0, 1))
            for top, left, bottom, right in windows
        ]
    )


def _blocks(values: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of side×side, the last row and column of smaller ones."""
    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], side)
        counts = np.diff(np.append(starts, values.shape[axis]))
        sums = np.add.reduceat(values, starts, axis=axis)
        values = sums / np.expand_dims(counts, 1 - axis)
    return values


def _panels(picture: np.ndarray, lines: int, columns: int) -> tuple[Figure, Any]:
    """A figure of panels for pictures of one shape, and its axes [lines, columns]."""
    ratio = picture.shape[0] / picture.shape[1]
    figure, axes = panels(lines * columns, columns, ratio)
    return figure, axes.reshape(lines, columns)


def _bin_names(levels: tuple[int, ...]) -> list[str]:
    return [
        f"level {level}, bin ({row}, {column})"
        for level in levels
        for row in range(level)
        for column in range(level)
    ]


def _check_bin(number: int, levels: tuple[int, ...]) -> None:
    if not 0 <= number < num_bins(levels):
        raise ValueError(
            f"there is no bin {number}: the pyramid {levels} has {num_bins(levels)}, "
            "counted from 0"
        )
