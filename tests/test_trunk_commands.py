"""Published networks from the command line: predict, features, export."""

import csv
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import sklearn.datasets

import sppnet_jax as sn
from configs import folder
from sppnet_jax.classification.feature_files import load_features
from sppnet_jax.classification.image_scores import score_images
from sppnet_jax.data.images import resize_whole
from sppnet_jax.data.photographs import read_image
from sppnet_jax.network.described import describe
from sppnet_jax.network.model import Architecture, make_model
from sppnet_jax.network.preprocess import normalize
from sppnet_jax.network.pretrained import (
    pretrained_network,
    published_architecture,
    with_pretrained,
)
from sppnet_jax.network.trained import load_network
from sppnet_jax.network.weight_files import read_tensors, write_tensors
from tests.data_helpers import encode, picture, write_class_folders
from tests.network_helpers import (
    TINY_TRUNK,
    drawn_params,
    run_with_tiny_trunk,
    write_network,
)

LITE = "--trunk=efficientnet_lite0"
TINY = f"--trunk={TINY_TRUNK}"
FLOWER = Path(sklearn.datasets.__file__).parent / "images/flower.jpg"


@pytest.fixture(scope="module")
def named(command_line, tmp_path_factory):
    """What is said of a torn photograph and of a daisy, and of the daisy's windows."""
    folder = tmp_path_factory.mktemp("photos")
    torn, drawn = folder / "torn.jpg", folder / "drawn.png"
    torn.write_bytes(FLOWER.read_bytes()[:2000])
    out = f"--out={folder / 'found.json'}"
    given = LITE, "--windows", f"--picture={drawn}", out, torn, FLOWER
    return command_line("predict", *given, check=False, devices=1), drawn


@pytest.mark.slow
def test_a_published_network_names_a_photograph_and_its_windows(named):
    result, drawn = named
    whole, *windows = re.findall(r"^ +([\d.]+)%  (.*)$", result.stdout, re.MULTILINE)
    assert whole[1] == "daisy, the whole image"
    assert re.fullmatch(r"daisy, x \d+ to \d+, y \d+ to \d+", windows[0][1])
    # The daisy fills its window, and not the photograph.
    assert float(windows[0][0]) > float(whole[0])
    shown = read_image(drawn.with_name("drawn_2.png"))
    assert shown.shape == read_image(FLOWER).shape


def test_a_photograph_that_cannot_be_read_is_named_and_the_others_are_scored(named):
    result, drawn = named
    assert "torn.jpg: can't be read: truncated" in result.stdout
    assert "1 of 2 files could not be read" in result.stderr
    assert result.returncode == 1
    assert not drawn.with_name("drawn_1.png").exists()


def test_what_was_named_is_in_the_file_too(named):
    result, drawn = named
    torn, flower = json.loads(drawn.with_name("found.json").read_text())
    assert torn.keys() == {"path", "error"}
    height, width = read_image(FLOWER).shape[:2]
    assert flower.items() >= {"path": str(FLOWER), "width": width}.items()
    whole, *windows = flower["found"]
    assert whole.keys() == {"label", "score"}
    printed = re.findall(r"^ +([\d.]+)%  ", result.stdout, re.MULTILINE)
    for row, percent in zip(flower["found"], printed, strict=True):
        assert f"{row['score']:.1%}" == f"{percent}%"
    for row in windows:
        assert 0 <= row["ymin"] < row["ymax"] <= height
        assert 0 <= row["xmin"] < row["xmax"] <= width


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pets"
    write_class_folders(root, 5)
    return root


@pytest.fixture
def tiny(command_line, tiny_trunk, photos, tmp_path):
    """Runs a command with the tiny trunk, its weights and the photographs."""

    def run(command, *arguments, **options):
        where = [f"--config.data.root={photos}"] if command == "features" else []
        options |= {"cwd": tmp_path, "how": run_with_tiny_trunk}
        return command_line(command, *where, *arguments, **options)

    return run


