"""The experiments: what they write, and that nothing is done twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    multi_view,
    setting,
    svm_features,
    table2_pyramid_and_multi_size,
    table3_full_image,
)
from experiments.report import TEXT, Cited, Claim, Row, percent, write_network_report
from experiments.runs import (
    NetworkRecipe,
    Preset,
    Setting,
    diverged,
    networks_of,
    settings_of,
)
from sppnet_jax.classification import views as protocols
from sppnet_jax.training import once
from sppnet_jax.training.step_log import DivergedError
from tests.data_helpers import write_two_colors

pytestmark = pytest.mark.usefixtures("shallow_zf5")

ZF5 = (
    NetworkRecipe("zf5", ()),
    NetworkRecipe("zf5"),
    NetworkRecipe("zf5", training="multi"),
)


def tiny_config(backbone):
    config = setting.PRESETS["folder"].make_config(backbone)
    config.epochs = 2
    config.batch_size = 8
    config.model.width = 0.02
    config.data.image_size = 64
    config.data.resize_side = 72
    config.log_steps = 0
    config.schedule.warmup_epochs = 0.0
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of one size, so that whole images need one program at each scale."""
    root = tmp_path_factory.mktemp("pictures")
    write_two_colors(root, 80, 96)
    return root


@pytest.fixture(scope="module")
def given(folder, digit_scenes_dir, tmp_path_factory):
    return Setting(
        preset_name="folder",
        preset=Preset(tiny_config, small=56, large=64, seeds=(0, 1)),
        folder=tmp_path_factory.mktemp("experiments"),
        seeds=(0, 1),
        root=str(folder),
        data_dir="",
    )


def results_of(given, name):
    return json.loads((given.folder / name / "results.json").read_text())


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on_without_training_again(given, monkeypatch):
    table2 = table2_pyramid_and_multi_size
    monkeypatch.setattr(
        table2, "PAPER", {network: table2.PAPER[network] for network in ZF5}
    )
    tested = table2.network_test

    def interrupted(workdirs, protocol):
        if workdirs[0].name == "zf5-6321-multi-seed0":
            raise KeyboardInterrupt
        return tested(workdirs, protocol)

    monkeypatch.setattr(table2, "network_test", interrupted)
    with pytest.raises(KeyboardInterrupt):
        table2.main(given)
    partial = results_of(given, "table2_pyramid_and_multi_size")
    done = ["top-1 error" in row["measured"] for row in partial["rows"]]
    assert done == [True, True, False]
    table = given.folder / "table2_pyramid_and_multi_size" / "table.md"
    assert "not run" in table.read_text()
    trained = (given.folder / "networks/zf5-6321-multi-seed0/checkpoints").stat()

    monkeypatch.setattr(table2, "network_test", tested)
    table2.main(given)
    again = (given.folder / "networks/zf5-6321-multi-seed0/checkpoints").stat()
    assert again.st_mtime_ns == trained.st_mtime_ns
    results = results_of(given, "table2_pyramid_and_multi_size")
    assert results["seeds"] == [0, 1]
    for row in results["rows"]:
        measured = row["measured"]["top-1 error"]
        assert len(measured["values"]) == 2
        assert measured["mean"] == pytest.approx(np.mean(measured["values"]))
        assert row["paper"]["top-1 error"]["value"] in (0.3599, 0.3498, 0.3460)
        assert row["paper"]["top-1 error"]["source"] == "as recalled"
    assert len(results["claims"][0]["differences"]) == 2
    spp = results["rows"][1]["measured"]
    for column, name in (("top-1 error", "top1"), ("top-5 error", "top5")):
        tests = [
            given.folder / f"networks/zf5-6321-single-seed{seed}/evaluate_ten_view.json"
            for seed in (0, 1)
        ]
        right = [json.loads(path.read_text())[f"{name}_correct"] for path in tests]
        assert spp[column]["values"] == [1 - correct / 8 for correct in right]
    assert (table.parent / "plot.png").stat().st_size > 10_000
    assert "not run" not in table.read_text()


