"""What networks are made of, as nodes of an ONNX graph.

Maps are [batch, channels, height, width] here, of any height and width: nothing in a
graph depends on the size of an image. A pyramid over a map of unknown size is
`MaxRoiPool` over the whole map, whose bins are ours. Its runtime starts each maximum at
the smallest positive number; so a map that may be negative is lifted above zero first.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sppnet_jax.network.layers import join_indices
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.stack import (
    LRN,
    Conv,
    Cut,
    Layer,
    MaxPool,
    cut_table,
    table_geometry,
)
from sppnet_jax.pyramid.geometry import Geometry, Sliding

OPSET = 18
IR_VERSION = 9  # of ONNX Runtime from 1.16 on
Params = Mapping[str, Mapping[str, Any]]


class Graph:
    """A graph that grows by nodes and constants, each with a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self._names = Counter[str]()

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node of one output; returns the output's name."""
        output = self._free(name or kind.lower())
        self.nodes.append(
            helper.make_node(kind, inputs, [output], output, **attributes)
        )
        return output

    def constant(self, value: Any, name: str = "constant") -> str:
        """An array that is part of the file; returns its name."""
        name = self._free(name)
        self.tensors.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def ints(self, *values: int) -> str:
        """Whole numbers, int64 [n], that are part of the file; returns their name."""
        return self.constant(np.array(values, np.int64))

    def take(self, array: str, *indices: int, axis: int) -> str:
        """Some places along an axis."""
        return self.add("Gather", array, self.ints(*indices), axis=axis)

    def size(self, array: str, axis: int) -> str:
        """The length of an axis, int64 [1]."""
        return self.add("Shape", array, start=axis, end=axis + 1)

    def cast(self, array: str, dtype: Any, name: str = "") -> str:
        """An array as another type."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.add("Cast", array, to=kind, name=name)

    def range(self, count: str, dtype: Any = np.int64) -> str:
        """0, 1, … up to a length, int64 [1]."""
        scalar = self.add("Squeeze", count)
        whole = self.add(
            "Range", self.constant(np.int64(0)), scalar, self.constant(np.int64(1))
        )
        return whole if dtype == np.int64 else self.cast(whole, dtype)

    def _free(self, name: str) -> str:
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else self._free(f"{name}_{count}")


def add_inputs(graph: Graph, images: str, preprocessing: Preprocessing) -> str:
    """Pixels [batch, height, width, 3] as the network's inputs, channels first."""
    mean = np.asarray(preprocessing.mean, np.float32)
    pixels = graph.cast(images, np.float32)
    if mean.ndim == 3:
        # As `preprocess.normalize`: warped to the size of the images.
        sides = graph.size(images, 1), graph.size(images, 2)
        sizes = graph.add("Concat", graph.ints(1, 3), *sides, axis=0)
        stored = graph.constant(mean.transpose(2, 0, 1)[None], "mean")
        warped = graph.add("Resize", stored, "", "", sizes, mode="linear", antialias=1)
        centred = graph.add(
            "Sub", graph.add("Transpose", pixels, perm=[0, 3, 1, 2]), warped
        )
        scale = np.asarray(preprocessing.scale, np.float32)
        return graph.add(
            "Div", centred, graph.constant(scale.reshape(-1, 1, 1), "scale")
        )
    centred = graph.add("Sub", pixels, graph.constant(mean, "mean"))
    scale = np.asarray(preprocessing.scale, np.float32)
    inputs = graph.add("Div", centred, graph.constant(scale, "scale"))
    return graph.add("Transpose", inputs, perm=[0, 3, 1, 2], name="inputs")


def add_trunk(
    graph: Graph, model: SPPNet, params: Params, inputs: str
) -> tuple[str, bool]:
    """The map that the pyramid sees; and whether it is nowhere negative."""
    numbers = (f"conv{number}" for number in range(1, len(params) + 1))
    convs = ((name, params[name]) for name in numbers)
    maps, positive, cuts = _add_table(graph, model.table, inputs, False, convs)
    if len(model.cuts) > 1:
        grids = [
            table_geometry(cut_table(model.backbone.layers, cut)) for cut in model.cuts
        ]
        maps = _add_joined(graph, [cuts[cut][0] for cut in model.cuts], grids)
        positive = all(cuts[cut][1] for cut in model.cuts)
    return maps, positive


