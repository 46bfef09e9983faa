"""Boxes of every kind of data set come as exact, half-open pixels of their image."""

import logging
import pickle

import mock_voc
import numpy as np
import pytest
from data_helpers import (
    make_source,
    voc_object,
    voc_xml,
    write_voc_folder,
)
from mock_imagenet import prepare_mock_imagenet
from mock_voc import CLASSES, OBJECTS, OtherBoxes, prepare_mock_voc

from sppnet_jax.data.images import image_size
from sppnet_jax.data.sources import (
    available_splits,
    open_detection_source,
    open_source,
    read_objects,
)
from sppnet_jax.data.tfds_records import recover_pixels


@pytest.fixture(scope="module")
def voc_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare_mock_voc(folder)
    return str(folder)


def objects_by_name(source):
    return {record["name"]: record["objects"] for record in source.records}


@pytest.mark.parametrize("dataset", ["voc/2007", "voc/2007:5.0.0", "voc"])
def test_vocs_own_pixels_are_moved_by_one(voc_dir, dataset):
    source = open_detection_source(dataset, "train", data_dir=voc_dir)
    assert source.multi_label
    assert source.class_names == CLASSES
    found = objects_by_name(source)
    for number, expected in enumerate(OBJECTS):
        boxes, labels, difficult = found[f"00000{number}.jpg"]
        assert (boxes.dtype, labels.dtype, difficult.dtype) == (float, np.int32, bool)
        assert labels.tolist() == [label for label, _, _ in expected]
        assert difficult.tolist() == [hard for _, _, hard in expected]
        half_open = [[y - 1, x - 1, y2, x2] for _, (x, y, x2, y2), _ in expected]
        half_open = np.array(half_open, float).reshape(-1, 4)
        np.testing.assert_allclose(boxes, half_open, rtol=0, atol=4e-6)
        if number != 2:
            np.testing.assert_array_equal(boxes, half_open)


def test_records_have_labels_too(voc_dir):
    source = open_detection_source("voc/2007", "train", data_dir=voc_dir)
    plain = open_source("voc/2007", "train", data_dir=voc_dir, multi_label=True)
    for one, other in zip(source.records, plain.records, strict=True):
        assert one.keys() == {"image", "name", "labels", "objects"}
        np.testing.assert_array_equal(one["labels"], other["labels"])
        assert one["image"] == other["image"]


def test_boxes_of_other_data_sets_are_half_open(tmp_path, caplog):
    prepare_mock_voc(tmp_path, builder_class=OtherBoxes)
    source = open_detection_source("other_boxes", "train", data_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        found = objects_by_name(source)
    assert found["000000.jpg"].boxes.tolist() == [[1, 1, 24, 32]]
    # A half-open box from 47 to 47 holds nothing.
    assert found["000001.jpg"].boxes.tolist() == [[11, 7, 13, 41], [3, 3, 5, 5]]
    assert found["000001.jpg"].labels.tolist() == [2, 2]
    assert found["000001.jpg"].difficult.tolist() == [True, False]
    assert "'000001.jpg' in split 'train'" in caplog.text
    assert "1 of 3 boxes are empty: left out" in caplog.text


def test_every_whole_pixel_comes_back_exactly():
    """All coordinates of many sizes, as TFDS divides and rounds them."""
    rng = np.random.default_rng(0)
    sizes = {1, 2, 3, 333, 375, 500, 4096, 9973, 16_384, 19_997, 19_999, 20_000}
    for size in sizes | set(rng.integers(4, 20_001, 150).tolist()):
        pixels = np.arange(size + 1)
        fractions = np.array([pixel / size for pixel in pixels.tolist()], np.float32)
        fours = np.stack([fractions, fractions[::-1]] * 2, axis=1)
        found = recover_pixels(fours, (size, size))
        np.testing.assert_array_equal(found, np.stack([pixels, pixels[::-1]] * 2, 1))


def test_other_pixels_keep_the_precision_of_float32():
    rng = np.random.default_rng(1)
    for height, width in ((375, 500), (19_997, 20_000), (13, 7)):
        pixels = rng.uniform(0, 1, (500, 4)) * [height, width, height, width]
        pixels = np.concatenate([pixels, np.round(pixels, 1)])
        fractions = (pixels / [height, width, height, width]).astype(np.float32)
        found = recover_pixels(fractions, (height, width))
        assert (np.abs(found - pixels) <= pixels * 2**-22).all()
        fractional = np.abs(pixels - np.round(pixels)) > 0.01
        assert (found != np.round(found))[fractional].all()


def test_digit_scenes_are_the_default(digit_scenes_dir):
    source = open_detection_source("digit_scenes/detection", "test[:50]")
    assert source.class_names == tuple("0123456789")
    for record in source.records:
        boxes, labels, difficult = record["objects"]
        np.testing.assert_array_equal(boxes, np.round(boxes))
        height, width = image_size(record["image"])
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes >= 0).all()
        assert (boxes <= [height, width, height, width]).all()
        assert set(labels) == set(np.flatnonzero(record["labels"] == 1))
        assert not difficult.any()
        # The file's name says which digits are in the scene.
        assert len(boxes) == len(record["name"].partition("digits_")[2].split("-"))


