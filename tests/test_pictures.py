"""The pictures of a run."""

import json

import cv2
import pytest

from sppnet_jax.classification import pictures as plots
from sppnet_jax.run.metrics import MetricsLog, read_metrics
from sppnet_jax.run.run_folder import save_config
from sppnet_jax.training import curves
from sppnet_jax.training.curves import _views, plot_training
from tests.data_helpers import picture


def test_the_curves_of_a_run_are_drawn_even_from_a_single_row(tmp_path):
    with MetricsLog(tmp_path, resumed_step=0) as log:
        log.write("train", 1, {"epoch": 0.5, "loss": 2.0})
    drawn = cv2.imread(str(plot_training(tmp_path)))
    assert drawn.std() > 1


@pytest.mark.filterwarnings("ignore:Glyph")
def test_predictions_are_drawn_whatever_the_class_names(tmp_path):
    names = ["cat", "c^$\\x$", "ワニ", "a_{b}"]
    shown = [
        plots.Prediction(picture(20 + 9 * k, 60), name, 0.5, label)
        for k, (name, label) in enumerate(zip(names, [None, *names], strict=False))
    ]
    drawn = cv2.imread(str(plots.plot_predictions(shown, tmp_path / "drawn.png")))
    assert drawn.std() > 10


def test_the_curves_of_a_frozen_trunk_say_how_its_images_were_seen():
    assert _views({}) == ("augmented", "centre crop")
    frozen = {"model": {"trainable": "head"}, "data": {"view": "full"}}
    assert _views(frozen) == ("whole images", "whole images")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_curves_say_where_the_training_loss_is_of_smoothed_labels(
    tmp_path, monkeypatch, smoothing
):
    drawn = []
    monkeypatch.setattr(
        curves, "save_figure", lambda figure, path: drawn.append(figure)
    )
    settings = {"seed": 0, "data": {}, "optimizer": {"label_smoothing": smoothing}}
    save_config(tmp_path, settings)
    with MetricsLog(tmp_path, resumed_step=0) as log:
        log.write("train_epoch", 1, {"epoch": 1, "loss": 2.0, "accuracy": 0.5})
    plot_training(tmp_path)
    (label,) = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert ("smoothed labels" in label) == bool(smoothing)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_thousands_of_predictions_are_a_picture_of_the_first(tmp_path):
    shown = [plots.Prediction(picture(8, 8), "$_|" * 77, 0.5, "猫" * 76)] * 2000
    drawn = cv2.imread(str(plots.plot_predictions(shown, tmp_path / "drawn.png")))
    assert max(drawn.shape) < 3000


def test_a_damaged_line_of_metrics_loses_no_other(tmp_path, caplog):
    rows = [{"split": "train", "step": step, "loss": 1.0} for step in range(1, 6)]
    lines = [json.dumps(row) for row in rows]
    lines[2] = '{"split": "tra'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"spl')
    assert read_metrics(tmp_path) == [row for row in rows if row["step"] != 3]
    assert "2 damaged lines are left out" in caplog.text
