"""Writes an experiment down: results.json, a Markdown table, a plot.

A row holds what was measured, by column: shares, one for each seed, or seconds, one for
each image. The paper's figures stand beside ours, each with how sure it is. A cell that
is not measured yet says so, and has no place in results.json.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.runs import DetectionSetting, NetworkRecipe, Setting
from sppnet_jax.benchmarks.report import cell, machine
from sppnet_jax.run import files
from sppnet_jax.run.figures import save_figure

NOT_RUN = "not run"
TEXT, RECALLED = "text", "as recalled"
_ABOUT_PAIRS = (
    "Pairs are networks that differ in one thing, at one seed. All are tested on the "
    "same images, so the intervals tell how it would go with other seeds, not with "
    "other images."
)
_ABOUT_PAPER = (
    "The paper's figures: VOC 2007, a full-width network trained on ImageNet; those "
    "marked (text) are from its text, all others as we recall its tables."
)


class Cited(NamedTuple):
    """A figure of the paper's; `source`: TEXT, or RECALLED for one of its tables."""

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
    paper: dict[str, Cited]


class Claim(NamedTuple):
    """A claim of the paper, and our differences that speak for it where positive."""

    text: str
    differences: list[float]

    def mean_and_interval(self) -> tuple[float, float, float]:
        """The mean difference and its 95 % interval (Student's t)."""
        count = len(self.differences)
        mean = float(np.mean(self.differences))
        if count < 2:
            return mean, -np.inf, np.inf
        error = float(np.std(self.differences, ddof=1)) / count**0.5
        half = float(stats.t.ppf(0.975, count - 1)) * error
        return mean, mean - half, mean + half

    def verdict(self) -> str:
        """Whether it holds here, in words."""
        if not self.differences:
            return NOT_RUN
        mean, low, high = self.mean_and_interval()
        found = "not shown here: the interval holds zero"
        if low > 0:
            found = "holds here"
        elif high < 0:
            found = "does not hold here: the opposite was measured"
        between = f"{100 * low:+.1f} to {100 * high:+.1f}"
        if len(self.differences) < 2:
            between, found = "unknown", "not shown here: a single difference"
        return (
            f"{found} ({100 * mean:+.1f} points, 95 % interval {between}, from "
            f"{len(self.differences)} pairs)"
        )


class Ratio(NamedTuple):
    """The seconds of one thing over those of another: one ratio for each image."""

    text: str
    values: list[float]
    paper: Cited | None = None

    def verdict(self) -> str:
        """Our ratio beside the paper's, in words."""
        found = f"{cell(float(np.median(self.values)))}×"
        if len(self.values) > 1:
            low, high = min(self.values), max(self.values)
            found += f" ({cell(low)} to {cell(high)} over the images)"
        if self.paper:
            source = " (text)" if self.paper.source == TEXT else ""
            found += f"; the paper: {self.paper.value:g}×{source}"
        return found


def differences(
    higher: Mapping[int, Any], lower: Mapping[int, Any], of: Callable[[Any], float]
) -> list[float]:
    """How much higher the first is, for each seed that has both.

    `of`: the number that is compared, of what there is for a seed.
    """
    return [of(high) - of(lower[s]) for s, high in higher.items() if s in lower]


def network_rows(
    columns: Sequence[str],
    measured: Mapping[NetworkRecipe, Mapping[int, Sequence[float]]],
    paper: Mapping[NetworkRecipe, Sequence[float]],
    in_text: Sequence[NetworkRecipe] = (),
) -> list[Row]:
    """A row for each network of the paper, its shares in the order of the columns.

    `measured`: by network and seed. `in_text`: those whose figures are from the text.
    """
    rows = []
    for recipe, figures in paper.items():
        source = TEXT if recipe in in_text else RECALLED
        ours = zip(*measured[recipe].values(), strict=True)
        shares = [list(column) for column in ours] or [[] for _ in columns]
        rows.append(
            Row(
                recipe.label,
                dict(zip(columns, shares, strict=True)),
                {c: Cited(f, source) for c, f in zip(columns, figures, strict=True)},
            )
        )
    return rows


def write_network_report(
    given: Setting,
    name: str,
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    claims: Sequence[Claim],
    notes: Sequence[str],
) -> Path:
    """Writes the report of an experiment on networks, shares alone, and plots it."""
    folder = write_report(
        given,
        name,
        title=title,
        columns=[Column(column) for column in columns],
        rows=rows,
        claims=claims,
        notes=notes,
        figures_apart=True,
    )
    plot_shares(folder, title, {column: [column] for column in columns}, rows)
    return folder


