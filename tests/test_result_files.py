"""Detections are written so that other programs read what was found."""

import json
import sys
from urllib.parse import unquote

import numpy as np
import pytest

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.average_precision import evaluate_detections
from sppnet_jax.detection.coco_precision import coco_precision
from sppnet_jax.detection.detection_table import DetectionTable
from sppnet_jax.detection.result_files import (
    write_coco_ground_truth,
    write_coco_results,
    write_voc_results,
    write_yolo_results,
)

IDS = ["000005", "000007", "photo 3"]
NAMES = ["aeroplane", "cat"]


def few():
    return DetectionTable(
        np.array([1, 0, 2]),
        np.array([1, 1, 0]),
        np.float32([0.5, 0.1, -2.25]),
        np.float32([[0, 0, 10, 20], [1, 2, 3.5, 4], [7, 8, 9, 10]]),
    )


def many(rng, rows=300):
    """Float32 scores with ties, neighbours and tiny numbers; boxes of all kinds."""
    scores = rng.normal(size=rows).astype(np.float32)
    scores[::5] = np.nextafter(scores[1::5], np.float32(9))
    scores[2::5] = scores[3::5]
    scores[4::10] *= np.float32(1e-30)
    starts = rng.uniform(0, 40, (rows, 2))
    boxes = np.concatenate([starts, starts + rng.uniform(5, 30, (rows, 2))], axis=1)
    boxes[::2] = boxes[::2].round()
    return DetectionTable(
        rng.integers(0, 3, rows), rng.integers(0, 2, rows), scores, np.float32(boxes)
    )


def objects(rng):
    truth = []
    for count in (4, 0, 6):
        starts = rng.integers(0, 40, (count, 2))
        stops = starts + rng.integers(10, 30, (count, 2))
        boxes = np.concatenate([starts, stops], axis=1).astype(np.float64)
        truth.append(Objects(boxes, np.arange(count) % 2, rng.random(count) < 0.2))
    return truth


def read_lines(path, ids):
    """Images, scores and 0-based boxes of a results file, line by line."""
    rows = [line.split() for line in path.read_text().splitlines()]
    images = np.array([ids.index(unquote(row[0])) for row in rows], int)
    scores = np.array([float(row[1]) for row in rows])
    pixels = np.array([list(map(float, row[2:])) for row in rows]).reshape(-1, 4)
    return images, scores, pixels[:, [1, 0, 3, 2]] - [1, 1, 0, 0]


def test_the_lines_are_vocs(tmp_path):
    paths = write_voc_results(tmp_path / "results", few(), IDS, NAMES, split="val")
    assert [path.name for path in paths] == [
        "comp4_det_val_aeroplane.txt",
        "comp4_det_val_cat.txt",
    ]
    assert paths[0].read_text() == "photo%203 -2.25 9 8 10 9\n"
    # In the order given; the pixels 1-based, the last ones included.
    assert paths[1].read_text() == "000007 0.5 1 1 20 10\n000005 0.1 3 2 4 3.5\n"
    assert sorted(tmp_path.glob("*/*")) == paths


def test_what_was_written_is_read_again(tmp_path):
    rng = np.random.default_rng(0)
    table, truth = many(rng), objects(rng)
    # Every object is found several times.
    which = np.arange(40) % 10
    table.boxes[:40] = np.concatenate([t.boxes for t in truth])[which]
    table.images[:40] = np.repeat([0, 1, 2], [4, 0, 6])[which]
    table.labels[:40] = np.concatenate([t.labels for t in truth])[which]
    paths = write_voc_results(tmp_path, table, IDS, NAMES)
    columns = zip(*(read_lines(path, IDS) for path in paths), strict=True)
    images, scores, boxes = (np.concatenate(parts) for parts in columns)
    again = DetectionTable(images, np.sort(table.labels), scores, boxes)
    order = np.argsort(table.labels, kind="stable")
    np.testing.assert_array_equal(again.images, table.images[order])
    np.testing.assert_array_equal(again.labels, table.labels[order])
    np.testing.assert_array_equal(again.scores.astype(np.float32), table.scores[order])
    np.testing.assert_array_equal(again.boxes.astype(np.float32), table.boxes[order])
    before, after = table.scores[order][:, None], again.scores[:, None]
    np.testing.assert_array_equal(after < after.T, before < before.T)
    expected = evaluate_detections(table, truth, NAMES)
    found = evaluate_detections(again, truth, NAMES)
    assert found.map_area == expected.map_area > 0.05
    assert found.map_11_point == expected.map_11_point
    for result, wanted in zip(found.classes, expected.classes, strict=True):
        np.testing.assert_array_equal(result.recall, wanted.recall)
        np.testing.assert_array_equal(result.precision, wanted.precision)


def test_a_class_without_detections_has_an_empty_file(tmp_path):
    nothing = DetectionTable(*(column[:0] for column in few()))
    paths = write_voc_results(tmp_path, nothing, IDS, NAMES)
    assert [path.read_text() for path in paths] == ["", ""]


