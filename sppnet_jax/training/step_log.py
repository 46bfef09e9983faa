"""The numbers of training steps on their way to the log and the progress bar."""

import logging
import math
import time
from collections import deque
from typing import Any, NamedTuple

import jax

from sppnet_jax.run import parallel
from sppnet_jax.run.metrics import MetricsLog
from sppnet_jax.run.progress import progress_bar

log = logging.getLogger(__name__)


class DivergedError(RuntimeError):
    """The loss or the weights are no longer finite numbers."""


class Pace(NamedTuple):
    """How long a training is, and how often it logs and saves.

    `batch_size`: examples of a step, over all devices. `epoch_steps`: after so many the
    training is tested; 0 where there are no epochs.
    `checkpoint_steps`: 0 saves at the end of an epoch and of the training; otherwise
    also every so many steps. `max_steps`: ends there without a word; 0 for the whole.
    `profile_steps`: so many steps are traced, see profile.py; 0 for none.
    `unit`: what the examples are, for the progress bar.
    """

    total_steps: int
    batch_size: int
    epoch_steps: int = 0
    log_steps: int = 50
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    max_steps: int = 0
    profile_steps: int = 0
    unit: str = "img"


def fresh_memory() -> dict[str, Any]:
    """What the host remembers from step to step at the start of a run; JSON values."""
    return {
        "validation_errors": [],
        "validation": {},
        "epoch_sums": _zero_sums(),
        "last_finite": None,
        "last": {},
    }


class StepLog:
    """Turns the metrics of steps into log rows, the progress bar and epoch averages.

    The device runs ahead: the numbers of a step are read when the next is under way.
    `memory`: see `fresh_memory`; changed in place and saved with each checkpoint.
    `step`, `last_step`: where the training begins and ends.
    """

    def __init__(
        self,
        name: str,
        memory: dict[str, Any],
        log: MetricsLog,
        pace: Pace,
        step: int,
        last_step: int,
    ) -> None:
        self._name, self._memory, self._log, self._pace = name, memory, log, pace
        self._last_step = last_step
        self._pending: deque[tuple[int, float, dict[str, jax.Array]]] = deque()
        self._shown: dict[str, str] = {}
        self._timed_from = (step, time.monotonic())
        total, done = (steps * pace.batch_size for steps in (last_step, step))
        self._bar = progress_bar(name, total, done=done, unit=pace.unit)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, step: int, rate: float, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step; reads those of the step before it."""
        self._pending.append((step, rate, metrics))
        if len(self._pending) > 1:
            self._read_one()

    def flush(self) -> None:
        """Reads what is still under way."""
        while self._pending:
            self._read_one()

    def compiled(self, step: int, size: int | None, seconds: float) -> None:
        """Logs that the program for images of a size was compiled before a step."""
        log.info(
            "compiled the step of %s%s in %.1f s",
            self._name,
            "" if size is None else f" for {size}×{size} pixels",
            seconds,
        )
        self._log.write("compile", step, {"size": size or 0, "seconds": seconds})
        self._timed_from = (step, time.monotonic())

    def end_epoch(self, step: int, size: int | None) -> None:
        """Logs the means over the epoch that this step ends, at its size of images."""
        self.flush()
        sums = self._memory["epoch_sums"]
        if sums["count"]:
            means = {
                "epoch": step // self._pace.epoch_steps,
                "loss": sums["loss"] / sums["count"],
                "accuracy": sums["correct"] / sums["count"],
            }
            if size is not None:
                means["size"] = size
            self._log.write("train_epoch", step, means)
        self._memory["epoch_sums"] = _zero_sums()

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the test after an epoch, and remembers it."""
        self._memory["validation_errors"].append(1 - metrics["top1"])
        self._memory["validation"] = metrics
        row = {"epoch": step // self._pace.epoch_steps, **metrics}
        self._log.write("validation", step, row)
        self._show(validation=f"{metrics['top1']:.1%}")
        self._timed_from = (step, time.monotonic())

    def _read_one(self) -> None:
        step, rate, on_device = self._pending.popleft()
        values = parallel.unreplicate(on_device)
        metrics = {name: float(value) for name, value in values.items()}
        count = max(metrics["count"], 1)
        loss, accuracy = metrics["loss"] / count, metrics["correct"] / count
        self._check_finite(step, loss)
        self._memory["last"] = {"loss": loss, "accuracy": accuracy}
        sums = self._memory["epoch_sums"]
        for name in sums:
            sums[name] += metrics[name]
        self._bar.update(self._pace.batch_size)
        epochs = self._pace.epoch_steps
        at = {"epoch": step / epochs} if epochs else {}
        shown = {name: f"{epoch:.1f}" for name, epoch in at.items()}
        self._show(**shown, loss=f"{loss:.3f}", accuracy=f"{accuracy:.0%}")
        every = self._pace.log_steps
        last = not epochs and step == self._last_step
        if every and (step % every == 0 or last):
            row = {
                **at,
                "loss": loss,
                "accuracy": accuracy,
                "learning_rate": float(rate),
                "images_per_second": self._speed(step),
            }
            self._log.write("train", step, row)

    def _check_finite(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            last = self._memory["last_finite"]
            before = "no loss before it was finite"
            if last:
                before = f"the last finite loss was {last[1]:.4g} at step {last[0]}"
            raise DivergedError(
                f"the loss of {self._name} is {loss} at step {step}; {before}. A lower "
                "learning_rate or a longer warm-up usually helps"
            )
        self._memory["last_finite"] = [step, loss]

    def _speed(self, step: int) -> float:
        """Images a second since it was last asked, tests after epochs left out."""
        since, started = self._timed_from
        now = time.monotonic()
        self._timed_from = (step, now)
        return (step - since) * self._pace.batch_size / max(now - started, 1e-9)

    def _show(self, **values: str) -> None:
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)


def _zero_sums() -> dict[str, float]:
    return {"loss": 0.0, "correct": 0, "count": 0}
