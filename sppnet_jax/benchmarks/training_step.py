"""A training step of every backbone, beside the same network in PyTorch.

Same parameters, same batch, same work: mean subtraction from uint8 images that are on
the device already, dropout of 0.5, loss, gradients, SGD with momentum and weight decay.
Colours are not altered. Compilation happens before the clock starts.
"""

import contextlib
import ctypes
import importlib
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.benchmarks.peak import count_flops, measured_peak
from sppnet_jax.benchmarks.peers import find_peers, find_torch, torch_device
from sppnet_jax.benchmarks.report import Measurements, Report, Timing, draw_bars, kept
from sppnet_jax.benchmarks.timing import milliseconds, time_in_turn, times_as_fast
from sppnet_jax.network.model import SPPNet, create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trunks import PAPER
from sppnet_jax.run import caches
from sppnet_jax.run.memory import give_back
from sppnet_jax.run.parallel import AXIS
from sppnet_jax.training.steps import (
    Optimizer,
    TrainState,
    init_params,
    make_train_step,
)

OURS = "sppnet_jax"
LEVELS = (6, 3, 2, 1)
MEAN = 128.0
LEARNING_RATE = 1e-9  # parameters stay finite, whatever random images do


class Size(NamedTuple):
    """How large a suite is: batch, rounds at most, dtypes, and the networks' sizes."""

    batch: int
    rounds: int
    dtypes: tuple[str, ...]
    width: float = 1.0
    image_size: int = 224
    num_classes: int = 1000
    networks: tuple[str, ...] = PAPER


SIZES = {  # by platform
    "cpu": Size(16, 4, ("float32",)),
    "gpu": Size(128, 20, ("float32", "bfloat16")),
    "tpu": Size(128, 20, ("float32", "bfloat16")),
}
QUICK = Size(2, 2, ("float32",), 1 / 32, 64, 5, networks=("zf5",))


class Peer(NamedTuple):
    """One way to run PyTorch's step; the fields are those of `make_twin_step`."""

    layout: str
    bfloat16: bool
    compiled: bool

    def name(self) -> str:
        layout = self.layout.removesuffix("_format")
        return f"PyTorch, {layout}" + (", compiled" if self.compiled else "")


class Step(NamedTuple):
    """A step that changes its own state, and its peak memory where that is known."""

    step: Callable[[], Any]
    peak_bytes: int | None


def run(timing: Timing) -> Report:
    """Times every backbone, and measures the memory of each alternative."""
    platform = jax.devices()[0].platform
    size = QUICK if timing.quick else SIZES.get(platform, SIZES["cpu"])
    torch, notes = find_torch()
    rounds = min(timing.rounds, size.rounds)
    if rounds < timing.rounds:
        notes.append(f"{rounds} rounds, not {timing.rounds}: a step takes seconds")
    if "bfloat16" not in size.dtypes:
        notes.append("bfloat16 is left out: processors are slower in it")
    rows: list[Measurements] = []
    peaks = {dtype: measured_peak(dtype) for dtype in size.dtypes}
    cases = itertools.product(size.dtypes, size.networks)
    for dtype, name in kept(cases, rows, "training_step", timing):
        found, said = _rows(name, dtype, size, torch, rounds, peaks[dtype])
        rows += found
        notes += said
    notes += _explanations(platform, torch)
    title = f"A training step, batch {size.batch}, {size.image_size} pixels"
    return Report("training_step", title, rows, plot, notes)


def _explanations(platform: str, torch: Any) -> list[str]:
    """What the columns mean."""
    notes = [
        "GFLOP: of forward and backward, as XLA counts them; share of peak: of the "
        "fastest matrix product"
    ]
    if platform == "cpu":
        notes += [
            "peak MB: of resident memory in a second step, above that of a process "
            "with the packages loaded; each alternative in a process of its own",
            "times: in one process that keeps the memory it frees, PyTorch's steps too",
        ]
    else:
        notes.append(
            "peak MB: ours as XLA plans it (arguments, temporary buffers), PyTorch's "
            "as its allocator counts it in a second step"
        )
    if torch is not None:
        notes.append(
            "differs by: the logits from ours for the same parameters and images, "
            "without dropout, relative to the largest; what torch.compile makes of a "
            "network is timed only"
        )
    return notes