def test_names_that_no_file_can_hold_are_written_as_in_urls(tmp_path):
    ids = ["a b", "a%20b", "line\nbreak", "völlig normal", "5/6"]
    names = ["cat/dog", "traffic light", "50%", "\\", "hæst"]
    rows = np.arange(5)
    boxes = np.tile([0.0, 0, 4, 5], (5, 1))
    paths = write_voc_results(
        tmp_path, DetectionTable(rows, rows, rows / 2, boxes), ids, names
    )
    assert [path.name.removeprefix("comp4_det_test_") for path in paths] == [
        "cat%2Fdog.txt",
        "traffic%20light.txt",
        "50%25.txt",
        "%5C.txt",
        "hæst.txt",
    ]
    lines = [path.read_text("utf-8").split()[0] for path in paths]
    assert lines == ["a%20b", "a%2520b", "line%0Abreak", "völlig%20normal", "5%2F6"]
    assert [read_lines(path, ids)[0].tolist() for path in paths] == [[i] for i in rows]


def test_classes_of_long_names_have_files_of_their_own(tmp_path):
    """Of 230 bytes a name is whole in the file's; longer ones are cut and marked."""
    names = ["a" * 230, "熊" * 90, "熊" * 91]
    paths = write_voc_results(tmp_path, few(), IDS, names)
    assert paths[0].name == f"comp4_det_test_{names[0]}.txt"
    assert len({path.name for path in paths}) == 3
    for path in paths:
        assert path.name.startswith("comp4_det_test_")
        assert path.exists()


@pytest.mark.parametrize(
    ("ids", "names", "message"),
    [
        (["a", "b", "a"], NAMES, "image ids must be different, 'a' is there twice"),
        (["a", "b", ""], NAMES, "image ids must be strings that aren't empty, got ''"),
        ([1, 2, 3], NAMES, "image ids must be strings .* got 1"),
        (IDS, ["cat", "cat"], "class names must be different, 'cat' is there twice"),
        (IDS[:2], NAMES, "detections' images must be from 0 to 1"),
        (IDS, NAMES[:1], "detections' labels must be from 0 to 0"),
    ],
)
def test_names_that_tell_nothing_apart_are_errors(tmp_path, ids, names, message):
    with pytest.raises(ValueError, match=message):
        write_voc_results(tmp_path, few(), ids, names)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_coco_results(path, few())
    before = path.read_text()

    def fail(value):
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="no space"):
        write_coco_results(path, few())
    assert path.read_text() == before


