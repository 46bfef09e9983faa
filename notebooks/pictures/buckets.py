"""Pictures of buckets: images in them, what they pad and cost, and that they agree.

They are for notebooks: a function takes plain arrays and returns a matplotlib figure,
which a notebook shows as it is and `figure.savefig` writes.

    plot_padded        images in their buckets, the padding hatched
    plot_choices       sizes as points, buckets as rectangles; padding against buckets
    plot_costs         what programs take to compile and to run; seconds for N images
    plot_features      the features of an image alone and in its bucket
    plot_differences   how far results are from those of each image alone

Images are uint8 [height, width, 3]; sizes and buckets are (height, width) in pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from notebooks.pictures.maps import FEATURES_COLORS, SCORES_COLORS
from sppnet_jax.buckets.choice import Bucket, Sizes, check_sizes
from sppnet_jax.buckets.table import (
    BucketRow,
    pad_to_bucket,
    padding_waste,
    smallest_bucket,
)
from sppnet_jax.run.figures import SMALL, TITLE, color_of, tidy

WIDTH = 9.0  # of a figure, in inches
LEAST = 1e-9  # where what is equal to the last bit is drawn on a logarithmic axis


def plot_padded(images: Sequence[np.ndarray], buckets: Sequence[Bucket]) -> Figure:
    """Draws each image at the top left of the smallest bucket that holds it.

    Raises: ValueError for no images, or one that no bucket holds.
    """
    if not len(images):
        raise ValueError("there are no images to draw")
    held = [smallest_bucket(_size(image), buckets) for image in images]
    tallest = max(height for height, _ in held)
    widths = [width / tallest for _, width in held]
    figure = Figure(
        figsize=(WIDTH, WIDTH / max(sum(widths), 2) + 0.6), layout="constrained"
    )
    panels = figure.subplots(1, len(images), squeeze=False, width_ratios=widths)[0]
    for axes, image, bucket in zip(panels, images, held, strict=True):
        (height, width), share = _size(image), padding_waste([_size(image)], [bucket])
        axes.imshow(pad_to_bucket(image, bucket), extent=(0, bucket[1], bucket[0], 0))
        for corner, wide, high in (
            ((width, 0), bucket[1] - width, bucket[0]),
            ((0, height), width, bucket[0] - height),
        ):
            padding = Rectangle(corner, wide, high, fill=False, hatch="///", ec="0.5")
            axes.add_patch(padding)
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, ec="white", lw=1))
        axes.set(xlim=(0, bucket[1]), ylim=(tallest, 0), xticks=[], yticks=[])
        axes.set_title(
            f"{height}×{width}\nin {bucket[0]}×{bucket[1]}\n{share:.0%} padding",
            fontsize=SMALL,
        )
        axes.spines[:].set_visible(False)
    return figure


def plot_choices(sizes: Sizes, choices: Sequence[Sequence[Bucket]]) -> Figure:
    """Draws sizes as points with the buckets of some choices, and what each pads.

    The first panels have three choices: the one of fewest buckets, one in the middle
    and the one of most. Each point has the colour of its bucket; larger points are more
    images. The last panel has the padded share of all choices.

    `choices`: sets of buckets, each of which holds every size.

    Raises: ValueError for no choices, or a size that no bucket of a choice holds.
    """
    if not len(choices):
        raise ValueError("there are no choices of buckets to draw")
    ordered = sorted(choices, key=len)
    waste = [padding_waste(sizes, choice) for choice in ordered]
    shown = [ordered[n] for n in sorted({0, len(ordered) // 2, len(ordered) - 1})]
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for axes, choice in zip(panels, shown, strict=False):
        _draw_choice(axes, sizes, choice)
    last = panels[-1]
    last.plot([len(choice) for choice in ordered], waste, "o-", color="black")
    last.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    last.set(ylim=(0, None))
    last.set_xlabel("buckets", fontsize=SMALL)
    last.set_title("padded share of the pixels", fontsize=TITLE)
    last.grid(alpha=0.3)
    tidy(last, labelsize=SMALL)
    return figure


def plot_costs(tables: Mapping[str, Sequence[BucketRow]], images: int = 500) -> Figure:
    """Draws what programs took to compile and to run, and what many images would take.

    The third panel is computed from the first two: every program of a table compiled,
    then the images one batch after the other. Where a table has one image in a batch,
    it is taken to be one of many with a program for each image.

    `tables`: rows of `BucketTable`s by a name, after images went through them.
    `images`: up to so many, all of distinct sizes, in the third panel.

    Raises: ValueError for a table whose programs have not run.
    """
    costs = {name: _cost(name, rows) for name, rows in tables.items()}
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    compiled, run, total = figure.subplots(1, 3)
    for place, (name, (programs, to_compile, to_run, alone)) in enumerate(
        costs.items()
    ):
        color = color_of(place)
        spots = place + np.linspace(-0.3, 0.3, len(to_compile) + 2)[1:-1]
        compiled.bar(spots, to_compile, 0.6 / len(to_compile), color=color)
        run.bar(spots, to_run * 1e3, 0.6 / len(to_run), color=color)
        count = np.arange(1, images + 1)
        each = np.full(images, to_run.mean())
        needed = count if alone else np.full(images, programs)
        seconds = needed * to_compile.mean() + np.cumsum(each)
        total.plot(count, seconds, color=color, label=name)
    for axes in (compiled, run):
        axes.set_xticks(range(len(costs)), list(costs), fontsize=SMALL)
    compiled.set_title("seconds to compile a program", fontsize=TITLE)
    run.set_title("milliseconds to run an image", fontsize=TITLE)
    total.set_title("seconds for N images of N sizes", fontsize=TITLE)
    total.set(yscale="log", xlim=(1, images))
    total.set_xlabel("N", fontsize=SMALL)
    total.legend(fontsize=SMALL, frameon=False)
    total.grid(alpha=0.3)
    for axes in (compiled, run, total):
        tidy(axes, labelsize=SMALL)
    return figure


def plot_features(alone: Any, padded: Any) -> Figure:
    """Draws the features of an image alone, those of its bucket, and their difference.

    The mean over channels; the white line is the image's part of the bucket's map. The
    last panel has the largest difference of a channel, and of what lies beyond that
    part the largest value: if all is well, nothing but rounding, and zero.

    `alone`: float [rows, columns, channels]. `padded`: the same of the bucket, no
    smaller.

    Raises: ValueError for arrays that do not fit.
    """
    alone, padded = np.asarray(alone, np.float64), np.asarray(padded, np.float64)
    fits = alone.ndim == padded.ndim == 3 and alone.shape[2] == padded.shape[2]
    if not fits or alone.shape[0] > padded.shape[0] or alone.shape[1] > padded.shape[1]:
        raise ValueError(
            "the features of an image are [rows, columns, channels], those of its "
            "bucket no smaller and of as many channels; got "
            f"{list(alone.shape)} and {list(padded.shape)}"
        )
    rows, columns = alone.shape[:2]
    missing = ((0, padded.shape[0] - rows), (0, padded.shape[1] - columns), (0, 0))
    difference = np.abs(padded - np.pad(alone, missing)).max(axis=2)
    largest = max(np.abs(alone).max(), np.finfo(float).tiny)
    beyond = max(
        np.abs(padded[rows:]).max(initial=0),
        np.abs(padded[:, columns:]).max(initial=0),
    )
    inside = difference[:rows, :columns].max() / largest
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, 3)
    top = alone.mean(axis=2).max()
    for axes, values, title in (
        (panels[0], alone.mean(axis=2), f"alone: {rows}×{columns} cells"),
        (
            panels[1],
            padded.mean(axis=2),
            "in its bucket: {}×{} cells".format(*padded.shape[:2]),
        ),
    ):
        picture = axes.imshow(values, cmap=FEATURES_COLORS, vmin=0, vmax=top or 1)
        axes.set_title(title, fontsize=TITLE)
    figure.colorbar(picture, ax=panels[:2], shrink=0.7, label="mean of channels")
    picture = panels[2].imshow(
        difference / largest, cmap=SCORES_COLORS, vmin=0, vmax=max(inside, 1e-7)
    )
    panels[2].set_title(
        f"difference, at most {inside:.1g} of the largest;\nbeyond: {beyond:g}",
        fontsize=TITLE,
    )
    figure.colorbar(picture, ax=panels[2], shrink=0.7)
    for axes, size in zip(panels, (alone, padded, padded), strict=True):
        frame = Rectangle((-0.5, -0.5), columns, rows, fill=False, ec="white", lw=1.5)
        axes.add_patch(frame)
        axes.set(xlim=(-0.6, padded.shape[1] - 0.4), ylim=(padded.shape[0] - 0.4, -0.6))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(size is not alone)
    return figure


def plot_differences(reference: Any, ways: Mapping[str, Any]) -> Figure:
    """Draws how far each image's results are from the reference, one dot an image.

    The largest difference of an image's values, relative to the largest of them all;
    and the share of images whose best class is the same.

    `reference`: float [images, classes]. `ways`: the same by a name.

    Raises: ValueError for arrays of other shapes.
    """
    reference = np.asarray(reference, np.float64)
    largest = np.abs(reference).max()
    figure = Figure(figsize=(WIDTH, 0.9 + 0.6 * len(ways)), layout="constrained")
    axes = figure.subplots()
    random = np.random.default_rng(0)
    for place, (name, values) in enumerate(ways.items()):
        values = np.asarray(values, np.float64)
        if values.shape != reference.shape or values.ndim != 2:
            raise ValueError(
                f"results are float [images, classes]: {name!r} is "
                f"{list(values.shape)}, the reference {list(reference.shape)}"
            )
        worst = np.abs(values - reference).max(axis=1) / largest
        equal = (values.argmax(axis=1) == reference.argmax(axis=1)).mean()
        spots = place + random.uniform(-0.25, 0.25, len(worst))
        color = color_of(place)
        axes.plot(np.maximum(worst, LEAST), spots, ".", color=color, alpha=0.6)
        axes.text(3, place, f"same class: {equal:.0%}", va="center", fontsize=SMALL)
    axes.axvline(float(np.finfo(np.float32).eps), color="0.5", linestyle=":")
    axes.set(xscale="log", xlim=(LEAST / 2, 40), ylim=(len(ways) - 0.5, -0.5))
    axes.set_yticks(range(len(ways)), list(ways), fontsize=TITLE)
    axes.set_xlabel(
        "largest difference of an image's logits, relative; dotted: float32's last bit",
        fontsize=SMALL,
    )
    tidy(axes, labelsize=SMALL)
    return figure


def _draw_choice(axes: Axes, sizes: Sizes, choice: Sequence[Bucket]) -> None:
    distinct, counts = np.unique(check_sizes(sizes), axis=0, return_counts=True)
    held = [smallest_bucket((int(h), int(w)), choice) for h, w in distinct]
    area = 4 + 40 * counts / counts.max()
    for number, bucket in enumerate(sorted(choice, key=np.prod, reverse=True)):
        color = color_of(number)
        box = Rectangle((0, 0), bucket[1], bucket[0], ec=color, fc=(color, 0.06))
        axes.add_patch(box)
        own = np.array([one == bucket for one in held])
        heights, widths = distinct[own].T
        axes.scatter(widths, heights, area[own], color=color, linewidths=0, alpha=0.6)
    longest = max(max(bucket) for bucket in choice) * 1.05
    axes.set(xlim=(0, longest), ylim=(longest, 0), aspect="equal")
    axes.set_xlabel("width, pixels", fontsize=SMALL)
    axes.set_ylabel("height, pixels", fontsize=SMALL)
    share, several = padding_waste(sizes, choice), "s" if len(choice) > 1 else ""
    axes.set_title(
        f"{len(choice)} bucket{several}: {share:.0%} padding", fontsize=TITLE
    )
    tidy(axes, labelsize=SMALL)


def _cost(
    name: str, rows: Sequence[BucketRow]
) -> tuple[int, np.ndarray, np.ndarray, bool]:
    """Programs, seconds to compile each, seconds an image, whether it runs alone."""
    if not rows or not all(row.calls and row.compile_seconds for row in rows):
        raise ValueError(
            f"the table {name!r} has buckets that no image went through: map images of "
            "all of them first"
        )
    compiled = np.array([row.compile_seconds for row in rows])
    run = np.array(
        [(row.seconds_per_call or 0) * row.calls / row.images for row in rows]
    )
    return len(rows), compiled, run, all(row.batch_size == 1 for row in rows)


def _size(image: np.ndarray) -> Bucket:
    return int(image.shape[0]), int(image.shape[1])
