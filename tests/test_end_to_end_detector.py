"""Detectors that are trained end to end: on scenes, cut off, on several devices."""

import json
import logging
import os
import re
import shutil
import signal
import socket

import jax
import numpy as np
import pytest

from sppnet_jax.data.images import decode_image
from sppnet_jax.detection import maps
from sppnet_jax.detection.box_layer import BOX
from sppnet_jax.detection.box_split import open_split_of
from sppnet_jax.detection.detector_evaluation import evaluate_detectors
from sppnet_jax.detection.detector_training import train_detector
from sppnet_jax.detection.trained_detector import (
    detect_images,
    detect_split,
    load_detector,
)
from sppnet_jax.network import trunks
from sppnet_jax.network.pretrained import pretrained_params
from sppnet_jax.network.trained import load_network
from sppnet_jax.run import parallel, progress, run_folder, stages
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.settings import plain
from sppnet_jax.run.shares import Share
from tests.network_helpers import TINY, TINY_TRUNK, run_with_tiny_trunk
from tests.processes import Started
from tests.test_detect_command import write_classifier, write_scenes
from tests.test_pretrained_detector import make as make_pretrained

pytestmark = pytest.mark.slow  # all but a few

STEPS = 90


@pytest.fixture(scope="module")
def base(tiny_trunk, tmp_path_factory):
    """A folder of scenes, and weights."""
    base = tmp_path_factory.mktemp("detect")
    write_scenes(base / "voc")
    shutil.copy(tiny_trunk, base / "tiny.safetensors")
    return base


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="sppnet_jax")
    return caplog


def make(base, **changes):
    given = {
        "system": "end_to_end",
        "scorer": "softmax",
        "buckets": 1,
        "finetune.steps": STEPS,
        "finetune.images": 4,
        "finetune.batch_size": 64,
        "finetune.units": 24,
        "finetune.trainable": "conv2",
        "finetune.learning_rate": 0.02,
        "finetune.dropout": 0.0,
        "finetune.checkpoint_steps": 20,
    }
    return make_pretrained(base, **given | changes)


@pytest.fixture(scope="module")
def trained(base):
    workdir = base / "trained"
    train_detector(make(base), workdir)
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


def weights(workdir):
    with Checkpoints(workdir / "finetune/checkpoints") as checkpoints:
        return checkpoints.restore_params()


def all_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_it_finds_what_it_was_trained_on(trained):
    report = evaluate_detectors([trained])
    assert report["map_11_point"] > 0.4


def test_the_trunk_is_trained_from_the_named_layer_on(base, trained):
    before = pretrained_params(TINY_TRUNK, str(base / "tiny.safetensors"))
    after = load_detector(trained).network.params
    all_equal(after["conv1"], before["conv1"])
    assert np.abs(after["conv2"]["kernel"] - before["conv2"]["kernel"]).max() > 1e-3
    assert after[BOX]["kernel"].shape == (24, 2 * 4)


def test_its_box_layer_moves_boxes_where_regression_is_wanted(base, trained):
    split = open_split_of(make(base), "test", trained)
    there = [
        detect_split([load_detector(trained, settings)], split)
        for settings in (
            make(base, **{"test.vote": 0.0}),
            make(base, **{"test.vote": 0.0, "regression.enabled": False}),
        )
    ]
    moved, kept = (
        [
            bool((found.boxes[0] == proposals).all(axis=1).any())
            for found, proposals in zip(one, split.proposals, strict=True)
            if len(proposals)
        ]
        for one in there
    )
    assert all(kept)
    assert not any(moved)


def test_images_at_hand_show_what_a_split_does(base, trained):
    detector = load_detector(trained)
    split = open_split_of(make(base), "test", trained)
    image = decode_image(split.source.records[0]["image"])
    expected, found = (
        detect_split([detector], split)[0],
        detect_images([detector], [image])[0],
    )
    np.testing.assert_allclose(found.scores[:5], expected.scores[:5], atol=1e-4)
    np.testing.assert_allclose(found.boxes[:5], expected.boxes[:5], atol=0.05)


