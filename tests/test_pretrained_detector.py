"""Detectors on a published trunk, or on other levels of a classifier than its own."""

import logging
import re
import shutil

import jax
import numpy as np
import pytest

from configs import detect_pretrained
from configs import folder as classifier_config
from sppnet_jax.data.images import decode_image, resize_whole
from sppnet_jax.detection import maps
from sppnet_jax.detection.box_split import open_split_of
from sppnet_jax.detection.detector_evaluation import evaluate_detectors
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.detector_training import train_detector
from sppnet_jax.detection.split_features import split_features
from sppnet_jax.detection.trained_detector import detect_split, load_detector
from sppnet_jax.detection.warp import warp_windows
from sppnet_jax.detection.window_features import (
    make_program,
    pooled_rows,
    rows_of,
)
from sppnet_jax.network.model import Architecture
from sppnet_jax.network.pretrained import pretrained_network, pretrained_params
from sppnet_jax.network.trained import load_network
from sppnet_jax.pyramid.geometry import boxes_to_windows
from sppnet_jax.run import run_folder, stages
from sppnet_jax.run.settings import read
from tests.network_helpers import (
    TINY_TRUNK,
    joined_by_hand,
    pooled_by_hand,
    run_with_tiny_trunk,
    tiny_maps,
    write_network,
)
from tests.test_detect_command import TEST, write_scenes

pytestmark = pytest.mark.slow  # all but a few

SCALE = 90


@pytest.fixture(scope="module")
def base(tiny_trunk, tmp_path_factory):
    """A folder of scenes, and weights."""
    base = tmp_path_factory.mktemp("detect")
    write_scenes(base / "voc")
    shutil.copy(tiny_trunk, base / "tiny.safetensors")
    return base


def make(base, **changes):
    config = detect_pretrained.get_config()
    config.network, config.weights = TINY_TRUNK, str(base / "tiny.safetensors")
    config.cache = str(base / "cache")
    config.data.root, config.data.threads = str(base / "voc"), 2
    config.cuts, config.levels, config.scales = (), (2, 1), (SCALE,)
    config.proposals.width, config.proposals.min_side = 100, 16
    config.proposals.max_windows = 60
    config.finetune.batch_size, config.finetune.units = 16, 24
    config.finetune.learning_rate, config.finetune.drop_steps = 0.01, ()
    config.svm.C, config.svm.max_rounds = 0.01, 2
    config.update_from_flattened_dict(changes)
    return read(DetectorSettings, config.to_dict())


@pytest.fixture(scope="module")
def trained(base):
    workdir = base / "trained"
    train_detector(make(base), workdir)
    return workdir


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def no_map(monkeypatch):
    """A convolution of a split fails the test."""

    def refuse(*_, **__):
        raise AssertionError("a map is computed")

    monkeypatch.setattr(maps, "map_whole_images", refuse)


def test_a_detector_on_a_published_trunk_finds_what_it_was_trained_on(trained):
    report = evaluate_detectors([trained])
    assert report["map_11_point"] > 0.4
    assert load_network(trained / "network").params.keys() == {"conv1", "conv2"}


def test_calibration_moves_scores_so_that_0_shows_objects(base, trained, copy):
    report = run_folder.read_json(trained / "svm" / stages.STAGE_FILE)["report"]
    moved = np.array(report["calibration"]["moved by"])
    assert (np.abs(moved) > 0.01).all()
    calibrated = load_detector(trained)
    train_detector(make(base, **{"svm.calibration_parts": 0}), copy)
    raw = load_detector(copy).weights["svms"]
    svms = calibrated.weights["svms"]
    np.testing.assert_array_equal(svms.weights, raw.weights)
    np.testing.assert_allclose(svms.biases - raw.biases, moved, atol=1e-6)
    split = open_split_of(calibrated.settings, "train", trained)
    shown = [found.above(0) for found in detect_split([calibrated], split)]
    objects = sum(len(found.labels) for found in split.objects)
    assert 0.5 < sum(len(found.scores) for found in shown) / objects < 2


