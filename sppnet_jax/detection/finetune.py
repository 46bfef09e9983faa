"""Fine-tuning of the fc layers on windows: fc6, fc7 and a new fc8 (section 4.2).

The convolutions stay as they are, so each step pools its windows from maps on disk. A
batch holds windows of a few images, a quarter of them positives, and is a function of
the seed and the step's number: a resumed run draws what it would have drawn.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sppnet_jax.detection.examples import Examples
from sppnet_jax.detection.window_features import (
    WindowFeatures,
    make_program,
    pooled_rows,
    rows_of,
)
from sppnet_jax.network.model import SPPNet
from sppnet_jax.run import parallel
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.interrupt import Interrupt
from sppnet_jax.run.metrics import MetricsLog, read_metrics
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.run.run_folder import CHECKPOINTS
from sppnet_jax.training.step_log import DivergedError
from sppnet_jax.training.steps import Optimizer, TrainState

log = logging.getLogger(__name__)


class Finetuning(NamedTuple):
    """How the fc layers are fine-tuned.

    `batch_size`: windows of a step, over all devices; `positives`: the share of them
    that show an object. `images_per_batch`: how many images they are from.
    `memory`: bytes of pooled windows that are kept for the steps to come; images beyond
    that are pooled again whenever a step draws them. The result is the same.
    `drop_steps`: where the learning rate is divided by `drop_factor`.
    """

    steps: int
    batch_size: int = 128
    positives: float = 0.25
    images_per_batch: int = 8
    memory: float = 4e9
    learning_rate: float = 1e-4
    drop_steps: tuple[int, ...] = ()
    drop_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    log_steps: int = 50
    checkpoint_steps: int = 500


class InterruptedRun(RuntimeError):
    """Ctrl-C or SIGTERM; what was done is saved."""


def finetune(
    folder: Path,
    model: SPPNet,
    params: Any,
    features: WindowFeatures,
    examples: Sequence[Examples],
    settings: Finetuning,
) -> dict[str, Any]:
    """Trains fc6, fc7 and a new fc8, from the newest checkpoint in `folder` if any.

    `model`: of as many classes as there are and one more, the last: background.
    `params`: of the trained classifier; its fc6 and fc7 are where training begins.
    `examples`: of each image, see examples.py.

    Returns: a report of plain values. The result is the newest checkpoint, see
    `load_finetuned`.
    Raises: ValueError if no image has both positives and negatives; DivergedError for a
    loss that isn't finite; InterruptedRun after an interrupt, with a checkpoint saved.
    """
    parallel.check_batch_size(settings.batch_size)
    usable = [
        image
        for image, found in enumerate(examples)
        if len(found.positives) and len(found.negatives)
    ]
    if not usable:
        raise ValueError(
            f"none of the {len(examples)} training images has both windows on objects "
            "and windows that overlap them a little: there is nothing to fine-tune on. "
            "Check the annotations, or lower finetune.negative_overlap"
        )
    transform = Optimizer(
        momentum=settings.momentum, weight_decay=settings.weight_decay
    ).transform()
    step_program = _make_step(model, transform)
    load = _batch_loader(features, examples, usable, settings, model.num_classes - 1)
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        state = _first_state(model, params, transform, settings.seed)
        if checkpoints.latest_step() is not None:
            host = parallel.unreplicate(state)
            rest = {"optimizer": host.optimizer, "step": host.step, "rng": host.rng}
            fc, rest, _ = checkpoints.restore(params=host.params, training=rest)
            state = parallel.replicate(TrainState(params=fc, **rest))
        step = int(parallel.unreplicate(state.step))
        if step:
            log.info("fine-tuning goes on at step %d of %d", step, settings.steps)
        loss, accuracy = _last_numbers(folder, step)
        with (
            Interrupt() as interrupt,
            ThreadPoolExecutor(1) as ahead,
            MetricsLog(folder, resumed_step=step) as metrics_log,
            progress_bar(
                "fine-tuning",
                settings.steps * settings.batch_size,
                done=step * settings.batch_size,
            ) as bar,
        ):
            waiting = ahead.submit(load, step) if step < settings.steps else None
            while step < settings.steps:
                assert waiting is not None
                batch = waiting.result()
                if step + 1 < settings.steps:
                    waiting = ahead.submit(load, step + 1)
                rate = learning_rate(settings, step)
                state, metrics = step_program(state, batch, np.float32(rate))
                step += 1
                bar.update(settings.batch_size)
                every = max(1, settings.log_steps)
                if step % every == 0 or step == settings.steps:
                    values = parallel.unreplicate(metrics)
                    loss, accuracy = float(values["loss"]), float(values["accuracy"])
                    if not math.isfinite(loss):
                        raise DivergedError(
                            f"the loss of fine-tuning is {loss} at step {step}; a "
                            "lower finetune.learning_rate usually helps"
                        )
                    row = {"loss": loss, "accuracy": accuracy, "learning_rate": rate}
                    metrics_log.write("finetune", step, row)
                    bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.0%}")
                stopping = interrupt.requested and step < settings.steps
                saved = settings.checkpoint_steps
                if stopping or step == settings.steps or (saved and step % saved == 0):
                    _save(checkpoints, step, state)
                if stopping:
                    raise InterruptedRun(
                        f"interrupted at step {step} of {settings.steps} of "
                        "fine-tuning; the same command goes on from there"
                    )
    return {
        "steps": step,
        "images": len(usable),
        "positives": sum(len(examples[i].positives) for i in usable),
        "negatives": sum(len(examples[i].negatives) for i in usable),
        "loss": loss,
        "accuracy": accuracy,
    }


def load_finetuned(folder: Path, model: SPPNet, params: Any) -> Any:
    """The parameters `params` with the fine-tuned fc layers in place of theirs."""
    shapes = jax.eval_shape(lambda: _fresh_fc(model, params, 0))
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        return {**params, **checkpoints.restore_params(shapes)}


def learning_rate(settings: Finetuning, step: int) -> float:
    """The learning rate of a step, from 0 on."""
    drops = sum(step >= drop for drop in settings.drop_steps)
    return settings.learning_rate / settings.drop_factor**drops


def draw_batch(
    examples: Sequence[Examples],
    usable: Sequence[int],
    settings: Finetuning,
    background: int,
    step: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which windows a step sees: (images, rows of their boxes, labels), int [batch].

    Images come in a new random order each time all were seen. Of the windows of the
    step's images, positives and negatives are drawn at random; again, if there are too
    few.
    """
    images = _images_of(step, usable, settings)
    rng = np.random.default_rng((settings.seed, 1, step))
    wanted = round(settings.batch_size * settings.positives)
    positives = [
        (image, row, label)
        for image in images
        for row, label in zip(
            examples[image].positives, examples[image].labels, strict=True
        )
    ]
    negatives = [
        (image, row, background)
        for image in images
        for row in examples[image].negatives
    ]
    chosen = np.array(
        [
            *_draw(positives, wanted, rng),
            *_draw(negatives, settings.batch_size - wanted, rng),
        ]
    )
    return chosen[:, 0], chosen[:, 1], chosen[:, 2]


