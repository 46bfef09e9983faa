"""Ablations of pyramids: what is trained, what is told of it, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from sppnet_jax.ablation import (
    PYRAMIDS,
    AblationRow,
    ablate,
    ablation_table,
    plot_ablation,
    small_config,
)
from sppnet_jax.classification.evaluation import evaluate_networks
from sppnet_jax.network.trained import load_network
from sppnet_jax.run.settings import read
from sppnet_jax.training import frozen, once
from sppnet_jax.training.network_settings import NetworkSettings, network_settings
from sppnet_jax.training.step_log import DivergedError
from tests.data_helpers import write_two_colors
from tests.network_helpers import TINY_TRUNK

pytestmark = pytest.mark.usefixtures("shallow_zf5")

LEVELS, SEEDS = [(2, 1), None], (1, 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of two classes that differ in colour; 16 to train on, 8 to test."""
    root = tmp_path_factory.mktemp("pictures")
    write_two_colors(root, 70, 80)
    return root


@pytest.fixture(scope="module")
def small(root):
    """All settings of the tests' networks."""
    return {
        "epochs": 2,
        "batch_size": 8,
        "model": {"width": 0.02},
        "data": {"name": "image_folder", "root": str(root), "threads": 2},
    }


@pytest.fixture(scope="module")
def done(small, digit_scenes_dir, tmp_path_factory):
    """An ablation that ran to its end: (folder, rows)."""
    folder = tmp_path_factory.mktemp("ablation")
    return folder, ablate(LEVELS, SEEDS, folder=folder, **small)


@pytest.fixture
def trained(monkeypatch):
    """Settings of the trainings that are asked for; each diverges at once."""
    asked = []

    def diverge(settings, workdir, features):
        asked.append(settings)
        raise DivergedError("the loss is nan at step 7")

    monkeypatch.setattr(once, "train_network", diverge)
    return asked


def layers_of(row):
    return load_network(Path(row.workdir)).params


@pytest.mark.slow
def test_there_is_a_row_for_each_network_by_pyramid_and_then_by_seed(done):
    _, rows = done
    told = [(row.levels, row.seed) for row in rows]
    assert told == [((2, 1), 1), ((2, 1), 0), (None, 1), (None, 0)]
    for row in rows:
        settings = network_settings(Path(row.workdir))
        assert (settings.model.levels or None, settings.seed) == told.pop(0)
        assert row.seconds > 0
        assert row.diverged == ""


@pytest.mark.slow
def test_accuracies_are_those_that_evaluate_wrote(done):
    _, rows = done
    for row in rows:
        report = json.loads((Path(row.workdir) / "evaluate_single.json").read_text())
        assert row.top1 == report["top1_correct"] / 8
        assert row.images == report["count"] == 8
        assert report["checkpoint_steps"] == [4]  # two epochs of 16 images


@pytest.mark.slow
def test_sizes_of_fc6_are_those_of_the_trained_networks(done):
    _, rows = done
    for row, bins in zip(rows, (5, 5, 1, 1), strict=True):
        layers = layers_of(row)
        *_, last = sorted(name for name in layers if name.startswith("conv"))
        channels = layers[last]["bias"].size
        assert row.bins == bins  # at 64 pixels the twin pools its 3×3 map into one
        assert row.fc6_inputs == bins * channels == len(layers["fc6"]["kernel"])
        assert row.fc6_parameters == sum(
            array.size for array in jax.tree.leaves(layers["fc6"])
        )


@pytest.mark.slow
def test_seeds_are_other_networks(done):
    _, rows = done
    one, other = (layers_of(row)["fc6"]["kernel"] for row in rows[:2])
    assert np.abs(one - other).max() > 0.01


@pytest.mark.slow
def test_finished_networks_are_not_trained_again(done, small, trained):
    folder, rows = done
    assert ablate(LEVELS, SEEDS, folder=folder, **small) == rows
    assert ablate([None], (0,), folder=folder, **small) == rows[3:]
    assert not trained
    more = ablate([*LEVELS, (1,)], (0,), folder=folder, **small)
    assert more[:2] == [rows[1], rows[3]]
    assert [settings.model.levels for settings in trained] == [(1,)]


