"""Features are the network's own activations, in order, with their provenance."""

import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from data_helpers import make_source, write_class_folders
from network_helpers import drawn_params

from sppnet_jax.classification import feature_files
from sppnet_jax.classification.feature_files import (
    file_name,
    load_features,
    save_features,
    write_features,
)
from sppnet_jax.data import images
from sppnet_jax.data.datasets import ImageData
from sppnet_jax.data.sources import open_source
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trained import as_network
from sppnet_jax.training.layer_features import (
    Features,
    extract_features,
    layer_names,
)
from sppnet_jax.training.network_settings import NetworkSettings

SIZE = 32
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "pyramid", "fc6", "fc7", "fc8")
MEAN = Preprocessing(
    mean=np.random.default_rng(0).uniform(90, 150, (SIZE, SIZE, 3)).astype(np.float32),
    scale=64.0,
    color_shifts=np.zeros((3, 3), np.float32),
)
PLAIN = MEAN._replace(mean=np.float32(128))


def make_network(levels=(3, 2, 1), size=SIZE):
    """A narrow ZF-5 whose biases aren't zero, so padding that leaked would show."""
    model = create_model("zf5", levels, 5, width=0.04, image_size=size)
    return model, drawn_params(model)


@pytest.fixture(scope="module")
def network():
    return make_network()


def varied_source(broken=()):
    """Seven images, landscape and portrait, whose records have no order of sizes."""
    shapes = [(40, 60), (70, 35), (33, 33), (90, 45), (38, 41), (36, 90), (50, 50)]
    return make_source(shapes, broken)


def extract(network, source, **options):
    given = {"layer": "fc7", "side": 36, "mode": "crop", "batch_size": 4, **options}
    return extract_features(as_network(*network, PLAIN), source, **given)


def activations(network, pixels, layer, mean=128.0):
    """By hand: one image at its own size, in no bucket and no batch."""
    model, params = network
    inputs = jnp.asarray((pixels[None].astype(np.float32) - mean) / 64)
    logits, named = _apply(model, params, inputs)
    return np.asarray({**named, "fc8": logits}[layer]).reshape(-1)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, inputs):
    return model.apply({"params": params}, inputs)


def decoded(source):
    return [images.decode_image(record["image"]) for record in source.records]


def assert_rows(features, expected):
    stacked = np.stack(expected)
    assert features.values.dtype == np.float32
    assert features.values.shape == stacked.shape
    scale = np.abs(stacked).max()
    np.testing.assert_allclose(features.values, stacked, atol=1e-5 * scale)


@pytest.mark.parametrize("layer", ["conv1", "conv5", "pyramid", "fc6", "fc8"])
def test_features_of_crops_are_the_networks_activations(layer, network):
    source = varied_source()
    crops = [
        images.crop(images.resize_shorter_side(image, 36), SIZE, "center")
        for image in decoded(source)
    ]
    features = extract(network, source, layer=layer)
    assert_rows(features, [activations(network, crop, layer) for crop in crops])


@pytest.mark.parametrize("layer", ["pyramid", "fc7", "fc8"])
def test_features_of_full_images_are_those_of_each_image_alone(layer, network):
    source = varied_source()
    whole = [images.resize_shorter_side(image, 40) for image in decoded(source)]
    assert len({image.shape for image in whole}) > 3
    features = extract(
        network, source, layer=layer, mode="full", side=40, max_buckets=2
    )
    assert_rows(features, [activations(network, image, layer) for image in whole])


def test_a_mean_image_is_warped_to_each_full_image(network):
    source = varied_source()
    seen = as_network(*network, MEAN)
    features = extract_features(
        seen, source, layer="fc6", side=40, mode="full", batch_size=4
    )
    expected = []
    for image in decoded(source):
        whole = images.resize_shorter_side(image, 40)
        mean = np.asarray(jax.image.resize(MEAN.mean, whole.shape, "linear"))
        expected.append(activations(network, whole, "fc6", mean))
    assert_rows(features, expected)


@pytest.mark.parametrize("side", [SIZE, 48])
def test_warped_images_are_whole_and_square(side, network):
    source = varied_source()
    warped = [images.warp(image, side) for image in decoded(source)]
    features = extract(network, source, layer="pyramid", mode="warp", side=side)
    assert_rows(features, [activations(network, image, "pyramid") for image in warped])
    cropped = extract(network, source, layer="pyramid", side=max(side, 36))
    assert np.abs(features.values - cropped.values).max() > 0.01


