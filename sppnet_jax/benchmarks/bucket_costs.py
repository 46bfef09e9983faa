"""Every bucket's program: what it costs to compile, to start and to run.

The buckets are those that pad photograph-like sizes the least. Times of a call are of
the program alone, its images on the device already. Starts are measured in processes of
their own, since a compiler remembers: with an empty folder for JAX's persistent cache,
again with the folder that this left, and without a cache, compiling when the first
batch comes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.benchmarks.peak import count_flops, measured_bandwidth, measured_peak
from sppnet_jax.benchmarks.report import Measurements, Report, Timing, draw_bars, kept
from sppnet_jax.benchmarks.samples import (
    random_network,
    sample_image,
    sample_sizes,
    scorer,
)
from sppnet_jax.benchmarks.timing import milliseconds, no_persistent_cache, time_in_turn
from sppnet_jax.buckets import BucketTable, choose_buckets, padding_waste
from sppnet_jax.buckets.choice import Bucket

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 900  # seconds for a process that compiles all buckets


class _Case(NamedTuple):
    """ZF-5 of a width, images of a shorter side in batches, so many buckets at most."""

    width: float
    side: int
    images: int
    batch: int
    buckets: int
    dtype: str


CASES = {
    "cpu": [_Case(1.0, 224, 400, 4, 6, "float32")],
    "other": [_Case(1.0, 224, 400, 128, 6, t) for t in ("float32", "bfloat16")],
}
QUICK = [_Case(1 / 16, 64, 40, 2, 2, "float32")]
STARTS = {  # what a process does: its persistent cache, and whether it compiles ahead
    "no cache, on demand": (False, False),
    "empty cache, ahead": (True, True),
    "filled cache, ahead": (True, True),
}


def run(timing: Timing) -> Report:
    """Measures every bucket of the cases for this device."""
    platform = jax.devices()[0].platform
    cases = QUICK if timing.quick else CASES.get(platform, CASES["other"])
    rows: list[Measurements] = []
    notes: list[str] = []
    results: dict[str, Any] = {}
    bandwidth = measured_bandwidth(16 if timing.quick else 512)
    for case in kept(cases, rows, "buckets", timing):
        own, noted, result = _measure(case, bandwidth, timing)
        rows += own
        notes += noted
        results[case.dtype] = result
    return Report("buckets", "Programs of buckets", rows, plot, notes, results)


def _measure(
    case: _Case, bandwidth: float, timing: Timing
) -> tuple[list[Measurements], list[str], dict[str, Any]]:
    sizes = sample_sizes(case.images, case.side)
    buckets = choose_buckets(sizes, case.buckets, multiple=8)
    starts, notes = _starts(case, buckets)
    with no_persistent_cache():
        table = _table(case, buckets)
        table.compile()
    peak = measured_peak(case.dtype)
    seconds = _seconds(table, case, timing)
    # Other work may have slowed one of them.
    peak = max(peak, measured_peak(case.dtype))
    images = (sample_image(*size, n) for n, size in enumerate(sizes))
    for _ in table.map(enumerate(images)):  # the table counts them
        pass
    rows: list[Measurements] = []
    for row in table.rows():
        name = _name(row.bucket)
        took = milliseconds(seconds[name])
        flops = row.flops or _flops(case, row.bucket)
        rows.append(
            {
                "bucket": name,
                "batch": row.batch_size,
                "dtype": case.dtype,
                "images": row.images,
                "padding": row.padded_share,
                "GFLOP": flops / 1e9,
                # A library's convolutions on a GPU are not counted.
                "GB": row.bytes / 1e9 if row.flops and row.bytes else None,
                "compile s": row.compile_seconds,
                **_start_columns(starts, name),
                **took,
                "ms, served": row.seconds_per_call and row.seconds_per_call * 1e3,
                "images/s": row.batch_size / took["ms"] * 1e3,
                "of peak": flops / took["ms"] * 1e3 / peak,
            }
        )
    result: dict[str, Any] = {
        "measured peak, GFLOP/s": peak / 1e9,
        "measured bandwidth, GB/s": bandwidth / 1e9,
        "padded share, full batches": padding_waste(sizes, buckets),
    }
    notes.append(
        f"{case.dtype}: {len(sizes)} images of shorter side {case.side}, "
        f"{result['padded share, full batches']:.1%} of full batches is padding; "
        f"the device's measured peak is {peak / 1e9:,.0f} GFLOP/s, its bandwidth "
        f"{bandwidth / 1e9:.3g} GB/s"
    )
    notes += _on_starts(case, rows, result)
    return rows, notes, result


def _on_starts(
    case: _Case, rows: Sequence[Measurements], result: dict[str, Any]
) -> list[str]:
    """What the starts come to over all buckets, in words; also put into `result`."""

    def total(column: str) -> float | None:
        seconds = [row[column] for row in rows if row.get(column) is not None]
        return sum(seconds) if len(seconds) == len(rows) else None

    notes = []
    empty, filled = total("empty cache s"), total("filled cache s")
    if empty and filled:
        ratio = result["filled cache is × as fast"] = empty / filled
        notes.append(
            f"{case.dtype}: all programs are there after {empty:.3g} s with an empty "
            f"persistent cache and {filled:.3g} s with a filled one, {ratio:.3g} times "
            "as fast"
        )
    ahead, demand = total("ahead s"), total("on demand s")
    if ahead and demand:
        result["first results ahead are × as fast"] = demand / ahead
        notes.append(
            f"{case.dtype}: a bucket's first batch takes {ahead / len(rows):.3g} s "
            f"where its program was compiled ahead, {demand / len(rows):.3g} s where "
            "it was not"
        )
    return notes


def _seconds(table: BucketTable, case: _Case, timing: Timing) -> dict[str, np.ndarray]:
    """Seconds of each call of each bucket's program, the buckets in turn."""

    def call(bucket: Bucket) -> Any:
        program = table.program(bucket)
        images = jnp.asarray(np.stack([sample_image(*bucket)] * table.batch_size))
        sizes = jnp.asarray(np.full((table.batch_size, 2), bucket, np.int32))
        return lambda: program(images, sizes)

    calls = {_name(bucket): call(bucket) for bucket in table.buckets}
    return time_in_turn(calls, rounds=timing.rounds, label=f"calls {case.dtype}")


