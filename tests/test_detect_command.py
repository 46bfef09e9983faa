"""A detector is trained on a folder in VOC layout, tested, and looks at photographs."""

import csv
import json
import logging
import re
import shutil
import signal
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs import folder as classifier_config
from sppnet_jax import cli, detect
from sppnet_jax.cli import detector_base_config
from sppnet_jax.data import datasets, photographs
from sppnet_jax.data.datasets import BoxData
from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import open_detection_source, read_objects
from sppnet_jax.detection import (
    detector_evaluation,
    detector_training,
    learn,
    maps,
    results,
    split_features,
)
from sppnet_jax.detection.average_precision import evaluate_detections
from sppnet_jax.detection.box_split import open_split_of
from sppnet_jax.detection.coco_precision import HOW_TO_GET
from sppnet_jax.detection.detection_table import DetectionTable
from sppnet_jax.detection.detector import Scored, score_boxes, suppress
from sppnet_jax.detection.detector_evaluation import (
    evaluate_detectors,
    settings_together,
)
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings
from sppnet_jax.detection.detector_training import check_network, train_detector
from sppnet_jax.detection.examples import with_objects
from sppnet_jax.detection.proposals import find_boxes, save_proposals
from sppnet_jax.detection.trained_detector import (
    detect_images,
    detect_split,
    image_detector,
    load_detector,
    load_detectors,
)
from sppnet_jax.detection.window_features import make_program
from sppnet_jax.network import trained as trained_network
from sppnet_jax.network.trained import load_network
from sppnet_jax.run import run_folder
from sppnet_jax.run.files import read_arrays
from sppnet_jax.run.settings import plain, read
from tests.data_helpers import (
    encode,
    overlap,
    voc_object,
    voc_xml,
    write_voc_folder,
)
from tests.network_helpers import write_network
from tests.processes import Started, import_times, run_and_be_killed
from tests.test_quick_start import NOT_NEEDED

CLASSES = ("disc", "square")
SIZE = (90, 120)
TRAIN = [f"a{number:02d}" for number in range(12)]
TEST = [f"b{number:02d}" for number in range(6)]
EVERY = (*TRAIN, *TEST)
BROKEN = ("a07", "b01")