def _rows(
    name: str, dtype: str, size: Size, torch: Any, rounds: int, peak: float
) -> tuple[list[Measurements], list[str]]:
    """The rows of one backbone in one dtype, and notes on what did not work."""
    peers = {peer.name(): peer for peer in _peers(dtype)} if torch is not None else {}
    params = _random_params(name, dtype, size)
    flops = _flops(name, dtype, size, params)
    running, differ, notes = {OURS: _our_step(name, dtype, size, params)}, {}, []
    logits = _our_logits(name, dtype, size, params)
    for what, peer in list(peers.items()):
        try:
            running[what], theirs = _torch_step(name, size, peer, params)
        except Exception as error:  # whatever another package raises, ours is timed
            del peers[what]
            notes.append(f"{what}, {name}, {dtype}: {type(error).__name__}: {error}")
            continue
        if not peer.compiled:
            worst = np.abs(theirs - logits).max()
            differ[what] = float(worst / np.abs(logits).max())
    seconds = time_in_turn(
        {what: own.step for what, own in running.items()},
        rounds=rounds,
        label=f"{name} {dtype}",
    )
    peaks = {what: own.peak_bytes for what, own in running.items()}
    running.clear()  # frees their states
    give_back()
    if jax.devices()[0].platform == "cpu":
        peaks = _resident_peaks(name, dtype, size, [None, *peers.values()])
    rows: list[Measurements] = []
    for what, times in seconds.items():
        took, peak_bytes = milliseconds(times), peaks.get(what)
        ratio = times_as_fast(seconds[OURS], times)
        rows.append(
            {
                "network": name,
                "dtype": dtype,
                "what": what,
                "images/s": size.batch / took["ms"] * 1e3,
                **took,
                "ours is × as fast": None if what == OURS else ratio.median,
                "peak MB": None if peak_bytes is None else peak_bytes / 2**20,
                "GFLOP": flops / 1e9,
                "share of peak": flops / (took["ms"] / 1e3) / peak,
                "differs by": differ.get(what),
            }
        )
    return rows, notes


def _peers(dtype: str) -> list[Peer]:
    """PyTorch's layouts; on a GPU also what `torch.compile` makes of the faster."""
    ways = [("contiguous_format", False), ("channels_last", False)]
    if jax.devices()[0].platform == "gpu":
        ways.append(("channels_last", True))
    return [Peer(layout, dtype == "bfloat16", compiled) for layout, compiled in ways]


def _model(name: str, dtype: str, size: Size) -> SPPNet:
    return create_model(
        name,
        LEVELS,
        size.num_classes,
        width=size.width,
        image_size=size.image_size,
        weight_init="he",  # so that logits go by all layers, and differences show
        dtype=jnp.dtype(dtype),
    )


def _random_params(name: str, dtype: str, size: Size) -> Any:
    """The parameters that all alternatives start from, on the host."""
    model = _model(name, dtype, size)
    init = jax.jit(lambda rng: init_params(model, rng))
    return jax.tree.map(np.asarray, init(jax.random.PRNGKey(0)))


