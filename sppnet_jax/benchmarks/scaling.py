"""A data-parallel training step over 1, 2, 4 devices in 1 and 2 processes.

Each layout runs in worker processes of its own, which stay up and take turns: a process
can't change how many devices it has. Without a GPU the devices are threads of the host
(`--xla_force_host_platform_device_count`), which share its cores.

Strong scaling divides one batch over the devices; weak scaling gives each device the
same number of images. All layouts start from the same parameters and have no dropout,
so layouts with the same global batch must give the same losses.
"""

import contextlib
import functools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from sppnet_jax.benchmarks.report import Measurements, Report, Timing, draw_bars
from sppnet_jax.benchmarks.timing import milliseconds, spread, time_in_turn
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.run import caches, parallel
from sppnet_jax.training.steps import (
    Optimizer,
    create_state,
    make_train_step,
    shard_batch,
)

STEPS = 5  # a measurement times so many steps: the pipe to the workers costs nothing
TIMEOUT = 300.0  # seconds without an answer: a worker hangs
REPOSITORY = Path(__file__).resolve().parents[2]
LEVELS = (3, 2, 1)


class Layout(NamedTuple):
    """How many processes train together, and how many devices each has."""

    processes: int
    devices: int  # in all processes together


class _Case(NamedTuple):
    """What is trained: ZF-5 of some width, and the batches.

    `batch`: images of all devices together in strong scaling; `per_device`: images of
    each device in weak scaling.
    """

    width: float
    image_size: int
    batch: int
    per_device: int


SMALL = _Case(1 / 6, 64, 64, 16)
QUICK = _Case(1 / 48, 40, 4, 2)
LARGE = _Case(1.0, 224, 512, 128)  # on accelerators


def run(timing: Timing) -> Report:
    """Times every layout that this machine can have."""
    on_gpu = jax.devices()[0].platform == "gpu"
    most = jax.local_device_count() if on_gpu else 2 if timing.quick else 4
    layouts = _layouts(most)
    case = QUICK if timing.quick else LARGE if on_gpu else SMALL
    with contextlib.ExitStack() as stack:
        groups = {
            layout: stack.enter_context(workers(layout, case, on_gpu=on_gpu))
            for layout in layouts
        }
        rows = _rows("strong", groups, case, timing)
        rows += _rows("weak", groups, case, timing)
    notes = [
        f"rate: images/s beside those of one device. {_perfect(on_gpu)}",
        "differs by: the loss of the first steps from that of the first layout with "
        "the same global batch, relative",
    ]
    if on_gpu and len(layouts) == 1:
        notes.append("there is one GPU: nothing to scale over")
    title = f"A training step of ZF-5, width {case.width:.3g}, over devices"
    return Report("scaling", title, _compared(rows), plot, notes)


def _perfect(on_gpu: bool) -> str:
    """What the rate would be at best."""
    if on_gpu:
        return "Perfect scaling is the number of devices"
    return (
        f"The devices share {len(os.sched_getaffinity(0))} cores, and one device uses "
        "them all: 1 is perfect, and what is missing to 1 is the cost of splitting the "
        "work and of summing the gradients"
    )


def _layouts(devices: int) -> list[Layout]:
    """One process with 1, 2, 4, … devices, and two with 2, 4, … together."""
    counts = [2**k for k in range(devices.bit_length()) if 2**k <= devices]
    return [Layout(1, n) for n in counts] + [Layout(2, n) for n in counts if n > 1]


def _rows(
    kind: str, groups: dict[Layout, "Workers"], case: _Case, timing: Timing
) -> list[Measurements]:
    """Times of all layouts in turn, in one kind of scaling."""
    losses = {layout: group.ask(f"loss {kind}")[0] for layout, group in groups.items()}
    names = {f"{p} × {d // p}": Layout(p, d) for p, d in groups}
    seconds = time_in_turn(
        {
            name: functools.partial(groups[layout].ask, f"time {kind}")
            for name, layout in names.items()
        },
        rounds=timing.rounds,
        label=f"{kind} scaling",
    )
    rows: list[Measurements] = []
    one = seconds["1 × 1"] / _global_batch(kind, case, 1)
    for name, layout in names.items():
        batch = _global_batch(kind, case, layout.devices)
        took = milliseconds(seconds[name] / STEPS)
        rows.append(
            {
                "processes × devices": name,
                "scaling": kind,
                "devices": layout.devices,
                "processes": layout.processes,
                "batch": batch,
                **took,
                "images/s": batch / took["ms"] * 1e3,
                "rate": spread(one / (seconds[name] / batch)).median,
                "loss": losses[layout],
            }
        )
    return rows


def _compared(rows: Sequence[Measurements]) -> list[Measurements]:
    """The rows with the difference of each loss from the first of its batch."""
    first: dict[int, float] = {}
    for row in rows:
        first.setdefault(row["batch"], row["loss"])
    return [
        {**row, "differs by": abs(row["loss"] / first[row["batch"]] - 1)}
        for row in rows
    ]


def _global_batch(kind: str, case: _Case, devices: int) -> int:
    return case.batch if kind == "strong" else case.per_device * devices