def _add_table(
    graph: Graph,
    table: Sequence[Layer],
    maps: str,
    positive: bool,
    convs: Iterator[tuple[str, Mapping[str, Any]]],
) -> tuple[str, bool, dict[str, tuple[str, bool]]]:
    cuts: dict[str, tuple[str, bool]] = {}
    for layer in table:
        if isinstance(layer, Cut):
            cuts[layer.name] = maps, positive
        elif isinstance(layer, LRN):
            maps = _add_norm(graph, layer, maps)
        elif isinstance(layer, MaxPool):
            maps = add_max_pool(graph, layer, maps)
        elif isinstance(layer, Conv):
            maps = _add_conv(graph, layer, maps, *next(convs))
            maps, positive = _add_activation(graph, layer.activation, maps, False)
        else:
            ends = [
                _add_table(graph, own, maps, positive, convs) for own in layer.tables
            ]
            joined, positive = ends[0][0], all(end[1] for end in ends)
            parts = [end[0] for end in ends]
            if layer.join == "concat":
                joined = graph.add("Concat", *parts, axis=1)
            else:
                for part in parts[1:]:
                    joined = graph.add("Add", joined, part)
            maps, positive = _add_activation(graph, layer.activation, joined, positive)
    return maps, positive, cuts


def _add_conv(
    graph: Graph, layer: Conv, maps: str, name: str, own: Mapping[str, Any]
) -> str:
    kernel = np.asarray(own["kernel"], np.float32)
    groups = kernel.shape[-1] if layer.groups == layer.filters > 1 else layer.groups
    before, after = Sliding(layer.kernel, layer.stride, layer.padding).pads
    weights = graph.constant(kernel.transpose(3, 2, 0, 1), f"{name}.weight")
    bias = graph.constant(np.asarray(own["bias"], np.float32), f"{name}.bias")
    return graph.add(
        "Conv",
        *(maps, weights, bias),
        name=name,
        kernel_shape=[layer.kernel] * 2,
        strides=[layer.stride] * 2,
        pads=[before, before, after, after],
        group=groups,
    )


def add_max_pool(graph: Graph, layer: MaxPool, maps: str) -> str:
    """A pooling of a table's row."""
    before, after = Sliding(*layer).pads
    return graph.add(
        "MaxPool",
        maps,
        kernel_shape=[layer.kernel] * 2,
        strides=[layer.stride] * 2,
        pads=[before, before, after, after],
    )


def _add_norm(graph: Graph, layer: LRN, maps: str) -> str:
    if layer.size % 2 == 0:
        raise ValueError(
            f"ONNX normalises over channels on both sides alike: {layer.size} is even"
        )
    # ONNX's α is divided by the number of channels, ours is not.
    return graph.add(
        "LRN",
        maps,
        size=layer.size,
        bias=float(layer.k),
        alpha=layer.alpha * layer.size,
        beta=layer.beta,
    )


def _add_activation(
    graph: Graph, activation: str, maps: str, positive: bool
) -> tuple[str, bool]:
    if activation == "relu":
        return graph.add("Relu", maps), True
    if activation == "relu6":
        zero, six = (graph.constant(np.float32(value)) for value in (0, 6))
        return graph.add("Clip", maps, zero, six), True
    if activation == "silu":
        return graph.add("Mul", maps, graph.add("Sigmoid", maps)), False
    return maps, positive


def _add_joined(graph: Graph, maps: Sequence[str], grids: Sequence[Geometry]) -> str:
    """As `layers.join_maps`: each unit takes those with the closest centres."""
    finest = min(range(len(grids)), key=lambda number: grids[number].stride)
    parts = []
    for found, grid in zip(maps, grids, strict=True):
        for axis in (2, 3):
            count = graph.range(graph.size(maps[finest], axis), np.float64)
            scale, shift = join_indices(grids[finest], grid)
            place = graph.add("Mul", count, graph.constant(np.float64(scale)))
            place = graph.add("Add", place, graph.constant(np.float64(shift)))
            index = graph.cast(graph.add("Floor", place), np.int64)
            one = graph.ints(1)
            last = graph.add("Sub", graph.size(found, axis), one)
            zero = graph.constant(np.int64(0))
            index = graph.add("Min", graph.add("Max", index, zero), last)
            found = graph.add("Gather", found, index, axis=axis)
        parts.append(found)
    return graph.add("Concat", *parts, axis=1)


def add_pyramid(
    graph: Graph, model: SPPNet, maps: str, positive: bool, windows: str = ""
) -> str:
    """The pooled vectors [N, D] of whole maps, or of windows of one map.

    `windows`: int64 [N, 4], half-open (top, left, bottom, right); "" for whole maps.
    `positive`: whether the maps are nowhere negative.
    """
    if model.levels is None:
        assert model.backbone.last_pool is not None
        pooled = add_max_pool(graph, model.backbone.last_pool, maps)
        return _as_vectors(graph, pooled)
    if model.reducer == "mean":
        parts = [_add_means(graph, maps, level, windows) for level in model.levels]
        return graph.add("Concat", *parts, axis=1, name="pyramid")
    least = ""
    if not positive:
        least = graph.add("ReduceMin", maps, keepdims=0)
        maps = graph.add("Sub", maps, least)
    regions = _add_regions(graph, maps, windows)
    parts = []
    for level in model.levels:
        pooled = graph.add("MaxRoiPool", maps, regions, pooled_shape=[level, level])
        parts.append(_as_vectors(graph, pooled))
    vectors = graph.add("Concat", *parts, axis=1, name="pyramid")
    return graph.add("Add", vectors, least) if least else vectors


