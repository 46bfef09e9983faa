"""The embedded data set is what its docstring says, and is the same everywhere."""

import itertools
import os
import signal

import cv2
import numpy as np
import pytest
import sklearn.datasets

from sppnet_jax.data import digit_scenes
from sppnet_jax.data.digit_scenes import DigitScenes
from sppnet_jax.data.sources import available_splits, open_source
from tests.processes import Started

CONFIGS = ("classification", "detection")


@pytest.fixture(scope="module", params=CONFIGS)
def builder(request, digit_scenes_dir):
    return _prepared(request.param, digit_scenes_dir)


@pytest.fixture(scope="module")
def classification(digit_scenes_dir):
    return _prepared("classification", digit_scenes_dir)


@pytest.fixture(scope="module")
def detection(digit_scenes_dir):
    return _prepared("detection", digit_scenes_dir)


def _prepared(config, data_dir):
    splits = available_splits(f"digit_scenes/{config}", data_dir=data_dir)
    assert splits == ("train", "test")
    return DigitScenes(config=config, data_dir=data_dir)


def test_images_have_any_size_and_aspect_the_docstring_names(builder):
    scenes = builder.as_data_source("test")
    shapes = np.array([scenes[i]["image"].shape for i in range(300)])
    shorter, longer = shapes[:, :2].min(axis=1), shapes[:, :2].max(axis=1)
    assert (shapes[:, 2] == 3).all()
    assert shorter.min() < 56
    assert shorter.max() > 104
    assert 48 <= shorter.min() <= shorter.max() <= 112
    assert (longer <= 2 * shorter).all()
    assert (shapes[:, 0] / shapes[:, 1]).min() < 0.6
    assert (shapes[:, 0] / shapes[:, 1]).max() > 1.6


def test_every_class_is_in_every_split(classification):
    sizes = {
        split: info.num_examples for split, info in classification.info.splits.items()
    }
    assert sizes == {"train": 11504, "test": 1077}
    labels = [scene["label"] for scene in classification.as_data_source("test")]
    assert min(np.bincount(labels, minlength=10)) >= 100


def test_train_and_test_share_no_digit(classification, detection):
    used = {}
    for split in ("train", "test"):
        scenes = classification.as_data_source(split)
        used[split] = {int(scene["digit_index"]) for scene in scenes}
        for scene in detection.as_data_source(split):
            used[split].update(_digits_of(scene))
    assert used["train"].isdisjoint(used["test"])
    assert used["train"] | used["test"] == set(range(1797))


def test_the_digit_index_leads_to_the_digit(classification):
    targets = sklearn.datasets.load_digits().target
    for scene in classification.as_data_source("test[:50]"):
        assert targets[scene["digit_index"]] == scene["label"]


def test_the_centre_view_contains_the_digit_and_it_stands_out(monkeypatch):
    for scene, canvas, [(ink, top, left)] in _watched(
        "classification", 60, monkeypatch
    ):
        height, width = canvas.shape[:2]
        view = digit_scenes.CENTRE_VIEW * min(height, width)
        assert top >= (height - view) / 2 - 1
        assert top + ink.shape[0] <= (height + view) / 2 + 1
        assert left >= (width - view) / 2 - 1
        assert left + ink.shape[1] <= (width + view) / 2 + 1
        assert 0.45 < max(ink.shape) / min(height, width) <= 0.85
        place = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
        painted = _decoded(scene)[top : top + ink.shape[0], left : left + ink.shape[1]]
        before, after = (_luma(image)[ink > 0.9].mean() for image in (place, painted))
        assert abs(after - before) > 60


def test_a_box_is_the_tight_box_of_visible_ink(monkeypatch):
    for scene, canvas, painted in _watched("detection", 40, monkeypatch):
        height, width = canvas.shape[:2]
        assert 1 <= len(painted) == len(scene["objects"]) <= 6
        for thing, (ink, top, left) in zip(scene["objects"], painted, strict=True):
            box = np.array(thing["bbox"]) * [height, width, height, width]
            bottom, right = top + ink.shape[0], left + ink.shape[1]
            np.testing.assert_allclose(box, [top, left, bottom, right], atol=1e-9)
            assert 0 <= top < bottom <= height
            assert 0 <= left < right <= width
            edges = ink[0], ink[-1], ink[:, 0], ink[:, -1]
            assert min(edge.max() for edge in edges) > 0.2


def test_detection_has_the_features_of_voc(detection):
    features = detection.info.features
    assert set(features) == {
        *("image", "image/filename", "objects", "labels", "labels_no_difficult"),
    }
    assert set(features["objects"].feature) == {
        *("label", "bbox", "pose", "is_truncated", "is_difficult"),
    }
    scene = detection.as_data_source("test")[0]
    assert sorted(set(scene["objects"]["label"])) == list(scene["labels"])
    counts = {len(s["objects"]["label"]) for s in detection.as_data_source("test")}
    assert counts == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("config", CONFIGS)
def test_scenes_are_the_same_every_time(config):
    first, second = (
        [scene["image"].getvalue() for scene in _examples(config, 10)] for _ in range(2)
    )
    assert first == second


def test_version_1_0_0_has_these_scenes():
    assert [
        (scene["digit_index"], scene["label"], _decoded(scene).shape)
        for scene in _examples("classification", 4)
    ] == [
        (3, 3, (148, 100, 3)),
        (3, 3, (56, 99, 3)),
        (3, 3, (67, 130, 3)),
        (5, 5, (106, 141, 3)),
    ]


def _examples(config, count):
    """The first scenes of the test split, as they are made."""
    examples = getattr(digit_scenes, f"_{config}_examples")("test")
    return (scene for _, scene in itertools.islice(examples, count))


def _watched(config, count, monkeypatch):
    """Yields scenes with the background and the inks that went into each."""
    paint = digit_scenes._paint
    canvases, painted = [], []

    def watch(canvas, ink, top, left, rng):
        canvases.append(canvas.copy())
        painted.append((ink, top, left))
        paint(canvas, ink, top, left, rng)

    monkeypatch.setattr(digit_scenes, "_paint", watch)
    for scene in _examples(config, count):
        yield scene, canvases[0], list(painted)
        canvases.clear()
        painted.clear()


def _digits_of(scene):
    name = scene["image/filename"].decode()
    return [
        int(i) for i in name.partition("digits_")[2].removesuffix(".jpg").split("-")
    ]


def _decoded(scene):
    buffer = np.frombuffer(scene["image"].getvalue(), np.uint8)
    return cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB)


def _luma(image):
    return image @ np.array([0.299, 0.587, 0.114])


def open_eight(data_dir, killed=False):
    """Prepares and opens the first scenes, in a process of its own."""
    read = DigitScenes._generate_examples

    def generate(self, split):
        for number, example in itertools.islice(read(self, split), 8):
            yield number, example
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)

    DigitScenes._generate_examples = generate
    source = open_source("digit_scenes/classification", "train", data_dir=data_dir)
    print("records:", len(source.records))


def test_preparing_survives_a_kill_and_two_processes_at_once(tmp_path):
    killed = Started(open_eight, str(tmp_path), True)
    assert killed.end().returncode == -signal.SIGKILL
    assert list(tmp_path.glob("digit_scenes/classification/incomplete.*"))
    both = [Started(open_eight, str(tmp_path)) for _ in range(2)]
    for process in both:
        ended = process.end()
        assert "records: 8" in ended.stdout, ended.stderr
    assert not list(tmp_path.glob("digit_scenes/classification/incomplete.*"))
