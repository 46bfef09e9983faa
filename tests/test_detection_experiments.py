"""The detection experiments: what they write, and that nothing is done twice."""

import argparse
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import detect_folder, folder
from experiments import (
    detection_layers,
    detection_timing,
    detection_vs_rcnn,
    detector_memory,
    runs,
    scale_selection,
    setting,
)
from experiments.detection_timing import Convolutions, Photo, System, Windows
from experiments.report import (
    TEXT,
    Cited,
    Column,
    Ratio,
    Row,
    plot_shares,
    write_report,
)
from experiments.runs import (
    DetectionSetting,
    DetectorRecipe,
    detector_workdir,
    share_stages,
)
from experiments.setting import detection_setting, paper_scales
from sppnet_jax.detection.detector import layer_head
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.run import stages
from sppnet_jax.run.settings import read
from tests.data_helpers import encode, picture, voc_object, voc_xml, write_voc_folder
from tests.network_helpers import drawn_params, write_network

pytestmark = pytest.mark.usefixtures("shallow_zf5")

SIZE = (72, 96)
CLASSES = ("red", "green")


def add_squares(image, rng):
    """Paints a square of each class; returns VOC's boxes (xmin, ymin, xmax, ymax)."""
    boxes = []
    for label in range(len(CLASSES)):
        side = int(rng.integers(24, 36))
        top = int(rng.integers(0, SIZE[0] - side))
        left = int(rng.integers(0, SIZE[1] // 2 - side)) + label * SIZE[1] // 2
        image[top : top + side, left : left + side] = 0
        image[top : top + side, left : left + side, label] = 255
        boxes.append((left + 1, top + 1, left + side, top + side))
    return boxes


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Eight pictures of two squares, in Pascal VOC layout."""
    root = tmp_path_factory.mktemp("voc")
    rng = np.random.default_rng(0)
    names = [f"{number:03d}" for number in range(8)]
    images = {name: picture(*SIZE, seed=seed) for seed, name in enumerate(names)}
    annotations = {}
    for name, image in images.items():
        boxes = add_squares(image, rng)
        objects = [voc_object(box, c) for box, c in zip(boxes, CLASSES, strict=True)]
        annotations[name] = voc_xml(*objects, size=SIZE)
    lists = {"trainval.txt": "\n".join(names[:5]), "test.txt": "\n".join(names[5:])}
    write_voc_folder(root, annotations, lists, size=SIZE)
    for name, image in images.items():
        (root / f"JPEGImages/{name}.png").write_bytes(encode(image))
    return root


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The workdir of a classifier that was never trained."""
    config = folder.get_config()
    config.model.width = 0.02
    config.data.image_size = 64
    config.inputs.mean = 128.0
    config.inputs.color_sigma = 0.0
    return write_network(tmp_path_factory.mktemp("network"), config)


@pytest.fixture(scope="module")
def given(voc, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    config = detect_folder.get_config()
    config.network = str(network)
    config.cache = str(folder / "detection_cache")
    config.data.root = str(voc)
    config.proposals.width = 100
    config.proposals.min_side = 16
    config.proposals.max_windows = 30
    config.batch_size = 4
    config.finetune.steps = 2
    config.finetune.batch_size = 16
    settings = read(DetectorSettings, config.to_dict())
    return DetectionSetting("folder", settings, 64, folder, (0,))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Two scales stand for five, and each time is measured once."""
    scales = {1: (688,), 5: (480, 688)}
    monkeypatch.setattr(setting, "PAPER_SCALES", scales)
    choices = [scale_selection.CHOICES[number] for number in (1, 3, 5)]
    monkeypatch.setattr(scale_selection, "CHOICES", choices)
    monkeypatch.setattr(detection_vs_rcnn, "ROUNDS", 1)


def options(**values):
    usual = {
        "scales": [1],
        "rcnn": False,
        "scorer": "softmax",
        "timed_images": 2,
        "repeats": 1,
        "batch": 16,
        "fc_rank": None,
        "max_windows": None,
        "image": None,
        "width": 0.02,
    }
    return argparse.Namespace(**{**usual, **values})


def results_of(folder, name):
    assert (folder / name / "plot.png").stat().st_size > 10_000
    assert (folder / name / "table.md").read_text().startswith("# ")
    return json.loads((folder / name / "results.json").read_text())


def finished(workdir, stage):
    return (workdir / stage / stages.STAGE_FILE).stat().st_mtime_ns


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on_without_training_again(given, monkeypatch):
    def interrupted(given, detector, seed):
        if detector.layer == "fc7" and detector.regression:
            raise KeyboardInterrupt
        return runs.detector_test(given, detector, seed)

    monkeypatch.setattr(detection_layers, "detector_test", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detection_layers.main(given, options())
    folder = given.folder / detection_layers.NAME
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [len(row["measured"]) for row in rows] == [1, 1, 1, 1, 0]
    assert (folder / "table.md").read_text().count("not run") > 0

    base = DetectorRecipe(paper_scales(given, 1), scorer="softmax", regression=False)
    tuned = finished(detector_workdir(given, base, 0), "finetune")
    evaluate, evaluated = runs.evaluate_detectors, []

    def counted(workdirs, **settings):
        evaluated.extend(workdirs)
        return evaluate(workdirs, **settings)

    monkeypatch.setattr(detection_layers, "detector_test", runs.detector_test)
    monkeypatch.setattr(runs, "evaluate_detectors", counted)
    detection_layers.main(given, options())
    assert [path.name for path in evaluated] == ["spp-197-finetuned-fc7-boxes-seed0"]
    assert finished(detector_workdir(given, base, 0), "finetune") == tuned
    results = results_of(given.folder, detection_layers.NAME)
    assert results["preset"] == "folder"
    for row, kind in zip(results["rows"], detection_layers.PAPER, strict=True):
        measured = row["measured"][detection_layers.ONE]
        detector = base._replace(
            scorer="svm",
            layer=kind.layer,
            finetuned=kind.finetuned,
            regression=kind.regression,
        )
        path = detector_workdir(given, detector, 0) / "test" / "results.json"
        assert measured["values"] == [json.loads(path.read_text())["map_11_point"]]
    papers = [row["paper"][detection_layers.ONE]["value"] for row in results["rows"]]
    assert papers == [0.43, 0.425, 0.523, 0.545, 0.58]
    assert results["rows"][-1]["paper"][detection_layers.ONE]["source"] == "text"
    assert len(results["claims"][0]["differences"]) == 1


@pytest.mark.slow
def test_systems_are_compared_on_one_network_and_the_same_images(given):
    detection_vs_rcnn.main(given, options())
    results = results_of(given.folder, detection_vs_rcnn.NAME)
    rows = {row["row"]: row for row in results["rows"]}
    one, five, rcnn = (
        rows[name]
        for name in (
            detection_vs_rcnn.ONE,
            detection_vs_rcnn.FIVE,
            detection_vs_rcnn.RCNN,
        )
    )
    parts = {"proposals", "warping", "convolution", "pooling", "fc", "suppression"}
    for row in results["rows"]:
        assert parts < set(row["measured"])
        assert all(len(row["measured"][part]["values"]) == 2 for part in parts)
    for row in (one, five, rcnn, rows[detection_vs_rcnn.ONE + detection_vs_rcnn.SVD]):
        assert len(row["measured"]["mAP, 11 points"]["values"]) == 1
    every = rows[detection_vs_rcnn.ONE + detection_vs_rcnn.EVERY]
    assert "mAP, 11 points" not in every["measured"]
    assert [row["paper"]["convolution"]["value"] for row in (one, five, rcnn)] == [
        0.053,
        0.293,
        14.37,
    ]
    assert rcnn["paper"]["convolution"]["source"] == "text"
    first = results["ratios"][0]
    assert first["paper"] == {"value": 270, "source": "text"}
    slow, fast = (row["measured"]["convolution"]["values"] for row in (rcnn, one))
    np.testing.assert_allclose(first["values"], np.divide(slow, fast))


@pytest.mark.slow
def test_windows_are_counted_at_their_scales(given):
    scale_selection.main(given, options())
    results = results_of(given.folder, scale_selection.NAME)
    assert len(results["rows"]) == 3
    assert all(row["measured"] for row in results["rows"])
    shares = results["windows_at_each_scale"]
    assert list(shares) == [
        f"2 scales, windows near {side}×{side}" for side in (32, 64)
    ]
    for found in shares.values():
        assert list(found) == ["137", "197"]
        assert sum(found.values()) == pytest.approx(1)
    papers = [row["paper"] for row in results["rows"] if row["paper"]]
    assert [paper["mAP, 11 points"]["value"] for paper in papers] == [0.58, 0.592]


@pytest.mark.slow
def test_the_paper_preset_measures_times_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(detection_vs_rcnn, "PAPER_SCALES", {1: (48,), 5: (48, 64)})
    (tmp_path / "x.png").write_bytes(encode(picture(60, 60)))
    image = str(tmp_path / "x.png")
    detection_vs_rcnn.on_paper(
        tmp_path, options(max_windows=20, fc_rank=[8, 4], image=image)
    )
    results = results_of(tmp_path, detection_vs_rcnn.NAME)
    labels = [row["row"] for row in results["rows"]]
    assert "SPP, 5 scales, SVD 8/4" in labels
    assert labels[-1] == "R-CNN"
    for row in results["rows"]:
        features = row["measured"].pop("convolution, pooling, fc")["median"]
        parts = [
            row["measured"][part]["median"] for part in ("convolution", "pooling", "fc")
        ]
        assert features == pytest.approx(sum(parts))
        assert not any("mAP" in name for name in row["measured"])
    assert [ratio["paper"] and ratio["paper"]["value"] for ratio in results["ratios"]][
        :3
    ] == [270, 49, 102]


def narrow_network():
    model = create_model("zf5", (2, 1), 3, width=0.02, image_size=64)
    inputs = Preprocessing(np.array(128.0), 64.0, np.zeros((3, 3)))
    return Convolutions(model, drawn_params(model), inputs)


def test_sharing_windows_changes_no_score():
    network = narrow_network()
    rng = np.random.default_rng(0)
    photos = []
    for seed, size in enumerate([(60, 80), (90, 70)]):
        corners = rng.uniform(0, 30, (40, 2)).round(-1)
        boxes = np.concatenate([corners, corners + 30], axis=1).astype(np.float32)
        photos.append(Photo(picture(*size, seed=seed), boxes))
    windows = Windows((100, 140), 64.0**2)
    program = detection_timing.fc_program(layer_head(network.model, "fc7"))
    systems = []
    for name, shared in (("shared", True), ("apart", False)):
        parts = detection_timing.spp_parts(network, windows, photos, shared=shared)
        parts["fc"] = detection_timing.fc_part(program, network.params)
        systems.append(System(name, parts, rounds=2))
    seconds, found = detection_timing.measure(systems, photos)
    np.testing.assert_allclose(found["shared"], found["apart"], rtol=1e-4, atol=1e-6)
    assert found["apart"].shape[0] == 40
    assert detection_timing.distinct_share(network, windows, photos) < 0.7
    for parts in seconds.values():
        assert {name: len(values) for name, values in parts.items()} == {
            "warping": 2,
            "convolution": 2,
            "pooling": 2,
            "fc": 2,
        }


def test_rcnn_times_what_rcnn_computes():
    image = picture(64, 64)
    boxes = np.array([[0, 0, 64, 64]] * 5, np.float32)
    boxes[1:, 2:] -= np.arange(1, 5)[:, None]
    network, photos = narrow_network(), [Photo(image, boxes)]
    parts = detection_timing.rcnn_parts(network, photos, context=0, batch_size=2)
    program = detection_timing.fc_program(layer_head(network.model, "fc7"))
    parts["fc"] = detection_timing.fc_part(program, network.params)
    _, found = detection_timing.measure([System("R-CNN", parts, 1, 2)], photos)
    pixels = jnp.array(image[None] - 128.0) / 64
    _, activations = network.model.apply({"params": network.params}, pixels)
    np.testing.assert_allclose(
        found["R-CNN"][:1], activations["fc7"], rtol=1e-4, atol=1e-6
    )
    assert found["R-CNN"].shape[0] == 5


def test_a_stage_is_copied_where_it_is_missing_or_another(tmp_path):
    def make(workdir, name, value):
        stages.run_stage(
            workdir, name, {"v": value}, lambda f: (f / "x").write_text(str(value))
        )

    first, second = tmp_path / "a", tmp_path / "b"
    make(first, "network", 1)
    make(first, "finetune", 1)
    share_stages(first, second)
    assert (second / "finetune" / "x").read_text() == "1"
    (second / "finetune" / "x").write_text("ours")
    share_stages(first, second)
    assert (second / "finetune" / "x").read_text() == "ours"
    make(first, "finetune", 2)
    make(second, "svm", 1)
    share_stages(first, second)
    assert (second / "finetune" / "x").read_text() == "2"
    assert (second / "svm" / "x").read_text() == "1"
    (first / "finetune" / stages.STAGE_FILE).unlink()
    share_stages(first, second)
    assert (second / "finetune" / "x").read_text() == "2"


def test_a_detector_is_built_on_what_it_adds_to():
    whole = DetectorRecipe((197,), ranks=(8, 4))
    names = []
    while whole:
        names.append(whole.name)
        whole = whole.origin
    assert names == [
        "spp-197-finetuned-fc7-boxes-rank8_4",
        "spp-197-finetuned-fc7-boxes",
        "spp-197-finetuned-fc7",
        "spp-197-finetuned-softmax",
    ]
    pool5 = DetectorRecipe((197,), layer="pyramid", finetuned=False, regression=False)
    assert pool5.origin is None


def test_window_shares_are_those_of_a_plain_count():
    sizes = np.array([[100, 200], [0, 0]])
    boxes = [np.array([[0, 0, 32, 32], [0, 0, 64, 64], [0, 0, 99, 99.0]])]
    found = scale_selection.scale_shares(
        [*boxes, np.zeros((0, 4))], sizes, (100, 200), 64.0**2
    )
    assert found == {100: pytest.approx(2 / 3), 200: pytest.approx(1 / 3)}


@pytest.mark.parametrize("preset", ["digits", "folder"])
def test_a_command_line_becomes_a_setting(preset, network, voc, tmp_path):
    line = options(
        preset=preset,
        network=str(network),
        root=str(voc) if preset == "folder" else "",
        data_dir="",
        train_split="train[:9]",
        test_split="",
        steps=40,
        max_windows=7,
        seeds=[3, 4],
    )
    given = detection_setting(line, tmp_path)
    assert given.seeds == (3, 4)
    assert given.settings.data.train_split == "train[:9]"
    assert given.settings.finetune.steps == 40
    (usual,) = setting.DETECTION_PRESETS[preset]().finetune.drop_steps
    of = setting.DETECTION_PRESETS[preset]().finetune.steps
    assert given.settings.finetune.drop_steps == (round(40 * usual / of),)
    assert given.settings.proposals.max_windows == 7
    assert paper_scales(given, 1) == (197,)
    assert paper_scales(given, 5) == (137, 197)
    line.network = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="no trained classifier"):
        detection_setting(line, tmp_path)
    line.steps = 0
    with pytest.raises(ValueError, match="--steps must be at least 1, got 0"):
        detection_setting(line, tmp_path)


def test_only_what_was_measured_is_a_result(tmp_path):
    columns = [Column("mAP"), Column("fc", "s")]
    rows = [
        Row("first", {"mAP": [0.1, 0.2]}, {"mAP": Cited(0.3, TEXT)}),
        Row("second", {"mAP": [], "fc": [3.0, 1.0, 2.0]}, {"fc": Cited(0.5)}),
    ]
    ratio = Ratio("Faster", [2.0, 4.0], Cited(102, TEXT))
    given = DetectionSetting("p", DetectorSettings(), 64, tmp_path, (0,))
    folder = write_report(
        given, "x", title="T", columns=columns, rows=rows, ratios=[ratio]
    )
    plot_shares(folder, "T", {"mAP": ["mAP"]}, rows)
    lines = (folder / "table.md").read_text().splitlines()
    assert "| first | 15.0 ± 7.1 | 30.0 (text) | – | – |" in lines
    assert "| second | not run | – | 2 | 0.5 |" in lines
    assert "- Faster: 3× (2 to 4 over the images); the paper: 102× (text)." in lines
    first, second = results_of(tmp_path, "x")["rows"]
    assert list(first["measured"]) == ["mAP"]
    assert second["measured"] == {"fc": {"values": [3.0, 1.0, 2.0], "median": 2.0}}


@pytest.mark.slow
def test_the_memory_of_a_training_is_measured_once_step_by_step(tmp_path, monkeypatch):
    (row,) = detector_memory.measure([4], 40, tmp_path).rows
    steps = [value for name, value in row.items() if name.endswith(", GB")]
    assert 0.2 < min(steps) < max(steps) == row["peak, GB"] == row["box regression, GB"]
    assert row["negatives, GB"] <= row["hard negatives, round 1, GB"]
    monkeypatch.setattr(detector_memory.subprocess, "run", None)
    report = detector_memory.measure([4], 40, tmp_path)
    assert list(report.rows) == [row]
    assert len(report.plot(report.rows).axes[0].patches) == len(steps) - 1