def test_a_network_without_spp_takes_crops_and_squares_of_its_size_only():
    network = make_network(levels=None, size=64)
    source = varied_source()
    warped = [images.warp(image, 64) for image in decoded(source)]
    features = extract(network, source, mode="warp", side=64)
    assert_rows(features, [activations(network, image, "fc7") for image in warped])
    assert extract(network, source, side=72).values.shape == features.values.shape
    with pytest.raises(ValueError, match="so it takes no whole images of any size"):
        extract(network, source, mode="full", side=72)
    with pytest.raises(ValueError, match="takes squares of 64 pixels only, not 80"):
        extract(network, source, mode="warp", side=80)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"mode": "full", "layer": "conv5"},
            "another size for each whole image.*choose from pyramid, fc6, fc7, fc8, "
            "or use the mode crop or warp",
        ),
        ({"layer": "fc9"}, "unknown layer 'fc9': this .* conv1 to conv5, .*, fc8"),
        ({"layer": "conv6"}, "unknown layer 'conv6'"),
        ({"mode": "whole"}, "unknown mode 'whole': choose from crop, warp, full"),
        ({"side": 31}, "a crop of 32×32 pixels does not fit .* is 31: .*at least 32"),
        ({"mode": "full", "side": 8}, "8 pixels is too small .* at least 29"),
        ({"mode": "warp", "side": 0}, "pixels are not made|too small"),
    ],
)
def test_what_a_network_or_a_mode_does_not_have_is_refused(request_, message, network):
    with pytest.raises(ValueError, match=message):
        extract(network, varied_source(), **request_)


def test_each_backbone_has_as_many_convolutions_as_its_table():
    assert layer_names(create_model("zf5")) == LAYERS
    assert layer_names(create_model("overfeat7"))[6:8] == ("conv7", "pyramid")
    assert layer_names(create_model("overfeat7"), "full") == LAYERS[5:]


@pytest.mark.parametrize("mode", ["crop", "warp", "full"])
def test_a_broken_image_is_left_out_and_the_others_keep_their_order(
    mode, network, caplog
):
    whole = extract(network, varied_source(), mode=mode)
    logging.getLogger("sppnet_jax").propagate = True
    features = extract(network, varied_source(broken=(2, 5)), mode=mode)
    kept = [0, 1, 3, 4, 6]
    assert features.indices.tolist() == kept
    assert features.names == tuple(f"picture_{number}.png" for number in kept)
    assert features.labels.tolist() == [number % 3 for number in kept]
    assert features.labels.dtype == features.indices.dtype == np.int32
    assert features.broken == 2
    np.testing.assert_allclose(features.values, whole.values[kept], atol=1e-5)
    assert "2.png: truncated" in caplog.text
    with pytest.raises(ValueError, match=r"broken image 'picture_2\.png'"):
        extract(network, varied_source(broken=(2, 5)), mode=mode, strict=True)


def test_images_may_have_several_labels(network):
    single = varied_source(broken=(1,))
    labels = np.random.default_rng(0).integers(-1, 2, (7, 3)).astype(np.int8)
    records = [
        {"image": record["image"], "labels": labels[i], "name": record["name"]}
        for i, record in enumerate(single.records)
    ]
    source = single._replace(records=records, multi_label=True)
    for mode in ("crop", "full"):
        features = extract(network, source, mode=mode)
        assert features.labels.dtype == np.int8
        np.testing.assert_array_equal(features.labels, np.delete(labels, 1, axis=0))


def test_features_that_exceed_the_memory_are_refused_before_any_is_computed(
    network, monkeypatch
):
    free = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    extract(network, make_source(4), layer="fc8", side=36)
    with pytest.raises(ValueError, match=r"features of conv1 for 4 images take 0\.0"):
        extract(network, make_source(4), layer="conv1", side=36)


def test_a_file_of_features_gives_back_what_was_saved(tmp_path):
    features = Features(
        values=np.arange(6, dtype=np.float32).reshape(3, 2),
        labels=np.array([[1, -1], [0, 1], [-1, -1]], np.int8),
        indices=np.array([0, 2, 3], np.int32),
        names=("a/ü.jpg", "b", "日本.png"),
        class_names=("cat", "dog"),
        broken=1,
    )
    path = tmp_path / "new" / "features.npz"
    save_features(path, features, {"layer": "fc7", "side": 36})
    loaded, provenance = load_features(path)
    assert provenance == {"layer": "fc7", "side": 36}
    for name, value in features._asdict().items():
        np.testing.assert_array_equal(getattr(loaded, name), value, err_msg=name)
        assert type(getattr(loaded, name)) is type(value)
    assert [file.name for file in path.parent.iterdir()] == ["features.npz"]


