"""Writes an experiment down: results.json, a Markdown table, a plot.

Each row holds what every seed measured; the paper's figures stand beside ours in
columns of their own, with how sure they are. What was not run says so.
"""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from scipy import stats

from experiments.presets import Network
from experiments.setting import Setting
from sppnet_jax.run import files

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

NOT_RUN = "not run"
_ABOUT_PAIRS = (
    "Pairs are networks that differ in one thing, at one seed. All are tested on the "
    "same images, so the intervals tell how it would go with other seeds, not with "
    "other images."
)


class Row(NamedTuple):
    """One line of a table.

    `measured`: by column, one share (0 to 1) for each seed that was run.
    `paper`: by column, the paper's share; `source`: "text" where it was read in the
    paper's text, "as recalled" where it is remembered from its tables.
    """

    label: str
    measured: dict[str, list[float]]
    paper: dict[str, float]
    source: str = "as recalled"


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


def network_rows(
    columns: Sequence[str],
    measured: Mapping[Network, Mapping[int, Sequence[float]]],
    paper: Mapping[Network, Sequence[float]],
    in_text: Sequence[Network] = (),
) -> list[Row]:
    """A row for each network of the paper, its shares in the order of the columns.

    `measured`: by network and seed. `in_text`: those whose figures are from the text.
    """
    return [
        Row(
            network.label,
            {
                column: [shares[number] for shares in measured[network].values()]
                for number, column in enumerate(columns)
            },
            dict(zip(columns, figures, strict=True)),
            "text" if network in in_text else "as recalled",
        )
        for network, figures in paper.items()
    ]


def write_report(
    setting: Setting,
    name: str,
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    claims: Sequence[Claim] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Writes NAME/results.json, table.md and plot.png; returns their folder."""
    folder = setting.folder / name
    results = {
        "experiment": name,
        "title": title,
        "preset": setting.preset_name,
        "seeds": list(setting.seeds),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": [_row_values(row) for row in rows],
        "claims": [
            {"claim": c.text, "verdict": c.verdict(), "differences": c.differences}
            for c in claims
        ],
        "notes": list(notes),
    }
    files.write_json(folder / "results.json", results)
    files.write_text(
        folder / "table.md", _markdown(title, columns, rows, claims, notes)
    )
    _plot(folder / "plot.png", title, columns, rows)
    return folder


def percent(values: Sequence[float]) -> str:
    """The mean over seeds in percent, with the standard deviation."""
    if not values:
        return NOT_RUN
    mean = f"{100 * np.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * np.std(values, ddof=1):.1f}"


def _row_values(row: Row) -> dict[str, Any]:
    return {
        "row": row.label,
        "measured": {
            column: {
                "values": values,
                "mean": float(np.mean(values)) if values else None,
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            }
            for column, values in row.measured.items()
        },
        "paper": row.paper,
        "paper_source": row.source if row.paper else None,
    }


def _markdown(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    claims: Sequence[Claim],
    notes: Sequence[str],
) -> str:
    heads = ["", *(f"{column}, here" for column in columns)]
    heads += [f"{column}, paper" for column in columns]
    lines = [f"# {title}", "", _line([*heads, "paper's figures"])]
    lines.append(_line(["---"] * (len(heads) + 1)))
    for row in rows:
        ours = [percent(row.measured.get(column, [])) for column in columns]
        papers = [
            f"{100 * row.paper[column]:.2f}" if column in row.paper else "–"
            for column in columns
        ]
        lines.append(_line([row.label, *ours, *papers, row.source * bool(row.paper)]))
    lines += ["", "In percent; mean ± standard deviation over the seeds.", ""]
    if claims:
        lines.append(f"- {_ABOUT_PAIRS}")
    lines += [f"- {claim.text}: {claim.verdict()}." for claim in claims]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plot(path: Path, title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Each row's seeds and mean; the paper's figures on axes of their own."""
    panels = [
        (column, ours)
        for column in columns
        for ours in (True, False)
        if ours or any(column in row.paper for row in rows)
    ]
    figure, (all_axes,) = plt.subplots(
        1,
        len(panels),
        figsize=(2.5 + 3.2 * len(panels), 1.6 + 0.32 * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title)
    heights = np.arange(len(rows))[::-1]
    for axes, (column, ours) in zip(all_axes, panels, strict=True):
        for height, row in zip(heights, rows, strict=True):
            if ours:
                _draw_seeds(axes, height, row.measured.get(column, []))
            elif column in row.paper:
                axes.plot(100 * row.paper[column], height, "D", color="C1")
        of = "here\n(mean ± sd; gray: seeds)" if ours else "paper"
        axes.set_xlabel(f"{column} in %, {of}")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_yticks(heights, [row.label for row in rows])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_seeds(axes: Axes, height: float, values: Sequence[float]) -> None:
    if not values:
        where = axes.get_yaxis_transform()
        axes.text(0.03, height, NOT_RUN, transform=where, va="center", color="0.6")
        return
    seeds = [100 * value for value in values]
    spread = np.std(seeds, ddof=1) if len(seeds) > 1 else 0.0
    axes.errorbar(np.mean(seeds), height, xerr=spread, fmt="o", color="C0", capsize=3)
    axes.plot(seeds, [height] * len(seeds), "o", color="0.6", ms=4)
