"""What was exported gives what the network gives, for images of any size."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import sppnet_jax as sn
from sppnet_jax import exported
from sppnet_jax.classification.image_scores import score_images
from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.data.images import resize_shorter_side, resize_whole
from sppnet_jax.detection.box_regression import BoxRegressors
from sppnet_jax.detection.detector import (
    Suppression,
    score_boxes,
    scoring_head,
    suppress,
)
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.low_rank import truncate_fc
from sppnet_jax.detection.split_features import image_features
from sppnet_jax.detection.trained_detector import Detector
from sppnet_jax.detection.window_features import make_program
from sppnet_jax.exports.onnx_files import (
    detector_to_onnx,
    network_to_onnx,
    save_onnx,
)
from sppnet_jax.exports.stablehlo import export_stablehlo
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.network.trained import as_network
from tests.network_helpers import drawn_params

runtime = pytest.importorskip("onnxruntime")
NO_SHIFTS = np.zeros((3, 3), np.float32)
IMAGENET = Preprocessing(
    np.array([124, 116, 104], np.float32), np.array([58, 57, 57], np.float32), NO_SHIFTS
)
OLD = Path(__file__).parent / "exported_by_jax_0_10_2"
RNG = np.random.default_rng(0)
MEAN_IMAGE = Preprocessing(
    RNG.uniform(90, 140, (40, 40, 3)).astype(np.float32), 1.0, NO_SHIFTS
)
CAFFE = Preprocessing(np.float32(128), 1.0, NO_SHIFTS)


def make_network(name, levels, preprocessing=IMAGENET, classes=5, **options):
    model = sn.create_model(name, levels, classes, **options)
    return as_network(model, drawn_params(model), preprocessing)


def pictures(count, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, height, width, 3), np.uint8)


def session_of(path):
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def logits_of(network, images):
    inputs = normalize(jnp.asarray(images), network.preprocessing)
    return np.asarray(network.model.apply({"params": network.params}, inputs)[0])


def check_onnx(network, path, *sizes):
    """The file's logits are the network's, to 1e-4 of the largest."""
    session = session_of(save_onnx(network_to_onnx(network), path))
    for size in sizes:
        images = pictures(*size)
        found, shares = session.run(["logits", "probabilities"], {"images": images})
        wanted = logits_of(network, images)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max(), size
        np.testing.assert_allclose(
            shares, np.asarray(jax.nn.softmax(wanted)), rtol=1e-3, atol=1e-6
        )


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", [MEAN_IMAGE, CAFFE, IMAGENET])
def test_an_onnx_file_takes_images_of_every_parity_and_aspect(
    shallow_zf5, tmp_path, preprocessing
):
    network = make_network("zf5", (6, 3, 2, 1), preprocessing, width=0.1)
    sizes = (1, 64, 64), (2, 65, 80), (3, 64, 71), (1, 51, 204), (1, 204, 51)
    check_onnx(network, tmp_path / "zf5.onnx", *sizes)


@pytest.mark.parametrize("reducer", ["max", "mean"])
@pytest.mark.parametrize("cuts", [(), ("stride2",), ("stride2", "stride4")])
def test_cuts_and_means_are_exported(tiny_trunk, tmp_path, cuts, reducer):
    network = make_network(
        "resnet18", (3, 2, 1), cuts=cuts, reducer=reducer, head="linear", image_size=32
    )
    check_onnx(network, tmp_path / "tiny.onnx", (2, 33, 47), (1, 40, 40), (1, 26, 104))


TRUNKS = [
    ("convnet5", {"width": 0.05}),
    ("overfeat7", {"width": 0.03}),
    ("alexnet", {"width": 0.05}),
    ("vgg16", {"width": 0.05}),
    ("squeezenet", {"reducer": "mean", "head": "none", "classes": 1000}),
    ("resnet18", {"head": "linear", "width": 0.1}),
    ("resnet50", {"head": "linear", "width": 0.05}),
    ("efficientnet_lite0", {"head": "linear", "cuts": ("stride8", "stride16")}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), TRUNKS, ids=[name for name, _ in TRUNKS])
def test_every_trunk_is_exported(tmp_path, name, options):
    levels = (1,) if options.get("head") == "none" else (3, 2, 1)
    network = make_network(name, levels, **options)
    check_onnx(network, tmp_path / "trunk.onnx", (2, 97, 130))


def test_a_map_of_negative_numbers_is_pooled_as_it_is(tiny_trunk, tmp_path):
    """ONNX Runtime starts its maxima at the smallest positive number."""
    network = make_network(
        "resnet18", (2, 1), cuts=("stride2",), head="none", classes=30, image_size=32
    )
    linear = network.model.backbone.layers[0]._replace(activation="none")
    layers = (linear, *network.model.backbone.layers[1:])
    backbone = network.model.backbone._replace(layers=layers)
    params = {"conv1": dict(network.params["conv1"])}
    params["conv1"]["bias"] = np.full(6, -9, np.float32)
    model = network.model.clone(backbone=backbone)
    negative = as_network(model, params, CAFFE._replace(scale=200.0))
    assert (logits_of(negative, pictures(1, 33, 33)) < 0).all()
    check_onnx(negative, tmp_path / "negative.onnx", (1, 33, 33), (2, 40, 51))


@pytest.mark.parametrize("level", range(1, 13))
def test_the_bins_of_onnx_runtime_are_ours_at_every_size(level):
    """As its MaxRoiPool computes them, in float32, for maps of up to 2,000 cells."""
    for size in range(1, 2001):
        bin_size = np.float32(size) / np.float32(level)
        index = np.arange(level, dtype=np.float32)
        stops = np.minimum(np.ceil((index + 1) * bin_size), size)
        theirs = np.stack([np.floor(index * bin_size), stops], axis=1)
        ours = sn.pyramid_bins(size, level)
        assert (theirs == ours).all(), size


def test_the_file_says_what_it_takes_and_gives(shallow_zf5, tmp_path):
    network = make_network("zf5", (2, 1), width=0.05)
    path = save_onnx(network_to_onnx(network, "float32"), tmp_path / "net.onnx")
    session = session_of(path)
    (images,) = session.get_inputs()
    assert images.shape == ["batch", "height", "width", 3]
    assert [one.shape for one in session.get_outputs()] == [["batch", 5]] * 2
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == ["0", "1", "2", "3", "4"]
    assert json.loads(told["levels"]) == [2, 1]
    photos = pictures(1, 60, 75)
    (found,) = session.run(["logits"], {"images": photos.astype(np.float32)})
    np.testing.assert_allclose(found, logits_of(network, photos), rtol=1e-4, atol=1e-5)
    inferred = onnx.shape_inference.infer_shapes(
        onnx.load(path), strict_mode=True, data_prop=True
    )
    assert len(inferred.graph.value_info) > 10


@pytest.fixture(scope="module")
def folder(shallow_zf5, tmp_path_factory):
    """An exported network and its folder."""
    network = make_network("zf5", (3, 1), MEAN_IMAGE, width=0.05, image_size=48)
    folder = tmp_path_factory.mktemp("exported")
    return network, export_stablehlo(network, folder)


@pytest.mark.parametrize(
    "size", [(48, 48), (60, 90), (96, 96), (500, 48), (31, 40), (20, 300), (97, 201)]
)
def test_an_exported_folder_scores_images_of_every_size_as_the_network(folder, size):
    network, place = folder
    image = resize_whole(pictures(1, 9, 12)[0], min(size), 10)
    image = np.resize(image, (*size, 3))
    found = exported.load(place).score(image)
    wanted = score_images(network, [image])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-6 if min(size) == 48 else 2e-3)


def test_an_image_that_no_exported_size_holds_is_refused(folder, tmp_path):
    network, _ = folder
    place = export_stablehlo(network, tmp_path, buckets=[(48, 64)], platforms=["cpu"])
    short = exported.load(place)
    assert short.score(pictures(1, 48, 60)[0]).shape == (5,)
    with pytest.raises(ValueError, match=r"48×96 pixels, fits none of .* 48×64"):
        short.score(pictures(1, 60, 120)[0])
    with pytest.raises(ValueError, match="40×90 holds no image"):
        export_stablehlo(network, tmp_path, buckets=[(40, 90)])


@pytest.mark.parametrize(
    ("size", "new"),
    [((40, 30), (63, 47)), ((40, 30), (20, 15)), ((41, 67), (30, 49)), ((30, 50), 27)],
)
def test_it_resizes_as_opencv_does(size, new):
    image = pictures(1, *size)[0]
    if isinstance(new, int):
        wanted = resize_shorter_side(image, new)
    else:
        wanted = resize_whole(image, min(new), 9)
    found = exported._resize(image, *wanted.shape[:2])
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (found == wanted).mean() > 0.97


def test_a_folder_that_jax_0_10_2_wrote_is_still_read():
    """Its scores are those that were noted down when it was written."""
    network = exported.load(OLD)
    image = np.arange(20 * 33 * 3, dtype=np.uint8).reshape(20, 33, 3)
    noted = json.loads((OLD / "scores.json").read_text())
    assert network.described["versions"]["jax"] == "0.10.2"
    np.testing.assert_allclose(network.score(image), noted, rtol=1e-5)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def change(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.json", lambda path: path.unlink(), "there is no .*model.json"),
        ("model.json", lambda path: path.write_text("{}"), "model.json describes no"),
        ("model.json", lambda path: path.write_text("[1"), "model.json is damaged"),
        ("weights.safetensors", cut, "weights.safetensors is damaged"),
        ("weights.safetensors", lambda path: path.unlink(), "there is no .*weights"),
        ("48x65.stablehlo", cut, "can't read the program .*48x65"),
        ("48x65.stablehlo", lambda path: path.unlink(), "there is no .*48x65"),
    ],
)
def test_a_damaged_folder_is_named(folder, tmp_path, name, damage, message):
    copy = shutil.copytree(folder[1], tmp_path / "copy")
    damage(copy / name)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        exported.load(copy)


def drawn(rng, *shape):
    return rng.normal(0, 1 / np.sqrt(shape[-2]), shape).astype(np.float32)


def make_detector(kind, reducer="max", rule="paper"):
    """A detector of three classes with drawn weights; `kind` is what scores boxes."""
    rng = np.random.default_rng(1)
    network = make_network(
        "resnet18",
        (3, 2, 1),
        cuts=("stride2", "stride4"),
        reducer=reducer,
        head="none",
        classes=14,
        image_size=32,
    )
    length, units = 14 * (9 + 4 + 1), 20
    settings = DetectorSettings(
        network="resnet18",
        scales=(40,),
        rule=rule,
        test=Suppression(vote=0.5 if kind in ("pyramid", "softmax") else 0.0),
        scorer="softmax" if kind == "softmax" else "svm",
        system="end_to_end" if kind == "softmax" else "spp",
        layer="fc7" if kind == "low rank" else "pyramid",
    )
    fc, svms, regressors = {}, None, None
    if kind != "pyramid":
        sizes = {"fc6": (length, units), "fc7": (units, units), "fc8": (units, 4)}
        fc = {
            name: {"kernel": drawn(rng, *shape), "bias": drawn(rng, 1, shape[1])[0]}
            for name, shape in sizes.items()
        }
    if kind == "softmax":
        fc["box"] = {"kernel": drawn(rng, units, 12), "bias": drawn(rng, 1, 12)[0]}
    else:
        seen = units if kind == "low rank" else length
        svms = LinearSVMs(drawn(rng, seen, 3).T, drawn(rng, 1, 3)[0])
        regressors = BoxRegressors(
            drawn(rng, 3, length, 4) / 4, drawn(rng, 1, 3, 4)[0] / 4
        )
    if kind == "low rank":
        fc = truncate_fc(fc, {"fc6": 8, "fc7": 5})
    model = network.model.clone(num_classes=4, head="fc", width=units / 4096)
    head, weights = scoring_head(
        model if fc else network.model,
        fc,
        layer=settings.layer,
        svms=svms,
        regressors=regressors,
        move_boxes=kind == "softmax",
    )
    classes = ("one", "two", "three")
    return Detector(settings, Path(), network, head, "", weights, classes, frozenset())


@pytest.mark.parametrize(
    ("kind", "reducer", "rule"),
    [
        ("pyramid", "max", "paper"),
        ("pyramid", "mean", "closest"),
        ("low rank", "max", "closest"),
        ("softmax", "max", "paper"),
    ],
)
def test_a_detector_scores_moves_and_suppresses_boxes_as_here(
    tiny_trunk, tmp_path, kind, reducer, rule
):
    detector = make_detector(kind, reducer, rule)
    model = detector_to_onnx(detector, suppressed=True)
    session = session_of(save_onnx(model, tmp_path / "detector.onnx"))
    names = [one.name for one in session.get_outputs()]
    program = None
    for seed, (height, width) in enumerate([(40, 53), (71, 40), (40, 40), (40, 150)]):
        (image,) = pictures(1, height, width, seed)
        rng = np.random.default_rng(seed)
        edges = np.sort(rng.uniform(0, 1, (300, 2, 2)), axis=1) * [height, width]
        boxes = edges.reshape(-1, 4).astype(np.float32)
        boxes[:40] = np.rint(boxes[:40])  # edges on units' centres
        boxes[:40, 2:] += 1
        boxes = np.minimum(boxes, [height, width, height, width]).astype(np.float32)
        features = image_features(detector.settings, detector.network, [image], [boxes])
        program = program or make_program(features, detector.head)
        size = height, width
        scored = score_boxes(features, program, detector.weights, 0, size, 3)
        found = dict(
            zip(names, session.run(None, {"image": image, "boxes": boxes}), strict=True)
        )
        np.testing.assert_allclose(found["scores"], scored.scores, atol=1e-4)
        np.testing.assert_allclose(found["moved"], scored.boxes, atol=0.1)
        kept = suppress([scored], detector.settings.test)
        order = np.lexsort((-found["confidences"], found["labels"]))
        ours = np.lexsort((-kept.scores, kept.labels))
        np.testing.assert_array_equal(found["labels"][order], kept.labels[ours])
        np.testing.assert_allclose(
            found["detections"][order], kept.boxes[ours], atol=0.1
        )


def test_odd_boxes_are_no_detections_and_none_is_enough(tiny_trunk, tmp_path):
    model = detector_to_onnx(make_detector("pyramid"), suppressed=True)
    session = session_of(save_onnx(model, tmp_path / "detector.onnx"))
    names = [one.name for one in session.get_outputs()]
    (image,) = pictures(1, 40, 53)

    def detect(*boxes):
        given = np.array(boxes, np.float32).reshape(-1, 4)
        found = session.run(None, {"image": image, "boxes": given})
        return dict(zip(names, found, strict=True))

    nothing = detect()
    assert nothing["scores"].shape == (0, 3)
    assert nothing["detections"].shape == (0, 4)
    odd = [(-50, -50, -10, -10), (10, 10, 10, 10), (20, 30, 20, 40)]
    odd += [(0, 0, np.inf, np.inf), (np.nan, 0, 10, 10)]
    for box in odd:
        assert not len(detect(box)["detections"]), box
    both, alone = detect(*odd, (2, 3, 30, 40)), detect((2, 3, 30, 40))
    assert len(both["detections"]) == len(alone["detections"]) > 0
    assert np.isfinite(both["detections"]).all()


def test_no_image_is_a_batch_too(shallow_zf5, tmp_path):
    network = make_network("zf5", (3, 1), width=0.05)
    session = session_of(save_onnx(network_to_onnx(network), tmp_path / "net.onnx"))
    (found,) = session.run(["logits"], {"images": pictures(0, 64, 70)})
    assert found.shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ["cudaa"]}, "cpu, cuda, tpu, one or several; got cudaa"),
        ({"platforms": []}, "one or several; got none"),
        ({"buckets": [(48, 99_999_999)]}, "larger than any image"),
    ],
)
def test_what_can_t_be_exported_is_refused(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_stablehlo(folder[0], tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_detector_of_warped_windows_is_refused():
    detector = make_detector("pyramid")
    warped = detector._replace(settings=detector.settings._replace(system="rcnn"))
    with pytest.raises(ValueError, match="R-CNN"):
        detector_to_onnx(warped)