def test_the_trained_folder_is_enough_to_detect(
    command_line, base, tiny_trunk, trained, copy, tmp_path
):
    """Weights, cache and data are somewhere else by then."""
    gone = tmp_path / "gone.safetensors"
    shutil.copy(tiny_trunk, gone)
    train_detector(make(base, weights=str(gone)), copy)
    gone.unlink()
    photo = base / f"voc/JPEGImages/{TEST[0]}.png"
    told = command_line(
        "detect", "image", f"--workdir={copy}", photo, how=run_with_tiny_trunk
    ).stdout
    assert re.search(r"^ +-?[\d.]+  (disc|square)  x \d+ to", told, re.MULTILINE)
    assert (copy / f"images/{TEST[0]}_detections.jpg").exists()


def test_a_training_goes_on_when_the_weights_are_gone(base, copy, tmp_path, caplog):
    gone = tmp_path / "gone.safetensors"
    shutil.copy(base / "tiny.safetensors", gone)
    given = {"weights": str(gone), "cuts": ("stride2",), "reducer": "max"}
    train_detector(make(base, **given), copy)
    before = load_detector(copy).weights["svms"]
    gone.unlink()
    with caplog.at_level(logging.INFO, logger="sppnet_jax"):
        train_detector(make(base, **given), copy)
    assert f"{gone} is gone; going on with the copy of it" in caplog.text
    jax.tree.map(
        np.testing.assert_array_equal, load_detector(copy).weights["svms"], before
    )
    for other in ({"cuts": ()}, {"weights": str(tmp_path / "absent")}):
        with pytest.raises(FileNotFoundError, match="there is no weight file"):
            train_detector(make(base, **given | other), copy)
    assert load_detector(copy).network.model.cuts == ("stride2",)


