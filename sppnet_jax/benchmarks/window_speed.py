"""Thousands of windows of one map, beside masks and the region pools of others.

- masks: a maximum over the whole map for every bin, as one would write it first in JAX;
  bin by bin, which is the fastest form here (under `jax.vmap` over the windows XLA
  holds all masked maps in memory, 255 GB of them for 2,000 windows);
- ONNX Runtime's `MaxRoiPool`, one for each level, on a CPU;
- `torchvision.ops.roi_pool`, one for each level, on a GPU.

All pool the same windows of the same map, and their results are compared. No program
can take less than the time of writing the results and the table once: "bound" is that
time at the measured bandwidth of a large copy. Results go to fresh memory, whose pages
the operating system hands out one by one: "writing alone" is a program that does no
more than fill the results. "its gradient" is the backward pass alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.benchmarks.peak import measured_bandwidth
from sppnet_jax.benchmarks.peers import (
    as_numpy,
    find_peers,
    find_torch,
    torch_device,
)
from sppnet_jax.benchmarks.report import (
    Measurements,
    Report,
    Timing,
    cell,
    draw_bars,
    kept,
)
from sppnet_jax.benchmarks.timing import milliseconds, time_in_turn, times_as_fast
from sppnet_jax.pyramid.pooling import adaptive_span, num_bins
from sppnet_jax.pyramid.windows import block_counts, window_pyramid_pool

OURS, MASKS, WRITING = "sppnet_jax", "masks", "writing alone"
GRADIENT = "its gradient"
MAX_ROI_POOL, ROI_POOL = "ONNX Runtime MaxRoiPool", "torchvision roi_pool"
MASKED_ROUNDS = 3  # they take seconds

Peers = dict[str, Any]  # modules by name


class _Case(NamedTuple):
    """A map (height, width, channels), the number of windows, the pyramid.

    `masked`, `backward`: whether masks are timed too, and the gradient.
    """

    shape: tuple[int, int, int]
    windows: int
    levels: tuple[int, ...]
    dtype: str = "float32"
    masked: bool = False
    backward: bool = False


# The last maps of ZF-5 and Overfeat for a photograph of about 688×920 pixels.
ZF5, OVERFEAT = (43, 58, 256), (56, 75, 512)
PAPER = (6, 3, 2, 1)
FULL = (
    _Case(ZF5, 2_000, PAPER, masked=True, backward=True),
    _Case(ZF5, 2_000, PAPER, "bfloat16"),
    _Case(ZF5, 100, PAPER, masked=True),
    _Case(ZF5, 128, PAPER, backward=True),  # a training step's
    _Case(ZF5, 500, PAPER),
    _Case(ZF5, 10_000, PAPER),
    _Case(ZF5, 2_000, (6, 3, 2)),
    _Case(ZF5, 2_000, (6, 3)),
    _Case(ZF5, 2_000, (6,)),
    _Case(ZF5, 2_000, (4, 3, 2, 1)),
    _Case(OVERFEAT, 2_000, PAPER),
)
QUICK = (
    _Case((9, 13, 16), 20, PAPER, masked=True, backward=True),
    _Case((9, 13, 16), 20, (3,), "bfloat16", masked=True),
)


def run(timing: Timing) -> Report:
    """Times every case."""
    on_gpu = jax.devices()[0].platform == "gpu"
    if on_gpu:  # ONNX Runtime's operator would run on the processor
        torch, notes = find_torch()
        peers, said = find_peers("torchvision") if torch is not None else ({}, [])
        peers, notes = {**peers, "torch": torch}, notes + said
    else:
        peers, notes = find_peers("onnx", "onnxruntime")
    bandwidth = measured_bandwidth()
    rows: list[Measurements] = []
    for case in kept(QUICK if timing.quick else FULL, rows, "windows", timing):
        rows += _rows(case, peers, bandwidth, on_gpu, timing)
    notes.append(f"measured bandwidth of a large copy: {bandwidth / 1e9:.1f} GB/s")
    title = "Windows of one map, pooled into a pyramid"
    return Report("windows", title, rows, plot, notes)


def _rows(
    case: _Case, peers: Peers, bandwidth: float, on_gpu: bool, timing: Timing
) -> list[Measurements]:
    features, windows = inputs(case)
    x, w = jnp.asarray(features, case.dtype), jnp.asarray(windows)
    ours = jax.jit(lambda x, w: window_pyramid_pool(x, w, case.levels))
    masks = jax.jit(lambda x, w: masked_pool(x, w, case.levels))
    shape = case.windows, num_bins(case.levels), case.shape[2]
    fill = jax.jit(lambda x: jnp.broadcast_to(x[0, 0, 0], shape))
    fast: dict[str, Callable[[], Any]] = {OURS: lambda: ours(x, w)}
    if case.dtype == "float32" and "onnx" in peers and "onnxruntime" in peers:
        fast[MAX_ROI_POOL] = max_roi_pool(peers, features, windows, case.levels)
    if on_gpu and "torchvision" in peers:
        name = ROI_POOL if case.dtype == "float32" else f"{ROI_POOL}, float32"
        fast[name] = _roi_pool(peers, features, windows, case.levels)
    alternatives = dict(fast)
    if case.masked:
        alternatives[MASKS] = lambda: masks(x, w)
    expected = as_numpy(ours(x, w))
    differ = {
        name: float(np.abs(as_numpy(call()) - expected).max())
        for name, call in alternatives.items()
    }
    label = f"{case.windows} windows of {case.shape}"
    fast[WRITING] = lambda: fill(x)
    if case.backward:
        back = jax.jit(lambda x, w, own: jax.vjp(ours, x, w)[1](own)[0])
        pooled = ours(x, w)
        fast[GRADIENT] = lambda: back(x, w, pooled)
    seconds = time_in_turn(fast, rounds=timing.rounds, label=label)
    ratio = {name: times_as_fast(seconds[OURS], s) for name, s in seconds.items()}
    if MASKS in alternatives:
        rounds = min(MASKED_ROUNDS, timing.rounds)
        pair = {OURS: fast[OURS], MASKS: alternatives[MASKS]}
        slow = time_in_turn(pair, rounds=rounds, warmup=0, label=label)
        seconds[MASKS] = slow[MASKS]
        ratio[MASKS] = times_as_fast(slow[OURS], slow[MASKS])
    bound = least_bytes(case) / bandwidth
    return [
        {
            "map": "×".join(map(str, case.shape)),
            "windows": case.windows,
            "levels": ",".join(map(str, case.levels)),
            "dtype": case.dtype,
            "what": name,
            **milliseconds(times),
            "bound, ms": bound * 1e3 if name == OURS else None,
            "ours is × as fast": None if name == OURS else ratio[name].median,
            "differs by": differ.get(name),
        }
        for name, times in seconds.items()
    ]


def inputs(case: _Case) -> tuple[np.ndarray, np.ndarray]:
    """A map whose values bfloat16 holds, and windows of all sizes."""
    random = np.random.default_rng(0)
    features = random.normal(size=case.shape).astype(np.float32)
    features = (features.view(np.uint32) & 0xFFFF0000).view(np.float32)
    ends = random.integers(0, case.shape[:2], (2, case.windows, 2))
    windows = np.concatenate([ends.min(axis=0), ends.max(axis=0) + 1], axis=1)
    return features, windows.astype(np.int32)


def least_bytes(case: _Case) -> int:
    """Bytes of the results and of the table, each once, in the dtype of the map."""
    height, width, channels = case.shape
    rows, columns = block_counts(case.shape, case.levels)
    table = rows * columns * height * width * channels
    results = case.windows * num_bins(case.levels) * channels
    return (table + results) * jnp.dtype(case.dtype).itemsize


def masked_pool(
    features: jax.Array, windows: jax.Array, levels: Sequence[int]
) -> jax.Array:
    """Every bin as a masked maximum over the whole map."""
    height, width, _ = features.shape

    def pool(window: jax.Array) -> jax.Array:
        top, left, bottom, right = window
        parts = []
        for level in levels:
            index = jnp.arange(level)
            first, last = adaptive_span(index, bottom - top, level)
            rows = _inside(top + first, top + last, height)
            first, last = adaptive_span(index, right - left, level)
            columns = _inside(left + first, left + last, width)
            masks = rows[:, None, :, None] & columns[None, :, None, :]
            parts.append(masks.reshape(level * level, height, width))
        return jax.lax.map(pool_bin, jnp.concatenate(parts))

    def pool_bin(mask: jax.Array) -> jax.Array:
        return jnp.where(mask[:, :, None], features, -jnp.inf).max(axis=(0, 1))

    return jax.lax.map(pool, windows)


def _inside(start: jax.Array, stop: jax.Array, size: int) -> jax.Array:
    position = jnp.arange(size)
    return (start[:, None] <= position) & (position < stop[:, None])


def max_roi_pool(
    peers: Peers, features: np.ndarray, windows: np.ndarray, levels: Sequence[int]
) -> Callable[[], np.ndarray]:
    """One `MaxRoiPool` for each level; its results are [windows, channels, bins]."""
    onnx, runtime = peers["onnx"], peers["onnxruntime"]
    make, kinds = onnx.helper, onnx.TensorProto
    channels = features.shape[2]
    both, nodes, shapes = ["maps", "rois"], [], []
    for n in levels:
        pooled, shape, flat = f"p{n}", f"shape{n}", f"flat{n}"
        nodes.append(make.make_node("MaxRoiPool", both, [pooled], pooled_shape=[n, n]))
        nodes.append(make.make_node("Reshape", [pooled, shape], [flat]))
        sides = [0, channels, n * n]
        shapes.append(make.make_tensor(shape, kinds.INT64, [3], sides))
    flats = [f"flat{n}" for n in levels]
    nodes.append(make.make_node("Concat", flats, ["bins"], axis=2))
    maps, rois, bins = (
        make.make_tensor_value_info(name, kinds.FLOAT, shape)
        for name, shape in (
            ("maps", [1, channels, None, None]),
            ("rois", [None, 5]),
            ("bins", None),
        )
    )
    graph = make.make_graph(nodes, "pyramid", [maps, rois], [bins], shapes)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)])
    model.ir_version = 10
    options = runtime.SessionOptions()
    # Its idle threads would spin, and take the cores of whoever comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {
        "maps": np.ascontiguousarray(features.transpose(2, 0, 1)[None]),
        "rois": _rois(windows),
    }
    return lambda: session.run(None, given)[0]


def _roi_pool(
    peers: Peers, features: np.ndarray, windows: np.ndarray, levels: Sequence[int]
) -> Callable[[], Any]:
    """One `roi_pool` for each level, in float32: it has no bfloat16."""
    torch, roi_pool = peers["torch"], peers["torchvision"].ops.roi_pool
    device = torch_device()
    maps = torch.from_numpy(features.transpose(2, 0, 1)[None].copy()).to(device)
    rois = torch.from_numpy(_rois(windows)).to(device)

    def pool() -> Any:
        bins = [roi_pool(maps, rois, n).flatten(2) for n in levels]
        return torch.cat(bins, dim=2)

    return pool


def _rois(windows: np.ndarray) -> np.ndarray:
    """(image, left, top, right, bottom), the last cells included."""
    top, left, bottom, right = windows.T
    image = np.zeros(len(windows))
    return np.stack([image, left, top, right - 1, bottom - 1], 1).astype(np.float32)


def plot(rows: Sequence[Measurements]) -> Figure:
    """Milliseconds by case on a logarithmic axis, one bar for each alternative."""
    cases = sum(row["what"] == OURS for row in rows)
    figure = Figure(figsize=(9, 0.7 * cases + 1.5), layout="constrained")
    axes = figure.subplots()
    for bars in draw_bars(axes, [(r["what"], _name(r), r["ms"]) for r in rows]):
        labels = [cell(ms) if ms else "" for ms in bars.datavalues]
        axes.bar_label(bars, labels, padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.margins(x=0.1)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _name(row: Measurements) -> str:
    kind = "" if row["dtype"] == "float32" else f" {row['dtype']}"
    return f"{row['windows']:,} windows, {row['map']}\n{{{row['levels']}}}{kind}"
