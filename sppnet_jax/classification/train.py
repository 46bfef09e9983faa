"""The training loop: batches in, checkpoints and metrics out, resumable at any step."""

import contextlib
import logging
import math
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from tqdm import tqdm

from sppnet_jax import parallel
from sppnet_jax.checkpoints import Checkpoints
from sppnet_jax.classification.evaluate import count_correct
from sppnet_jax.classification.preprocess import Preprocessing
from sppnet_jax.classification.schedule import Schedule
from sppnet_jax.classification.step import (
    Optimizer,
    TrainState,
    create_state,
    make_test_step,
    make_train_step,
)
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.pipeline import Batches, steps_per_epoch
from sppnet_jax.data.sources import Source
from sppnet_jax.metrics import MetricsLog
from sppnet_jax.model import SPPNet

log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class Run(NamedTuple):
    """How long a run is, and how often it logs and saves.

    `checkpoint_steps`: 0 saves at the end of every epoch; otherwise also every so many
    steps. `max_steps`: stops early, as if interrupted; 0 for the whole run.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    log_steps: int = 50
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    max_steps: int = 0


def train(
    workdir: Path,
    model: SPPNet,
    source: Source,
    *,
    train_batches: Batches,
    validation_batches: Callable[[], Batches],
    run: Run,
    optimizer: Optimizer,
    schedule: Schedule,
    preprocessing: Preprocessing,
) -> dict[str, float]:
    """Trains to the end of the last epoch, from the newest checkpoint if there is one.

    `train_batches`: the iterator over `source`; its position is saved and restored.
    `validation_batches`: a function that gives a fresh iterator over the validation
    set, tested after each epoch.

    Returns: the last validation metrics.
    Raises: DivergedError when the loss is not finite; ValueError for a checkpoint of
    another model. An interrupt (Ctrl-C, SIGTERM) saves a checkpoint and ends the run.
    """
    epoch_steps = steps_per_epoch(source, run.batch_size)
    total_steps = run.epochs * epoch_steps
    train_step = make_train_step(model, optimizer, preprocessing)
    test_step = make_test_step(model, preprocessing)
    broken = BrokenImages(source)
    with Checkpoints(workdir / "checkpoints", keep=run.keep_checkpoints) as checkpoints:
        state, host = _start(checkpoints, model, optimizer, run.seed, train_batches)
        step = int(parallel.unreplicate(state.step))
        if step:
            log.info("resuming at step %d of %d", step, total_steps)
        last_step = min(total_steps, run.max_steps or total_steps)
        with (
            _Interrupt() as interrupt,
            MetricsLog(
                workdir, resumed_step=step, enabled=parallel.is_first_process()
            ) as metrics_log,
            _Progress(host, metrics_log, run, step, last_step, epoch_steps) as progress,
        ):
            stopping = False
            while step < last_step and not stopping:
                batch = next(train_batches)
                broken.report(batch)
                rate = schedule.rate(
                    step,
                    steps_per_epoch=epoch_steps,
                    total_steps=total_steps,
                    validation_errors=host["validation_errors"],
                )
                inputs = {name: batch[name] for name in ("image", "label", "mask")}
                state, metrics = train_step(
                    state, parallel.shard(inputs), np.float32(rate)
                )
                step += 1
                progress.add(step, rate, metrics)
                epoch_ends = step % epoch_steps == 0
                if epoch_ends:
                    progress.end_epoch(step)
                    counts = count_correct(
                        test_step, state.params, validation_batches()
                    )
                    host["validation_errors"].append(1 - counts["top1"])
                    host["validation"] = counts
                    progress.validated(step, counts)
                stopping = interrupt.requested or step == last_step
                if epoch_ends or stopping or _due(step, run.checkpoint_steps):
                    progress.flush()
                    _save(checkpoints, state, host, train_batches)
    if step < total_steps:
        log.info(
            "stopped at step %d of %d; the same command goes on from there",
            step,
            total_steps,
        )
    broken.summarize()
    return host["validation"]


def _start(
    checkpoints: Checkpoints,
    model: SPPNet,
    optimizer: Optimizer,
    seed: int,
    batches: grain.DatasetIterator,
) -> tuple[TrainState, dict[str, Any]]:
    state = create_state(model, optimizer, seed)
    if checkpoints.latest_step() is None:
        sums = {"loss": 0.0, "correct": 0, "count": 0}
        return state, {"validation_errors": [], "validation": {}, "epoch_sums": sums}
    params, training = _split(parallel.unreplicate(state))
    params, training, host = checkpoints.restore(
        params=params, training=training, batches=batches
    )
    return parallel.replicate(TrainState(params=params, **training)), host


def _save(
    checkpoints: Checkpoints,
    state: TrainState,
    host: dict[str, Any],
    batches: grain.DatasetIterator,
) -> None:
    params, training = _split(parallel.unreplicate(state))
    checkpoints.save(
        int(training["step"]),
        params=params,
        training=training,
        host=host,
        batches=batches,
    )


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    rest = state._asdict()
    return rest.pop("params"), rest


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Progress:
    """Turns the metrics of steps into log rows, the progress bar and epoch averages.

    The device runs ahead: the numbers of a step are read when the next is under way.
    """

    def __init__(
        self,
        host: dict[str, Any],
        log: MetricsLog,
        run: Run,
        step: int,
        last_step: int,
        epoch_steps: int,
    ) -> None:
        self._host, self._log, self._run = host, log, run
        self._epoch_steps = epoch_steps
        self._pending: deque[tuple[int, float, dict[str, jax.Array]]] = deque()
        self._last_finite: tuple[int, float] | None = None
        self._shown: dict[str, str] = {}
        self._bar = tqdm(
            total=last_step * run.batch_size,
            initial=step * run.batch_size,
            unit="img",
            desc="training",
            mininterval=0.5,
            disable=not parallel.is_first_process(),
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, step: int, rate: float, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((step, rate, metrics))
        if len(self._pending) > 1:
            self._read_one()

    def flush(self) -> None:
        while self._pending:
            self._read_one()

    def end_epoch(self, step: int) -> None:
        self.flush()
        sums = self._host["epoch_sums"]
        if sums["count"]:
            self._log.write(
                "train_epoch",
                step,
                {
                    "epoch": step // self._epoch_steps,
                    "loss": sums["loss"] / sums["count"],
                    "accuracy": sums["correct"] / sums["count"],
                },
            )
        self._host["epoch_sums"] = {"loss": 0.0, "correct": 0, "count": 0}

    def validated(self, step: int, counts: dict[str, float]) -> None:
        epoch = step // self._epoch_steps
        self._log.write("validation", step, {"epoch": epoch, **counts})
        self._show(validation=f"{counts['top1']:.1%}")

    def _read_one(self) -> None:
        step, rate, device_metrics = self._pending.popleft()
        metrics = {
            name: float(x.addressable_shards[0].data[0])
            for name, x in device_metrics.items()
        }
        count = max(metrics["count"], 1)
        loss, accuracy = metrics["loss"] / count, metrics["correct"] / count
        if not math.isfinite(loss):
            last = "no step before it was finite"
            if self._last_finite:
                last = "the last finite loss was {1:.4g} at step {0}".format(
                    *self._last_finite
                )
            raise DivergedError(
                f"the loss is {loss} at step {step}; {last}. A lower learning_rate or "
                "a longer warmup_epochs usually helps; checkpoints hold finite states"
            )
        self._last_finite = (step, loss)
        sums = self._host["epoch_sums"]
        for name in sums:
            sums[name] += metrics[name]
        self._bar.update(self._run.batch_size)
        epoch = step / self._epoch_steps
        self._show(epoch=f"{epoch:.1f}", loss=f"{loss:.3f}", accuracy=f"{accuracy:.0%}")
        if _due(step, self._run.log_steps):
            speed = self._bar.format_dict.get("rate") or 0.0
            self._log.write(
                "train",
                step,
                {
                    "epoch": epoch,
                    "loss": loss,
                    "accuracy": accuracy,
                    "learning_rate": float(rate),
                    "images_per_second": speed,
                },
            )

    def _show(self, **values: str) -> None:
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)


class _Interrupt:
    """Notes Ctrl-C and SIGTERM, so that the step under way can end and be saved.

    A second Ctrl-C interrupts at once. Of several processes each would stop at a step
    of its own and wait for the others forever, so there nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        numbers = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in numbers:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.info("interrupted: saving a checkpoint after this step")