@pytest.mark.parametrize(
    ("cuts", "levels", "reducer"),
    [
        ((), (3, 1), "mean"),
        (("stride2",), (2, 1), "max"),
        (("stride2", "stride4"), (3, 2), "mean"),
        (("stride4", "stride2"), (1,), "max"),
    ],
)
def test_windows_are_pooled_as_their_part_of_the_map_is_by_hand(
    base, trained, cuts, levels, reducer
):
    settings = make(base, cuts=cuts, levels=levels, reducer=reducer)
    architecture = Architecture(TINY_TRUNK, settings.weights, "all", cuts, levels)
    network = pretrained_network(architecture._replace(reducer=reducer))
    split = open_split_of(settings, "test", trained)
    boxes = [own[:20] for own in split.proposals]
    features, _ = split_features(settings, network, split, boxes, trained)
    found = rows_of(
        features, make_program(features, pooled_rows), {}, 0, np.arange(len(boxes[0]))
    )
    image = resize_whole(decode_image(split.source.records[0]["image"]), SCALE, 4.0)
    fine, coarse = convolved(base, image)
    parts = {"": coarse, "stride2": fine, "stride4": coarse}
    joined = parts[cuts[0] if cuts else ""]
    if len(cuts) == 2:
        joined = joined_by_hand(fine, coarse)
        if cuts[0] == "stride4":
            joined = np.concatenate([joined[..., 6:], joined[..., :6]], axis=-1)
    stride = 4 if joined is coarse else 2
    assert (network.geometry.stride, network.geometry.center) == (stride, 1)
    windows = boxes_to_windows(boxes[0], network.geometry, joined.shape[:2]).tolist()
    expected = [
        pooled_by_hand(joined[top:bottom, left:right], levels, getattr(np, reducer))
        for top, left, bottom, right in windows
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def convolved(base, image):
    params = pretrained_params(TINY_TRUNK, str(base / "tiny.safetensors"))
    return tiny_maps(params, image)


def test_other_levels_and_another_reducer_use_the_same_maps(base, copy, no_map):
    for changes in ({"levels": (3, 1)}, {"reducer": "mean"}):
        train_detector(make(base, **changes), copy)
        network = load_detector(copy).network
        for name, value in changes.items():
            assert getattr(network.model, name) == value


def test_another_cut_is_another_map(base, copy, no_map):
    with pytest.raises(AssertionError, match="a map is computed"):
        train_detector(make(base, cuts=("stride2", "stride4")), copy)


def test_settings_that_a_detector_was_not_trained_with_are_refused(base, trained):
    for changes in ({"levels": (3, 1)}, {"reducer": "mean"}, {"cuts": ("stride2",)}):
        (name,) = changes
        with pytest.raises(ValueError, match=f"was trained with {name} = "):
            load_detector(trained, make(base, **changes))


def test_fc7_of_a_trunk_that_has_none_is_refused_in_words(base, tmp_path):
    with pytest.raises(ValueError, match=r"no fc layers for these pyramids: use --con"):
        train_detector(make(base, layer="fc7"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scorer", ["svm", "softmax"])
def test_fresh_fc_layers_are_fine_tuned_on_a_trunk_without(base, copy, scorer):
    changes = {"finetune.steps": 60, "layer": "fc7", "scorer": scorer}
    train_detector(make(base, **changes), copy)
    detector = load_detector(copy)
    fc = detector.weights["fc"]
    assert fc["fc6"]["kernel"].shape == (5 * 8, 24)
    assert fc["fc7"]["kernel"].shape == (24, 24)
    assert fc["fc8"]["kernel"].shape == (24, 3)
    assert evaluate_detectors([copy])["map_11_point"] > 0.2


def write_tiny_classifier(workdir, weights, **changes):
    config = classifier_config.get_config()
    config.model.backbone, config.model.weights = TINY_TRUNK, str(weights)
    config.model.levels, config.model.head, config.model.width = (2, 1), "linear", 1.0
    config.data.image_size, config.data.resize_side = 32, 40
    config.update_from_flattened_dict(changes)
    return write_network(workdir, config)


@pytest.mark.parametrize(
    ("changes", "channels"),
    [({"levels": (3, 1), "reducer": "mean"}, 8), ({"cuts": ("stride2",)}, 6)],
)
def test_a_classifier_serves_other_pyramids_and_cuts_than_its_own(
    base, tmp_path, changes, channels
):
    classifier = write_tiny_classifier(tmp_path / "own", base / "tiny.safetensors")
    settings = make(base, network=str(classifier), **changes)
    train_detector(settings, tmp_path / "run")
    shutil.rmtree(classifier)
    train_detector(settings, tmp_path / "run")
    detector = load_detector(tmp_path / "run")
    bins = sum(n * n for n in settings.levels or (2, 1))
    assert detector.weights["svms"].weights.shape == (2, bins * channels)
    report = evaluate_detectors([tmp_path / "run"])
    assert np.isfinite(report["map_11_point"])


def test_fc_layers_of_another_pyramid_are_not_used(base, tmp_path):
    changes = {"model.head": "fc", "model.width": 0.3}
    classifier = write_tiny_classifier(tmp_path / "own", "", **changes)
    given = {"network": str(classifier), "levels": (3,)}
    with pytest.raises(ValueError, match="has no fc layers for these pyramids"):
        train_detector(make(base, **given, layer="fc6"), tmp_path / "run")
    changes = {"layer": "fc6", "finetune.steps": 2}
    train_detector(make(base, **given, **changes), tmp_path / "run")
    fc = load_detector(tmp_path / "run").weights["fc"]
    assert fc["fc6"]["kernel"].shape == (9 * 2, 24)  # not the 1,229 units of its own


@pytest.mark.parametrize("cuts", [(), ("stride2", "stride4")])
def test_rcnn_warps_windows_to_the_side_that_is_asked_for(base, tmp_path, cuts):
    settings = make(
        base,
        system="rcnn",
        window_side=24,
        context=2,
        cuts=cuts,
        reducer="mean",
        **{"proposals.max_windows": 12},
    )
    train_detector(settings, tmp_path)
    detector = load_detector(tmp_path)
    assert detector.network.model.image_size == 24
    split = open_split_of(settings, "test", tmp_path)
    boxes = [own[:5] for own in split.proposals]
    features, _ = split_features(settings, detector.network, split, boxes, tmp_path)
    found = rows_of(features, make_program(features, pooled_rows), {}, 0, np.arange(5))
    image = decode_image(split.source.records[0]["image"])
    warped = warp_windows(image, boxes[0], 24, context=2, fill=np.uint8([127] * 3))
    for row, window in zip(found, warped, strict=True):
        fine, coarse = convolved(base, window)
        joined = joined_by_hand(fine, coarse) if cuts else coarse
        expected = pooled_by_hand(joined, (2, 1), np.mean)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(evaluate_detectors([tmp_path])["map_11_point"])