def _draw(items: list[Any], count: int, rng: np.random.Generator) -> list[Any]:
    drawn = rng.choice(len(items), size=count, replace=count > len(items))
    return [items[index] for index in drawn]


def _images_of(step: int, usable: Sequence[int], settings: Finetuning) -> list[int]:
    count = min(settings.images_per_batch, len(usable))
    found = []
    for position in range(step * count, (step + 1) * count):
        turn, place = divmod(position, len(usable))
        order = np.random.default_rng((settings.seed, 0, turn)).permutation(len(usable))
        found.append(usable[order[place]])
    return found


def _batch_loader(
    features: WindowFeatures,
    examples: Sequence[Examples],
    usable: Sequence[int],
    settings: Finetuning,
    background: int,
) -> Callable[[int], dict[str, np.ndarray]]:
    program = make_program(features, pooled_rows)
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    room = settings.memory

    def pooled_of(image: int, rows: np.ndarray) -> np.ndarray:
        nonlocal room
        if image not in kept and room > 0:
            own = examples[image]
            all_rows = np.unique(np.concatenate([own.positives, own.negatives]))
            values = rows_of(features, program, None, image, all_rows)
            kept[image] = (all_rows, values)
            room -= values.nbytes
        if image in kept:
            all_rows, values = kept[image]
            return values[np.searchsorted(all_rows, rows)]
        return rows_of(features, program, None, image, rows)

    def load(step: int) -> dict[str, np.ndarray]:
        images, rows, labels = draw_batch(examples, usable, settings, background, step)
        pooled: list[Any] = [None] * len(rows)
        for image in np.unique(images):
            mine = np.flatnonzero(images == image)
            for place, row in zip(mine, pooled_of(int(image), rows[mine]), strict=True):
                pooled[place] = row
        batch = {"pooled": np.stack(pooled), "label": labels.astype(np.int32)}
        # Positives come first: every device gets its share of them.
        order = np.random.default_rng((settings.seed, 2, step)).permutation(len(rows))
        return parallel.shard({name: values[order] for name, values in batch.items()})

    return load


