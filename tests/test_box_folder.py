"""One data set in three formats is one data set, and its format need not be said."""

import json
import logging

import numpy as np
import pytest
from data_helpers import encode, picture, voc_object, voc_xml, write_images

from sppnet_jax.data import folders
from sppnet_jax.data.annotations import EVENTS
from sppnet_jax.data.box_folder import guess_kind
from sppnet_jax.data.coco_folder import EVENTS as OF_COCO
from sppnet_jax.data.datasets import BoxData, open_box_split
from sppnet_jax.data.sources import (
    available_splits,
    open_detection_source,
    open_source,
    read_objects,
)
from sppnet_jax.data.voc_annotations import EVENTS as OF_VOC
from sppnet_jax.data.yolo_folder import EVENTS as OF_YOLO

CLASSES = ("cat", "dog", "emu")


def scenes(count=23):
    """Sizes of images, and of each its objects: class and half-open whole pixels."""
    rng = np.random.default_rng(4)
    for number in range(count):
        height, width = rng.integers(40, 80, 2).tolist()
        objects = []
        for _ in range(rng.integers(0, 5)):
            top, left = rng.integers(0, 30, 2).tolist()
            high, wide = rng.integers(2, 10, 2).tolist()
            objects.append((int(rng.integers(3)), (top, left, top + high, left + wide)))
        yield f"{number:02d}", (height, width), objects


def write_voc(root):
    for key, (height, width), objects in scenes():
        texts = [
            voc_object((x1 + 1, y1 + 1, x2, y2), CLASSES[label])
            for label, (y1, x1, y2, x2) in objects
        ]
        save(root, f"JPEGImages/{key}.png", (height, width))
        xml = voc_xml(*texts, size=(height, width)).encode()
        save(root, f"Annotations/{key}.xml", xml)


def write_coco(root):
    images, annotations = [], []
    for key, (height, width), objects in scenes():
        given = {"file_name": f"{key}.png", "height": height, "width": width}
        images.append({"id": 1000 + 7 * len(images), **given})
        annotations += [
            {
                "id": len(annotations),
                "image_id": images[-1]["id"],
                "category_id": 10 * label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
            }
            for label, (y1, x1, y2, x2) in objects
        ]
        save(root, f"images/{key}.png", (height, width))
    categories = [{"id": 10 * n + 1, "name": c} for n, c in enumerate(CLASSES)]
    lists = {"images": images, "annotations": annotations, "categories": categories}
    save(root, "annotations/instances_default.json", json.dumps(lists).encode())


def write_yolo(root):
    for key, (height, width), objects in scenes():
        lines = [
            f"{2 - label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
            f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n"
            for label, (y1, x1, y2, x2) in objects
        ]
        save(root, f"images/{key}.png", (height, width))
        save(root, f"labels/{key}.txt", "".join(lines).encode())
    save(root, "data.yaml", f"names: [{', '.join(CLASSES[::-1])}]\n".encode())


def save(root, path, what):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, tuple):
        what = encode(picture(*what, seed=int((root / path).stem)))
    (root / path).write_bytes(what)


WRITERS = {
    "voc_folder": write_voc,
    "coco_folder": write_coco,
    "yolo_folder": write_yolo,
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("three")
    for kind, write in WRITERS.items():
        write(root / kind)
    return root


def test_one_data_set_in_three_formats_gives_the_same_records(three):
    for split in ("trainval", "test", "trainval[:50%]"):
        sources = [
            open_detection_source(kind, split, root=str(three / kind))
            for kind in WRITERS
        ]
        for source in sources:
            assert source.class_names == CLASSES
            for one, other in zip(source.records, sources[0].records, strict=True):
                assert one["name"] == other["name"]
                assert one["image"] == other["image"]
                np.testing.assert_array_equal(one["labels"], other["labels"])
                for a, b in zip(one["objects"], other["objects"], strict=True):
                    np.testing.assert_array_equal(a, b)
                    assert a.dtype == b.dtype
        assert len({source.digest for source in sources}) == 3
    given = {key: objects for key, _, objects in scenes()}
    for record in sources[0].records:
        boxes = [list(map(float, box)) for _, box in given[record["name"][:2]]]
        assert record["objects"].boxes.tolist() == boxes


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_is_read_as_what_it_is(three, kind, caplog):
    folders.inform_once.cache_clear()
    root = str(three / kind)
    with caplog.at_level(logging.INFO, "sppnet_jax"):
        assert guess_kind(root) == kind
    assert f"it is read as a {kind}" in caplog.text
    assert available_splits("box_folder", root=root) == ("trainval", "test")
    guessed = open_box_split(BoxData("box_folder", root), "train")
    told = open_box_split(BoxData(kind, root), "train")
    assert guessed.digest == told.digest
    assert guessed.name == kind
    for one, other in zip(read_objects(guessed), read_objects(told), strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
    same = open_source("box_folder", "trainval", root=root, multi_label=True)
    assert same.digest == told.digest


def test_a_folder_of_two_formats_must_be_told(three, tmp_path):
    write_voc(tmp_path)
    write_yolo(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"boxes in 2 formats, Pascal VOC's .*YOLO's .*"
        "voc_folder or yolo_folder: --config.data.name=KIND",
    ):
        guess_kind(tmp_path)
    assert len(open_detection_source("voc_folder", "test", root=str(tmp_path))[0]) == 4


def test_a_folder_without_boxes_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of boxes .*Expected"):
        guess_kind(tmp_path / "nowhere")
    write_images(tmp_path, "cat/1.png", "dog/2.png")
    save(tmp_path, "cat/notes.txt", b"x")
    save(tmp_path, "settings.json", b"{}")
    save(tmp_path, "training.yaml", b"epochs: 3")
    with pytest.raises(ValueError, match=r"no boxes in a known layout. Expected"):
        guess_kind(tmp_path)


def test_formats_say_the_same_of_what_they_share():
    for events in (OF_VOC, OF_COCO, OF_YOLO):
        assert set(EVENTS) <= set(events)
