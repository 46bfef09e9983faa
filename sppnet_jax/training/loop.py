"""The one training loop: batches in, checkpoints and metrics out, resumable anywhere.

Whole networks and the fc layers of detectors go through it alike. A training is given
as what it is made of: a fresh state, batches, a program for each size of images, a
learning rate. What it remembers on the host is saved with each checkpoint.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from sppnet_jax.run import parallel
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.interrupt import Interrupt, Interrupted
from sppnet_jax.run.memory import give_back
from sppnet_jax.run.metrics import MetricsLog
from sppnet_jax.run.run_folder import CHECKPOINTS
from sppnet_jax.training.profile import FOLDER as PROFILE
from sppnet_jax.training.profile import Profile
from sppnet_jax.training.step_log import (
    DivergedError,
    Pace,
    StepLog,
    fresh_memory,
)
from sppnet_jax.training.steps import TrainState

log = logging.getLogger(__name__)


class StepBatches(Protocol):
    """Batches in an order of their own, whose position can be saved as JSON."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def start_prefetch(self) -> None: ...


def train(
    folder: Path,
    name: str,
    pace: Pace,
    *,
    make_state: Callable[[], TrainState],
    batches: StepBatches,
    place: Callable[[Any], Any],
    make_program: Callable[[int | None], Callable[..., Any]],
    rate: Callable[[int, list[float]], float],
    size_of: Callable[[int], int | None] = lambda epoch: None,
    validate: Callable[[Any], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Trains to the last step, from the newest checkpoint in a folder if there is one.

    `name`: what to call it, in the bar and in messages. `make_state`: makes a fresh
    state, replicated. `batches`: their position is saved and restored. `place`: puts a
    batch where the program takes it.
    `make_program`: from the side of the images (None: as they come) to the step, see
    steps.py. `rate`: from a step and the validation errors so far to a learning rate.
    `size_of`: from an epoch, counted from 0, to the side of its images.
    `validate`: tests replicated parameters after each epoch, "top1" among the results.

    Returns: what was remembered; "validation" are the last test's metrics, "last" the
    loss and accuracy of the last step.
    Raises: DivergedError when the loss or the weights are not finite; ValueError for a
    checkpoint of another model; OSError where checkpoints can't be written, before the
    first step; Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    last_step = min(pace.total_steps, pace.max_steps or pace.total_steps)
    programs: dict[int | None, Callable[..., Any]] = {}
    compiled: set[Any] = set()
    with Checkpoints(folder / CHECKPOINTS, keep=pace.keep_checkpoints) as checkpoints:
        # The state and the step's program are made while the first batches load.
        step, resumes = 0, checkpoints.latest_step() is not None
        if not resumes:
            batches.start_prefetch()
        state, memory = make_state(), fresh_memory()
        if resumes:
            state, memory = _restore(checkpoints, state, batches)
            step = int(parallel.unreplicate(state.step))
            log.info("%s goes on at step %d of %d", name, step, pace.total_steps)
            if step < last_step:
                batches.start_prefetch()
        if step < last_step:
            checkpoints.check_space(jax.eval_shape(lambda: _first(state)))
            give_back()  # what making the state has freed
        first = parallel.is_first_process()
        with (
            Interrupt() as interrupt,
            MetricsLog(folder, resumed_step=step, enabled=first) as metrics_log,
            StepLog(name, memory, metrics_log, pace, step, last_step) as step_log,
            Profile(
                folder / PROFILE, steps=pace.profile_steps if first else 0, start=step
            ) as profile,
        ):
            stopping = False
            while step < last_step and not stopping:
                with profile.step(step):
                    inputs = place(next(batches))
                    learning_rate = rate(step, memory["validation_errors"])
                    size = size_of(step // pace.epoch_steps if pace.epoch_steps else 0)
                    if size not in programs:
                        programs[size] = make_program(size)
                    shapes = size, *(leaf.shape for leaf in jax.tree.leaves(inputs))
                    known = shapes in compiled
                    compiled.add(shapes)
                    started = time.monotonic()
                    state, metrics = programs[size](
                        state, inputs, np.float32(learning_rate)
                    )
                    if not known:  # the call returns when the program is compiled
                        step_log.compiled(step, size, time.monotonic() - started)
                        give_back()
                step += 1
                profile.add(metrics)
                step_log.add(step, learning_rate, metrics)
                epoch_ends = bool(pace.epoch_steps) and step % pace.epoch_steps == 0
                if epoch_ends:
                    step_log.end_epoch(step, size)
                    if validate is not None:
                        step_log.validated(step, validate(state.params))
                stopping = interrupt.stops_after(step) or step == last_step
                every = pace.checkpoint_steps
                if epoch_ends or stopping or (every and step % every == 0):
                    step_log.flush()
                    _save(checkpoints, name, step, state, memory, batches)
            interrupted = interrupt.requested and step < last_step
    where = f"{name} stopped at step {step} of {pace.total_steps}"
    if interrupted:
        raise Interrupted(f"{where}; the same command goes on from there")
    if step < pace.total_steps:
        log.info("%s, the last one asked for", where)
    return memory


def _restore(
    checkpoints: Checkpoints, state: TrainState, batches: StepBatches
) -> tuple[TrainState, dict[str, Any]]:
    """The saved state and the host's memory; moves `batches` to where they were."""
    params, training = _split(parallel.unreplicate(state))
    params, training, host = checkpoints.restore(params=params, training=training)
    batches.set_state(host["batches"])
    restored = TrainState(params=params, **training)
    return parallel.replicate(restored), fresh_memory() | host["memory"]


def _save(
    checkpoints: Checkpoints,
    name: str,
    step: int,
    state: TrainState,
    memory: dict[str, Any],
    batches: StepBatches,
) -> None:
    params, training = _split(parallel.unreplicate(state))
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise DivergedError(
            f"the weights are not finite after step {step} of {name}; no checkpoint is "
            "written. A lower learning_rate or a longer warm-up usually helps"
        )
    host = {"memory": memory, "batches": batches.get_state()}
    checkpoints.save(step, params=params, training=training, host=host)


def _first(state: TrainState) -> TrainState:
    """One copy of a replicated state."""
    return jax.tree.map(lambda x: x[0], state)


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    rest = state._asdict()
    return rest.pop("params"), rest
