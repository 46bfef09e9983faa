"""The training loop: batches in, checkpoints and metrics out, resumable at any step."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sppnet_jax.data.batches import Batches, steps_per_epoch
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.sources import Source
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.run import parallel
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.interrupt import Interrupt
from sppnet_jax.run.metrics import MetricsLog
from sppnet_jax.run.run_folder import CHECKPOINTS
from sppnet_jax.training.profile import FOLDER as PROFILE
from sppnet_jax.training.profile import Profile
from sppnet_jax.training.schedule import Schedule
from sppnet_jax.training.sizes import epoch_size
from sppnet_jax.training.step_log import DivergedError, Progress, fresh_memory
from sppnet_jax.training.steps import (
    Optimizer,
    TrainState,
    create_state,
    make_train_step,
    shard_batch,
)

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """How long a run is, and how often it logs and saves.

    `sizes`: the sides of the training images in pixels, see sizes.py; () leaves them as
    the batches bring them. `size_multiple`: of sizes that are drawn.
    `checkpoint_steps`: 0 saves at the end of every epoch; otherwise also every so many
    steps. `max_steps`: stops early, as if interrupted; 0 for the whole run.
    `profile_steps`: so many steps are traced, see profile.py; 0 for none.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    sizes: tuple[int | str, ...] = ()
    size_multiple: int = 1
    log_steps: int = 50
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    max_steps: int = 0
    profile_steps: int = 0


def train(
    workdir: Path,
    model: SPPNet,
    source: Source,
    batches: Batches,
    *,
    validate: Callable[[Any], dict[str, float]],
    run: Run,
    optimizer: Optimizer,
    schedule: Schedule,
    preprocessing: Preprocessing,
) -> dict[str, float]:
    """Trains to the end of the last epoch, from the newest checkpoint if there is one.

    `batches`: the training batches of `source`; their position is saved and restored.
    `validate`: tests replicated parameters after each epoch; its "top1" decides when a
    plateau is reached.

    Returns: the last validation metrics.
    Raises: DivergedError when the loss or the weights are not finite; ValueError for a
    checkpoint of another model. An interrupt saves a checkpoint and ends the run.
    """
    epoch_steps = steps_per_epoch(source, run.batch_size)
    total_steps = run.epochs * epoch_steps
    last_step = min(total_steps, run.max_steps or total_steps)
    programs: dict[int | None, Callable[..., Any]] = {}
    broken = BrokenImages(source)
    with Checkpoints(workdir / CHECKPOINTS, keep=run.keep_checkpoints) as checkpoints:
        # The state and the step's program are made while the first batches load.
        step, resumes = 0, checkpoints.latest_step() is not None
        if not resumes:
            batches.start_prefetch()
        state, memory = create_state(model, optimizer, run.seed), fresh_memory()
        if resumes:
            state, memory = _restore(checkpoints, state, batches)
            batches.start_prefetch()
            step = int(parallel.unreplicate(state.step))
            log.info("resuming at step %d of %d", step, total_steps)
        first = parallel.is_first_process()
        with (
            Interrupt() as interrupt,
            MetricsLog(workdir, resumed_step=step, enabled=first) as metrics_log,
            Progress(
                memory,
                metrics_log,
                step=step,
                last_step=last_step,
                epoch_steps=epoch_steps,
                batch_size=run.batch_size,
                log_steps=run.log_steps,
            ) as progress,
            Profile(
                workdir / PROFILE, steps=run.profile_steps if first else 0, start=step
            ) as profile,
        ):
            stopping = False
            while step < last_step and not stopping:
                with profile.step(step):
                    batch = next(batches)
                    broken.report(batch)
                    rate = schedule.rate(
                        step,
                        steps_per_epoch=epoch_steps,
                        total_steps=total_steps,
                        validation_errors=memory["validation_errors"],
                    )
                    size = _epoch_size(run, step // epoch_steps)
                    known = size in programs
                    if not known:
                        programs[size] = make_train_step(
                            model, optimizer, preprocessing, size=size
                        )
                    inputs, started = shard_batch(batch), time.monotonic()
                    state, metrics = programs[size](state, inputs, np.float32(rate))
                    if not known:  # the call returns when the program is compiled
                        progress.compiled(step, size, time.monotonic() - started)
                step += 1
                profile.add(metrics)
                progress.add(step, rate, metrics)
                epoch_ends = step % epoch_steps == 0
                if epoch_ends:
                    progress.end_epoch(step, size)
                    progress.validated(step, validate(state.params))
                stopping = interrupt.requested or step == last_step
                every = run.checkpoint_steps
                if epoch_ends or stopping or (every and step % every == 0):
                    progress.flush()
                    _save(checkpoints, step, state, memory, batches)
    if step < total_steps:
        log.info(
            "stopped at step %d of %d; the same command goes on from there",
            step,
            total_steps,
        )
    broken.summarize()
    return memory["validation"]


def _epoch_size(run: Run, epoch: int) -> int | None:
    if not run.sizes:
        return None
    return epoch_size(run.sizes, epoch, seed=run.seed, multiple=run.size_multiple)


def _restore(
    checkpoints: Checkpoints, state: TrainState, batches: Batches
) -> tuple[TrainState, dict[str, Any]]:
    """The saved state and the host's memory; moves `batches` to where they were."""
    params, training = _split(parallel.unreplicate(state))
    params, training, host = checkpoints.restore(params=params, training=training)
    batches.set_state(host["batches"])
    restored = TrainState(params=params, **training)
    return parallel.replicate(restored), host["memory"]


def _save(
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    memory: dict[str, Any],
    batches: Batches,
) -> None:
    params, training = _split(parallel.unreplicate(state))
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise DivergedError(
            f"the weights are not finite after step {step}; no checkpoint is written. "
            "A lower learning_rate or a longer warmup_epochs usually helps"
        )
    host = {"memory": memory, "batches": batches.get_state()}
    checkpoints.save(step, params=params, training=training, host=host)


def _split(state: TrainState) -> tuple[Any, dict[str, Any]]:
    rest = state._asdict()
    return rest.pop("params"), rest