def train_elsewhere(settings, workdir, killed_after=0):
    """Trains in a process of its own; it is killed when so many windows are done."""

    def kill(bar, count):
        if bar == "end-to-end training" and count >= killed_after > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    progress.WATCHERS.append(kill)
    trunks.BACKBONES[TINY_TRUNK] = TINY
    train_detector(settings, workdir)


def test_killed_it_goes_on_to_the_same_bits(base, trained, tmp_path, log):
    given = make(base), tmp_path, 50 * 64
    ended = Started(train_elsewhere, *given, devices=4).end()
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not stages.is_done(tmp_path, "finetune")
    train_detector(make(base), tmp_path)
    assert re.search("end-to-end training goes on at step [24]0 of 90", log.text)
    all_equal(weights(tmp_path), weights(trained))


def test_one_device_learns_what_four_do(base, trained, tmp_path):
    settings = make(base, **{"finetune.steps": 3})
    train_detector(settings, tmp_path / "four")
    ended = Started(train_elsewhere, settings, tmp_path / "one", devices=1).end()
    assert not ended.returncode, ended.stderr
    jax.tree.map(
        lambda one, four: np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-5),
        weights(tmp_path / "one"),
        weights(tmp_path / "four"),
    )


def train_together(settings, workdir, port, index):
    """Trains as one of two processes."""
    parallel.join_processes(f"localhost:{port}", index, 2)
    trunks.BACKBONES[TINY_TRUNK] = TINY
    train_detector(settings, workdir, Share(index, 2))


def test_two_processes_train_together_as_one_does(base, tmp_path):
    """Two processes with two devices each, against one with four; and once more."""
    settings = make(base, **{"finetune.steps": 4, "finetune.checkpoint_steps": 2})
    train_detector(settings, tmp_path / "alone")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    records = []
    for _ in range(2):
        both = [
            Started(train_together, settings, tmp_path / "both", port, n, devices=2)
            for n in range(2)
        ]
        for ended in [one.end() for one in both]:
            assert not ended.returncode, ended.stderr
        records.append((tmp_path / "both/finetune/stage.json").read_text())
    assert records[0] == records[1]
    jax.tree.map(
        lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5),
        weights(tmp_path / "alone"),
        weights(tmp_path / "both"),
    )
    load_detector(tmp_path / "both")


def test_processes_that_are_not_joined_leave_the_training_to_the_first(
    base, tmp_path, monkeypatch
):
    settings = make(base, **{"finetune.steps": 2, "cache": str(tmp_path / "cache")})
    monkeypatch.setattr(maps, "map_whole_images", None)
    train_detector(settings, tmp_path / "run", Share(1, 2))
    assert not (tmp_path / "run").exists()
    assert len(list(tmp_path.glob("cache/proposals/*/*.npy"))) == 11
    train_detector(settings, tmp_path / "run", Share(0, 2))
    load_detector(tmp_path / "run")


def test_svms_learn_from_the_trained_trunk(base, copy, log):
    train_detector(make(base, scorer="svm", layer="fc7"), copy)
    assert "stage finetune is done" in log.text
    report = evaluate_detectors([copy])
    assert report["map_11_point"] > 0.4


def test_a_test_convolves_anew_with_the_trained_trunk(base, copy, monkeypatch):
    """Its maps are not those of the trunk that training began with."""

    def refuse(*_, **__):
        raise AssertionError("a map is computed")

    train_detector(
        make(
            base, scorer="svm", system="spp", layer="pyramid", **{"finetune.steps": 0}
        ),
        copy.with_name("frozen"),
    )
    evaluate_detectors([copy.with_name("frozen")])
    evaluate_detectors([copy])
    monkeypatch.setattr(maps, "map_whole_images", refuse)
    evaluate_detectors([copy])
    train_detector(make(base, **{"finetune.steps": 2}), copy)
    with pytest.raises(AssertionError, match="a map is computed"):
        evaluate_detectors([copy])


