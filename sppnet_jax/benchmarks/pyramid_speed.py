"""The layer, forward and backward, beside four pools of PyTorch concatenated.

PyTorch has no pyramid: what people write is one `adaptive_max_pool2d` per level. It is
timed in both of its layouts. Backward is the gradient of a weighted sum of the bins, so
forward + backward is a forward pass too.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.benchmarks.peers import as_numpy, find_torch, torch_device
from sppnet_jax.benchmarks.report import Measurements, Report, Timing, draw_bars, kept
from sppnet_jax.benchmarks.timing import milliseconds, time_in_turn, times_as_fast
from sppnet_jax.pyramid.pooling import spatial_pyramid_pool

OURS, FIRST, LAST = "sppnet_jax", "PyTorch, contiguous", "PyTorch, channels_last"
PASSES = ("forward", "forward + backward")
DTYPES = ("float32", "bfloat16")


class _Case(NamedTuple):
    """A batch of maps, and the pyramid."""

    batch: int
    side: int
    channels: int
    levels: tuple[int, ...]


PAPER = (  # training batches: conv5 at 224 and 180 pixels of ZF-5, 224 of Overfeat
    _Case(128, 13, 256, (6, 3, 2, 1)),
    _Case(128, 10, 256, (6, 3, 2, 1)),
    _Case(128, 13, 256, (4, 3, 2, 1)),
    _Case(128, 18, 512, (6, 3, 2, 1)),
)
QUICK = (_Case(2, 13, 8, (6, 3, 2, 1)),)


def run(timing: Timing) -> Report:
    """Times every case in float32 and bfloat16."""
    torch, notes = find_torch()
    rows: list[Measurements] = []
    cases = itertools.product(QUICK if timing.quick else PAPER, DTYPES)
    for case, dtype in kept(cases, rows, "pyramid", timing):
        rows += _rows(case, dtype, torch, timing)
    title = "Spatial pyramid pooling of a batch of maps"
    return Report("pyramid", title, rows, plot, notes)


def _rows(case: _Case, dtype: str, torch: Any, timing: Timing) -> list[Measurements]:
    maps, weights = _inputs(case)
    passes = _ours(maps, weights, case.levels, dtype)
    alternatives = {OURS: passes}
    if torch is not None:
        for name, form in ((FIRST, "contiguous_format"), (LAST, "channels_last")):
            layout = getattr(torch, form)
            alternatives[name] = _torchs(torch, maps, weights, case, dtype, layout)
    differ = {name: _difference(other, passes) for name, other in alternatives.items()}
    rows: list[Measurements] = []
    batch, side, channels, levels = case
    for number, pass_name in enumerate(PASSES):
        seconds = time_in_turn(
            {name: calls[number] for name, calls in alternatives.items()},
            rounds=timing.rounds,
            label=f"{side}×{side}×{channels} {dtype} {pass_name}",
        )
        for name, times in seconds.items():
            ratio = times_as_fast(seconds[OURS], times)
            rows.append(
                {
                    "maps": f"{batch}×{side}×{side}×{channels}",
                    "levels": ",".join(map(str, levels)),
                    "dtype": dtype,
                    "pass": pass_name,
                    "what": name,
                    **milliseconds(times),
                    "ours is × as fast": None if name == OURS else ratio.median,
                    "differs by": differ[name][number],
                }
            )
    return rows


def _inputs(case: _Case) -> tuple[np.ndarray, np.ndarray]:
    """Maps of distinct values in a channel, exact in bfloat16, and weights of bins."""
    random = np.random.default_rng(0)
    shape = (case.batch, case.side, case.side, case.channels)
    # bfloat16 holds 2^16 patterns: distinct ones for every cell of a map.
    cells = case.side * case.side
    values = np.linspace(0x3C00, 0x43FF, cells).astype(np.uint16)
    order = random.permuted(
        np.broadcast_to(values, (case.batch * case.channels, cells)), axis=1
    )
    bits = order.astype(np.uint32) << 16
    maps = bits.view(np.float32).reshape(case.batch, case.channels, cells)
    bins = sum(n * n for n in case.levels)
    weights = random.integers(-8, 8, (case.batch, bins, case.channels))
    return maps.swapaxes(1, 2).reshape(shape), weights.astype(np.float32)


def _ours(
    maps: np.ndarray, weights: np.ndarray, levels: Sequence[int], dtype: str
) -> list[Callable[[], Any]]:
    x, w = jnp.asarray(maps, dtype), jnp.asarray(weights, dtype)
    pool = functools.partial(spatial_pyramid_pool, levels=levels)

    @jax.jit
    def both(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled, back = jax.vjp(pool, x)
        return pooled, back(w)[0]

    forward = jax.jit(pool)
    return [lambda: (forward(x),), lambda: both(x, w)]


def _torchs(
    torch: Any, maps: Any, weights: Any, case: _Case, dtype: str, layout: Any
) -> list[Callable[[], Any]]:
    """The same of PyTorch: results have channels before bins, or before the cells."""
    device, kind = torch_device(), getattr(torch, dtype)
    x = torch.from_numpy(maps).permute(0, 3, 1, 2).to(device, kind)
    x = x.contiguous(memory_format=layout)
    w = torch.from_numpy(weights).permute(0, 2, 1).contiguous().to(device, kind)
    needs = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    def pool(x: Any) -> Any:
        pooled = [torch.nn.functional.adaptive_max_pool2d(x, n) for n in case.levels]
        return torch.cat([level.flatten(2) for level in pooled], dim=2)

    def forward() -> Any:
        with torch.no_grad():
            return (pool(x),)

    def both() -> Any:
        needs.grad = None
        pooled = pool(needs)
        pooled.backward(w)
        return pooled.detach(), needs.grad

    return [forward, both]


def _difference(theirs: Sequence[Callable], ours: Sequence[Callable]) -> list[float]:
    """The largest difference from our result of each pass, relative to the largest."""
    found = []
    for call, own in zip(theirs, ours, strict=True):
        worst = 0.0
        for other, mine in zip(call(), own(), strict=True):
            a, b = as_numpy(other), as_numpy(mine)
            worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
        found.append(worst)
    return found


def plot(rows: Sequence[Measurements]) -> Figure:
    """Milliseconds of each alternative, a panel for each case."""
    cases = list(dict.fromkeys((r["maps"], r["levels"]) for r in rows))
    figure = Figure(figsize=(4.2 * len(cases), 4.6), layout="constrained")
    for axes, case in zip(
        figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True
    ):
        own = [r for r in rows if (r["maps"], r["levels"]) == case]
        bars = [(r["what"], f"{r['dtype']}\n{r['pass']}", r["ms"]) for r in own]
        draw_bars(axes, bars)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("ms")
        axes.set_title(f"{case[0]}, {{{case[1]}}}", fontsize=10)
    labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=3, fontsize=9)
    return figure