def test_cocos_results_hold_every_detection(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_coco_results(path, few())
    records = json.loads(path.read_text())
    assert records[1] == {
        "image_id": 1,
        "category_id": 2,
        "bbox": [2, 1, 2, 2.5],
        "score": pytest.approx(0.1),
    }
    assert np.float32(records[1]["score"]) == few().scores[1]
    assert [record["image_id"] for record in records] == [2, 1, 3]
    nothing = DetectionTable(*(column[:0] for column in few()))
    write_coco_results(path, nothing)
    assert json.loads(path.read_text()) == []
    with pytest.raises(
        ValueError, match=r"labels must be from 0 to 1, .* from -1 to 1"
    ):
        write_coco_results(path, few()._replace(labels=np.array([0, -1, 1])))


def test_cocos_ground_truth_holds_every_object(tmp_path):
    truth = objects(np.random.default_rng(0))
    truth[0].difficult[:2] = [True, False]
    path = tmp_path / "truth.json"
    sizes = np.array([[80, 90], [50, 40], [70, 71]])
    write_coco_ground_truth(path, ["a.jpg", "b.jpg", "c.png"], sizes, truth, NAMES)
    value = json.loads(path.read_text())
    assert value["categories"] == [
        {"id": 1, "name": "aeroplane"},
        {"id": 2, "name": "cat"},
    ]
    assert value["images"][1] == {
        "id": 2,
        "file_name": "b.jpg",
        "height": 50,
        "width": 40,
    }
    annotations = value["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, 11))
    assert [a["image_id"] for a in annotations] == [1] * 4 + [3] * 6
    assert [a["ignore"] for a in annotations[:2]] == [1, 0]
    assert [a["iscrowd"] for a in annotations] == [a["ignore"] for a in annotations]
    every = np.concatenate([t.boxes for t in truth])
    for annotation, (top, left, bottom, right) in zip(annotations, every, strict=True):
        assert annotation["bbox"] == [left, top, right - left, bottom - top]
        assert annotation["area"] == (right - left) * (bottom - top)
    with pytest.raises(ValueError, match=r"for 3 images .* got \(2, 2\) and 3"):
        write_coco_ground_truth(path, IDS, sizes[:2], truth, NAMES)


def test_yolos_results_are_lines_of_shares_that_give_the_same_boxes(tmp_path):
    rng = np.random.default_rng(3)
    table = many(rng)
    sizes = np.array([[80, 90], [75, 77], [71, 113]])
    ids = ["a b", "train/7", "völlig 50%"]
    paths = write_yolo_results(tmp_path, table, ids, sizes, NAMES)
    assert [str(path.relative_to(tmp_path / "labels")) for path in paths] == [
        f"{name}.txt" for name in ids
    ]
    assert (tmp_path / "classes.txt").read_text() == "aeroplane\ncat\n"
    for image, (path, (height, width)) in enumerate(zip(paths, sizes, strict=True)):
        rows = [line.split() for line in path.read_text().splitlines()]
        mine = table.images == image
        assert [int(row[0]) for row in rows] == table.labels[mine].tolist()
        scores = np.array([row[5] for row in rows], np.float32)
        np.testing.assert_array_equal(scores, table.scores[mine])
        x, y, wide, high = np.array([row[1:5] for row in rows], float).T
        again = [y - high / 2, x - wide / 2, y + high / 2, x + wide / 2]
        again = np.stack(again, axis=1) * [height, width, height, width]
        np.testing.assert_allclose(again, table.boxes[mine], rtol=1e-6, atol=1e-6)


def test_an_image_without_detections_has_an_empty_label_file(tmp_path):
    nothing = DetectionTable(*(column[:0] for column in few()))
    sizes = np.array([[0, 0]] * 3)
    paths = write_yolo_results(tmp_path, nothing, IDS, sizes, NAMES)
    assert [path.read_text() for path in paths] == ["", "", ""]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "../b", "c"], "must be paths in a folder, got '../b'"),
        (["a", "/b", "c"], "must be paths in a folder, got '/b'"),
        (["a", "a", "c"], "must be different"),
    ],
)
def test_no_label_file_leads_out_of_its_folder(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        write_yolo_results(tmp_path, few(), ids, np.ones((3, 2)), NAMES)
    assert not list(tmp_path.iterdir())


def found_and_true(shift=0.0):
    """Detections of every object, each moved down by a share of its height; truth."""
    truth = objects(np.random.default_rng(5))
    counts = [len(one.labels) for one in truth]
    boxes = np.concatenate([one.boxes for one in truth])
    boxes[:, ::2] += shift * (boxes[:, 2:3] - boxes[:, :1])
    table = DetectionTable(
        np.repeat(np.arange(3), counts),
        np.concatenate([one.labels for one in truth]),
        np.linspace(1, 0.5, len(boxes)),
        boxes,
    )
    return table, [one._replace(difficult=one.difficult & False) for one in truth]


def test_cocos_precision_averages_over_ious_and_tells_sizes_apart():
    pytest.importorskip("pycocotools")
    perfect = coco_precision(*found_and_true(), NAMES)
    areas = [np.prod(b[:, 2:] - b[:, :2], axis=1) for b, *_ in found_and_true()[1]]
    small = np.concatenate(areas) < 32**2
    assert perfect["ap"] == perfect["ap_50"] == perfect["ar_100"] == 1
    assert perfect["ap_small"] == (1 if small.any() else None)
    assert perfect["ap_medium"] == (None if small.all() else 1)
    assert perfect["ap_large"] is None
    # Moved by a fifth, boxes overlap by 0.8/1.2: enough for 0.50, 0.55, 0.60 and 0.65.
    moved = coco_precision(*found_and_true(0.2), NAMES)
    assert moved["ap"] == pytest.approx(0.4)
    assert (moved["ap_50"], moved["ap_75"]) == (1, 0)


def test_cocos_precision_counts_difficult_objects_neither_way():
    pytest.importorskip("pycocotools")
    table, truth = found_and_true()
    truth[0].difficult[:2] = True
    assert coco_precision(table, truth, NAMES)["ap"] == 1
    kept = np.arange(len(table.scores)) >= 2
    without = DetectionTable(*(column[kept] for column in table))
    assert coco_precision(without, truth, NAMES)["ap"] == 1
    nothing = DetectionTable(*(column[:0] for column in table))
    assert coco_precision(nothing, truth, NAMES)["ap"] == 0


def test_cocos_precision_is_that_of_the_files(tmp_path):
    """What pycocotools makes of the JSON that is written is what is reported."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    table, truth = found_and_true()
    rng = np.random.default_rng(6)
    table.boxes[:] += rng.normal(0, 3, table.boxes.shape)
    truth[2].difficult[::2] = True
    sizes = np.full((3, 2), 100)
    write_coco_ground_truth(tmp_path / "truth.json", IDS, sizes, truth, NAMES)
    write_coco_results(tmp_path / "found.json", table)
    of_truth = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(of_truth, of_truth.loadRes(str(tmp_path / "found.json")))
    evaluation.params.iouType = "bbox"
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    told = list(coco_precision(table, truth, NAMES).values())
    assert [
        -1 if value is None else value for value in told
    ] == evaluation.stats.tolist()
    assert 0 < told[0] < 1


def test_without_pycocotools_there_is_no_coco_precision(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert coco_precision(*found_and_true(), NAMES) is None
