"""An ablation written down: a table, and accuracy over the size of fc6.

Both take the rows of `sppnet_jax.ablation.ablate`, or other rows with their fields.
"""

from collections.abc import Sequence

import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.ablation import AblationRow, Levels, label


class Table(str):
    """A table in Markdown: text to print, and a table where a notebook shows it."""

    def _repr_markdown_(self) -> str:
        return str(self)


def ablation_table(rows: Sequence[AblationRow]) -> Table:
    """A line for each pyramid, in the order of the rows; mean ± sd over its seeds.

    The standard deviation is that of a sample; a single seed has none.

    Returns: Markdown, which a notebook shows as a table.
    Raises: ValueError without a row.
    """
    lines = [
        "| pyramid | bins | fc6's input | fc6's parameters | top-1 in % | networks "
        "| seconds of training |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for levels, group in _by_levels(rows).items():
        first, seconds = group[0], np.mean([row.seconds for row in group])
        cells = [
            label(levels),
            *(f"{n:,}" for n in (first.bins, first.fc6_inputs, first.fc6_parameters)),
            _mean_and_spread(_accuracies(group)),
            _count(group),
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return Table("\n".join(lines) + "\n")


def plot_ablation(rows: Sequence[AblationRow]) -> Figure:
    """Draws top-1 accuracy over fc6's parameters: every network, each pyramid's mean.

    A bar is the standard deviation over the seeds. A pyramid whose trainings all
    diverged is named below the axis.

    Returns: a figure, which a notebook shows; `figure.savefig` writes it.
    Raises: ValueError without a row.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lost = []
    for levels, group in _by_levels(rows).items():
        shares = 100 * np.array(_accuracies(group))
        if not len(shares):
            lost.append(label(levels))
            continue
        size = group[0].fc6_parameters
        axes.plot([size] * len(shares), shares, "o", color="0.65", markersize=5)
        spread = shares.std(ddof=1) if len(shares) > 1 else 0.0
        color, marker = ("C0", "o") if levels else ("C1", "D")
        axes.errorbar(
            size, shares.mean(), spread, fmt=marker, color=color, capsize=4, ms=8
        )
        axes.annotate(
            f"{label(levels)}\n{_bins(group[0].bins)}",
            (size, shares.mean()),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.margins(x=0.25, y=0.15)
    missing = f"\ndiverged: {', '.join(lost)}" if lost else ""
    axes.set_xlabel(f"parameters of fc6{missing}")
    axes.set_ylabel("top-1 accuracy in %")
    axes.set_title("gray: single networks; mean ± sd over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _by_levels(rows: Sequence[AblationRow]) -> dict[Levels, list[AblationRow]]:
    if not rows:
        raise ValueError("there is no row to show: give what ablate returned")
    groups: dict[Levels, list[AblationRow]] = {}
    for row in rows:
        groups.setdefault(row.levels, []).append(row)
    return groups


def _accuracies(group: Sequence[AblationRow]) -> list[float]:
    return [row.top1 for row in group if row.top1 is not None]


def _count(group: Sequence[AblationRow]) -> str:
    lost = sum(row.top1 is None for row in group)
    return f"{len(group)} ({lost} diverged)" if lost else f"{len(group)}"


def _mean_and_spread(shares: Sequence[float]) -> str:
    if not shares:
        return "–"
    mean = f"{100 * np.mean(shares):.1f}"
    return mean if len(shares) < 2 else f"{mean} ± {100 * np.std(shares, ddof=1):.1f}"


def _bins(count: int) -> str:
    return f"{count} bin{'s' * (count > 1)}"


def _short(value: float, _: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