def draw_scene(seed):
    """Noise with a disc on one side and a square on the other, and their XML."""
    rng = np.random.default_rng(seed)
    image = rng.integers(90, 150, (*SIZE, 3), np.uint8)
    objects = []
    for name, left in zip(rng.permutation(CLASSES), (2, 62), strict=True):
        side = int(rng.integers(30, 50))
        x, y = left + int(rng.integers(54 - side)), int(rng.integers(88 - side))
        if name == "disc":
            middle = (x + side // 2, y + side // 2)
            cv2.circle(image, middle, side // 2, (230, 40, 30), -1)
        else:
            cv2.rectangle(image, (x, y), (x + side, y + side), (20, 60, 220), -1)
        box = (x + 1, y + 1, x + side + 1, y + side + 1)
        difficult = "1" if seed % 5 == 4 and name == "disc" else "0"
        objects.append(voc_object(box, str(name), difficult=difficult))
    return image, objects


def write_scenes(root):
    """Scenes to train and to test on, in VOC's layout."""
    scenes = {key: draw_scene(seed) for seed, key in enumerate(EVERY)}
    annotations = {key: voc_xml(*xml, size=SIZE) for key, (_, xml) in scenes.items()}
    parts = {"trainval": TRAIN, "test": TEST, "mixed": [*TRAIN[:2], *TEST[:3]]}
    lists = {f"{name}.txt": "\n".join(keys) for name, keys in parts.items()}
    write_voc_folder(root, annotations, lists, size=SIZE)
    for key, (image, _) in scenes.items():
        path = root / f"JPEGImages/{key}.png"
        path.write_bytes(encode(image))
        if key in BROKEN:
            # Its header says how large it is, but nothing can decode it.
            damaged = bytearray(encode(image, ".webp"))
            damaged[30:400] = bytes(370)
            path.unlink()
            path.with_suffix(".webp").write_bytes(damaged)
    return root


def write_classifier(workdir, levels=(6, 3, 2, 1)):
    """A classifier of 64 pixels."""
    config = classifier_config.get_config()
    config.model.levels = levels
    config.model.width = 1 / 16
    config.data.image_size, config.data.resize_side = 64, 70
    return write_network(workdir, config)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("detect")
    write_scenes(base / "voc")
    write_classifier(base / "classifier")
    return base


def small_config(base, **changes):
    config = detector_base_config()
    config.network = str(base / "classifier")
    config.cache = str(base / "cache")
    config.data.name, config.data.root = "voc_folder", str(base / "voc")
    config.proposals.width, config.proposals.min_side = 100, 16
    config.proposals.max_windows = 150
    config.scales = (90, 130)
    config.finetune.steps, config.finetune.batch_size = 12, 32
    config.finetune.learning_rate, config.finetune.drop_steps = 0.01, ()
    config.finetune.dropout = 0.1
    config.finetune.checkpoint_steps = 4
    config.layer = "fc6"
    config.svm.C, config.svm.max_rounds = 0.01, 2
    config.update_from_flattened_dict(changes)
    return read(DetectorSettings, config.to_dict())


def train(base, workdir, **changes):
    settings = small_config(base, **changes)
    train_detector(settings, workdir)
    return settings


@pytest.fixture(scope="module")
def trained(base):
    workdir = base / "trained"
    train(base, workdir)
    return workdir


@pytest.fixture(scope="module")
def report(base, trained):
    return evaluate_detectors([trained], settings=small_config(base))


@pytest.fixture
def copy(trained, tmp_path):
    """A detector to change."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO, logger="sppnet_jax")
    return caplog


def stages_of(log):
    """What the log said last of each stage, before its seconds."""
    lines = [line.split(" ", 2) for line in log.messages if line.startswith("stage ")]
    return {name: what for _, name, what in lines if not what.startswith("took")}


@pytest.mark.slow
@pytest.mark.quick
def test_the_detector_finds_what_it_was_trained_on(report):
    assert report["map_11_point"] > 0.5
    assert [row["name"] for row in report["classes"]] == list(CLASSES)
    assert [row["ground_truths"] for row in report["classes"]] == [5, 6]
    assert [row["difficult"] for row in report["classes"]] == [1, 0]
    assert report["proposals"]["recall"] > 0.8


@pytest.mark.parametrize(
    ("names", "train_split", "test_split"),
    [
        (("train", "val"), "train", "val"),
        (("train", "validation"), "train", "validation"),
        (("trainval", "train", "val"), "train", "val"),
        (("trainval", "train", "val", "test"), "trainval", "test"),
        (("train", "validation", "test"), "train+validation", "test"),
        (("train", "val", "test"), "train+val", "test"),
        (("trainval", "test"), "trainval", "test"),
        (("train", "test"), "train", "test"),
        (("all",), None, None),
        (("test",), None, "test"),
        (("train",), "train", None),
    ],
)
def test_no_image_is_in_both_of_the_default_splits(
    names, train_split, test_split, monkeypatch
):
    monkeypatch.setattr(datasets, "available_splits", lambda *_, **__: names)
    opened = lambda name, split, **_: split  # noqa: E731
    monkeypatch.setattr(datasets, "open_detection_source", opened)
    for purpose, expected in (("train", train_split), ("test", test_split)):
        if expected:
            assert datasets.open_box_split(BoxData(), purpose) == expected
        else:
            message = f"{', '.join(names)}: give --config.data.{purpose}_split"
            with pytest.raises(ValueError, match=re.escape(message)):
                datasets.open_box_split(BoxData(), purpose)


@pytest.mark.parametrize(("split", "seen", "count"), [("mixed", 2, 5), ("test", 0, 6)])
def test_tested_images_that_were_trained_on_are_counted(
    split, seen, count, base, copy, log, capsys
):
    config = small_config(base, **{"data.test_split": split})
    report = evaluate_detectors([copy], settings=config)
    assert report["trained_on"] == seen
    assert (HOW_TO_GET in capsys.readouterr().out) is (report["coco"] is None)
    stored = json.loads((copy / "test/results.json").read_text())
    assert (stored["trained_on"], stored["images"]) == (seen, count)
    told = f"{seen} of the {count} images to test on were trained on"
    assert (told in log.text) == bool(seen)


def test_broken_images_are_named_and_their_objects_count_as_missed(base, tmp_path, log):
    for purpose, objects in (("train", 0), ("test", 2)):
        config = small_config(base, cache=str(tmp_path))
        split = open_split_of(config, purpose, tmp_path)
        records = split.source.records
        names = [records[index]["name"] for index in range(len(records))]
        broken = [name.endswith(".webp") for name in names].index(True)
        assert names[broken] in log.text
        assert not len(split.proposals[broken])
        assert len(split.objects[broken].labels) == objects
        assert sum(len(found.labels) == 2 for found in split.objects) == (
            len(names) - (purpose == "train")
        )


def test_the_results_in_vocs_format_have_the_same_precision(base, trained, report):
    source = open_detection_source("voc_folder", "test", root=str(base / "voc"))
    records = source.records
    ids = [Path(records[i]["name"]).stem for i in range(len(records))]
    images, labels, values = [], [], []
    for label, name in enumerate(CLASSES):
        text = (trained / f"test/voc/comp4_det_test_{name}.txt").read_text()
        for line in text.splitlines():
            image, *numbers = line.split()
            images.append(ids.index(image))
            labels.append(label)
            values.append(list(map(float, numbers)))
    scores, xmin, ymin, xmax, ymax = np.array(values).T
    boxes = np.stack([ymin - 1, xmin - 1, ymax, xmax], axis=1)
    table = DetectionTable(np.array(images), np.array(labels), scores, boxes)
    result = evaluate_detections(table, read_objects(source), CLASSES)
    for row, one in zip(report["classes"], result.classes, strict=True):
        assert row["ap_11_point"] == pytest.approx(one.ap_11_point)
        assert row["ap_area"] == pytest.approx(one.ap_area)
    stored = json.loads((trained / "test/results.json").read_text())
    assert stored == json.loads(json.dumps(report))
    by_chance = table._replace(
        scores=np.random.default_rng(0).permutation(table.scores)
    )
    chance = evaluate_detections(by_chance, read_objects(source), CLASSES)
    assert chance.map_11_point < 0.3


def test_the_test_leaves_tables_files_and_pictures(trained, report):
    folder = trained / "test"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("results.json", "table.md", "voc", "yolo", "coco_results.json"),
        *("coco_ground_truth.json", "precision_recall.png", "examples.png"),
    }
    text = (folder / "table.md").read_text()
    assert f"| mean | {100 * report['map_11_point']:.1f} |" in text
    assert ("COCO's AP" in text) is bool(report["coco"])
    labels = sorted((folder / "yolo/labels").iterdir())
    assert [path.name for path in labels] == [f"{key}.txt" for key in TEST]
    lines = sum(len(path.read_text().splitlines()) for path in labels)
    assert lines == sum(row["detections"] for row in report["classes"])
    found = json.loads((folder / "coco_results.json").read_text())
    truth = json.loads((folder / "coco_ground_truth.json").read_text())
    assert len(found) == sum(row["detections"] for row in report["classes"])
    files = sorted(image["file_name"] for image in truth["images"])
    suffixes = (".webp" if key in BROKEN else ".png" for key in TEST)
    assert files == [key + suffix for key, suffix in zip(TEST, suffixes, strict=True)]
    for name in ("precision_recall.png", "examples.png"):
        assert cv2.imread(str(folder / name)).std() > 5


def test_detections_are_the_best_first_in_the_image_and_not_too_many(base, trained):
    config = small_config(base, **{"test.max_per_class": 7})
    detectors = load_detectors([trained], [config])
    split = open_split_of(config, "test", trained)
    for found in detect_split(detectors, split):
        assert (np.diff(found.scores) <= 0).all()
        counts = np.bincount(found.labels, minlength=2).tolist()
        assert counts in ([7, 7], [0, 0])
        assert (found.boxes >= 0).all()
        assert (found.boxes <= [*SIZE, *SIZE]).all()


def test_training_again_does_nothing_again(base, trained, log):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*/*.npz")}
    assert len(before) == 2
    train(base, trained)
    assert stages_of(log) == dict.fromkeys(
        ("network", "finetune", "svm", "regression"), "is done"
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("setting", "value", "redone", "why"),
    [
        ("svm.C", 0.02, {"svm"}, "C was 0.01, now 0.02"),
        ("regression.ridge", 10.0, {"regression"}, "ridge was 4000.0, now 10.0"),
        (
            "svm.feature_norm",
            10.0,
            {"svm", "regression"},
            "feature_norm was 20.0, now 10.0",
        ),
        (
            "finetune.learning_rate",
            0.001,
            {"finetune", "svm"},
            "learning_rate was 0.01, now 0.001",
        ),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it_and_says_why(
    setting, value, redone, why, base, copy, log
):
    train(base, copy, **{setting: value})
    done = {name for name, what in stages_of(log).items() if what == "is done"}
    assert done == {"network", "finetune", "svm", "regression"} - redone
    assert why in log.text


def test_a_changed_annotation_redoes_the_stages_but_no_map(
    base, copy, tmp_path, monkeypatch, log
):
    shutil.copytree(base / "voc", tmp_path / "voc")
    path = tmp_path / "voc/Annotations/a02.xml"
    text = path.read_text()
    assert "<difficult>0</difficult>" in text
    path.write_text(text.replace("difficult>0</", "difficult>1</", 1))

    def refuse(*_, **__):
        raise AssertionError("a map is computed")

    monkeypatch.setattr(maps, "map_whole_images", refuse)
    train(base, copy, **{"data.root": str(tmp_path / "voc")})
    told = stages_of(log)
    assert told.pop("network") == "is done"
    assert told.keys() == {"finetune", "svm", "regression"}
    reasons = [line.partition(" changed: ")[2] for line in log.messages]
    reasons = [reason for reason in reasons if reason]
    assert len(reasons) == 3
    assert all("objects was " in reason for reason in reasons)
    assert not any("images was " in reason for reason in reasons)


def test_a_stage_that_the_last_training_left_out_is_not_used(base, copy):
    """The SVMs in the folder are of another fine-tuning than the one beside them."""
    changes = {"finetune.steps": 4, "regression.enabled": False}
    config = train(base, copy, scorer="softmax", **changes)
    assert (copy / "svm/svm.npz").exists()
    evaluate_detectors([copy], settings=config)
    asked = small_config(base, **changes)
    with pytest.raises(FileNotFoundError, match="left out the stage 'svm'"):
        evaluate_detectors([copy], settings=asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.root": "absent"}, "absent"),
        ({"network": "absent"}, "absent, holds no trained classifier"),
        ({"network": "torn"}, "torn holds no trained run"),
        ({"proposals.file": "absent", "proposals.method": "file"}, "absent"),
        ({"network": "gone", "finetune.batch_size": 30}, "number of devices, 4"),
    ],
)
def test_a_training_that_cannot_begin_leaves_the_finished_detector(
    changes, message, base, copy, report, tmp_path
):
    places = ("data.root", "network", "proposals.file")
    if changes.get("network") == "gone":
        copied_from(copy, tmp_path / "gone")
    shutil.copytree(base / "classifier", tmp_path / "torn")
    (tmp_path / "torn/data.json").unlink()
    given = {
        name: str(tmp_path / value) if name in places else value
        for name, value in changes.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(base, copy, **given)
    again = evaluate_detectors([copy])
    assert again["classes"] == report["classes"]


def test_a_class_without_objects_to_train_on_is_never_detected(base, tmp_path, log):
    """Its squares are difficult, but for those to test on."""
    shutil.copytree(base / "voc", tmp_path / "voc")
    for key in TRAIN:
        path = tmp_path / f"voc/Annotations/{key}.xml"
        objects = path.read_text().split("<object>")
        hidden = [
            text.replace("<difficult>0", "<difficult>1") if "square" in text else text
            for text in objects
        ]
        path.write_text("<object>".join(hidden))
    changes = {"data.root": str(tmp_path / "voc"), "finetune.steps": 0}
    config = train(base, tmp_path / "run", **changes)
    assert "classes [1] have no objects to train on" in log.text
    report = evaluate_detectors([tmp_path / "run"], settings=config)
    disc, square = report["classes"]
    assert disc["detections"] > 0
    assert (square["detections"], square["ground_truths"]) == (0, 6)
    assert square["ap_area"] == 0


def test_scores_are_those_of_the_svms_as_they_were_trained(base, copy, monkeypatch):
    """Their weights hold the scale of the features, their biases do not."""
    seen = []
    mine = learn.mine_hard_negatives

    def spy(features_of, scores_of, boxes, *rest, **options):
        svms, state = mine(features_of, scores_of, boxes, *rest, **options)
        seen.append(svms.scores(features_of(0, np.arange(len(boxes[0])))))
        return svms, state

    monkeypatch.setattr(learn, "mine_hard_negatives", spy)
    shutil.rmtree(copy / "svm")
    config = train(base, copy)
    detector = load_detector(copy, config)
    split = open_split_of(config, "train", copy)
    boxes = with_objects(split.objects, split.proposals)
    features, _ = split_features.split_features(
        config, detector.network, split, boxes, copy
    )
    program = make_program(features, detector.head)
    scored = score_boxes(features, program, detector.weights, 0, SIZE, len(CLASSES))
    np.testing.assert_allclose(scored.scores, seen[0], rtol=1e-3, atol=1e-4)
    assert scored.boxes.shape == (len(boxes[0]), len(CLASSES), 4)


def copied_from(workdir, origin):
    """Makes a detector believe that its network is the copy of another."""
    stage = workdir / "network/stage.json"
    record = json.loads(stage.read_text())
    record["inputs"]["workdir"] = str(origin)
    stage.write_text(json.dumps(record))


def test_the_folder_is_enough_when_the_classifier_is_gone(base, copy, tmp_path, log):
    copied_from(copy, tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="another, holds no trained classifier"):
        train(base, copy, network=str(tmp_path / "another"))
    for network in (tmp_path / "gone", copy / "network"):
        train(base, copy, network=str(network))
    assert "going on with the copy of it" in log.text
    assert set(stages_of(log).values()) == {"is done"}


def report_and_arrays(workdir, report):
    """What a detector's folder holds, but for seconds and its own name."""
    kept = {name: report[name] for name in set(report) - {"seconds", "workdirs"}}
    return kept, {path.name: read_arrays(path) for path in workdir.glob("*/*.npz")}


def start_and_be_killed(workdir, bar, done):
    """`detect train` in a process that is killed in a stage; its log."""
    arguments = ["train", f"--workdir={workdir}"]
    given = "sppnet_jax.detect", arguments, bar, done
    result = Started(run_and_be_killed, *given, devices=4).end()
    assert result.returncode == -signal.SIGKILL, result.stderr
    return result.stderr


@pytest.mark.slow
def test_killed_in_every_stage_it_ends_as_if_it_had_never_been(
    base, trained, report, monkeypatch, log
):
    workdir = base / "killed"
    changes = {"cache": str(base / "other_cache")}
    config = small_config(base, **changes)
    run_folder.save_config(workdir, plain(config))
    moments = ("maps at 130", 6), ("fine-tuning", 10 * 32)
    told = [start_and_be_killed(workdir, *moment) for moment in moments]
    assert "stage finetune begins" not in told[0]
    assert "stage finetune begins" in told[1]
    save = learn.write_arrays

    def stop(path, **arrays):
        save(path, **arrays)
        if path.name == "rounds.npz":
            raise KeyboardInterrupt

    monkeypatch.setattr(learn, "write_arrays", stop)
    with pytest.raises(KeyboardInterrupt):
        train(base, workdir, **changes)
    assert re.search("fine-tuning goes on at step [48] of 12", log.text)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="has not come to its end"):
        evaluate_detectors([workdir], settings=config)
    train(base, workdir, **changes)
    assert "mining goes on after round 0" in log.text
    again = evaluate_detectors([workdir], settings=config)
    before, arrays = report_and_arrays(trained, report)
    after, arrays_after = report_and_arrays(workdir, again)
    assert after == before
    assert arrays.keys() == {"svm.npz", "regression.npz"}
    jax.tree.map(np.testing.assert_array_equal, arrays_after, arrays)


def test_a_detector_whose_training_has_not_ended_is_not_tested(base, copy, monkeypatch):
    """Its stages are done, but those of other settings than its config's."""

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(split_features, "convolve_split", die)
    with pytest.raises(KeyboardInterrupt):
        train(base, copy, scales=(90,))
    monkeypatch.undo()
    config = detector_settings(copy)
    with pytest.raises(FileNotFoundError, match="has not come to its end"):
        evaluate_detectors([copy], settings=config)


@pytest.fixture(scope="module")
def rcnn(base):
    workdir = base / "rcnn"
    changes = {"system": "rcnn", "proposals.max_windows": 40, "finetune.steps": 0}
    train(base, workdir, **changes)
    return workdir


def test_rcnn_is_trained_and_tested_on_the_same_data(rcnn):
    config = detector_settings(rcnn)
    report = evaluate_detectors([rcnn], settings=config)
    assert report["map_11_point"] > 0.4
    assert not (rcnn / "finetune").exists()


def test_two_detectors_are_combined(base, trained, rcnn, report):
    config = small_config(base)
    both = evaluate_detectors([trained, rcnn], settings=config)
    assert both["workdirs"] == [str(trained), str(rcnn)]
    assert (trained / "test_of_2/results.json").exists()
    assert both["map_11_point"] > 0.4
    assert both["classes"] != report["classes"]
    twice = evaluate_detectors([trained, trained], settings=config)
    for name in ("map_11_point", "map_area", "classes"):
        assert twice[name] == report[name]


def test_a_combination_suppresses_the_boxes_of_both(base, trained, rcnn):
    workdirs = [trained, rcnn]
    configs = [small_config(base), detector_settings(rcnn)]
    detectors = load_detectors(workdirs, configs)
    split = open_split_of(configs[0], "test", trained)
    found = detect_split(detectors, split)
    image = 2
    parts = []
    for config, workdir, detector in zip(configs, workdirs, detectors, strict=True):
        features, _ = split_features.split_features(
            config, detector.network, split, split.proposals, workdir
        )
        program = make_program(features, detector.head)
        part = score_boxes(features, program, detector.weights, image, SIZE, 2)
        assert len(part.scores) > 5
        parts.append(part)
    union = Scored(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))
    expected = suppress([union])
    for one, other in zip(found[image], expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_said_of_a_test_is_said_to_every_detector(base, trained, report):
    """Else the whole weights of the second would find more than the truncated ones."""
    config = small_config(base, fc_rank=(150, 150))
    alone = evaluate_detectors([trained], settings=config)
    twice = evaluate_detectors([trained, trained], settings=config)
    assert twice["classes"] == alone["classes"] != report["classes"]


def test_scores_of_different_kinds_are_not_combined(base, trained, copy):
    run_folder.save_config(copy, plain(small_config(base, scorer="softmax")))
    for pair in ([trained, copy], [copy, trained]):
        config = detector_settings(pair[0])
        with pytest.raises(ValueError, match="some score by SVMs, others by softmax"):
            evaluate_detectors(pair, settings=config)
        swapped = "softmax" if config.scorer == "svm" else "svm"
        both = settings_together(pair, config._replace(scorer=swapped))
        assert len(load_detectors(pair, both)) == 2


def test_images_that_share_a_name_are_refused_before_detection(
    base, trained, monkeypatch
):
    split = open_split_of(small_config(base), "test", trained)
    count = len(split.source.records)
    records = [dict(split.source.records[index]) for index in range(count)]
    records[1]["name"], records[4]["name"] = "x/one.png", "x/one.jpg"
    source = split.source._replace(records=records)
    changed = split._replace(source=source)
    monkeypatch.setattr(detector_evaluation, "open_split_of", lambda *_: changed)

    def refuse(*_, **__):
        raise AssertionError("it detects")

    monkeypatch.setattr(detector_evaluation, "detect_split", refuse)
    with pytest.raises(ValueError, match=r"1 images of .* 'x/one' for instance"):
        evaluate_detectors([trained], settings=small_config(base))
    records[4]["name"] = "y/one.jpg"
    with pytest.raises(AssertionError, match="it detects"):
        evaluate_detectors([trained], settings=small_config(base))


@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": "softmax"},
        {"fc_rank": (150, 150)},
        {"regression.enabled": False},
        {"test.nms": 0.5, "test.max_per_class": 3},
    ],
)
def test_what_only_tests_use_may_differ_from_the_training(
    changes, base, trained, report
):
    folder = trained / "test"
    kept = {path: path.read_bytes() for path in folder.glob("*.json")}
    found = evaluate_detectors([trained], settings=small_config(base, **changes))
    assert found["map_area"] != report["map_area"]
    assert found["map_11_point"] > 0.25
    for path, content in kept.items():
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scales", (90,)),
        ("rule", "closest"),
        ("svm.C", 1.0),
        ("finetune.steps", 3),
        ("layer", "fc7"),
        ("regression.ridge", 1.0),
    ],
)
def test_what_was_trained_otherwise_is_refused(setting, value, base, trained):
    config = small_config(base, **{setting: value})
    name = setting.partition(".")[0]
    with pytest.raises(ValueError, match=f"was trained with {name} = .* first"):
        evaluate_detectors([trained], settings=config)


