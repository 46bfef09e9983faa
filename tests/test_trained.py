"""A trained network as one value: what it holds, what it says of images and data."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax import predict
from sppnet_jax.classification import evaluation
from sppnet_jax.classification.evaluation import evaluate_networks
from sppnet_jax.classification.feature_files import write_features
from sppnet_jax.classification.image_scores import score_images
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


@pytest.mark.slow
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
    assert kinds == ["Decoded", "FileNotFoundError", "ValueError", "Decoded"]
    np.testing.assert_array_equal(found[str(paths[0])].pixels, picture(20, 30))
    assert found[str(paths[0])].size == (20, 30)


def test_predict_scores_a_large_jpeg_as_it_does_the_whole(
    run, flowers, tmp_path, capsys
):
    image, file = picture(403, 300), tmp_path / "large.jpg"
    file.write_bytes(encode(image, ".jpg"))
    network, out = load_network(run), tmp_path / "found.json"
    given = settings_for(flowers), network, [str(file)]
    assert predict.show_images(*given, out=out) == 0
    (told,) = json.loads(out.read_text())
    assert (told["height"], told["width"]) == (403, 300)
    assert "(300×403 pixels)" in capsys.readouterr().out
    ((_, read),) = read_images([str(file)], least_side=network.resize_side)
    assert read.pixels.shape[1] < 300
    (scores,) = score_images(network, [image])
    for row in told["found"]:
        expected = scores[network.class_names.index(row["label"])]
        assert abs(row["score"] - expected) < 0.01


def test_predict_decodes_each_photograph_once(run, flowers, tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path in paths:
        (tmp_path / path).write_bytes(encode(picture(80, 100)))
    decode, decoded = photographs.decode_part, []

    def counted(data, *needed):
        decoded.append(data)
        return decode(data, *needed)

    monkeypatch.setattr(photographs, "decode_part", counted)
    shown = settings_for(flowers), load_network(run), paths, tmp_path / "drawn.png"
    assert predict.show_images(*shown) == 0
    assert len(decoded) == 3


def test_a_test_s_results_are_told_even_if_they_can_t_be_written(
    run, tmp_path, monkeypatch
):
    shutil.copytree(run, tmp_path / "run")
    result, told = tmp_path / "run" / "evaluate_single.json", []
    result.mkdir()
    with monkeypatch.context() as patch:  # it is found before the work
        patch.setattr(evaluation, "load_network", None)
        with pytest.raises(OSError, match=r"single\.json can't be written"):
            evaluate_networks([tmp_path / "run"], "single")
    result.rmdir()

    def tell(report):
        told.append(report["count"])
        result.mkdir()

    with pytest.raises(OSError, match=r"single\.json can't be written"):
        evaluate_networks([tmp_path / "run"], "single", tell=tell)
    assert told == [8]
    assert result.with_suffix(".png").is_file()


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


def test_changed_held_out_images_are_said_in_a_test_and_when_a_run_goes_on(
    moved, tmp_path, caplog
):
    root, workdir = tmp_path / "flowers", tmp_path / "anew"
    train_network(settings_for(root), workdir)
    first, *_, last = sorted((root / "test").rglob("*.png"))
    evaluate_networks([workdir], "single")
    assert "which is tested on" not in caplog.text
    exchange(first, last)
    evaluate_networks([workdir], "single")
    assert "files of the split 'test', which is tested on, have" in caplog.text
    caplog.clear()
    train_network(settings_for(root)._replace(epochs=2), workdir)
    assert "files of the split 'test', which is tested on, have" in caplog.text


def test_another_way_to_write_a_folder_s_path_hides_no_change(
    moved, tmp_path, monkeypatch
):
    root, workdir = tmp_path / "flowers", tmp_path / "anew"
    train_network(settings_for(root), workdir)
    pictures_of(root)[0].rename(pictures_of(root)[0].with_name("other.png"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(root)
    for same in ("flowers", "link/", "link/../flowers"):
        given = settings_for(root)
        given = given._replace(data=given.data._replace(root=same, train_split="x"))
        with pytest.raises(ValueError, match="the data has changed since the training"):
            evaluate_networks([workdir], "single", settings=given)
    with pytest.raises(ValueError, match="the data has changed since the training"):
        write_features(given, load_network(workdir), workdir=workdir)


def test_a_test_on_another_folder_says_that_it_is_another(run, flowers, moved, caplog):
    root, workdir = moved
    for elsewhere in (flowers, root):
        evaluate_networks([workdir], "single", settings=settings_for(elsewhere))
    assert "this is other data" not in caplog.text
    pictures_of(root)[0].rename(pictures_of(root)[0].with_name("other.png"))
    evaluate_networks([workdir], "single", settings=settings_for(root))
    assert "this is other data than the run was trained on" in caplog.text


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
        ("config.json", "", "config.json is damaged"),
        ("config.json", "{}", "config.json is damaged: it doesn't tell data, seed"),
        ("config.json", "[]", "config.json is damaged"),
        ("data.json", "{}", "data.json is damaged: it doesn't tell class_names"),
        ("data.json", "[3]", "data.json is damaged"),
        ("data.json", '{"class_names": 1}', "data.json is damaged"),
        ("statistics.npz", "", "statistics.npz is damaged"),
        ("statistics.npz", "PK", "statistics.npz is damaged"),
        ("statistics.npz", "PK\x03\x04" + 90 * "a", "statistics.npz is damaged"),
        ("statistics.npz", "\x80\x04K\x01.", "statistics.npz is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_named(run, tmp_path, name, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "run")


def test_statistics_that_lack_an_array_or_are_cut_are_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "statistics.npz"
    whole = file.read_bytes()
    for part in (0.3, 0.6, 0.99):
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=r"statistics\.npz is damaged"):
            load_network(tmp_path / "run")
    np.savez(file, mean_image=np.zeros(3))
    with pytest.raises(ValueError, match=r"statistics.npz is damaged.*covariance"):
        load_network(tmp_path / "run")


@pytest.fixture(scope="module")
def two_checkpoints(flowers, run, tmp_path_factory):
    """The folder of a run with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    shutil.copytree(run, workdir)
    train_network(settings_for(flowers)._replace(epochs=2), workdir)
    return workdir


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        *(("params", empty), ("params", cut), ("training", shutil.rmtree)),
        *(("host", cut), (".", empty)),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    part, damage, flowers, two_checkpoints, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    damage(workdir / "checkpoints" / "4" / part)
    step = load_network(workdir).step
    if part in ("params", "."):
        assert step == 2
        assert "checkpoints/4 can't be read" in caplog.text
        assert "the checkpoint before it, of step 2, is taken" in caplog.text
    caplog.clear()
    train_network(settings_for(flowers)._replace(epochs=2), workdir)
    assert "of step 2, is taken" in caplog.text
    caplog.clear()
    assert load_network(workdir).step == 4
    assert not caplog.text
    old, new = (load_network(path).params for path in (two_checkpoints, workdir))
    jax.tree.map(np.testing.assert_array_equal, new, old)


