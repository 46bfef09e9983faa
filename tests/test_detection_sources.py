"""Boxes of every kind of data set come as exact, half-open pixels of their image."""

import io
import logging
import pickle
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import (
    encode,
    make_source,
    picture,
    voc_object,
    voc_xml,
    write_class_folders,
    write_voc_folder,
)
from mock_imagenet import prepare_mock_imagenet

from sppnet_jax.data.detection_sources import open_detection_source, read_objects
from sppnet_jax.data.images import image_size
from sppnet_jax.data.sources import available_splits, open_source
from sppnet_jax.data.tfds_records import recover_pixels

CLASSES = ("aeroplane", "bicycle", "bird")
POSES = ("frontal", "rear", "left", "right", "unspecified")
SIZES = ((24, 32), (33, 47), (21, 30), (25, 19))
# Each image's objects, as in VOC's XML: class, (xmin, ymin, xmax, ymax), difficult.
VOC_OBJECTS = (
    ((0, (1, 1, 32, 24), False),),
    ((2, (7, 11, 41, 13), True), (0, (47, 1, 47, 33), False), (2, (3, 3, 5, 5), False)),
    ((1, (2.3, 4.7, 29.5, 20.25), True),),
    ((1, (19, 25, 19, 25), False),),
)


class MockBoxes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features and values of TFDS's own `voc`: VOC's pixels over the size."""

    name = "voc"
    VERSION = tfds.core.Version("5.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="2007", version=VERSION),
        tfds.core.BuilderConfig(name="2012", version=VERSION),
    ]
    code_path = None
    objects = VOC_OBJECTS

    def _info(self):
        label = tfds.features.ClassLabel(names=CLASSES)
        one = {
            "label": label,
            "bbox": tfds.features.BBoxFeature(),
            "pose": tfds.features.ClassLabel(names=POSES),
            "is_truncated": np.bool_,
            "is_difficult": np.bool_,
        }
        features = {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(one),
            "labels": tfds.features.Sequence(label),
            "labels_no_difficult": tfds.features.Sequence(label),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        # The test objects of VOC 2012 are not public.
        withheld = self.builder_config and self.builder_config.name == "2012"
        test = tuple(() for _ in self.objects) if withheld else self.objects
        return {
            "train": self._generate_examples(self.objects),
            "test": self._generate_examples(test),
        }

    def _generate_examples(self, images):
        for number, objects in enumerate(images):
            height, width = SIZES[number]
            one = [
                {
                    "label": label,
                    "bbox": tfds.features.BBox(
                        ymin / height, xmin / width, ymax / height, xmax / width
                    ),
                    "pose": "unspecified",
                    "is_truncated": False,
                    "is_difficult": difficult,
                }
                for label, (xmin, ymin, xmax, ymax), difficult in objects
            ]
            certain = {label for label, _, difficult in objects if not difficult}
            image = encode(picture(height, width, seed=number), ".jpg")
            yield (
                number,
                {
                    "image": io.BytesIO(image),
                    "image/filename": f"00000{number}.jpg",
                    "objects": one,
                    "labels": sorted({label for label, _, _ in objects}),
                    "labels_no_difficult": sorted(certain),
                },
            )


class OtherBoxes(MockBoxes, skip_registration=True):
    """The same features under another name, whose boxes are half-open."""

    name = "other_boxes"
    BUILDER_CONFIGS: ClassVar = []


def prepare(builder_class, data_dir, *config):
    builder = builder_class(
        data_dir=str(data_dir), config=config[0] if config else None
    )
    builder.download_and_prepare(file_format="array_record")
    return str(data_dir)


@pytest.fixture(scope="module")
def voc_dir(tmp_path_factory):
    return prepare(MockBoxes, tmp_path_factory.mktemp("tfds"), "2007")


def objects_by_name(source):
    return {record["name"]: record["objects"] for record in source.records}


@pytest.mark.parametrize("dataset", ["voc/2007", "voc/2007:5.0.0", "voc"])
def test_vocs_own_pixels_are_moved_by_one(voc_dir, dataset):
    source = open_detection_source(dataset, "train", data_dir=voc_dir)
    assert source.multi_label
    assert source.class_names == CLASSES
    found = objects_by_name(source)
    for number, expected in enumerate(VOC_OBJECTS):
        boxes, labels, difficult = found[f"00000{number}.jpg"]
        assert (boxes.dtype, labels.dtype, difficult.dtype) == (float, np.int32, bool)
        assert labels.tolist() == [label for label, _, _ in expected]
        assert difficult.tolist() == [hard for _, _, hard in expected]
        half_open = [(y - 1, x - 1, y2, x2) for _, (x, y, x2, y2), _ in expected]
        np.testing.assert_allclose(boxes, half_open, rtol=0, atol=4e-6)
        if number != 2:
            assert boxes.tolist() == [list(map(float, box)) for box in half_open]


def test_records_have_labels_too(voc_dir):
    source = open_detection_source("voc/2007", "train", data_dir=voc_dir)
    plain = open_source("voc/2007", "train", data_dir=voc_dir, multi_label=True)
    for one, other in zip(source.records, plain.records, strict=True):
        assert one.keys() == {"image", "name", "labels", "objects"}
        np.testing.assert_array_equal(one["labels"], other["labels"])
        assert one["image"] == other["image"]


def test_boxes_of_other_data_sets_are_half_open(tmp_path, caplog):
    data_dir = prepare(OtherBoxes, tmp_path)
    source = open_detection_source("other_boxes", "test", data_dir=data_dir)
    with caplog.at_level(logging.WARNING):
        found = objects_by_name(source)
    assert found["000000.jpg"].boxes.tolist() == [[1, 1, 24, 32]]
    # A half-open box from 47 to 47 holds nothing.
    assert found["000001.jpg"].boxes.tolist() == [[11, 7, 13, 41], [3, 3, 5, 5]]
    assert found["000001.jpg"].labels.tolist() == [2, 2]
    assert found["000001.jpg"].difficult.tolist() == [True, False]
    assert "'000001.jpg' in split 'test'" in caplog.text
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


def test_rows_go_with_the_height_and_columns_with_the_width():
    found = recover_pixels(np.array([[0.5, 0.5, 1, 1]], np.float32), (10, 30))
    assert found.tolist() == [[5, 15, 10, 30]]


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
        ("image_folder", "has no boxes; a folder with boxes.* is a 'voc_folder'"),
        ("imagenet2012", r"'imagenet2012/5.1.0' has no boxes: it has features"),
        ("voc_folder", "'voc_folder' needs its folder: set root"),
        ("vocc", r"unknown data set 'vocc'.*Did you mean voc.*with boxes"),
    ],
)
def test_a_data_set_that_has_no_boxes_says_so(tmp_path, dataset, message):
    prepare_mock_imagenet(str(tmp_path), 2, 2)
    with pytest.raises(ValueError, match=message):
        open_detection_source(dataset, "train", data_dir=str(tmp_path))


def test_a_folder_of_class_folders_is_no_voc_folder(tmp_path):
    write_class_folders(tmp_path / "pets", 5)
    with pytest.raises(ValueError, match="has no folder JPEGImages"):
        open_detection_source("voc_folder", "train", root=str(tmp_path / "pets"))


def test_voc_that_is_not_prepared_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_detection_source("voc/2007", "test", data_dir=str(tmp_path))
    assert f"tfds build voc/2007 --file_format=array_record --data_dir={tmp_path}" in (
        str(error.value)
    )


def test_an_unknown_split_lists_those_there_are(voc_dir):
    with pytest.raises(ValueError, match=r"'trainval' .* it has 'train', 'test'"):
        open_detection_source("voc/2007", "trainval", data_dir=voc_dir)


def test_a_split_whose_objects_are_withheld_is_an_error(tmp_path):
    data_dir = prepare(MockBoxes, tmp_path, "2012")
    with pytest.raises(ValueError, match=r"none of the 4 records .* has a class"):
        open_detection_source("voc/2012", "test", data_dir=data_dir)


def test_an_image_without_a_size_names_its_record(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "encode", lambda image, suffix: b"\xff\xd8 broken")
    data_dir = prepare(MockBoxes, tmp_path, "2007")
    with pytest.raises(ValueError, match=r"'00000\d.jpg' in split 'train' .*opened"):
        open_detection_source("voc/2007", "train", data_dir=data_dir)


def test_a_label_outside_the_range_names_the_record(tmp_path):
    data_dir = prepare(MockBoxes, tmp_path, "2007")
    folder = tmp_path / "voc/2007/5.0.0"
    (folder / "objects-label.labels.txt").write_text("aeroplane\nbicycle\n")
    text = (folder / "features.json").read_text()
    (folder / "features.json").write_text(
        text.replace('"numClasses": "3"', '"numClasses": "2"')
    )
    with pytest.raises(ValueError, match=r"'000001.jpg' .* label 2, outside 0…1 of"):
        open_detection_source("voc/2007", "train", data_dir=data_dir)