@pytest.mark.parametrize(
    "changes",
    [
        {"finetune.bfloat16": True},
        {"scales": (60, 90), "buckets": 2},
        {"finetune.trainable": "head"},
        {"finetune.trainable": "all", "finetune.flip": False},
        {"levels": (3,), "reducer": "mean"},
    ],
)
def test_other_settings_train_and_are_tested_too(base, tmp_path, changes):
    before = pretrained_params(TINY_TRUNK, str(base / "tiny.safetensors"))
    train_detector(make(base, **{"finetune.steps": 2}, **changes), tmp_path)
    after = load_detector(tmp_path).network.params
    frozen = [
        name
        for name in before
        if name in after
        and (np.array_equal(before[name]["kernel"], after[name]["kernel"]))
    ]
    trainable = changes.get("finetune.trainable", "conv2")
    expected = {"head": ["conv1", "conv2"], "all": [], "conv2": ["conv1"]}
    assert sorted(frozen) == expected[trainable]
    assert np.isfinite(evaluate_detectors([tmp_path])["map_11_point"])


def test_a_classifier_of_the_paper_s_is_trained_on_with_its_fc_layers(base, tmp_path):
    write_classifier(tmp_path / "classifier", levels=(2, 1))
    given = {"network": str(tmp_path / "classifier"), "levels": ()}
    given |= {"finetune.steps": 2, "finetune.trainable": "conv3", "reducer": ""}
    train_detector(make(base, **given), tmp_path / "run")
    before = load_network(tmp_path / "classifier").params
    after = load_detector(tmp_path / "run").network.params
    for name in ("conv1", "conv2"):
        all_equal(after[name], before[name])
    for name in ("conv3", "conv5", "fc6", "fc7"):
        there, here = before[name]["kernel"], after[name]["kernel"]
        assert there.shape == here.shape
        assert 0 < np.abs(there - here).max() < 0.1 * np.abs(there).max()


def experiment(base, workdir, *arguments):
    """The experiment of that name, with networks of a few steps."""
    settings = make(base, **{"finetune.steps": 2})
    run_folder.save_config(workdir.parent, plain(settings))
    config = workdir.parent / "config.py"
    config.write_text(
        "import json, pathlib\n"
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    path = pathlib.Path({str(workdir.parent / 'config.json')!r})\n"
        "    return ConfigDict(json.loads(path.read_text()))\n"
    )
    given = [f"--config={config}", f"--workdir={workdir}", "--seeds=0", *arguments]
    run = run_with_tiny_trunk, "experiments.end_to_end", given
    ended = Started(*run, devices=4).end()
    assert not ended.returncode, ended.stderr
    return json.loads((workdir / "end_to_end/results.json").read_text()), ended.stderr


def test_the_experiment_fills_its_table_and_keeps_what_is_there(base, tmp_path):
    workdir = tmp_path / "experiment"
    first, _ = experiment(base, workdir, "--pyramids=21", "--trained=everything")
    rows = {row["row"]: row["measured"] for row in first["rows"]}
    assert rows["{2,1}, everything"].keys() == {"SVM", "softmax"}
    assert not rows["{2,1}, fc layers"]
    again, told = experiment(base, workdir, "--pyramids=21,7", "--trained=nothing")
    assert "21-everything" not in told
    after = {row["row"]: row["measured"] for row in again["rows"]}
    assert after["{2,1}, everything"] == rows["{2,1}, everything"]
    assert after["{7}, trunk frozen, no fc layers"].keys() == {"SVM"}
    table = (workdir / "end_to_end/table.md").read_text()
    assert "| {7}, everything | not run | not run |" in table
    assert "{2,1} is better than {7} (softmax): not run" in table
    verdict = "Training everything is better than a frozen trunk (SVM): not"
    assert f"{verdict} shown here: a single difference" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune.images": 3}, "images, 3, must be a multiple of the 4 devices"),
        ({"finetune.batch_size": 30}, "30 windows, of the images"),
        ({"finetune.trainable": "conv9"}, "from, trainable 'conv9': use"),
        ({"finetune.steps": 0, "scorer": "svm"}, "steps is 0: give steps, or use"),
        ({"levels": (), "network": "vgg16_nowhere"}, "holds no trained classifier"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_anything_is_written(
    base, tmp_path, changes, message
):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_detector(make(base, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_training_settings_are_refused_in_a_test(base, trained):
    with pytest.raises(ValueError, match="was trained with finetune = "):
        load_detector(trained, make(base, **{"finetune.trunk_rate": 0.5}))