def write_report(
    given: Setting | DetectionSetting,
    name: str,
    *,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    claims: Sequence[Claim] = (),
    ratios: Sequence[Ratio] = (),
    notes: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    figures_apart: bool = False,
) -> Path:
    """Writes NAME/results.json and NAME/table.md; returns their folder.

    `about`: what else to keep in results.json. `figures_apart`: the paper's figures
    come last, with a column for their source; else each stands beside ours.
    """
    folder = given.folder / name
    results = {
        "experiment": name,
        "title": title,
        "preset": given.preset_name,
        "seeds": list(given.seeds),
        **(about or {}),
        **machine(),
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
    lines = [f"# {title}", "", *_table(columns, rows, figures_apart), ""]
    if figures_apart:
        lines += ["In percent; mean ± standard deviation over the seeds.", ""]
        lines += [f"- {_ABOUT_PAIRS}"] if claims else []
    elif any(column.unit == "%" for column in columns):
        lines.append("- mAP in percent, mean ± standard deviation over the seeds.")
    if any(column.unit == "s" for column in columns):
        lines.append("- Seconds an image, the median over the images.")
    lines += [f"- {claim.text}: {claim.verdict()}." for claim in claims]
    lines += [f"- {ratio.text}: {ratio.verdict()}." for ratio in ratios]
    lines += [f"- {note}" for note in notes]
    cited = any(row.paper for row in rows)
    lines += [f"- {_ABOUT_PAPER}"] if cited and not figures_apart else []
    files.write_text(folder / "table.md", "\n".join(lines) + "\n")
    return folder


def plot_shares(
    folder: Path, title: str, panels: Mapping[str, Sequence[str]], rows: Sequence[Row]
) -> None:
    """Draws plot.png: shares over the rows, ours and, where there are any, the paper's.

    `panels`: the columns that are drawn together, by what they are called.
    """
    drawn = [
        (name, columns, ours)
        for name, columns in panels.items()
        for ours in (True, False)
        if ours or any(column in row.paper for row in rows for column in columns)
    ]
    size = (2.5 + 3.2 * len(drawn), 1.6 + 0.4 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (name, columns, ours) in zip(all_axes, drawn, strict=True):
        draw_shares(axes, name, columns, rows, ours=ours)
        if len(columns) > 1 and ours:
            for number, column in enumerate(columns):
                axes.plot([], [], "o", color=f"C{number}", label=column)
            figure.legend(loc="outside right center", frameon=False)
    save_figure(figure, folder / "plot.png")


def draw_shares(
    axes: Axes, name: str, columns: Sequence[str], rows: Sequence[Row], *, ours: bool
) -> None:
    """One panel: shares in percent over the rows, every seed's and the means of ours.

    `name`: of the columns together. `ours`: ours, not the paper's.
    """
    heights = np.arange(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        if ours and not any(row.measured.get(column) for column in columns):
            where = axes.get_yaxis_transform()
            axes.text(0.03, height, NOT_RUN, transform=where, va="center", color="0.6")
        for number, column in enumerate(columns):
            place = height + 0.4 * ((len(columns) - 1) / 2 - number) / len(columns)
            color = f"C{number}"
            if not ours and column in row.paper:
                axes.plot(100 * row.paper[column].value, place, "D", color=color)
            seeds = [100 * value for value in row.measured.get(column, ())]
            if ours and seeds:
                axes.plot(seeds, [place] * len(seeds), "o", color="0.6", ms=4)
                mean = np.mean(seeds)
                sd = np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0
                axes.errorbar(mean, place, xerr=sd, fmt="o", color=color, capsize=3)
    of = "here\n(mean ± sd; gray: seeds)" if ours else "paper"
    axes.set_xlabel(f"{name} in %, {of}")
    axes.set_yticks(heights, [row.label for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _row_values(row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    measured: dict[str, dict[str, Any]] = {}
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


def _table(
    columns: Sequence[Column], rows: Sequence[Row], figures_apart: bool
) -> list[str]:
    """The lines of the table, made column by column."""
    here, paper = [], []
    for column in columns:
        name = f"{column.name}, s" if column.unit == "s" else column.name
        ours = [_ours(row.measured.get(column.name), column) for row in rows]
        here.append([f"{name}, here" if column.paper else name, *ours])
        figures = [row.paper.get(column.name) for row in rows]
        theirs = [_theirs(figure, column, figures_apart) for figure in figures]
        paper.append([f"{name}, paper", *theirs] if column.paper else [])
    if figures_apart:
        sources = [" or ".join({f.source for f in row.paper.values()}) for row in rows]
        cells = [*here, *paper, ["paper's figures", *sources]]
    else:
        cells = [one for pair in zip(here, paper, strict=True) for one in pair if one]
    labels = ["", *(row.label for row in rows)]
    head, *lines = zip(labels, *cells, strict=True)
    return [f"| {' | '.join(own)} |" for own in (head, ["---"] * len(head), *lines)]


def _ours(values: Sequence[float] | None, column: Column) -> str:
    if not values:
        return "–" if values is None else NOT_RUN
    return percent(values) if column.unit == "%" else cell(float(np.median(values)))


def _theirs(figure: Cited | None, column: Column, apart: bool) -> str:
    if figure is None:
        return "–"
    if apart:
        return f"{100 * figure.value:.2f}"
    value = f"{100 * figure.value:.1f}" if column.unit == "%" else f"{figure.value:g}"
    return f"{value} (text)" if figure.source == TEXT else value


def percent(values: Sequence[float]) -> str:
    """The mean over seeds in percent, with the standard deviation."""
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"
