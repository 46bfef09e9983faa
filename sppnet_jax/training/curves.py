"""The picture of a training: loss and accuracy over its epochs."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sppnet_jax.network.model import HEAD_ONLY
from sppnet_jax.run.figures import save_figure, tidy
from sppnet_jax.run.metrics import read_metrics
from sppnet_jax.run.run_folder import CONFIG_FILE, load_config


def plot_training(workdir: Path) -> Path:
    """Draws loss and accuracy over epochs from metrics.jsonl; returns training.png."""
    rows = read_metrics(workdir)
    steps = [row for row in rows if row["split"] == "train"]
    epochs = [row for row in rows if row["split"] == "train_epoch"]
    tests = [row for row in rows if row["split"] == "validation"]
    figure = Figure((10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    file = workdir / CONFIG_FILE
    settings = load_config(workdir) if file.exists() else {}
    # Of smoothed labels, a perfect network's loss isn't 0.
    smoothed = settings.get("optimizer", {}).get("label_smoothing")
    of = ", smoothed labels" if smoothed else ""
    _line(left, steps, "loss", color="0.8", label="training, one batch")
    _line(left, epochs, "loss", color="C0", label=f"training, epoch mean{of}")
    _line(left, tests, "loss", color="C1", label="validation")
    left.set(xlabel="epoch", ylabel="loss (cross entropy)", ylim=(0, None))
    seen, tested = _views(settings)
    _line(right, epochs, "accuracy", color="C0", label=f"training, {seen}")
    _line(right, tests, "top1", color="C1", label=f"validation, {tested}")
    right.set(xlabel="epoch", ylabel="top-1 accuracy", ylim=(0, 1))
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    return save_figure(figure, workdir / "training.png")


def _views(settings: dict[str, Any]) -> tuple[str, str]:
    """How the images of the training and of the tests were seen, in words."""
    if settings.get("model", {}).get("trainable") != HEAD_ONLY:
        return "augmented", "centre crop"
    views = {"full": "whole images", "crop": "centre crop", "warp": "squares"}
    view = views[settings["data"]["view"]]
    return view, view


def _line(axes: Axes, rows: list[dict], name: str, **style: Any) -> None:
    if rows:
        axes.plot([r["epoch"] for r in rows], [r[name] for r in rows], **style)