@pytest.mark.slow
def test_how_fast_and_how_often_is_no_other_setting(done, small, trained):
    folder, rows = done
    same = {"log_steps": 1, "keep_checkpoints": 3, "data.workers": 0}
    threads = small | {"data": small["data"] | {"threads": 1}}
    assert ablate(LEVELS, SEEDS, folder=folder, **threads, **same) == rows
    assert not trained


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [{"epochs": 3}, {"model.dropout": 0.1}, {"data.train_split": "train[:8]"}]
)
def test_other_settings_or_data_make_other_networks(done, small, trained, other):
    folder, rows = done
    (row,) = ablate([None], (0,), folder=folder, **(small | other))
    assert len(trained) == 1
    assert row.workdir not in {row.workdir for row in rows}
    assert ablate(LEVELS, SEEDS, folder=folder, **small) == rows


@pytest.mark.slow
def test_an_interrupted_network_goes_on_to_the_same_result(
    done, small, tmp_path, monkeypatch
):
    _, rows = done
    whole = once.train_network

    def interrupted(settings, workdir, features):
        whole(settings._replace(max_steps=3), workdir, features)
        raise KeyboardInterrupt

    monkeypatch.setattr(once, "train_network", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablate(LEVELS, (1,), folder=tmp_path, **small)
    monkeypatch.setattr(once, "train_network", whole)
    (workdir,) = (path.parent for path in tmp_path.glob("*/*/checkpoints"))
    before = float((workdir / once.SECONDS).read_text())
    (row,) = ablate([(2, 1)], (1,), folder=tmp_path, **small)
    assert row.seconds > before > 0
    assert row[:-1] == rows[0]._replace(seconds=row.seconds)[:-1]
    for one, other in zip(
        jax.tree.leaves(layers_of(row)),
        jax.tree.leaves(layers_of(rows[0])),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_network_that_diverges_is_a_row_that_says_why(
    small, tmp_path, trained, capsys
):
    for _ in range(2):  # it is not tried again
        rows = ablate(LEVELS, (3,), folder=tmp_path, **small)
        assert [row.top1 for row in rows] == [None, None]
        assert {row.diverged for row in rows} == {"the loss is nan at step 7"}
        assert [row.bins for row in rows] == [5, 1]
    assert len(trained) == 2
    told = capsys.readouterr().err
    assert "network 2 of 2: no SPP, seed 3" in told
    assert "diverged: the loss is nan" in told


def test_any_field_can_be_given_by_keyword_or_dict(small, tmp_path, trained):
    given = digits.get_config()
    kept = given.to_json()
    two = {"data.name": "image_folder", "data.root": small["data"]["root"]}
    for settings in (
        {"model": {"width": 0.05, "dropout": 0.25}, "batch_size": 4},
        {"model.width": 0.05, "model": {"dropout": 0.25}, "batch_size": 4},
    ):
        ablate([(3,)], (2,), config=given, folder=tmp_path, **two, **settings)
    (made,) = trained  # the second time it is there, though as a diverged one
    assert (made.model.width, made.model.dropout) == (0.05, 0.25)
    assert (made.batch_size, made.seed) == (4, 2)
    assert made.model.levels == (3,)
    assert made.schedule.learning_rate == given.schedule.learning_rate
    assert given.to_json() == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (6, 3, 2, 1)}, r"a list of pyramids such as \[\(6, 3, 2, 1\)"),
        ({"levels": []}, "a list of pyramids"),
        ({"levels": "6321"}, "a list of pyramids"),
        ({"levels": [(2, 1), (0, 1)]}, "every level must be a positive integer"),
        ({"levels": [(2, 1), [2, 1]]}, r"levels holds \(2, 1\) twice"),
        ({"levels": [None, ()]}, "levels holds None twice"),
        ({"seeds": 3}, r"a list such as \(0, 1\) or range\(3\), got 3"),
        ({"seeds": (0, -1)}, "from 0 to"),
        ({"seeds": (1, 1)}, "seeds holds 1 twice"),
        ({"config": "configs/digits.py"}, "config must be a ConfigDict"),
        ({"widht": 2}, "unknown field 'widht': config has the fields seed"),
        ({"width": 0.5}, "unknown field 'width': .*did you mean model.width"),
        ({"model": {"witdh": 0.5}}, "did you mean model.width"),
        ({"epochs": "two"}, "config.epochs must be a whole number, got 'two'"),
        ({"seed": 4}, r"give seeds=\(0, 1\)"),
        ({"model.levels": (1,)}, "give the pyramids as levels="),
        ({"max_steps": 4}, "only finished networks"),
        ({"data.image_size": 9}, "too small"),
        ({"protocol": "one"}, "choose from single"),
        ({"protocol": "full_image"}, r"without SPP \(None\) can't be tested"),
        ({"sizes": (64, 56)}, "without a pyramid"),
        ({"data.train_split": "learn"}, "learn"),
        ({"batch_size": 6}, "multiple of the number of devices, 4"),
    ],
)
def test_what_can_not_work_is_refused_before_any_training(
    arguments, message, small, tmp_path, trained
):
    with pytest.raises(ValueError, match=message):
        ablate(**({"folder": tmp_path} | small | arguments))
    assert not trained
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_refused_before_any_training(
    small, tmp_path, trained
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"networks can't be kept in .*file"):
        ablate(**{"folder": tmp_path / "file"} | small)
    assert not trained


