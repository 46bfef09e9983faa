"""Networks and detectors as ONNX files, of images and boxes of any number and size.

    save_onnx(network_to_onnx(load_network("runs/flowers")), "flowers.onnx")
    save_onnx(detector_to_onnx(load_detector(Path("runs/cats"))), "cats.onnx")

A network takes `images`, [batch, height, width, 3], RGB pixels from 0 to 255, and gives
`logits` [batch, classes] and `probabilities`. A detector takes one `image`, [height,
width, 3], at the size that it is convolved at, and `boxes` [N, 4], (ymin, xmin, ymax,
xmax) in its pixels; it gives `scores` [N, classes], of an SVM or a softmax, and
`moved`, [N, classes, 4], the boxes that each class would move them to. The file's
metadata hold the classes, sizes and versions.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper

from sppnet_jax.detection.box_layer import BOX, SPREAD
from sppnet_jax.detection.box_regression import MAX_LOG_RATIO
from sppnet_jax.detection.detector import LEAST_SIDE, VOTE_SOFTNESS, Suppression
from sppnet_jax.detection.hard_negatives import NEVER
from sppnet_jax.detection.trained_detector import Detector
from sppnet_jax.exports.onnx_layers import (
    IR_VERSION,
    OPSET,
    Graph,
    add_fc,
    add_head,
    add_inputs,
    add_pyramid,
    add_trunk,
)
from sppnet_jax.network.trained import Network
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.run.files import own_version, whole_file

PIXELS = ("uint8", "float32")
_LARGEST = 2**31 - 1  # bytes of a protocol buffer


def network_to_onnx(network: Network, pixels: str = "uint8") -> onnx.ModelProto:
    """A network from pixels to logits.

    `pixels`: the type of the images, "uint8" or "float32".

    Raises: ValueError for a network that ONNX's operators can't compute.
    """
    graph, model = Graph(), network.model
    params = jax.tree.map(np.asarray, dict(network.params))
    inputs = add_inputs(graph, "images", network.preprocessing)
    pyramid = add_pyramid(graph, model, *add_trunk(graph, model, params, inputs))
    logits, _ = add_head(graph, params, pyramid)
    _name(graph, logits, "logits")
    graph.add("Softmax", "logits", axis=1, name="probabilities")
    sides = ("height", "width") if model.levels else (model.image_size,) * 2
    classes = len(network.class_names)
    return _model(
        graph,
        {"images": (pixels, ("batch", *sides, 3))},
        dict.fromkeys(("logits", "probabilities"), ("float32", ("batch", classes))),
        {
            "task": "classification",
            "classes": list(network.class_names),
            "image_size": model.image_size,
            "resize_side": network.resize_side,
            **_described(network),
        },
    )


def detector_to_onnx(
    detector: Detector, pixels: str = "uint8", *, suppressed: bool = False
) -> onnx.ModelProto:
    """A detector from the pixels of one image and boxes in it to scores.

    `suppressed`: also gives `detections` [K, 4], `labels` [K] and `confidences` [K],
    what non-maximum suppression leaves of each class, class after class.

    Raises: ValueError for one of R-CNN's, whose windows are warped images.
    """
    settings, network = detector.settings, detector.network
    if settings.system == "rcnn":
        raise ValueError(
            "the detector warps each box to an image (R-CNN): only those that pool "
            "windows from one map can be exported"
        )
    graph, model = Graph(), network.model
    params = jax.tree.map(np.asarray, dict(network.params))
    batch = graph.add("Unsqueeze", "image", graph.ints(0))
    inputs = add_inputs(graph, batch, network.preprocessing)
    maps, positive = add_trunk(graph, model, params, inputs)
    windows = _add_windows(graph, network.geometry, settings.rule, "boxes", maps)
    pyramid = add_pyramid(graph, model, maps, positive, windows)
    weights = jax.tree.map(np.asarray, detector.weights)
    scores, deltas = _add_scores(graph, detector, weights, pyramid)
    _name(graph, scores, "scores")
    classes = len(detector.class_names)
    _add_moved(graph, deltas, classes)
    outputs: dict[str, tuple[str, Sequence[Any]]] = {
        "scores": ("float32", ("boxes_given", classes)),
        "moved": ("float32", ("boxes_given", classes, 4)),
    }
    if suppressed:
        _add_suppression(graph, settings.test)
        outputs |= {
            "detections": ("float32", ("found", 4)),
            "labels": ("int64", ("found",)),
            "confidences": ("float32", ("found",)),
        }
    return _model(
        graph,
        {
            "image": (pixels, ("height", "width", 3)),
            "boxes": ("float32", ("boxes_given", 4)),
        },
        outputs,
        {
            "task": "detection",
            "classes": list(detector.class_names),
            "scales": list(settings.scales),
            "scorer": settings.scorer,
            "nms": settings.test.nms,
            "max_per_class": settings.test.max_per_class,
            "vote": settings.test.vote,
            **_described(network),
        },
    )


def save_onnx(model: onnx.ModelProto, path: str | Path) -> Path:
    """Writes a model as one file, after ONNX's own check of it; returns its path.

    Raises: ValueError for a model that is too large for one file.
    """
    if model.ByteSize() > _LARGEST:
        raise ValueError(
            f"the model takes {model.ByteSize() / 1e9:.1f} GB, and an ONNX file holds "
            "2.1 GB at most: export a narrower network, or --format=safetensors"
        )
    onnx.checker.check_model(model, full_check=True)
    path = Path(path).expanduser()
    with whole_file(path) as file:
        file.write(model.SerializeToString())
    return path


def _described(network: Network) -> dict[str, Any]:
    return {
        "backbone": network.settings["model"]["backbone"],
        "levels": list(network.model.levels or ()),
        "least_side": network.geometry.min_image_size,
        "pixels": "RGB, 0 to 255; normalised inside",
        "version": own_version(),
    }


def _model(
    graph: Graph,
    inputs: Mapping[str, tuple[str, Sequence[Any]]],
    outputs: Mapping[str, tuple[str, Sequence[Any]]],
    told: Mapping[str, Any],
) -> onnx.ModelProto:
    """The whole file of a graph; `told` is metadata, as JSON."""

    def declared(
        values: Mapping[str, tuple[str, Sequence[Any]]],
    ) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape)
            )
            for name, (dtype, shape) in values.items()
        ]

    made = helper.make_graph(
        graph.nodes, "sppnet_jax", declared(inputs), declared(outputs), graph.tensors
    )
    model = helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="sppnet_jax",
        producer_version=own_version(),
    )
    helper.set_model_props(
        model,
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in told.items()
        },
    )
    return model


def _name(graph: Graph, value: str, name: str) -> str:
    """Gives a value the name of an output."""
    return graph.add("Identity", value, name=name)


def _add_windows(
    graph: Graph, geometry: Geometry, rule: str, boxes: str, maps: str
) -> str:
    """`boxes_to_windows` of boxes on the map of the image itself: int64 [N, 4]."""

    def number(value: float) -> str:
        return graph.constant(np.float64(value))

    def halves(axis_first: int) -> str:
        return graph.take(position, axis_first, axis_first + 1, axis=1)

    def snap(value: str) -> str:
        nearest = graph.add("Round", graph.add("Mul", value, number(2)))
        nearest = graph.add("Mul", nearest, number(0.5))
        distance = graph.add("Abs", graph.add("Sub", value, nearest))
        close = graph.add("LessOrEqual", distance, slack)
        return graph.add("Where", close, nearest, value)

    edges = graph.cast(boxes, np.float64)
    largest = graph.add(
        "ReduceMax",
        graph.add("Abs", edges),
        graph.ints(1),
        keepdims=1,
    )
    rounding = 4 * float(np.finfo(np.float64).eps) / geometry.stride
    largest = graph.add("Max", largest, number(1))
    slack = graph.add("Mul", largest, number(rounding))
    shifted = graph.add("Sub", edges, number(geometry.center))
    position = snap(graph.add("Div", shifted, number(geometry.stride)))
    starts, stops = halves(0), halves(2)
    if rule == "paper":
        first = graph.add("Add", graph.add("Floor", starts), number(1))
        last = graph.add("Sub", graph.add("Ceil", stops), number(1))
    else:
        first = graph.add("Floor", graph.add("Add", starts, number(0.5)))
        last = graph.add("Ceil", graph.add("Sub", stops, number(0.5)))
    middle = graph.add("Mul", graph.add("Add", starts, stops), number(0.5))
    middle = graph.add("Ceil", graph.add("Sub", snap(middle), number(0.5)))
    empty = graph.add("Greater", first, last)
    sizes = graph.cast(graph.add("Shape", maps, start=2, end=4), np.float64)
    most = graph.add("Sub", sizes, number(1))
    ends = []
    for end in (first, last):
        chosen = graph.add("Where", empty, middle, end)
        ends.append(graph.add("Min", graph.add("Max", chosen, number(0)), most))
    stop = graph.add("Add", ends[1], number(1))
    return graph.cast(graph.add("Concat", ends[0], stop, axis=1), np.int64, "windows")


def _add_scores(
    graph: Graph, detector: Detector, weights: Any, pyramid: str
) -> tuple[str, str]:
    """Scores [N, classes], and encoded moves [N, classes, 4] or ""."""
    settings, svms, regressors = (
        detector.settings,
        weights["svms"],
        weights["regressors"],
    )
    moves_boxes = BOX in (weights["fc"] or {}) and settings.regression.enabled
    seen = {"pyramid": pyramid}
    if svms is None or settings.layer != "pyramid" or moves_boxes:
        fc = weights["fc"]
        logits, named = add_head(graph, fc, pyramid)
        seen |= named
    if svms is None:
        shares = graph.add("Softmax", logits, axis=1)
        ends = [graph.ints(n) for n in (0, -1, 1)]
        scores = graph.add("Slice", shares, *ends)  # the last class is background
    else:
        matrix = graph.constant(np.asarray(svms.weights, np.float32).T, "svm.weight")
        bias = graph.constant(np.asarray(svms.biases, np.float32), "svm.bias")
        scores = graph.add("Gemm", seen[settings.layer], matrix, bias)
    shape = graph.ints(0, len(detector.class_names), 4)
    if moves_boxes:
        moves = add_fc(graph, weights["fc"], BOX, seen["fc7"])
        moves = graph.add("Reshape", moves, shape)
        return scores, graph.add("Mul", moves, graph.constant(SPREAD))
    if regressors is None:
        return scores, ""
    each = np.asarray(regressors.weights, np.float32)  # [classes, D, 4]
    wide = each.transpose(1, 0, 2).reshape(each.shape[1], -1)
    bias = graph.constant(np.asarray(regressors.biases, np.float32).reshape(-1))
    moves = graph.add("Gemm", pyramid, graph.constant(wide, "box.weight"), bias)
    return scores, graph.add("Reshape", moves, shape)


def _add_moved(graph: Graph, deltas: str, classes: int) -> None:
    """`regress_boxes`: the output "moved" [N, classes, 4], inside the image."""
    one = graph.ints(1)
    boxes = graph.add("Unsqueeze", "boxes", one)  # [N, 1, 4]

    def part(array: str, first: int) -> str:
        return graph.take(array, first, first + 1, axis=2)

    if not deltas:
        count = graph.size("boxes", 0)
        tail = graph.ints(classes, 4)
        graph.add(
            "Expand", boxes, graph.add("Concat", count, tail, axis=0), name="moved"
        )
        return
    half = graph.constant(np.float32(0.5))
    starts, stops = part(boxes, 0), part(boxes, 2)
    sizes = graph.add("Sub", stops, starts)
    centres = graph.add("Add", starts, graph.add("Mul", sizes, half))
    limits = [graph.constant(np.float32(sign * MAX_LOG_RATIO)) for sign in (-1, 1)]
    ratios = graph.add("Exp", graph.add("Clip", part(deltas, 2), *limits))
    middles = graph.add("Add", centres, graph.add("Mul", part(deltas, 0), sizes))
    halves = graph.add("Mul", graph.add("Mul", ratios, sizes), half)
    moved = graph.add(
        "Concat",
        graph.add("Sub", middles, halves),
        graph.add("Add", middles, halves),
        axis=2,
    )
    sides = graph.cast(graph.add("Shape", "image", start=0, end=2), np.float32)
    most = graph.add("Concat", sides, sides, axis=0)
    zero = graph.constant(np.float32(0))
    graph.add("Min", graph.add("Max", moved, zero), most, name="moved")


def _add_suppression(graph: Graph, settings: Suppression) -> None:
    """`detector.suppress` as outputs: each class by itself, as a batch of ONNX's."""
    one = graph.ints(1)
    # Boxes that were moved out of the image are not there.
    sides = [graph.take("moved", *ends, axis=2) for ends in ((2, 3), (0, 1))]
    two = graph.ints(2)
    least = graph.add("ReduceMin", graph.add("Sub", *sides), two, keepdims=0)
    whole = graph.add("GreaterOrEqual", least, graph.constant(np.float32(LEAST_SIDE)))
    there = graph.add("Where", whole, "scores", graph.constant(np.float32(NEVER)))
    inside = graph.add(
        "Where", graph.add("Unsqueeze", whole, two), "moved", _zero(graph)
    )
    boxes = graph.add("Transpose", inside, perm=[1, 0, 2])  # [classes, N, 4]
    scores = graph.add("Unsqueeze", graph.add("Transpose", there, perm=[1, 0]), one)
    limits = (
        np.array([settings.max_per_class], np.int64),
        np.array([settings.nms], np.float32),
        # A class that was never trained is not there.
        np.array([NEVER / 2], np.float32),
    )
    kept = graph.add(
        "NonMaxSuppression", boxes, scores, *(graph.constant(x) for x in limits)
    )
    which = graph.take(kept, 0, 2, axis=1)  # class, box
    flat = graph.add("Squeeze", scores, one)
    graph.add("GatherND", flat, which, name="confidences")
    first = graph.constant(np.array(0, np.int64))
    labels = graph.add("Gather", kept, first, axis=1, name="labels")
    left = graph.add("GatherND", boxes, which)
    if settings.vote:
        left = _add_vote(graph, left, boxes, flat, labels, settings.vote)
    _name(graph, left, "detections")