def _starts(
    case: _Case, buckets: Sequence[Bucket]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What processes of their own measured, by start and bucket; notes on failures."""
    found: dict[str, dict[str, Any]] = {}
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (cached, ahead) in STARTS.items():
            given = {"case": case, "buckets": buckets, "ahead": ahead}
            try:
                found[name] = _in_a_process(given, Path(folder) if cached else None)
            except (subprocess.SubprocessError, OSError, ValueError) as error:
                said = (getattr(error, "stderr", "") or str(error)).strip()
                notes.append(f"the start with {name} failed: {said.splitlines()[-1]}")
    return found, notes


def _in_a_process(given: Mapping[str, Any], cache: Path | None) -> dict[str, Any]:
    code = (
        "import json; from sppnet_jax.benchmarks.bucket_costs import start; "
        "print(json.dumps(start(**json.loads(input()))))"
    )
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process has its share already
        "JAX_ENABLE_COMPILATION_CACHE": "true" if cache else "false",
    }
    if cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(given),
        cwd=REPOSITORY,  # where it finds this package
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    return json.loads(done.stdout.splitlines()[-1])


def start(
    case: Sequence[Any], buckets: Sequence[Sequence[int]], ahead: bool
) -> dict[str, dict[str, float | None]]:
    """Takes the programs of some buckets from nothing to their first results.

    `case`, `buckets`: plain lists, as JSON has them. `ahead`: compile all before the
    first batch.

    Returns: for each bucket, by its name, seconds to "compile" it and to the "first"
    result of a batch that waits for it.
    """
    fields = _Case(*case)
    table = _table(fields, [(int(height), int(width)) for height, width in buckets])
    if ahead:
        table.compile()
    first = {}
    for bucket in table.buckets:
        image = sample_image(*bucket)
        batch = [(n, image) for n in range(table.batch_size)]
        started = time.perf_counter()
        for _ in table.map(batch):
            pass
        first[bucket] = time.perf_counter() - started
    return {
        _name(row.bucket): {"compile": row.compile_seconds, "first": first[row.bucket]}
        for row in table.rows()
    }


def _table(case: _Case, buckets: Sequence[Bucket]) -> BucketTable:
    """A table of programs that are not compiled yet, of one device."""
    model, params = random_network(case.width, case.side, case.dtype)
    one = jax.devices()[:1]
    return BucketTable(scorer(model), params, buckets, case.batch, devices=one)


def _flops(case: _Case, bucket: Bucket) -> float:
    """Of a bucket's program, for a device whose compiler doesn't count them."""
    model, params = random_network(case.width, case.side, case.dtype)
    images = jax.ShapeDtypeStruct((case.batch, *bucket, 3), np.uint8)
    sizes = jax.ShapeDtypeStruct((case.batch, 2), np.int32)
    return count_flops(scorer(model), params, images, sizes)


def _start_columns(
    starts: Mapping[str, Mapping[str, Any]], bucket: str
) -> dict[str, float | None]:
    def of(start: str, what: str) -> float | None:
        return starts[start][bucket][what] if start in starts else None

    demand, empty, filled = STARTS
    return {
        "empty cache s": of(empty, "compile"),
        "filled cache s": of(filled, "compile"),
        "ahead s": of(empty, "first"),
        "on demand s": of(demand, "first"),
    }


def _name(bucket: Bucket) -> str:
    return f"{bucket[0]}×{bucket[1]}"


def plot(rows: Sequence[Measurements]) -> Figure:
    """Seconds to a program and to a first result, and images a second, by bucket."""
    figure = Figure(figsize=(13, 1.6 + 0.45 * len(rows)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    caches = {"compile s": "no persistent cache", "empty cache s": "empty cache"}
    _bars(left, rows, {**caches, "filled cache s": "filled cache"})
    left.set(title="until the program is there", xlabel="seconds")
    _bars(middle, rows, {"on demand s": "on demand", "ahead s": "compiled ahead"})
    middle.set(title="first batch of the bucket", xlabel="seconds")
    _bars(right, rows, {"images/s": "images/s"})
    for place, row in enumerate(rows):
        fastest, slowest = (row["batch"] / row[end] * 1e3 for end in ("low", "high"))
        right.plot([slowest, fastest], [place, place], color="black", linewidth=1.5)
        text = f" {row['of peak']:.0%} of peak"
        right.text(fastest, place, text, va="center", fontsize=8)
    right.set(title="full batches, median and quartiles", xlabel="images/s")
    right.margins(x=0.35)
    right.set_xlim(left=0)
    left.tick_params(axis="y", labelsize=8)
    for axes in (left, middle):
        # Below the axis' label, whatever the height of the figure.
        below: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
        axes.legend(fontsize=8, ncols=3, borderaxespad=5.5, **below)
    return figure


def _bars(axes: Any, rows: Sequence[Measurements], columns: Mapping[str, str]) -> None:
    """Bars of some columns beside each other; what is missing has none."""
    bars = [
        (label, f"{row['bucket']}\n{row['dtype']}", row.get(column))
        for column, label in columns.items()
        for row in rows
    ]
    draw_bars(axes, bars)
    axes.spines[["top", "right"]].set_visible(False)