def test_the_default_setting_is_the_demo_made_small():
    demo, small = digits.get_config(), small_config()
    demo, small = (
        once.deciding(read(NetworkSettings, config.to_dict()))
        for config in (demo, small)
    )
    differ = {name for name, value in small.items() if value != demo[name]}
    assert differ == {
        *("epochs", "batch_size", "model.width", "model.dropout", "data.crop"),
        *("inputs.color_sigma", "schedule.warmup_epochs"),
        *("data.min_area",),  # which only the demo's crops use
    }


def test_importing_it_loads_no_data_and_the_package_does_not_import_it():
    script = (
        "import sys, sppnet_jax\n"
        "assert 'sppnet_jax.ablation' not in sys.modules\n"
        "import sppnet_jax.ablation\n"
        "heavy = 'tensorflow_datasets', 'grain', 'orbax', 'matplotlib', 'sklearn'\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def make_rows(*shares, levels=(2, 1), bins=5):
    size = (bins * 4, 30 * (bins * 4 + 1))
    return [
        AblationRow(levels, seed, bins, *size, share, 8, 10.0 + seed, "", "")
        for seed, share in enumerate(shares)
    ]


def test_a_table_has_a_line_for_each_pyramid_with_mean_and_sample_deviation():
    rows = make_rows(0.5, 0.7, None) + make_rows(0.25, levels=None, bins=1)
    lines = ablation_table(rows)._repr_markdown_().splitlines()
    spread = 100 * np.std([0.5, 0.7], ddof=1)
    assert lines[2:] == [
        f"| {{2,1}} | 5 | 20 | 630 | 60.0 ± {spread:.1f} | 3 (1 diverged) | 11 |",
        "| no SPP | 1 | 4 | 150 | 25.0 | 1 | 10 |",
    ]
    assert {line.count("|") for line in lines} == {8}
    assert "| – | 1 (1 diverged) |" in ablation_table(make_rows(None))


def test_a_plot_shows_every_network_at_its_size_and_names_what_diverged():
    rows = make_rows(0.5, 0.7) + make_rows(0.25, levels=None, bins=1)
    figure = plot_ablation(rows + make_rows(None, levels=(9,), bins=81))
    (axes,) = figure.axes
    shown = {(x, y) for line in axes.lines for x, y in line.get_xydata().tolist()}
    for x, y in ((630, 50), (630, 70), (630, 60), (150, 25)):
        assert any(np.allclose((x, y), point) for point in shown)
    assert "diverged: {9}" in axes.get_xlabel()
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"{2,1}\n5 bins", "no SPP\n1 bin"}