def _add_vote(
    graph: Graph, left: str, boxes: str, scores: str, labels: str, overlap: float
) -> str:
    """`detector.vote`: each becomes the mean of its class's boxes that overlap it.

    `left`: [K, 4], of the classes `labels`. `boxes`, `scores`: [classes, N, 4] and
    [classes, N], all there are.
    """
    one, two = (graph.ints(n) for n in (1, 2))
    own = graph.add("Gather", boxes, labels, axis=0)  # [K, N, 4]
    places = graph.add("Unsqueeze", left, one)  # [K, 1, 4]

    def corners(array: str, *columns: int) -> str:
        return graph.take(array, *columns, axis=2)

    def area(array: str) -> str:
        sides = graph.add("Sub", corners(array, 2, 3), corners(array, 0, 1))
        return graph.add("ReduceProd", sides, two, keepdims=0)

    starts = graph.add("Max", corners(own, 0, 1), corners(places, 0, 1))
    stops = graph.add("Min", corners(own, 2, 3), corners(places, 2, 3))
    sides = graph.add("Max", graph.add("Sub", stops, starts), _zero(graph))
    shared = graph.add("ReduceProd", sides, two, keepdims=0)
    union = graph.add("Sub", graph.add("Add", area(own), area(places)), shared)
    # Without a division, which has no answer where both have no area.
    least = graph.add("Mul", union, graph.constant(np.float32(overlap)))
    some = graph.add("Greater", shared, _zero(graph))
    counted = graph.add("And", some, graph.add("GreaterOrEqual", shared, least))
    rows = graph.add("Gather", scores, labels, axis=0)  # [K, N]
    softness = graph.constant(np.float32(VOTE_SOFTNESS))
    logits = graph.add("Div", rows, softness)
    nothing = graph.constant(np.float32(-1e30))
    weights = graph.add("Softmax", graph.add("Where", counted, logits, nothing), axis=1)
    mean = graph.add("MatMul", graph.add("Unsqueeze", weights, one), own)
    return graph.add("Squeeze", mean, one)


def _zero(graph: Graph) -> str:
    return graph.constant(np.float32(0))