def test_a_folder_gives_the_pixels_of_its_annotations(tmp_path):
    rng = np.random.default_rng(2)
    annotations, expected = {}, {}
    for number in range(12):
        first = rng.integers(1, (30, 20), (5, 2))
        corners = np.concatenate([first, first + rng.integers(1, 4, (5, 2))], axis=1)
        texts = [voc_object(tuple(box), name="ab"[box[0] % 2]) for box in corners]
        annotations[f"{number:02d}"] = voc_xml(*texts)
        expected[f"{number:02d}.png"] = [
            [ymin - 1, xmin - 1, min(ymax, 24), min(xmax, 32)]
            for xmin, ymin, xmax, ymax in corners.tolist()
        ]
    root = str(write_voc_folder(tmp_path / "voc", annotations))
    assert available_splits("voc_folder", root=root) == ("trainval", "test")
    source = open_detection_source("voc_folder", "trainval+test", root=root)
    found = objects_by_name(source)
    assert {name: one.boxes.tolist() for name, one in found.items()} == expected


def test_objects_are_read_at_once_and_in_order(voc_dir):
    source = open_detection_source("voc/2007", "train", data_dir=voc_dir)
    copy = pickle.loads(pickle.dumps(source))
    found = read_objects(copy, threads=3)
    assert len(found) == len(source.records)
    for one, record in zip(found, source.records, strict=True):
        for array, expected in zip(one, record["objects"], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_objects_of_a_source_without_boxes_are_an_error():
    with pytest.raises(ValueError, match="no boxes; open it with open_detection_sourc"):
        read_objects(make_source(3))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("digit_scenes/classification", "has no boxes; 'digit_scenes/detection' has"),
        ("image_folder", "has no boxes; a folder with boxes is a 'box_folder'"),
        ("imagenet2012", r"'imagenet2012/5.1.0' has no boxes: it has features"),
        ("voc_folder", "'voc_folder' needs its folder: set root"),
        ("vocc", r"unknown data set 'vocc'.*Did you mean voc.*with boxes"),
    ],
)
def test_a_data_set_that_has_no_boxes_says_so(tmp_path, dataset, message):
    prepare_mock_imagenet(str(tmp_path), 2, 2)
    with pytest.raises(ValueError, match=message):
        open_detection_source(dataset, "train", data_dir=str(tmp_path))


def test_an_image_without_a_size_names_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(mock_voc, "encode", lambda *_: b"\xff\xd8 broken")
    prepare_mock_voc(tmp_path)
    with pytest.raises(ValueError, match=r"'00000\d.jpg' in split 'train' .*opened"):
        open_detection_source("voc/2007", "train", data_dir=str(tmp_path))