class Workers(NamedTuple):
    """The processes of a layout, which do what they are asked together."""

    layout: Layout
    processes: Sequence[subprocess.Popen]
    logs: Sequence[IO[bytes]]
    timeout: float

    def ask(self, question: str) -> list[float]:
        """Sends a line to every worker and waits for the number that each answers.

        Raises: RuntimeError with what a worker wrote to stderr, if one ended or none
        answered in time.
        """
        with contextlib.suppress(BrokenPipeError):  # seen as an end below
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(question.encode() + b"\n")
                process.stdin.flush()
        deadline = time.monotonic() + self.timeout
        answers: dict[int, float] = {}
        waiting: dict[Any, int] = {p.stdout: n for n, p in enumerate(self.processes)}
        while waiting:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select(list(waiting), [], [], left)[0]
            if not ready:
                silent = min(waiting.values())
                self._fail(silent, f"has not answered for {self.timeout:.0f} s")
            for pipe in ready:
                number, line = waiting.pop(pipe), pipe.readline()
                if not line:
                    ended = self.processes[number].wait(self.timeout)
                    self._fail(number, f"ended with {ended}")
                answers[number] = float(line)
        return [answers[number] for number in sorted(answers)]

    def _fail(self, number: int, what: str) -> None:
        log = self.logs[number]
        log.seek(0)
        said = log.read().decode(errors="replace").strip()[-3000:]
        raise RuntimeError(
            f"worker {number} of {self.layout.processes} with {self.layout.devices} "
            f"devices {what} at the question; its stderr:\n{said or '(empty)'}"
        )


@contextlib.contextmanager
def workers(
    layout: Layout, case: _Case, *, on_gpu: bool = False, timeout: float = TIMEOUT
) -> Iterator[Workers]:
    """Starts the processes of a layout; they are killed at the end.

    `timeout`: seconds that an answer may take, the start and compilation included.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(layout[0])]
        started: list[subprocess.Popen] = []
        for index, log in enumerate(logs):
            job = {
                "index": index,
                "processes": layout.processes,
                "coordinator": f"localhost:{port}" if layout.processes > 1 else "",
                "case": case._asdict(),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, json.dumps(job)],
                cwd=REPOSITORY,  # where it finds this package
                env=_environment(layout, index, on_gpu),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
            )
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield Workers(layout, started, logs, timeout)


def _environment(layout: Layout, index: int, on_gpu: bool) -> dict[str, str]:
    """What gives a worker its own devices."""
    own = layout.devices // layout.processes
    if on_gpu:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = visible.split(",") if visible else list(map(str, range(1024)))
        chosen = numbers[index * own : (index + 1) * own]
        return {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(chosen),
            # Several workers, and the process that asks, share a GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [f for f in flags if "xla_force_host_platform_device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={own}")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def _work(job: dict[str, Any], questions: IO[str], answers: IO[str]) -> None:
    """Answers "loss KIND" with a sum of losses, "time KIND" with 0 after some steps."""
    caches.use_compilation_cache()
    parallel.join_processes(job["coordinator"], job["index"], job["processes"])
    case = _Case(**job["case"])
    model = create_model(
        "zf5",
        LEVELS,
        10,
        width=case.width,
        image_size=case.image_size,
        dropout=0.0,  # its random numbers go by device
        weight_init="he",
    )
    preprocessing = Preprocessing(np.array(128.0), 64.0, np.zeros((3, 3), np.float32))
    optimizer = Optimizer()
    step = make_train_step(model, optimizer, preprocessing)
    for question in questions:
        what, kind = question.split()
        size = _global_batch(kind, case, jax.device_count())
        batch = shard_batch(_own_batch(size, case, job))
        if what == "loss":
            state, total = create_state(model, optimizer, seed=0), 0.0
        for _ in range(STEPS):
            state, metrics = step(state, batch, np.float32(1e-3))
            if what == "loss":
                total += float(parallel.unreplicate(metrics["loss"]))
        jax.block_until_ready(state)
        print(total if what == "loss" else 0.0, file=answers, flush=True)


def _own_batch(size: int, case: _Case, job: dict[str, Any]) -> dict[str, np.ndarray]:
    """This process's rows of the global batch, which is the same for all layouts."""
    random = np.random.default_rng(0)
    shape = (size, case.image_size, case.image_size, 3)
    batch = {
        "image": random.integers(0, 256, shape, np.uint8),
        "label": random.integers(0, 10, size),
        "mask": np.ones(size, bool),
    }
    own = slice(job["index"], None, job["processes"])
    return {name: values[own] for name, values in batch.items()}


def plot(rows: Sequence[Measurements]) -> Figure:
    """Milliseconds of a step and images/s beside one device, by layout."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, column in zip(figure.subplots(1, 2), ("ms", "rate"), strict=True):
        bars = [
            (f"{r['scaling']} scaling", r["processes × devices"], r[column])
            for r in rows
        ]
        draw_bars(axes, bars, upright=True)
        axes.set_xlabel("processes × devices of each")
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("ms of a step")
    figure.axes[1].set_ylabel("images/s, one device = 1")
    figure.axes[0].legend()
    return figure


if __name__ == "__main__":
    # Libraries write to stdout too: what they say goes to stderr, and only answers out.
    own_stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _work(json.loads(sys.argv[1]), sys.stdin, own_stdout)