def _make_step(model: SPPNet, transform: optax.GradientTransformation) -> Any:
    def step(
        state: TrainState, batch: dict[str, jax.Array], rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        rng = jax.random.fold_in(rng, parallel.device_index())
        count = parallel.sum_over_devices(jnp.float32(len(batch["label"])))

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits, _ = model.apply(
                {"params": params},
                batch["pooled"],
                train=True,
                rngs={"dropout": rng},
                method="classify",
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            )
            correct = logits.argmax(axis=-1) == batch["label"]
            return losses.sum() / count, (losses.sum(), correct.sum())

        grads, (loss, correct) = jax.grad(loss_fn, has_aux=True)(state.params)
        grads = parallel.sum_over_devices(grads)
        updates, momentum = transform.update(grads, state.optimizer, state.params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        metrics = {
            "loss": parallel.sum_over_devices(loss) / count,
            "accuracy": parallel.sum_over_devices(correct) / count,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, momentum, state.rng), metrics

    return parallel.data_parallel(step, scalars=1, donate_state=True)


def _first_state(
    model: SPPNet, params: Any, transform: optax.GradientTransformation, seed: int
) -> TrainState:
    fc = _fresh_fc(model, params, seed)
    rng = jax.random.PRNGKey(seed + 1)
    state = TrainState(jnp.zeros((), jnp.int32), fc, transform.init(fc), rng)
    return parallel.replicate(state)


def _fresh_fc(model: SPPNet, params: Any, seed: int) -> dict[str, Any]:
    """fc6 and fc7 as they were trained, and a new fc8 of N(0, 0.01)."""
    inputs = params["fc8"]["kernel"].shape[0]
    shape = (inputs, model.num_classes)
    kernel = 0.01 * jax.random.normal(jax.random.PRNGKey(seed), shape)
    fresh = {"kernel": kernel, "bias": jnp.zeros(model.num_classes)}
    return {"fc6": params["fc6"], "fc7": params["fc7"], "fc8": fresh}


def _last_numbers(folder: Path, step: int) -> tuple[float | None, float | None]:
    """The loss and the accuracy that were logged at a step: that of the checkpoint."""
    for row in reversed(read_metrics(folder)):
        if row["step"] == step:
            return row["loss"], row["accuracy"]
    return None, None


def _save(checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    host = parallel.unreplicate(state)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(host.params)):
        raise DivergedError(
            f"the weights are not finite after step {step} of fine-tuning; a lower "
            "finetune.learning_rate usually helps"
        )
    rest = {"optimizer": host.optimizer, "step": host.step, "rng": host.rng}
    checkpoints.save(step, params=host.params, training=rest, host={})
