"""Every kind of data set opens the same way, or says what to do."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_source, write_class_folders
from mock_imagenet import prepare_mock_imagenet
from mock_voc import CLASSES, prepare_mock_voc

from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import available_splits, check_labels, open_source, subset


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    prepare_mock_imagenet(data_dir)
    return data_dir


def test_imagenet_opens_without_tensorflow(imagenet_dir):
    source = open_source("imagenet2012", "train", data_dir=imagenet_dir)
    assert len(source.records) == 32
    assert len(source.class_names) == 1000
    assert source.class_names[:2] == ("n01440764", "n01443537")
    for record in source.records:
        assert record["name"].startswith(source.class_names[record["label"]])
        assert decode_image(record["image"]).ndim == 3
    assert available_splits("imagenet2012", data_dir=imagenet_dir) == (
        *("train", "validation"),
    )


@pytest.mark.parametrize(
    ("split", "count"),
    [("train[:50%]", 16), ("train[10:]", 22), ("train+validation", 44)],
)
def test_slices_of_tfds_and_a_version_may_be_named(imagenet_dir, split, count):
    source = open_source("imagenet2012:5.1.0", split, data_dir=imagenet_dir)
    assert len(source.records) == count
    assert source.split == split


def test_the_embedded_data_set_is_prepared_where_the_environment_says(digit_scenes_dir):
    source = open_source("digit_scenes/classification", "test")
    assert len(source.records) == 1077
    assert source.class_names == tuple("0123456789")
    assert (Path(digit_scenes_dir) / "digit_scenes/classification/1.0.0").is_dir()


def test_a_data_set_that_is_not_prepared_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        open_source("imagenet2012", "train", data_dir=str(tmp_path))
    message = str(error.value)
    assert "pip install -r requirements-prepare.txt" in message
    assert (
        f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path} "
        "--manual_dir=" in message
    )
    assert "ILSVRC2012_img_train.tar" in message
    assert "image-net.org" in message


def test_a_data_set_in_another_format_says_what_to_run(tmp_path):
    folder = prepare_mock_imagenet(str(tmp_path), 2, 2)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        FileNotFoundError, match=r"as tfrecord.*array_record(.|\n)*build"
    ):
        open_source("imagenet2012", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("dataset", "suggestion"),
    [
        ("imagenet2013", "imagenet2012"),
        ("digit_scene", "digit_scenes/classification"),
        ("imagefolder", "image_folder"),
        ("digit_scenes/clasification", "digit_scenes/classification"),
        ("not a name", "name/config"),
    ],
)
def test_an_unknown_data_set_suggests_close_names(tmp_path, dataset, suggestion):
    with pytest.raises(ValueError, match=suggestion):
        open_source(dataset, "train", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "unknown split 'test' .* it has 'train', 'validation'"),
        ("", "unknown split ''"),
        ("train[:0]", "is empty"),
        ("train[5:5]", "is empty"),
        ("train[:x]", "can't read the split"),
    ],
)
def test_a_split_that_is_not_there_or_empty_is_an_error(imagenet_dir, split, message):
    with pytest.raises(ValueError, match=message):
        open_source("imagenet2012", split, data_dir=imagenet_dir)


@pytest.mark.slow
def test_a_detection_data_set_is_no_classification_data_set(digit_scenes_dir):
    with pytest.raises(
        ValueError, match="not a data set of images with one class each"
    ):
        open_source("digit_scenes/detection", "test", data_dir=digit_scenes_dir)


VOC_LABELS = (
    *((1, -1, -1), (1, -1, 1), (-1, 0, -1), (-1, 1, -1)),
    *((1, -1, 0), (0, 1, -1), (-1, -1, -1)),
)
ONLY_PRESENCE = np.where(np.array(VOC_LABELS) == 0, 1, VOC_LABELS)


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        ((), VOC_LABELS),
        (("objects",), VOC_LABELS),
        (("labels", "labels_no_difficult"), VOC_LABELS),
        (("labels_no_difficult",), VOC_LABELS),
        (("labels", "labels_no_difficult", "is_difficult"), ONLY_PRESENCE),
        (("objects", "labels_no_difficult"), ONLY_PRESENCE),
    ],
)
def test_a_class_is_present_only_difficult_or_absent(tmp_path, left_out, expected):
    prepare_mock_voc(tmp_path, *left_out)
    source = open_source("voc/2007", "train", data_dir=str(tmp_path), multi_label=True)
    assert source.multi_label
    assert source.class_names == CLASSES
    for source_ in (source, pickle.loads(pickle.dumps(source))):
        records = sorted(source_.records, key=lambda record: record["name"])
        for number, record in enumerate(records):
            assert record.keys() == {"image", "labels", "name"}
            assert record["name"] == f"00000{number}.jpg"
            assert record["labels"].dtype == np.int8
            np.testing.assert_array_equal(record["labels"], expected[number])


def test_digit_scenes_have_several_labels_too(digit_scenes_dir):
    source = open_source("digit_scenes/detection", "test", multi_label=True)
    labels = np.stack([record["labels"] for record in source.records])
    assert labels.shape == (400, 10)
    assert set(np.unique(labels)) == {-1, 1}
    counts = (labels == 1).sum(axis=1)
    assert counts.min() == 1
    assert 1 < counts.max() <= 6


def test_a_source_of_several_labels_must_be_asked_for(tmp_path):
    prepare_mock_voc(tmp_path)
    with pytest.raises(ValueError, match=r"one class each.*open it with multi_label"):
        open_source("voc/2007", "train", data_dir=str(tmp_path))


def test_a_source_of_one_label_is_not_opened_as_one_of_several(imagenet_dir):
    with pytest.raises(ValueError, match=r"several classes .* leave multi_label out"):
        open_source("imagenet2012", "train", data_dir=imagenet_dir, multi_label=True)
    with pytest.raises(ValueError, match=r"several classes .* leave multi_label out"):
        open_source("digit_scenes/classification", "test", multi_label=True)


def test_a_data_set_without_labels_is_no_source_of_several(tmp_path):
    prepare_mock_voc(tmp_path, "objects", "labels", "labels_no_difficult")
    with pytest.raises(ValueError, match="there must be one image, and a sequence"):
        open_source("voc/2007", "train", data_dir=str(tmp_path), multi_label=True)


def test_a_split_whose_labels_are_withheld_is_an_error(tmp_path):
    prepare_mock_voc(tmp_path)
    with pytest.raises(ValueError, match=r"none of the 7 records .* has a class"):
        open_source("voc/2007", "test", data_dir=str(tmp_path), multi_label=True)


def test_one_of_several_labels_outside_the_range_names_the_record(tmp_path):
    folder = prepare_mock_voc(tmp_path)
    (folder / "labels.labels.txt").write_text("aeroplane\nbicycle\n")
    text = (folder / "features.json").read_text()
    (folder / "features.json").write_text(
        text.replace('"numClasses": "3"', '"numClasses": "2"')
    )
    with pytest.raises(ValueError, match=r"'00000[14].jpg' .* label 2, outside 0…1 of"):
        open_source("voc/2007", "train", data_dir=str(tmp_path), multi_label=True)


def test_tfds_data_is_identified_by_version_split_and_size(imagenet_dir):
    def digest(split):
        return open_source("imagenet2012", split, data_dir=imagenet_dir).digest

    assert digest("train") == "imagenet2012/5.1.0 train 32"
    assert digest("train[:50%]") == "imagenet2012/5.1.0 train[:50%] 16"


def test_a_subset_has_the_records_of_the_indices():
    source = make_source(5)._replace(digest="all five")
    part = subset(source, np.array([3, 1]))
    assert [record["name"] for record in part.records] == [
        "picture_3.png",
        "picture_1.png",
    ]
    assert (len(part.records), part.digest) == (2, "")


def test_an_image_folder_needs_its_root():
    with pytest.raises(ValueError, match="needs its folder: set root"):
        open_source("image_folder", "train")


def test_a_folder_has_one_class_an_image_or_several(tmp_path):
    with pytest.raises(ValueError, match=r"several classes .* leave multi_label out"):
        open_source("image_folder", "train", root=str(tmp_path), multi_label=True)
    with pytest.raises(ValueError, match=r"one class each.*open it with multi_label"):
        open_source("voc_folder", "train", root=str(tmp_path))


def test_an_unknown_split_of_a_folder_lists_those_there_are(tmp_path):
    write_class_folders(tmp_path / "pets", 5)
    with pytest.raises(
        ValueError, match=r"unknown split 'val' .* it has 'train', 'test'"
    ):
        open_source("image_folder", "val", root=str(tmp_path / "pets"))


def test_a_data_dir_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="TFDS_DATA_DIR"):
        open_source(
            "digit_scenes/detection", "train", data_dir=str(tmp_path / "file/x")
        )


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_outside_the_range_names_the_record(label):
    source = make_source(5, labels=(0, 1, 2, label, 0))
    with pytest.raises(ValueError, match=rf"'picture_3.png' in split 'train'.*{label}"):
        check_labels(source)
    check_labels(make_source(5))


def test_labels_are_checked_when_a_data_set_is_opened(tmp_path):
    folder = prepare_mock_imagenet(str(tmp_path), 4, 4)
    names = (folder / "label.labels.txt").read_text().splitlines()
    (folder / "label.labels.txt").write_text("\n".join(names[:100]))
    features = json.loads((folder / "features.json").read_text())
    label = features["featuresDict"]["features"]["label"]["classLabel"]
    label["numClasses"] = "100"
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match="label 111, outside 0…99 of the 100 classes"):
        open_source("imagenet2012", "train", data_dir=str(tmp_path))


def test_a_sample_of_labels_is_checked_in_a_large_source():
    source = make_source(20, labels=(0,) * 10 + (7,) * 10)
    with pytest.raises(ValueError, match="picture_10"):
        check_labels(source, all_up_to=4, sample=4)
