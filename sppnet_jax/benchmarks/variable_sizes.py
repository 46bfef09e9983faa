"""500 images of 500 sizes: fitted buckets, one jit per shape, warping, batch of one.

The reference is every image unpadded in a batch of one, by a program of its own.
Buckets give its logits; warping to one size gives those of another image: the table has
how far off they are.

From cold, all counts that there was not before: choosing the buckets, tracing,
compiling, and every image once; JAX's persistent cache is off. One jit per shape is
timed in parts, the others from cold before each part.

What bounds the ratio from cold: with N shapes, c seconds to compile one, b to compile a
bucket's program and r to run an image, it is N (c + r) / (8 b + N r). It is large as
long as r is a few per cent of c, as with the narrow network here; where r is as large
as c, nothing is more than twice as fast. The table has c, b and r.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from sppnet_jax.benchmarks.report import Measurements, Report, Timing
from sppnet_jax.benchmarks.samples import (
    random_network,
    sample_image,
    sample_sizes,
    scorer,
)
from sppnet_jax.benchmarks.timing import no_persistent_cache, spread, time_in_turn
from sppnet_jax.buckets import BucketTable, choose_buckets, padding_waste
from sppnet_jax.network.model import SPPNet

BUCKETS, SHAPES, WARPED = "fitted buckets", "one jit per shape", "warped to one size"
ALONE = "batch of one, compiled before"
MULTIPLE = 8  # of the buckets' sides: found in no time, and padded hardly more


class _Case(NamedTuple):
    """ZF-5 of a width, images of a shorter side, and how they are run.

    `parts`: of one jit per shape; before each, the others start from cold.
    `most_rounds`: of passes over all images with everything compiled.
    """

    width: float
    side: int
    images: int
    batch: int
    buckets: int
    parts: int
    most_rounds: int


CASES = {
    "cpu": _Case(1 / 16, 192, 500, 8, 8, 5, 5),
    "other": _Case(1 / 4, 192, 500, 16, 8, 5, 10),
}
QUICK = _Case(1 / 16, 64, 5, 2, 2, 2, 2)


class Pass(NamedTuple):
    """One pass over all images: their logits [images, classes] and what it took."""

    logits: np.ndarray
    programs: int
    compile_seconds: float
    padded_share: float
    again: Callable[[], np.ndarray]  # the same with everything compiled


def run(timing: Timing) -> Report:
    """Runs all images each way, from cold and again."""
    platform = jax.devices()[0].platform
    case = QUICK if timing.quick else CASES.get(platform, CASES["other"])
    sizes = sample_sizes(case.images, case.side)
    images = [sample_image(*size, n) for n, size in enumerate(sizes)]
    model, params = random_network(case.width, case.side, "float32")
    runs, cold = _from_cold(case, model, params, images)
    warm = time_in_turn(
        {name: found.again for name, found in runs.items()},
        rounds=min(timing.rounds, case.most_rounds),
        label="everything compiled",
    )
    rows = _rows(runs, cold, warm)
    ours = rows[0]
    results = {
        "one jit per shape / fitted buckets, from cold": rows[1]["× as long"],
        "padded share, full batches": padding_waste(sizes, _fitted(case, sizes)),
        "free sizes": _free_sizes(case),
    }
    free = results["free sizes"]
    notes = [
        f"{len(images)} images of shorter side {case.side}, ZF-5 at width "
        f"{case.width:.4g}, batches of {case.batch}; `× as long` is by the time from "
        "cold",
        f"buckets: {ours['programs']} programs, {rows[1]['× as long']:.3g} times less "
        f"time than one jit per shape from cold, {ours['padding']:.1%} padding with "
        "the blank rows of batches that were not full",
        f"images whose shorter side is free too, {free['shorter sides']} pixels, would "
        f"be padded {free['padded share']:.1%} by {case.buckets} buckets: resize to "
        "one shorter side first, as the paper does",
    ]
    title = "Images of distinct sizes"
    return Report("variable_sizes", title, rows, plot, notes, results)


def _from_cold(
    case: _Case, model: SPPNet, params: Any, images: Sequence[np.ndarray]
) -> tuple[dict[str, Pass], dict[str, np.ndarray]]:
    """The last run of each way, and its seconds from cold, one for each time."""
    parts = np.array_split(np.arange(len(images)), case.parts)
    shapes: list[Pass] = []
    latest: dict[str, Pass] = {}
    seconds: dict[str, list[float]] = {BUCKETS: [], SHAPES: [], WARPED: []}
    bar = tqdm(total=len(images), desc=SHAPES, unit="shape", leave=False)
    bar.mininterval = 0.5 if sys.stderr.isatty() else 20
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(3)))  # start the compiler
    with no_persistent_cache(), bar:
        for part in parts:
            for name, way in ((BUCKETS, _in_buckets), (WARPED, _warped)):
                jax.clear_caches()
                started = time.perf_counter()
                latest[name] = way(case, model, params, images)
                seconds[name].append(time.perf_counter() - started)
            jax.clear_caches()
            started = time.perf_counter()
            shapes.append(_one_by_one(model, params, [images[n] for n in part], bar))
            seconds[SHAPES].append(time.perf_counter() - started)
    latest[SHAPES] = Pass(
        np.concatenate([found.logits for found in shapes]),
        sum(found.programs for found in shapes),
        sum(found.compile_seconds for found in shapes),
        0.0,
        lambda: np.concatenate([found.again() for found in shapes]),
    )
    cold = {name: np.array(times) for name, times in seconds.items()}
    return latest, {**cold, SHAPES: cold[SHAPES].sum(keepdims=True)}


def _in_buckets(
    case: _Case, model: SPPNet, params: Any, images: Sequence[np.ndarray]
) -> Pass:
    buckets = _fitted(case, [image.shape[:2] for image in images])
    one = jax.devices()[:1]
    table = BucketTable(scorer(model), params, buckets, case.batch, devices=one)

    def serve() -> np.ndarray:
        found = dict(table.map(enumerate(images)))
        return np.stack([found[n] for n in range(len(images))])

    table.compile()
    logits = serve()
    rows = table.rows()
    computed = sum(r.calls * r.batch_size * r.bucket[0] * r.bucket[1] for r in rows)
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    compiled = sum(row.compile_seconds or 0 for row in rows)
    return Pass(logits, table.programs, compiled, 1 - pixels / computed, serve)


def _fitted(case: _Case, sizes: Any) -> tuple[tuple[int, int], ...]:
    return choose_buckets(sizes, case.buckets, multiple=MULTIPLE)


def _one_by_one(
    model: SPPNet, params: Any, images: Sequence[np.ndarray], bar: tqdm
) -> Pass:
    scores = jax.jit(scorer(model))
    programs: dict[tuple[int, ...], Any] = {}

    def score(image: np.ndarray) -> np.ndarray:
        return np.asarray(programs[image.shape](params, image[None]))[0]

    def serve() -> np.ndarray:
        return np.stack([score(image) for image in images])

    logits, compiled = [], 0.0
    for image in images:
        started = time.perf_counter()
        if image.shape not in programs:
            programs[image.shape] = scores.lower(params, image[None]).compile()
        compiled += time.perf_counter() - started
        logits.append(score(image))
        bar.update()
    return Pass(np.stack(logits), len(programs), compiled, 0.0, serve)


def _warped(
    case: _Case, model: SPPNet, params: Any, images: Sequence[np.ndarray]
) -> Pass:
    from PIL import Image

    size = case.side, case.side
    shape = (case.batch, *size, 3)
    started = time.perf_counter()
    blank = jax.ShapeDtypeStruct(shape, np.uint8)
    program = jax.jit(scorer(model)).lower(params, blank).compile()
    compiled = time.perf_counter() - started

    def serve() -> np.ndarray:
        logits = []
        for first in range(0, len(images), case.batch):
            inputs = np.zeros(shape, np.uint8)
            for row, image in enumerate(images[first : first + case.batch]):
                whole = Image.fromarray(image)
                inputs[row] = np.asarray(whole.resize(size, Image.Resampling.BILINEAR))
            # Not waited for: the next batch is warped while the device works.
            logits.append(program(params, inputs))
        return np.concatenate(jax.device_get(logits))[: len(images)]

    return Pass(serve(), 1, compiled, 0.0, serve)


def _rows(
    runs: dict[str, Pass],
    cold: dict[str, np.ndarray],
    warm: dict[str, np.ndarray],
) -> list[Measurements]:
    reference = runs[SHAPES].again()
    rows: list[Measurements] = []
    for name in (BUCKETS, SHAPES, WARPED, ALONE):
        way = SHAPES if name == ALONE else name
        found, again = runs[way], spread(warm[way])
        logits = reference if name == ALONE else found.logits
        start = spread(cold[name]) if name in cold else None
        equal = logits.argmax(axis=1) == reference.argmax(axis=1)
        worst = np.abs(logits - reference).max() / np.abs(reference).max()
        rows.append(
            {
                "what": name,
                "cold s": start and start.median,
                "cold low": start and start.low,
                "cold high": start and start.high,
                "× as long": start and start.median / spread(cold[BUCKETS]).median,
                "warm s": again.median,
                "warm low": again.low,
                "warm high": again.high,
                "warm ms/image": again.median * 1e3 / len(logits),
                "programs": found.programs,
                "compile s/program": found.compile_seconds / found.programs,
                "padding": found.padded_share,
                "differs by": float(worst),
                "top-1 equal": float(equal.mean()),
            }
        )
    return rows


def _free_sizes(case: _Case) -> dict[str, Any]:
    """The padding of images that were not resized to one shorter side."""
    random = np.random.default_rng(1)
    low, high = round(0.75 * case.side), round(1.25 * case.side)
    scale = random.uniform(low, high, (case.images, 1)) / case.side
    sizes = np.rint(np.array(sample_sizes(case.images, case.side)) * scale).astype(int)
    buckets = choose_buckets(sizes, case.buckets)
    return {
        "shorter sides": f"{low} to {high}",
        "padded share": padding_waste(sizes, buckets),
    }


def plot(rows: Sequence[Measurements]) -> Figure:
    """Seconds from cold and with everything compiled, and how far off logits are."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (column, title) in zip(
        panels, (("cold", "from cold"), ("warm", "everything compiled")), strict=False
    ):
        own = [row for row in rows if row[f"{column} s"] is not None]
        for place, row in enumerate(own):
            value = row[f"{column} s"]
            axes.barh(place, value, 0.7, color=f"C{rows.index(row)}")
            axes.text(value, place, f" {value:.3g} s", va="center", fontsize=9)
        _name(axes, own)
        axes.set(title=f"all images, {title}", xlabel="seconds")
        axes.margins(x=0.2)
    least = 1e-9  # what is equal to the last bit has a place on the axis too
    last = panels[-1]
    for place, row in enumerate(rows):
        difference = row["differs by"]
        last.plot(max(difference, least), place, "o", color=f"C{place}")
        shown = f"{difference:.1g}" if difference else "equal"
        text = f"  {shown}, top-1 equal {row['top-1 equal']:.0%}"
        where, side = max(difference, least), "right" if difference > 1e-4 else "left"
        last.annotate(text, (where, place), va="center", ha=side, fontsize=8)
    _name(last, rows)
    last.set(xscale="log", xlim=(least / 3, 10), title="agreement with a batch of one")
    last.set_xlabel("worst difference of logits, of the largest")
    return figure


def _name(axes: Any, rows: Sequence[Measurements]) -> None:
    axes.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