def test_a_classifiers_folder_and_config_are_refused_and_left_alone(base, trained):
    config = base / "classifier/config.json"
    before = config.read_text()
    with pytest.raises(ValueError, match="holds a trained classifier"):
        train(base, base / "classifier")
    assert config.read_text() == before
    for workdirs in ([base / "classifier"], [trained, base / "classifier"]):
        with pytest.raises(ValueError, match="holds a trained classifier"):
            evaluate_detectors(workdirs, settings=small_config(base))
    with pytest.raises(FileNotFoundError, match="new holds no trained run"):
        evaluate_detectors([base / "new"], settings=small_config(base))


def test_mistakes_are_told_before_anything_is_loaded(base):
    for name, value, message in (
        ("network", "", "--config.network=runs/NAME"),
        ("scales", (90, 90), "a side twice"),
        ("proposals.method", "file", r"--config\.proposals\.file=FILE"),
        ("data.root", "", "--config.data.root=FOLDER"),
        ("finetune.positive_overlap", 0.4, "a box would be both"),
        ("finetune.negative_overlap", (0.1, 0.6), "a box would be both"),
        ("finetune.negative_overlap", (0.5, 0.5), "0 ≤ low < high"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config(base, **{name: value})
    with pytest.raises(ValueError, match=r"train\|test\|image .* not 'fly'"):
        detect.main(["fly"])
    with pytest.raises(ValueError, match="say what to do"):
        detect.main([])
    with pytest.raises(FileNotFoundError, match="nowhere, holds no trained classifier"):
        train(base, base / "new", network=str(base / "nowhere"))


@pytest.mark.parametrize(
    ("changes", "levels", "message"),
    [
        ({}, (), "has no spatial pyramid .* or use --config.system=rcnn"),
        ({"scales": (90, 28)}, (2, 1), "has 28 pixels, .* needs at least 29"),
        ({"system": "rcnn", "context": 32}, (2, 1), "leaves nothing of the 64"),
        ({"finetune.batch_size": 30}, (2, 1), "number of devices, 4; got 30"),
    ],
)
def test_what_the_network_cannot_do_is_told_before_proposals_are_made(
    changes, levels, message, base, tmp_path
):
    network = tmp_path / "network"
    write_classifier(network, levels)
    given = {"network": str(network), "cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=message):
        train(base, tmp_path / "run", **given, **changes)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


def test_a_new_detector_reads_and_hashes_its_network_once(base, tmp_path, monkeypatch):
    read, hashed = [], []
    load, digest = detector_training.load_network, trained_network.digest_arrays

    def counted_load(workdir):
        read.append(workdir)
        return load(workdir)

    def counted_digest(arrays):
        arrays = list(arrays)
        hashed.append(sum(array.nbytes for array in arrays))
        return digest(arrays)

    monkeypatch.setattr(detector_training, "load_network", counted_load)
    monkeypatch.setattr(trained_network, "digest_arrays", counted_digest)
    train(base, tmp_path / "run", **{"finetune.steps": 0})
    assert read == [base / "classifier"]
    params = load(base / "classifier").params
    weights = sum(array.nbytes for array in jax.tree.leaves(params))
    assert hashed.count(weights) == 1


def test_what_the_network_can_just_do_is_not_refused(base, tmp_path):
    for changes in (
        {"scales": (29,)},
        {"system": "rcnn", "context": 31},
        {"system": "rcnn", "context": -1, "scales": (1,)},
        {"finetune.steps": 0, "finetune.batch_size": 30},
    ):
        config = small_config(base, **changes)
        check_network(config, load_network(config.network))


def test_proposals_may_come_from_a_file(base, trained, tmp_path, report):
    """The objects of an image without proposals count as missed."""
    boxes = {}
    for purpose in ("train", "test"):
        split = open_split_of(small_config(base), purpose, base)
        for index, found in enumerate(split.proposals):
            boxes[split.source.records[index]["name"]] = found
    boxes["b00.png"] = np.zeros((0, 4), np.float32)
    save_proposals(tmp_path / "boxes.npz", list(boxes), list(boxes.values()))
    changes = {"proposals.method": "file", "proposals.file": f"{tmp_path}/boxes.npz"}
    config = train(base, tmp_path / "run", **changes)
    with (
        np.load(tmp_path / "run/svm/svm.npz") as same,
        np.load(trained / "svm/svm.npz") as expected,
    ):
        np.testing.assert_array_equal(same["weights"], expected["weights"])
    result = evaluate_detectors([tmp_path / "run"], settings=config)
    with_all = [row["ground_truths"] for row in report["classes"]]
    assert [row["ground_truths"] for row in result["classes"]] == with_all
    assert result["map_area"] < report["map_area"]
    photo = tmp_path / "photo.png"
    photo.write_bytes(encode(draw_scene(100)[0]))
    with pytest.raises(ValueError, match="proposals from a file"):
        detect.detect_in_files(config, [tmp_path / "run"], [str(photo)])


def test_photographs_are_looked_at_and_unreadable_ones_named(
    base, trained, tmp_path, capsys, monkeypatch
):
    decoded, decode = [], photographs.decode_part
    monkeypatch.setattr(
        photographs,
        "decode_part",
        lambda data, side: decode(decoded.append(data) or data, side),
    )
    photos = []
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        photos.append(tmp_path / folder / "photo.png")
        photos[-1].write_bytes(encode(draw_scene(100 + number)[0]))
    torn = tmp_path / "torn.png"
    torn.write_bytes(photos[0].read_bytes()[:500])
    paths = [str(p) for p in (photos[0], torn, tmp_path / "absent.png", photos[1])]
    pictures = tmp_path / "pictures"
    given = (small_config(base), [trained], paths)
    assert detect.detect_in_files(*given, score=-1.0, pictures=pictures) == 2
    assert len(decoded) == 3  # once each, but the one that is absent
    told = capsys.readouterr().out
    assert f"{torn}: can't be read: truncated" in told
    assert "absent.png: can't be read: " in told
    assert f"{photos[0]} (120×90 pixels)" in told
    assert "  disc  x " in told
    assert "  square  x " in told
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["photo_detections.jpg", "photo_detections_2.jpg"]
    for name, photo in zip(names, photos, strict=True):
        drawn = cv2.imread(str(pictures / name))
        assert drawn.shape == cv2.imread(str(photo)).shape
    detect.detect_in_files(*given[:2], paths[:1], score=1e6, pictures=pictures)
    assert "nothing of a score of 1e+06 or more; the best: " in capsys.readouterr().out
    assert not list(base.glob("cache/*photo*"))


def test_boxes_of_a_large_jpeg_are_in_its_own_pixels(
    base, trained, tmp_path, monkeypatch
):
    """Although it is decoded, searched and drawn at a smaller size."""
    monkeypatch.setattr(detect, "_DRAWN_SIDE", 100)
    image = cv2.resize(draw_scene(100)[0], (960, 720))
    photo, out = tmp_path / "photo.jpg", tmp_path / "found.json"
    photo.write_bytes(encode(image, ".jpg"))
    config = small_config(base)
    given = config, [trained], [str(photo)]
    detect.detect_in_files(*given, score=-1.0, pictures=tmp_path, out=out)
    drawn = cv2.imread(str(tmp_path / "photo_detections.jpg"))
    assert drawn.shape in {(360, 480, 3), (180, 240, 3)}
    (told,) = json.loads(out.read_text())
    assert (told["height"], told["width"]) == (720, 960)
    (whole,) = detect_images(
        load_detectors([trained], [config]), [decode_image(encode(image, ".jpg"))]
    )
    for label, name in enumerate(CLASSES):
        best = next(row for row in told["found"] if row["label"] == name)
        expected = whole.boxes[np.flatnonzero(whole.labels == label)[0]]
        assert overlap([best[side] for side in detect.COLUMNS[2:]], expected) > 0.8


def test_a_picture_that_can_t_be_written_loses_no_other_image(
    base, trained, tmp_path, capsys, monkeypatch
):
    photos = []
    for number in range(3):
        photos.append(tmp_path / f"{number}.png")
        photos[-1].write_bytes(encode(draw_scene(100 + number)[0]))
    given = small_config(base), [trained], [str(path) for path in photos]
    pictures, out = tmp_path / "pictures", tmp_path / "found.json"
    (pictures / "1_detections.jpg").mkdir(parents=True)
    with pytest.raises(OSError, match=r"1_detections\.jpg can't be written"):
        detect.detect_in_files(*given, score=-1.0, pictures=pictures, out=out)
    assert len(json.loads(out.read_text())) == 3
    assert sum(path.is_file() for path in pictures.iterdir()) == 2
    told = capsys.readouterr().out
    assert all(f"{photo} (120×90 pixels)" in told for photo in photos)
    # A folder that can't be written to is told before the first image is looked at.
    monkeypatch.setattr(detect, "_look", None)
    with pytest.raises(OSError, match=f"{out} can't be written"):
        detect.detect_in_files(*given, pictures=out)


@pytest.mark.parametrize("name", ["cache", "finetune", "svm", "regression"])
def test_what_is_in_the_way_of_a_detector_s_files_is_told_before_the_work(
    name, base, tmp_path, monkeypatch
):
    monkeypatch.setattr(detector_training, "open_split_of", None)
    (tmp_path / name).touch()
    with pytest.raises((OSError, ValueError), match=f"/{name} .*(can't be wr|a file)"):
        train(base, tmp_path, cache=str(tmp_path / "cache"))


def test_a_changed_split_to_test_on_is_said(base, trained, copy, tmp_path, log):
    root = shutil.copytree(base / "voc", tmp_path / "voc")
    known = run_folder.load_training_data(copy)
    assert known.held_out.keys() == {"test"}
    run_folder.save_training_data(copy, known._replace(root=str(root)))
    settings = detector_settings(copy)
    settings = settings._replace(data=settings.data._replace(root=str(root)))
    evaluate_detectors([copy], settings=settings)
    assert "which is tested on" not in log.text
    (name, *_) = (root / "ImageSets/Main/test.txt").read_text().split()
    xml = root / f"Annotations/{name}.xml"
    xml.write_text(xml.read_text().replace("</annotation>", " </annotation>"))
    evaluate_detectors([copy], settings=settings)
    assert "files of the split 'test', which is tested on, have" in log.text


def test_two_tests_of_a_detector_do_not_share_a_folder(base, trained, copy):
    with (
        run_folder.locked(copy / "test" / "found"),
        pytest.raises(ValueError, match="another process is at work in"),
    ):
        evaluate_detectors([copy])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("detector.json", "{}"),
        ("detector.json", ""),
        ("svm/svm.npz", "PK"),
        ("regression/regression.npz", ""),
        ("network/statistics.npz", "PK"),
        ("network/config.json", "[]"),
        ("config.json", ""),
    ],
)
def test_damaged_files_of_a_detector_are_named(name, content, base, trained, copy):
    (copy / name).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is damaged"):
        load_detector(copy)


def test_a_test_tells_its_table_even_if_files_can_t_be_written(
    base, trained, copy, capsys, monkeypatch
):
    table = copy / "test" / "table.md"
    table.unlink(missing_ok=True)
    table.mkdir(parents=True)
    with pytest.raises(OSError, match=r"table\.md can't be written"):
        evaluate_detectors([copy])
    assert "| class |" not in capsys.readouterr().out
    table.rmdir()

    def written(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.result_files, "write_coco_results", written)
    with pytest.raises(OSError, match="No space left"):
        evaluate_detectors([copy])
    assert "| class |" in capsys.readouterr().out
    assert (copy / "test" / "coco_ground_truth.json").exists()
    assert (copy / "test" / "results.json").exists()


def test_a_folder_is_looked_at_and_what_is_found_is_written(
    base, trained, tmp_path, capsys
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        photo = photos / f"{number}.png"
        photo.write_bytes(encode(draw_scene(100 + number)[0]))
    (photos / "0_torn.png").write_bytes(b"torn")
    paths = cli.given_photos([str(photos)])
    given = small_config(base), [trained], paths
    outs = tmp_path / "found.json", tmp_path / "found.csv"
    for out in outs:
        detect.detect_in_files(*given, score=-1.0, pictures=tmp_path, out=out)
    first, torn, second = json.loads(outs[0].read_text())
    assert [Path(one["path"]).name for one in (first, second)] == ["0.png", "1.png"]
    assert torn.keys() == {"path", "error"}
    detectors = load_detectors([trained], [given[0]])
    images = [photographs.read_image(paths[number]) for number in (0, 2)]
    for told, found in zip(
        (first, second), detect_images(detectors, images), strict=True
    ):
        assert (told["width"], told["height"]) == (120, 90)
        boxes, labels, scores = found.above(-1.0)
        assert [row["label"] for row in told["found"]] == [CLASSES[k] for k in labels]
        sides = [[row[side] for side in detect.COLUMNS[2:]] for row in told["found"]]
        np.testing.assert_allclose(sides, boxes, atol=0.006)
        np.testing.assert_allclose(
            [row["score"] for row in told["found"]], scores, atol=1e-6
        )
    lines = list(csv.DictReader(outs[1].open()))
    assert len(lines) == len(first["found"]) + 1 + len(second["found"])
    assert {name: str(value) for name, value in first["found"][0].items()}.items() <= (
        lines[0].items()
    )


def test_photographs_get_what_the_images_of_a_split_do(base, trained):
    """Although these are padded to sizes that fit any photographs."""
    config = small_config(base)
    detectors = load_detectors([trained], [config])
    split = open_split_of(config, "test", trained)
    of_split = detect_split(detectors, split)
    kept = [k for k, record in enumerate(split.images) if len(split.proposals[k])]
    images = [decode_image(split.source.records[k]["image"]) for k in kept]
    for k, found in zip(kept, detect_images(detectors, images), strict=True):
        np.testing.assert_array_equal(found.labels, of_split[k].labels)
        np.testing.assert_allclose(found.scores, of_split[k].scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, of_split[k].boxes, atol=1e-2)


def test_a_new_photograph_compiles_nothing(base, trained, log):
    config = small_config(base)
    detect_one = image_detector(load_detectors([trained], [config]))

    def look(seed, *size):
        image = cv2.resize(draw_scene(seed)[0], size[::-1])
        return detect_one(image, find_boxes(image, config.proposals))

    look(100, 90, 120)
    with jax.log_compiles():
        for seed, size in enumerate([(90, 120), (360, 480), (99, 132), (300, 400)]):
            look(seed, *size)
        assert not [line for line in log.messages if line.startswith("Compiling")]
        look(5, 120, 90)
        assert [line for line in log.messages if line.startswith("Compiling")]


def test_looking_imports_nothing_that_it_has_no_need_of(
    base, trained, command_line, tmp_path
):
    photo = tmp_path / "photo.png"
    photo.write_bytes(encode(draw_scene(7)[0]))
    arguments = "image", f"--workdir={trained}", f"--pictures={tmp_path}", photo
    result = command_line("detect", *arguments, how=import_times)
    assert "picture: " in result.stdout
    imported = {line.split()[-1] for line in result.stderr.splitlines()}
    assert {"jax", "cv2", "matplotlib.figure"} <= imported
    assert "matplotlib.pyplot" not in imported
    rooms = {name.split(".")[0] for name in imported}
    assert not rooms & (set(NOT_NEEDED) - {"matplotlib"})


def test_the_command_line_trains_tests_and_looks(base, trained, command_line):
    """Settings that are not given are those of the folder's training."""
    again = command_line("detect", "train", f"--workdir={trained}", devices=4)
    assert again.stderr.count(" is done") == 4
    photo, torn = base / "photo.png", base / "torn.png"
    photo.write_bytes(encode(draw_scene(7)[0]))
    torn.write_bytes(b"")
    result = command_line(
        *("detect", "image", f"--workdir={trained}", photo, torn),
        devices=4,
        check=False,
    )
    assert result.returncode == 1
    assert "picture: " in result.stdout
    assert "error: 1 of 2 files could not be read" in result.stderr
    wrong = command_line(
        "detect", "test", f"--workdir={base / 'classifier'}", check=False
    )
    assert wrong.returncode == 2
    assert "holds a trained classifier, no detector" in wrong.stderr
    assert "Traceback" not in wrong.stderr