@pytest.fixture(scope="module")
def on_trunk(root, tiny_trunk, tmp_path_factory):
    """Ablates linear heads on the tiny trunk, by default two pyramids and two seeds."""
    folder = tmp_path_factory.mktemp("heads")

    def run(levels=((2, 1), (3,)), seeds=(0, 1), *, folder=folder, **changes):
        given = {"epochs": 2, "batch_size": 8, "data.threads": 2}
        given |= {"model.weights": str(tiny_trunk), "data.resize_side": 64} | changes
        return ablate(
            levels, seeds, trunk=TINY_TRUNK, root=str(root), folder=folder, **given
        )

    return run


@pytest.fixture
def extracted(monkeypatch):
    """What went through a trunk: (split, levels) of each pass."""
    passes, extract = [], frozen.extract_features

    def counted(network, source, **given):
        passes.append((source.split, network.model.levels))
        return extract(network, source, **given)

    monkeypatch.setattr(frozen, "extract_features", counted)
    return passes


@pytest.mark.slow
def test_heads_on_a_frozen_trunk_are_compared_and_its_images_are_pooled_once(
    on_trunk, extracted, monkeypatch
):
    rows = on_trunk()
    assert extracted == [("train", (3, 2, 1)), ("test", (3, 2, 1))]
    told = [(row.levels, row.seed, row.bins, row.fc6_inputs) for row in rows]
    assert told == [
        ((2, 1), 0, 5, 40),
        ((2, 1), 1, 5, 40),
        ((3,), 0, 9, 72),
        ((3,), 1, 9, 72),
    ]
    for row in rows:
        layers = layers_of(row)
        assert row.fc6_parameters == sum(part.size for part in layers["fc8"].values())
    for row in rows[::3]:
        report = evaluate_networks([Path(row.workdir)], "full_image")
        assert (row.top1, row.images) == (report["top1"], 8)
    first, second = (layers_of(row)["fc8"]["kernel"] for row in rows[:2])
    assert np.abs(first - second).max() > 1e-3

    def refuse(*_, **__):
        raise AssertionError("a network is trained")

    monkeypatch.setattr(once, "train_network", refuse)
    assert on_trunk() == rows
    assert len(extracted) == 2


def test_new_pyramids_and_recipes_of_heads_pool_new_levels_only(on_trunk, extracted):
    on_trunk()
    extracted.clear()
    on_trunk([(4, 2)], (0,))
    assert extracted == [("train", (4,)), ("test", (4,))]
    on_trunk([(4, 2)], (0,), epochs=1)
    assert len(extracted) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "single"}, "leave out protocol='single'"),
        ({"levels": [(1,), None]}, "has no twin|is pooled by a pyramid"),
        ({"config": small_config()}, "give a config, or a trunk and its root: not bo"),
        ({"trunk": "resnet19"}, "did you mean 'resnet18'"),
        ({"trunk": "zf5"}, "zf5 was never published with weights"),
        ({"root": ""}, "give the folder of images"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_on_a_trunk_is_refused(
    root, tiny_trunk, tmp_path, changes, message
):
    given = {"trunk": TINY_TRUNK, "root": str(root), "folder": tmp_path} | changes
    weights = {"model.weights": str(tiny_trunk)}
    with pytest.raises(ValueError, match=message):
        ablate(**given, **weights)


@pytest.mark.slow
def test_by_default_a_frozen_trunk_is_compared_without_the_twin(on_trunk, tmp_path):
    rows = on_trunk(PYRAMIDS, (0,), folder=tmp_path, epochs=1)
    assert [row.levels for row in rows] == [(6, 3, 2, 1), (4, 3, 2, 1), (1,)]


def test_no_rows_are_an_error():
    for show in (ablation_table, plot_ablation):
        with pytest.raises(ValueError, match="what ablate returned"):
            show([])
