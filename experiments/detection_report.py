"""Writes a detection experiment down: results.json, a Markdown table, a plot.

A row holds what was measured, by column: average precisions, one for each seed, or
seconds, one for each image. The paper's figures stand beside ours, each with how sure
it is. A cell that is not measured yet says so, and has no place in results.json.
"""

import datetime
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np

from experiments.report import NOT_RUN, Claim, percent

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from sppnet_jax.run import files
from sppnet_jax.run.figures import save_figure

TEXT, RECALLED = "text", "as we recall it"
_ABOUT_PAPER = (
    "The paper's figures: VOC 2007, a full-width network trained on ImageNet; those "
    "marked (text) are from its text, all others as we recall its tables."
)


class Figure(NamedTuple):
    """A number of the paper's; `source`: TEXT, or RECALLED for one of its tables."""

    value: float
    source: str = RECALLED


class Column(NamedTuple):
    """`unit`: "%" of shares from 0 to 1, a mean over seeds; "s", a median over images.

    `paper`: whether the paper's figures get a column.
    """

    name: str
    unit: str = "%"
    paper: bool = True


class Row(NamedTuple):
    """One line of a table: by column, what was measured, and the paper's figures.

    An empty list is not measured yet; a column that is missing does not apply.
    """

    label: str
    measured: dict[str, list[float]]
    paper: dict[str, Figure]


class Ratio(NamedTuple):
    """The seconds of one thing over those of another: one ratio for each image."""

    text: str
    values: list[float]
    paper: Figure | None = None

    def verdict(self) -> str:
        """Our ratio beside the paper's, in words."""
        found = f"{_digits(np.median(self.values))}×"
        if len(self.values) > 1:
            low, high = min(self.values), max(self.values)
            found += f" ({_digits(low)} to {_digits(high)} over the images)"
        if self.paper:
            source = " (text)" if self.paper.source == TEXT else ""
            found += f"; the paper: {self.paper.value:g}×{source}"
        return found


def write_results(
    folder: Path,
    *,
    title: str,
    about: dict[str, Any],
    columns: Sequence[Column],
    rows: Sequence[Row],
    claims: Sequence[Claim] = (),
    ratios: Sequence[Ratio] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes results.json and table.md into an experiment's folder, which it makes.

    `about`: what else to keep in results.json, such as the preset and the seeds.
    """
    results = {
        "experiment": folder.name,
        "title": title,
        **about,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": [_row_values(row, columns) for row in rows],
        "claims": [
            {"claim": c.text, "verdict": c.verdict(), "differences": c.differences}
            for c in claims
        ],
        "ratios": [
            {
                "ratio": r.text,
                "values": r.values,
                "median": float(np.median(r.values)),
                "paper": r.paper._asdict() if r.paper else None,
            }
            for r in ratios
        ],
        "notes": list(notes),
    }
    files.write_json(folder / "results.json", results)
    text = _markdown(title, columns, rows, claims, ratios, notes)
    files.write_text(folder / "table.md", text)


def plot_precisions(
    path: Path, title: str, columns: Sequence[str], rows: Sequence[Row]
) -> None:
    """Draws the columns over the rows: our seeds and means, and the paper's."""
    figure, (here, paper) = plt.subplots(
        1,
        2,
        figsize=(10, 1.8 + 0.4 * len(rows)),
        sharey=True,
        layout="constrained",
    )
    figure.suptitle(title)
    draw_precisions(here, columns, rows, ours=True)
    draw_precisions(paper, columns, rows, ours=False)
    handles = [
        Line2D([], [], color=f"C{number}", marker="o", linestyle="", label=column)
        for number, column in enumerate(columns)
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    save_figure(figure, path)


def draw_precisions(
    axes: Axes, columns: Sequence[str], rows: Sequence[Row], *, ours: bool
) -> None:
    """One panel: shares in percent over the rows, ours or the paper's."""
    heights = np.arange(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        if ours and not any(row.measured.get(column) for column in columns):
            where = axes.get_yaxis_transform()
            axes.text(0.03, height, NOT_RUN, transform=where, va="center", color="0.6")
        for number, column in enumerate(columns):
            place = height + 0.4 * ((len(columns) - 1) / 2 - number) / len(columns)
            if ours:
                _draw_seeds(axes, place, row.measured.get(column, []), f"C{number}")
            elif column in row.paper:
                value = 100 * row.paper[column].value
                axes.plot(value, place, "D", color=f"C{number}")
    axes.set_xlabel("mAP in %, here" if ours else "mAP in %, paper")
    axes.set_yticks(heights, [row.label for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_seeds(axes: Axes, height: float, values: Sequence[float], color: str) -> None:
    if not values:
        return
    seeds = [100 * value for value in values]
    spread = np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0
    axes.plot(seeds, [height] * len(seeds), "o", color="0.6", ms=4)
    axes.errorbar(np.mean(seeds), height, xerr=spread, fmt="o", color=color, capsize=3)


def _row_values(row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    measured = {}
    for column in columns:
        values = row.measured.get(column.name, [])
        if values and column.unit == "%":
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            numbers = {"mean": float(np.mean(values)), "sd": sd}
            measured[column.name] = {"values": values, **numbers}
        elif values:
            median = float(np.median(values))
            measured[column.name] = {"values": values, "median": median}
    paper = {name: figure._asdict() for name, figure in row.paper.items()}
    return {"row": row.label, "measured": measured, "paper": paper}


def _markdown(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    claims: Sequence[Claim],
    ratios: Sequence[Ratio],
    notes: Sequence[str],
) -> str:
    heads = [""]
    for column in columns:
        name = f"{column.name}, s" if column.unit == "s" else column.name
        heads += [f"{name}, here", f"{name}, paper"] if column.paper else [name]
    lines = [f"# {title}", "", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        cells = [row.label]
        for column in columns:
            cells.append(_ours(row.measured.get(column.name), column))
            if column.paper:
                cells.append(_theirs(row.paper.get(column.name), column))
        lines.append(_line(cells))
    lines.append("")
    if any(column.unit == "%" for column in columns):
        lines.append("- mAP in percent, mean ± standard deviation over the seeds.")
    if any(column.unit == "s" for column in columns):
        lines.append("- Seconds an image, the median over the images.")
    lines += [f"- {claim.text}: {claim.verdict()}." for claim in claims]
    lines += [f"- {ratio.text}: {ratio.verdict()}." for ratio in ratios]
    lines += [f"- {note}" for note in [*notes, _ABOUT_PAPER]]
    return "\n".join(lines) + "\n"


def _ours(values: Sequence[float] | None, column: Column) -> str:
    if not values:
        return "–" if values is None else NOT_RUN
    return percent(values) if column.unit == "%" else _digits(float(np.median(values)))


def _theirs(figure: Figure | None, column: Column) -> str:
    if figure is None:
        return "–"
    value = f"{100 * figure.value:.1f}" if column.unit == "%" else f"{figure.value:g}"
    return f"{value} (text)" if figure.source == TEXT else value


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _digits(value: float) -> str:
    """Three digits, but none before the point dropped."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
