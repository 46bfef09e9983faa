"""A network in ONNX Runtime and as exported StableHLO, beside itself in JAX.

Each takes the same uint8 images, preprocessing inside, and gives softmax scores. ONNX
Runtime has its own threads, as many as cores.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.benchmarks.peers import find_peers
from sppnet_jax.benchmarks.report import Measurements, Report, Timing, draw_bars, kept
from sppnet_jax.benchmarks.timing import milliseconds, time_in_turn, times_as_fast
from sppnet_jax.network.model import create_model, init_params
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.network.trained import Network, as_network

OURS, RUNTIME = "sppnet_jax", "ONNX Runtime"
PROVIDER = "CPUExecutionProvider"


class _Case(NamedTuple):
    """A network, and the images that it is given."""

    trunk: str
    levels: tuple[int, ...]
    head: str
    images: tuple[int, int, int]  # batch, height, width


CASES = (
    _Case("zf5", (6, 3, 2, 1), "fc", (1, 224, 224)),
    _Case("zf5", (6, 3, 2, 1), "fc", (16, 224, 224)),
    _Case("efficientnet_lite0", (3, 2, 1), "linear", (1, 256, 345)),
    _Case("efficientnet_lite0", (3, 2, 1), "linear", (16, 256, 345)),
    _Case("resnet18", (3, 2, 1), "linear", (1, 256, 345)),
)
QUICK = (_Case("zf5", (2, 1), "fc", (1, 64, 71)),)


def run(timing: Timing) -> Report:
    """Times every case."""
    peers, notes = find_peers("onnxruntime")
    rows: list[Measurements] = []
    for case in kept(QUICK if timing.quick else CASES, rows, "exported", timing):
        rows += _rows(case, peers.get("onnxruntime"), timing)
    title = "A network here, and as the ONNX file that was exported of it"
    return Report("exported", title, rows, plot, notes)


def _rows(case: _Case, runtime: Any, timing: Timing) -> list[Measurements]:
    width = 0.1 if timing.quick else 1.0
    model = create_model(
        case.trunk, case.levels, head=case.head, width=width, weight_init="he"
    )
    params = init_params(model, jax.random.key(0))
    mean = np.array(128, np.float32)
    network = as_network(model, params, Preprocessing(mean, 64.0, np.zeros((3, 3))))
    shape = (*case.images, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    calls = {OURS: _ours(network, images)}
    if runtime is not None:
        calls[RUNTIME] = _onnx(runtime, network, images)
    found = {name: np.asarray(call()) for name, call in calls.items()}
    seconds = time_in_turn(
        calls, rounds=timing.rounds, label=f"{case.trunk} {case.images}"
    )
    return [
        {
            "network": f"{case.trunk}, {{{','.join(map(str, case.levels))}}}",
            "images": "×".join(map(str, case.images)),
            "what": name,
            **milliseconds(times),
            "images/s": case.images[0] / float(np.median(times)),
            "ours is × as fast": None
            if name == OURS
            else times_as_fast(seconds[OURS], times).median,
            "differs by": float(np.abs(found[name] - found[OURS]).max()),
        }
        for name, times in seconds.items()
    ]


def _ours(network: Network, images: np.ndarray) -> Callable[[], Any]:
    def score(params: Any, images: jax.Array) -> jax.Array:
        inputs = normalize(images, network.preprocessing)
        return jax.nn.softmax(network.model.apply({"params": params}, inputs)[0])

    program = jax.jit(score)
    params = jax.device_put(network.params)
    return lambda: np.asarray(program(params, jnp.asarray(images)))


def _onnx(runtime: Any, network: Network, images: np.ndarray) -> Callable[[], Any]:
    # Here, not above: a bare machine with an accelerator may lack what it needs.
    from sppnet_jax.exports.onnx_files import network_to_onnx, save_onnx

    with tempfile.TemporaryDirectory() as folder:
        path = save_onnx(network_to_onnx(network), Path(folder) / "network.onnx")
        session = runtime.InferenceSession(str(path), providers=[PROVIDER])
    run = functools.partial(session.run, ["probabilities"], {"images": images})
    return lambda: run()[0]


def plot(rows: Sequence[Measurements]) -> Figure:
    """Milliseconds of each case here and there."""
    figure = Figure(figsize=(8, 0.9 + 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots()
    draw_bars(
        axes, [(r["what"], f"{r['network']}\n{r['images']}", r["ms"]) for r in rows]
    )
    axes.set_xlabel("ms")
    axes.legend(loc="lower right", fontsize=9)
    return figure
