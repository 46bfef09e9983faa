"""A trained network as one value: what it holds, what it says of images and data."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax import predict
from sppnet_jax.classification.evaluation import evaluate_networks
from sppnet_jax.data import photographs
from sppnet_jax.data.datasets import ImageData
from sppnet_jax.data.images import crop, resize_whole
from sppnet_jax.data.photographs import read_images
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.network.model import Architecture
from sppnet_jax.network.preprocess import Inputs, make_preprocessing, normalize
from sppnet_jax.network.trained import as_network, load_network
from sppnet_jax.run import run_folder
from sppnet_jax.run.settings import plain
from sppnet_jax.training.network_settings import NetworkSettings
from sppnet_jax.training.networks import train_network
from tests.data_helpers import encode, exchange, picture, write_two_colors
from tests.network_helpers import drawn_params

SIZES = [(70, 90), (64, 64), (150, 80), (40, 300)]


def settings_for(root, **model):
    return NetworkSettings(
        epochs=1,
        batch_size=8,
        model=Architecture(
            levels=(2, 1), width=0.02, weight_init="he", **({"dropout": 0.0} | model)
        ),
        data=ImageData(
            "image_folder", str(root), image_size=64, resize_side=72, threads=2
        ),
        inputs=Inputs(mean=0.0, scale=64.0),
        log_steps=1,
    )


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos") / "flowers"
    write_two_colors(root, 80, 96)
    return root


@pytest.fixture(scope="module")
def run(flowers, tmp_path_factory):
    """The folder of a network that saw each picture once."""
    workdir = tmp_path_factory.mktemp("runs") / "flowers"
    train_network(settings_for(flowers), workdir)
    return workdir


@pytest.fixture(scope="module")
def network(run):
    return load_network(run)


def logits_alone(network, image):
    inputs = normalize(jnp.asarray(image[None]), network.preprocessing)
    return jax.jit(network.model.apply)({"params": network.params}, inputs)[0][0]


def test_it_holds_what_the_run_left(network, run, flowers):
    known = run_folder.load_statistics(run)
    assert network.class_names == network.trained_on.class_names
    assert len(network.class_names) == network.model.num_classes == 2
    assert (network.step, network.resize_side) == (2, 72)
    assert network.trained_on.root == str(flowers)
    assert network.geometry == sn.backbone_geometry("zf5")
    np.testing.assert_array_equal(network.preprocessing.mean, known["mean_image"])


def test_scores_are_those_of_each_image_alone_and_whole(network):
    images = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    scores = sn.score_images(network, images)
    for image, found in zip(images, scores, strict=True):
        resized = resize_whole(image, 72, 4.0)
        expected = jax.nn.softmax(logits_alone(network, resized))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert sn.score_images(network, []).shape == (0, 2)


def test_a_network_without_a_pyramid_scores_centre_crops():
    model = sn.create_model("zf5", None, 3, width=0.02, image_size=64)
    params = drawn_params(model)
    inputs = Inputs(mean=128.0, scale=64.0, color_sigma=0.0)
    twin = as_network(model, params, make_preprocessing(inputs, None))
    image = picture(90, 70)
    (found,) = sn.score_images(twin, [image])
    seen = crop(resize_whole(image, 64, 4.0), 64, "center")
    expected = jax.nn.softmax(logits_alone(twin, seen))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert twin.class_names == ("0", "1", "2")


def test_its_digest_goes_with_the_weights_and_not_with_the_folder(
    network, run, tmp_path
):
    shutil.copytree(run, tmp_path / "moved")
    assert load_network(tmp_path / "moved").digest == network.digest
    weights = jax.tree.map(np.array, network.params)
    weights["fc8"]["bias"][0] += 1e-6
    changed = as_network(network.model, weights, network.preprocessing)
    same = as_network(network.model, network.params, network.preprocessing)
    assert changed.digest != same.digest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": (1,)}, "holds another model"),
        ({"width": 0.03}, "holds another model"),
    ],
)
def test_settings_of_another_network_are_refused(run, flowers, settings, message):
    other = settings_for(flowers)
    other = other._replace(model=other.model._replace(**settings))
    with pytest.raises(ValueError, match=message):
        load_network(run, plain(other))


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        sn.load_network(tmp_path)


def test_unreadable_photographs_are_errors_in_their_place(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "absent.png", "half.png", "b.png")]
    for path in (paths[0], paths[3]):
        path.write_bytes(encode(picture(20, 30)))
    paths[2].write_bytes(paths[0].read_bytes()[:80])
    found = dict(read_images([str(path) for path in paths], threads=2))
    kinds = [type(found[str(path)]).__name__ for path in paths]
    assert kinds == ["ndarray", "FileNotFoundError", "ValueError", "ndarray"]
    np.testing.assert_array_equal(found[str(paths[0])], picture(20, 30))


def test_predict_decodes_each_photograph_once(run, flowers, tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path in paths:
        (tmp_path / path).write_bytes(encode(picture(80, 100)))
    decode, decoded = photographs.decode_image, []

    def counted(data):
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(photographs, "decode_image", counted)
    shown = settings_for(flowers), load_network(run), paths, tmp_path / "drawn.png"
    assert predict.show_images(*shown) == 0
    assert len(decoded) == 3


@pytest.fixture
def moved(flowers, run, tmp_path):
    """A copy of the pictures and of the network trained on them."""
    shutil.copytree(flowers, tmp_path / "flowers")
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "flowers", tmp_path / "run"


def pictures_of(root):
    return sorted((root / "train").rglob("*.png"))


def test_a_training_goes_on_with_the_same_pictures_in_another_place(moved):
    root, workdir = moved
    longer = settings_for(root)._replace(epochs=2)
    train_network(longer, workdir)
    assert load_network(workdir).step == 4


@pytest.mark.parametrize("change", ["exchanged", "renamed", "relabelled"])
def test_a_training_refuses_pictures_that_are_others_in_equal_number(moved, change):
    root, workdir = moved
    first, *_, last = pictures_of(root)
    if change == "exchanged":  # two files of one class, so counts and names agree
        exchange(first, pictures_of(root)[1])
    elif change == "renamed":
        first.rename(first.with_name("other.png"))
    else:
        exchange(first, last)
    longer = settings_for(root)._replace(epochs=2)
    with pytest.raises(ValueError, match="have since been renamed, exchanged"):
        train_network(longer, workdir)
    assert load_network(workdir).step == 2


def test_a_test_refuses_a_folder_that_was_changed_since_the_training(
    flowers, run, tmp_path
):
    root = tmp_path / "flowers"
    shutil.copytree(flowers, root)
    workdir = tmp_path / "run"
    train_network(settings_for(root), workdir)
    assert evaluate_networks([workdir], "single")["count"] == 8
    exchange(pictures_of(root)[0], next((root / "test").rglob("*.png")))
    with pytest.raises(ValueError, match="the data has changed since the training"):
        evaluate_networks([workdir], "single")


def test_a_network_is_not_trained_into_a_detector_s_folder(flowers, tmp_path):
    detector = plain(DetectorSettings(network="runs/network"))
    run_folder.save_config(tmp_path, detector)
    with pytest.raises(ValueError, match="holds a detector, no network"):
        train_network(settings_for(flowers), tmp_path)
    with pytest.raises(ValueError, match=r"its network is in .*network"):
        load_network(tmp_path)
    assert run_folder.load_config(tmp_path) == json.loads(json.dumps(detector))


def test_two_trainings_do_not_share_a_folder(flowers, tmp_path):
    with run_folder.locked(tmp_path), pytest.raises(ValueError, match="another proc"):
        train_network(settings_for(flowers), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"seed": 1, "da', "config.json is damaged"),
        ("config.json", "{}", "config.json holds no settings of a run"),
        ("data.json", "{}", "data.json doesn't tell what was trained on"),
        ("statistics.npz", "PK", "statistics.npz is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_named(run, tmp_path, name, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "run")


@pytest.mark.parametrize(
    "image", [np.zeros((20, 30), np.uint8), np.zeros((0, 5, 3), np.uint8), [[1]]]
)
def test_arrays_that_are_no_images_are_refused(network, image):
    with pytest.raises(ValueError, match=r"image must be uint8|has no pixels"):
        sn.score_images(network, [image])