def test_features_of_a_trunk_are_those_of_each_image_by_itself(
    tiny, tiny_trunk, photos, tmp_path
):
    result = tiny(
        "features",
        TINY,
        f"--weights={tiny_trunk}",
        "--config.data.name=image_folder",
        "--config.model.cuts=('stride2',)",
        "--config.model.levels=(2,1)",
        "--config.model.reducer=max",
        "--mode=full",
        "--side=48",
    )
    (file,) = tmp_path.glob("features_*.npz")
    name = rf"features_{TINY_TRUNK}-stride2-2.1-max-\w{{8}}_image_folder-pets-\w{{8}}"
    assert re.fullmatch(rf"{name}_test_pyramid_full_48\.npz", file.name)
    assert f"features: {file.name}" in result.stdout
    features, provenance = load_features(file)
    assert (provenance["trunk"], provenance["workdir"]) == (TINY_TRUNK, "")
    assert provenance["weights"] == str(tiny_trunk)
    network = pretrained_network(
        Architecture(
            TINY_TRUNK, str(tiny_trunk), cuts=("stride2",), levels=(2, 1), head="none"
        )
    )
    apply = jax.jit(network.model.apply)
    for row, file in zip(features.values, features.names, strict=True):
        image = resize_whole(read_image(photos / file), 48, 4.0)
        inputs = normalize(jnp.asarray(image[None]), network.preprocessing)
        expected, _ = apply({"params": network.params}, inputs)
        np.testing.assert_allclose(row, expected[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def run(tiny_trunk, tmp_path_factory):
    """The folder of a run on the tiny trunk, of three classes."""
    config = folder.get_config()
    config.model.backbone, config.model.weights = TINY_TRUNK, str(tiny_trunk)
    config.model.head, config.model.levels = "linear", (2, 1)
    config.data.image_size, config.data.resize_side = 48, 56
    return write_network(tmp_path_factory.mktemp("runs") / "pets", config)


def test_an_export_answers_as_the_run_it_is_from(tiny, run, tmp_path):
    photo = tmp_path / "photo.png"
    photo.write_bytes(encode(picture(60, 90)))
    told = tiny("export", "--format=safetensors", f"--workdir={run}").stdout
    assert told.endswith(f"in 6 tensors: {run / 'model.safetensors'}\n")
    own = tiny("predict", f"--workdir={run}", photo).stdout
    weights = f"--weights={run / 'model.safetensors'}"
    assert tiny("predict", TINY, weights, photo).stdout == own
    assert len(re.findall("%  (one|two|three)$", own, re.MULTILINE)) == 3


def test_a_pattern_of_photographs_is_scored_each_as_by_itself(tiny, run, tmp_path):
    sizes = [(60, 90), (90, 60), (40, 45), (300, 20)]
    for number, size in enumerate(sizes):
        image = picture(*size, seed=number)
        (tmp_path / f"{number}.png").write_bytes(encode(image))
    out = tmp_path / "named.csv"
    tiny("predict", f"--workdir={run}", f"--out={out}", "[0-3].png")
    lines = list(csv.DictReader(out.open()))
    network = load_network(run)
    for number, size in enumerate(sizes):
        (expected,) = score_images(network, [picture(*size, seed=number)])
        own = [line for line in lines if line["path"] == f"{number}.png"]
        assert (int(own[0]["height"]), int(own[0]["width"])) == size
        assert len(own) == 3
        for line in own:
            score = expected[network.class_names.index(line["label"])]
            assert abs(float(line["score"]) - score) < 1e-4


def test_an_export_holds_the_parameters_by_name_and_says_of_what(tiny, run, tmp_path):
    path = tmp_path / "new" / "pets.safetensors"
    tiny("export", f"--workdir={run}", f"--out={path}")
    tensors = read_tensors(path)
    params = load_network(run).params
    assert len(tensors) == 6
    for name, tensor in tensors.items():
        layer, part = name.split(".")
        np.testing.assert_array_equal(tensor, params[layer][part])
    with safetensors.safe_open(path, "np") as file:
        told = file.metadata()
    network = sn.load_pretrained(TINY_TRUNK, str(path))
    assert network.class_names == ("one", "two", "three")
    assert (network.model.image_size, network.resize_side) == (48, 56)
    assert (told["backbone"], told["levels"]) == (TINY_TRUNK, "2,1")
    assert json.loads(told["classes"]) == ["one", "two", "three"]
    assert told["version"].startswith("sppnet_jax ")
    with pytest.raises(ValueError, match=f"weights of {TINY_TRUNK}, not of vgg16"):
        published_architecture("vgg16", str(path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"backbone": "resnet19"},
        {"levels": "2,x"},
        {"width": "-1"},
        {"classes": "[" * 100_000},
        {"classes": "7"},
        {"resize_side": "1000000000"},
        {"image_size": "0"},
    ],
    ids=str,
)
def test_a_file_that_says_what_no_network_is_is_refused(run, tmp_path, wrong):
    path = tmp_path / "model.safetensors"
    told = describe(load_network(run)) | wrong
    write_tensors(path, {"conv1.bias": np.zeros(1, np.float32)}, told)
    with pytest.raises(ValueError, match="doesn't say which network"):
        published_architecture(TINY_TRUNK, str(path))


def test_another_network_of_the_backbone_begins_with_an_export(command_line, tmp_path):
    """Of a narrow ZF-5, which was never published."""
    config = folder.get_config()
    config.model.levels, config.model.width = (2, 1), 0.02
    config.data.image_size, config.data.resize_side = 64, 72
    run, path = write_network(tmp_path, config), tmp_path / "model.safetensors"
    command_line("export", f"--workdir={run}")
    own = load_network(run)
    architecture = Architecture("zf5", str(path), levels=(2, 1), width=0.02)
    drawn = drawn_params(make_model(architecture, 4, 64))
    for layer in drawn.values():
        layer["kernel"] += 1
    taken = with_pretrained(drawn, architecture)
    for layer in ("conv1", "conv5", "fc6", "fc7"):
        for part in ("kernel", "bias"):
            expected = np.asarray(own.params[layer][part])
            np.testing.assert_array_equal(taken[layer][part], expected)
    assert taken["fc8"] is drawn["fc8"]
    wide = architecture._replace(width=0.04)
    with pytest.raises(ValueError, match=r"don't fit conv1: .*Use the width"):
        with_pretrained(drawn_params(make_model(wide, 4, 64)), wide)


def test_a_run_that_ended_at_a_cut_exports_what_it_has(tiny, tiny_trunk, tmp_path):
    config = folder.get_config()
    config.model.backbone, config.model.weights = TINY_TRUNK, str(tiny_trunk)
    config.model.head, config.model.cuts = "linear", ("stride2",)
    config.model.levels = (2, 1)
    cut = write_network(tmp_path / "cut", config)
    tiny("export", f"--workdir={cut}")
    path = str(cut / "model.safetensors")
    architecture = published_architecture(TINY_TRUNK, path)
    assert architecture.cuts == ("stride2",)
    assert set(pretrained_network(architecture).params) == {"conv1", "fc8"}
    whole = architecture._replace(cuts=())
    with pytest.raises(ValueError, match=r"end before conv2: give the config.model.cu"):
        with_pretrained(drawn_params(make_model(whole, 3, 32)), whole)


def test_weights_of_a_run_that_measured_its_own_mean_are_refused(
    tiny, tiny_trunk, tmp_path
):
    config = folder.get_config()
    config.model.backbone, config.model.head = TINY_TRUNK, "linear"
    config.inputs.mean, config.inputs.color_sigma = 128.0, 0.0
    drawn = write_network(tmp_path / "drawn", config)
    tiny("export", f"--workdir={drawn}")
    weights = f"--weights={drawn / 'model.safetensors'}"
    error = tiny("predict", TINY, weights, "a.jpg", check=False).stderr
    assert "began with drawn weights" in error
    assert "give the run's --workdir" in error


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("predict", ["--trunk=resnet_18"], "did you mean 'resnet18'"),
        ("predict", ["--trunk=zf5"], "zf5 was never published with weights"),
        ("predict", ["--trunk=vgg16"], "or --weights=FILE beside --trunk"),
        ("predict", [LITE, "--workdir=runs/a"], "takes the place of --workdir"),
        ("evaluate", [LITE], "this command takes no --trunk"),
        ("predict", ["--weights=a.pth", "--workdir=a"], "--weights are of a --trunk"),
        ("predict", [TINY, "--weights=absent.pth"], "no weight file absent.pth"),
        ("predict", [LITE, "--weights=TINY"], "holds no weights of efficientnet_lite0"),
        ("predict", [TINY, f"--weights={FLOWER}"], "cannot read the weights of"),
        (
            "predict",
            [TINY, "--weights=TINY", "--config.model.levels=(2,1)"],
            "scores no classes",
        ),
        ("features", [], "or a pretrained network: --trunk=efficientnet_lite0"),
        ("features", [LITE], "--config.data.name=image_folder"),
        (
            "features",
            [TINY, "--weights=TINY", "--config.data.name=image_folder", "--layer=fc7"],
            "this network has conv1 to conv2, stride2, stride4, pyramid, fc8",
        ),
        ("export", [TINY, "--weights=TINY", "--out=."], "give --out=FILE.safe"),
        (
            "export",
            ["--format=pth", "--trunk=vgg16"],
            "should be one of <safetensors|onnx|stablehlo>",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    tiny, tiny_trunk, command, arguments, message
):
    given = [word.replace("=TINY", f"={tiny_trunk}") for word in arguments]
    photos = ["photo.jpg"] if command == "predict" else []
    result = tiny(command, *given, *photos, check=False)
    assert result.returncode in (1, 2)  # 2 where the command line tells
    assert message in result.stderr
    assert "Traceback" not in result.stderr