@pytest.mark.slow
def test_every_experiment_shares_the_networks(given, monkeypatch):
    paper = {ZF5[1]: (0.38, 0.37)}
    monkeypatch.setattr(table3_full_image, "PAPER", paper)
    monkeypatch.setattr(multi_view, "NETWORK", ZF5[1])
    monkeypatch.setattr(protocols, "_PAPER_SCALES", (224, 256))  # for six
    views = {
        view._replace(network=ZF5[1]): figures
        for view, figures in svm_features.PAPER.items()
        if view.layer == "fc7"
    }
    monkeypatch.setattr(svm_features, "PAPER", views)
    for experiment in (table3_full_image, multi_view, svm_features):
        experiment.main(given)
        for row in results_of(given, experiment.NAME)["rows"]:
            assert all(0 <= m["mean"] <= 1 for m in row["measured"].values())
    made = {path.name for path in (given.folder / "networks").iterdir()}
    assert {"zf5-6321-single-seed0", "zf5-6321-single-seed1"} <= made
    rows = results_of(given, "multi_view")["rows"]
    assert rows[-1]["row"] == "2 networks combined"


def test_a_preset_that_was_changed_is_not_mixed_with_its_old_networks(given):
    one = given._replace(seeds=(0,))
    list(networks_of(one, ZF5[1:2]))

    def longer_config(name):
        config = tiny_config(name)
        config.epochs = 3
        return config

    longer = given.preset._replace(make_config=longer_config)
    with pytest.raises(ValueError, match=r"other settings, epochs=2, not 3: remove it"):
        list(networks_of(one._replace(preset=longer), ZF5[1:2]))
    with pytest.raises(ValueError, match=r"other settings, data.root="):
        list(networks_of(one._replace(root=str(given.folder)), ZF5[1:2]))


def test_a_network_that_diverges_is_left_out_and_named(given, monkeypatch, tmp_path):
    def diverge(settings, workdir, features):
        raise DivergedError("the loss is nan at step 7")

    monkeypatch.setattr(once, "train_network", diverge)
    elsewhere = given._replace(folder=tmp_path, seeds=(0,))
    for _ in range(2):  # also when it is run again
        with pytest.raises(DivergedError, match="every network diverged"):
            list(networks_of(elsewhere, ZF5[:1]))
        monkeypatch.setattr(once, "train_network", None)
    (note,) = diverged(elsewhere, ZF5)
    assert note == "The training of ZF-5, no SPP, seed 0, diverged: it is left out."


@pytest.mark.parametrize("name", setting.PRESETS)
@pytest.mark.parametrize("network", table2_pyramid_and_multi_size.PAPER)
def test_every_network_of_every_preset_can_be_trained(name, network):
    given = Setting(name, setting.PRESETS[name], Path(), (0,), "pictures", "")
    settings_of(given, network, 0)
    assert network.label.startswith(("ZF-5", "Convnet*-5", "Overfeat"))


def test_a_claim_holds_only_where_its_interval_is_above_zero():
    assert "holds here (+2.0" in Claim("", [0.01, 0.02, 0.03, 0.02]).verdict()
    assert "opposite was measured" in Claim("", [-0.02, -0.02, -0.03]).verdict()
    assert "holds zero" in Claim("", [-0.01, 0.02, 0.01]).verdict()
    assert "single difference" in Claim("", [0.5]).verdict()
    assert Claim("", []).verdict() == "not run"


def test_what_was_not_run_says_so_in_the_table(given, tmp_path):
    rows = [
        Row("first", {"error": [0.1, 0.2]}, {"error": Cited(0.3, TEXT)}),
        Row("b", {"error": []}, {}),
    ]
    folder = write_network_report(
        given._replace(folder=tmp_path),
        "x",
        title="T",
        columns=("error",),
        rows=rows,
        claims=(),
        notes=(),
    )
    lines = (folder / "table.md").read_text().splitlines()
    assert "| first | 15.0 ± 7.1 | 30.00 | text |" in lines
    assert "| b | not run | – |  |" in lines
    assert percent([0.5]) == "50.0"