def test_a_run_without_any_whole_checkpoint_says_so(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        empty(step)
    with pytest.raises(ValueError, match=r"none of the checkpoints .* can be read"):
        load_network(tmp_path / "run")


def test_a_run_may_lie_below_any_name(flowers, tmp_path, monkeypatch):
    name = "a[1]/b*c?/[!x]/["
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)
    for epochs in (1, 2):
        train_network(settings_for(flowers)._replace(epochs=epochs), Path("run"))
        assert load_network("run").step == 2 * epochs
    assert load_network(tmp_path / name / "run").step == 4
    steps = {path.name for path in Path("run", "checkpoints").iterdir()}
    assert steps == {"2", "4"}


@pytest.mark.parametrize("name", ["checkpoints", "statistics.npz/x", "metrics.jsonl/x"])
def test_what_is_in_the_way_of_a_run_s_files_is_told_before_the_first_step(
    name, flowers, tmp_path
):
    workdir = tmp_path / "run"
    (workdir / name).parent.mkdir(parents=True)
    (workdir / name).touch()
    told = re.escape(str(workdir / name.split("/")[0]))
    with pytest.raises(OSError, match=f"{told}.* can't be written"):
        train_network(settings_for(flowers), workdir)
    assert not any(workdir.glob("events*"))


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    flowers, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100_000)
    )
    with pytest.raises(OSError, match=r"checkpoints/0 can't be written: it takes .*MB"):
        train_network(settings_for(flowers), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_s_paths_are_found_from_any_folder(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(flowers.parent)
    given = settings_for("flowers")
    model = given.model._replace(weights="begin.safetensors")
    given = given._replace(
        model=model, data=given.data._replace(root="flowers", data_dir="tfds")
    ).with_absolute_paths()
    assert given.data.root == str(flowers)
    assert given.data.data_dir == str(flowers.parent / "tfds")
    assert given.model.weights == str(flowers.parent / "begin.safetensors")
    for weights in ("", "pretrained", "package:some-weights", "hub:owner/name"):
        same = given._replace(model=given.model._replace(weights=weights))
        assert same.with_absolute_paths() == same


@pytest.mark.parametrize(
    "image", [np.zeros((20, 30), np.uint8), np.zeros((0, 5, 3), np.uint8), [[1]]]
)
def test_arrays_that_are_no_images_are_refused(network, image):
    with pytest.raises(ValueError, match=r"image must be uint8|has no pixels"):
        sn.score_images(network, [image])