def _as_vectors(graph: Graph, pooled: str) -> str:
    """[N, C, rows, columns] as vectors, bin after bin."""
    last = graph.add("Transpose", pooled, perm=[0, 2, 3, 1])
    return graph.add("Flatten", last, axis=1)


def _add_regions(graph: Graph, maps: str, windows: str) -> str:
    """What MaxRoiPool takes: (image, left, top, right, bottom), ends included."""
    if windows:
        swapped = graph.take(windows, 1, 0, 3, 2, axis=1)
        ends = graph.constant(np.array([[0, 0, 1, 1]], np.int64))
        inside = graph.add("Sub", swapped, ends)
        first = graph.take(windows, 0, axis=1)
        images = graph.add("Sub", first, first)  # all are of image 0
        return graph.cast(graph.add("Concat", images, inside, axis=1), np.float32)
    one = graph.ints(1)
    count = graph.size(maps, 0)
    zero = graph.ints(0)
    right = graph.add("Sub", graph.size(maps, 3), one)
    bottom = graph.add("Sub", graph.size(maps, 2), one)
    whole = graph.add("Concat", zero, zero, right, bottom, axis=0)
    rows = graph.add("Expand", whole, graph.add("Concat", count, one, axis=0))
    images = graph.add("Unsqueeze", graph.range(count), one)
    return graph.cast(graph.add("Concat", images, rows, axis=1), np.float32)


def _add_means(graph: Graph, maps: str, level: int, windows: str) -> str:
    """Means over bins: products with matrices that hold each bin's shares."""
    shares = []
    for axis in (2, 3):
        size = graph.size(maps, axis)
        if windows:
            ends = [graph.take(windows, n, axis=1) for n in (axis - 2, axis)]
            start, length = ends[0], graph.add("Sub", ends[1], ends[0])  # [N, 1]
        else:
            start, length = graph.constant(np.array([[0]], np.int64)), size
        numbers = np.arange(level, dtype=np.int64)[None]
        first = graph.add(
            "Div",
            graph.add("Mul", graph.constant(numbers), length),
            graph.constant(np.int64(level)),
        )
        # Rounded up, in integers.
        later = graph.add("Mul", graph.constant(numbers + 1), length)
        later = graph.add("Add", later, graph.constant(np.int64(level - 1)))
        last = graph.add("Div", later, graph.constant(np.int64(level)))
        last_axis = graph.ints(2)
        first, last = (
            graph.add("Unsqueeze", graph.add("Add", edge, start), last_axis)
            for edge in (first, last)
        )
        cells = graph.range(size)
        after = graph.add("GreaterOrEqual", cells, first)
        inside = graph.add("And", after, graph.add("Less", cells, last))
        count = graph.cast(graph.add("Sub", last, first), np.float32)
        shares.append(graph.add("Div", graph.cast(inside, np.float32), count))
    rows, columns = shares  # [N or 1, level, height], [N or 1, level, width]
    one = graph.ints(1)
    rows, columns = (graph.add("Unsqueeze", share, one) for share in shares)
    across = graph.add("Transpose", columns, perm=[0, 1, 3, 2])
    pooled = graph.add("MatMul", graph.add("MatMul", rows, maps), across)
    return _as_vectors(graph, pooled)


def add_fc(graph: Graph, params: Params, name: str, vectors: str) -> str:
    """A fully connected layer, whole or of a lower rank."""
    own = {key: np.asarray(value, np.float32) for key, value in params[name].items()}
    bias = graph.constant(own["bias"], f"{name}.bias")
    if "down" in own:
        down = graph.constant(own["down"], f"{name}.down")
        vectors = graph.add("MatMul", vectors, down)
    kernel = own["up"] if "down" in own else own["kernel"]
    weight = graph.constant(kernel, f"{name}.weight")
    return graph.add("Gemm", vectors, weight, bias, name=name)


def add_head(graph: Graph, params: Params, pyramid: str) -> tuple[str, dict[str, str]]:
    """Logits from pooled vectors; and the activations of fc6 and fc7 by name.

    `params`: of fc6, fc7 and fc8, of fc8 alone, or of none.
    """
    if "fc8" not in params:
        return pyramid, {}
    named, seen = {}, pyramid
    for name in ("fc6", "fc7") if "fc6" in params else ():
        seen = named[name] = graph.add("Relu", add_fc(graph, params, name, seen))
    return add_fc(graph, params, "fc8", seen), named