def test_folders_of_one_name_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "test", "fc7", "full", 256
    roots = ["a/pets", "b/pets", f"{tmp_path}/a/pets/", "pets", "n" * 250]
    names = [file_name(ImageData("image_folder", root), *told) for root in roots]
    assert names[0] == names[2]
    assert len(set(names)) == 4
    assert all(name.startswith("features_image_folder-pets-") for name in names[:4])
    assert max(map(len, names)) < 150
    boxes = {file_name(ImageData("box_folder", root), *told) for root in roots}
    assert len(boxes) == 4


def test_a_disk_too_small_for_features_is_told_before_they_are_computed(
    tmp_path, monkeypatch
):
    write_class_folders(tmp_path / "pets", 5)
    settings = NetworkSettings(
        data=ImageData("image_folder", str(tmp_path / "pets"), image_size=64)
    )
    model = create_model("zf5", (1,), 2, width=0.02, image_size=64)
    network = as_network(model, drawn_params(model), MEAN)
    monkeypatch.setattr(feature_files, "extract_features", None)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 8191)
    )
    output = tmp_path / "f.npz"
    with pytest.raises(OSError, match=r"f\.npz can't be written: it takes .* MB"):
        write_features(settings, network, layer="conv1", output=output)
    with pytest.raises(TypeError):  # there is room, and it goes on
        write_features(settings, network, layer="fc8", output=output)


def test_another_kind_of_file_is_no_file_of_features(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    names = ("other.npz", "array.npz.npy", "text.npz", "empty.npz", "half.npz")
    for name in names:
        with pytest.raises(ValueError, match="holds no features: give a file that"):
            load_features(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_features(tmp_path / "absent.npz")


def test_the_command_line_writes_features_with_their_provenance(
    digits_run, command_line
):
    result = command_line(
        "features", f"--workdir={digits_run}", "--split=test[:20]", "--mode=full"
    )
    path = digits_run / (
        "features_digit_scenes-classification_test[:20]_fc7_full_36.npz"
    )
    assert f"features: {path}" in result.stdout
    assert "20 images × 82 numbers" in result.stderr
    features, provenance = load_features(path)
    source = open_source("digit_scenes/classification", "test[:20]")
    assert features.values.shape == (20, 82)
    assert features.labels.tolist() == [r["label"] for r in source.records]
    assert features.names == tuple(r["name"] for r in source.records)
    assert features.class_names == tuple("0123456789")
    config = json.loads((digits_run / "config.json").read_text())
    for name, value in {
        "workdir": str(digits_run),
        "checkpoint_step": 3,
        "layer": "fc7",
        "mode": "full",
        "side": 36,
        "data": "digit_scenes/classification",
        "split": "test[:20]",
        "multi_label": False,
        "records": 20,
        "images": 20,
        "broken": 0,
        "numbers": 82,
        "config": config,
    }.items():
        assert provenance[name] == value, name
    assert provenance["trained_on"].startswith("11504 images of digit_scenes")
    assert provenance["version"]
    assert provenance["date"][:2] == "20"


def test_any_other_data_set_can_be_described_by_a_trained_network(
    digits_run, command_line, tmp_path
):
    write_class_folders(tmp_path / "pets", 10)
    broken = tmp_path / "pets" / "cat" / "00.png"
    broken.write_bytes(broken.read_bytes()[:100])
    output = tmp_path / "out" / "pets.npz"
    result = command_line(
        "features",
        f"--workdir={digits_run}",
        "--config.data.name=image_folder",
        f"--config.data.root={tmp_path / 'pets'}",
        "--layer=conv5",
        "--mode=warp",
        "--split=train+test",
        f"--output={output}",
    )
    assert "(1 broken left out)" in result.stdout
    assert "cat/00.png: truncated" in result.stderr
    features, provenance = load_features(output)
    assert features.class_names == ("cat", "dog")
    assert (len(features.values), features.broken) == (19, 1)
    assert np.bincount(features.labels).tolist() == [9, 10]
    assert provenance["root"] == str(tmp_path / "pets")
    assert provenance["side"] == 32


def test_a_request_that_cannot_be_met_is_an_error_for_people(digits_run, command_line):
    def error(*arguments):
        result = command_line(
            "features", f"--workdir={digits_run}", *arguments, check=False
        )
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        return result.stderr

    assert "choose from pyramid" in error("--mode=full", "--layer=conv5")
    assert "give --output=FILE.npz" in error(f"--output={digits_run}")
    several = ["--config.data.name=digit_scenes/detection", "--split=test[:9]"]
    assert "sppnet_jax.features --multi_label" in error(*several)
    command_line("features", f"--workdir={digits_run}", *several, "--multi_label")
    (path,) = digits_run.glob("features_digit_scenes-detection*")
    assert load_features(path)[0].labels.shape == (9, 10)