def _batch(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [batch, side, side, 3], and labels, int32 [batch]."""
    random = np.random.default_rng(0)
    shape = (size.batch, size.image_size, size.image_size, 3)
    images = random.integers(0, 256, shape, np.uint8)
    return images, random.integers(0, size.num_classes, size.batch, np.int32)


def _flops(name: str, dtype: str, size: Size, params: Any) -> float:
    """Of the forward and the backward pass of a batch."""
    model = _model(name, dtype, size)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, images)[0].sum()

    shape = (size.batch, size.image_size, size.image_size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return count_flops(jax.grad(loss), params, images)


def _our_step(name: str, dtype: str, size: Size, params: Any) -> Step:
    """Our step on the first device."""
    preprocessing = Preprocessing(np.array(MEAN), 1.0, np.zeros((3, 3), np.float32))
    optimizer, rate = Optimizer(), np.float32(LEARNING_RATE)
    train_step = make_train_step(_model(name, dtype, size), optimizer, preprocessing)
    images, labels = _batch(size)
    mask = np.ones(size.batch, bool)
    momentum = optimizer.transform().init(params)
    zero, rng = jnp.zeros((), jnp.int32), jax.random.PRNGKey(1)
    fresh = TrainState(zero, params, momentum, rng)
    # A leading axis of one takes the first device, however many there are.
    copy = jax.pmap(lambda _, tree: tree, in_axes=(0, None), axis_name=AXIS)
    held = [copy(np.arange(1), fresh)]
    batch = copy(np.arange(1), {"image": images, "label": labels, "mask": mask})
    peak_bytes = None
    if jax.devices()[0].platform != "cpu":
        plan = train_step.lower(held[0], batch, rate).compile().memory_analysis()
        peak_bytes = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        peak_bytes += plan.output_size_in_bytes - plan.alias_size_in_bytes

    def step() -> Any:
        held[0], metrics = train_step(held[0], batch, rate)
        return held[0], metrics

    return Step(step, peak_bytes)


def _our_logits(name: str, dtype: str, size: Size, params: Any) -> np.ndarray:
    """Of the batch's first two images."""
    model = _model(name, dtype, size)
    images = _batch(size)[0][:2].astype(np.float32) - MEAN
    logits = jax.jit(lambda params, x: model.apply({"params": params}, x)[0])
    return np.asarray(logits(params, images))


def _torch_step(
    name: str, size: Size, peer: Peer, params: Any
) -> tuple[Step, np.ndarray]:
    """PyTorch's step, after its first two calls, and its logits before them."""
    torch = importlib.import_module("torch")
    twins = importlib.import_module("sppnet_jax.benchmarks.torch_twin")
    device = torch_device()
    on_gpu = device == "cuda"
    if on_gpu:  # as JAX does by default: TF32, and the fastest algorithm of several
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        before = torch.cuda.memory_allocated()
    if peer.compiled:
        torch.compiler.reset()  # it gives up on a function after eight networks
    sizes = {"width": size.width, "image_size": size.image_size}
    twin = twins.Twin(name, LEVELS, size.num_classes, **sizes)
    twins.load_params(twin, params)
    twin.to(device)
    train_step = twins.make_twin_step(twin, Optimizer(), MEAN, **peer._asdict())
    form = getattr(torch, peer.layout)
    images, labels = _batch(size)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=form)
    pixels, targets = pixels.to(device), torch.from_numpy(labels).long().to(device)
    logits = twins.twin_logits(twin, pixels[:2], MEAN, bfloat16=peer.bfloat16)

    def step() -> Any:
        return train_step(pixels, targets, LEARNING_RATE)

    step()
    peak_bytes = None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak_bytes = torch.cuda.max_memory_allocated() - before
    return Step(step, peak_bytes), logits


def _resident_peaks(
    name: str, dtype: str, size: Size, peers: Sequence[Peer | None]
) -> dict[str, int | None]:
    """Peak bytes of ours (None) and of PyTorch's steps, each in a process of its own.

    None where a process did not live to tell, or the system does not count.
    """
    peaks: dict[str, int | None] = {}
    spawn = multiprocessing.get_context("spawn")
    for peer in peers:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            result = pool.submit(_resident_peak, name, dtype, size, peer)
            with contextlib.suppress(BrokenExecutor, OSError):
                peaks[peer.name() if peer else OURS] = result.result()
    return peaks


def _resident_peak(name: str, dtype: str, size: Size, peer: Peer | None) -> int:
    """How much resident memory the second step needs at most, beyond the packages."""
    caches.use_compilation_cache()
    jax.block_until_ready(jnp.zeros(1))
    if peer is not None:
        find_peers("torch")
        importlib.import_module("sppnet_jax.benchmarks.torch_twin")
    before = _memory_status("VmRSS")
    params = _random_params(name, dtype, size)
    if peer is None:
        step = _our_step(name, dtype, size, params).step
    else:
        step = _torch_step(name, size, peer, params)[0].step
    del params
    jax.block_until_ready(step())
    ctypes.CDLL(None).malloc_trim(0)  # what compiling freed is not the step's
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    jax.block_until_ready(step())
    return _memory_status("VmHWM") - before


def _memory_status(field: str) -> int:
    """Bytes of a field of Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def plot(rows: Sequence[Measurements]) -> Figure:
    """Images/s and peak memory of each alternative, by network."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, column in ((left, "images/s"), (right, "peak MB")):
        bars = [(f"{r['what']}, {r['dtype']}", r["network"], r[column]) for r in rows]
        draw_bars(axes, bars, upright=True)
        axes.grid(axis="y", alpha=0.3)
    left.set_ylabel("images/s")
    right.set_ylabel("peak memory, MB")
    labels = left.get_legend_handles_labels()
    figure.legend(*labels, loc="outside lower center", ncols=3)
    return figure
