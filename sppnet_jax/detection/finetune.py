"""Fine-tuning of the fc layers on windows: fc6, fc7 and a new fc8 (section 4.2).

The convolutions stay as they are, so each step pools its windows from maps on disk. A
batch holds windows of a few images, a quarter of them positives, and is a function of
the seed and the step's number: a resumed run draws what it would have drawn.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
from sppnet_jax.run.run_folder import CHECKPOINTS
from sppnet_jax.run.settings import at_least, between, share
from sppnet_jax.training.ahead import StepsAhead
from sppnet_jax.training.loop import train
from sppnet_jax.training.step_log import Pace
from sppnet_jax.training.steps import Optimizer, TrainState, make_step

log = logging.getLogger(__name__)


class Finetuning(NamedTuple):
    """How the fc layers are fine-tuned; the paper's recipe for VOC 2007.

    `steps`: 0 for no fine-tuning. `batch_size`: windows of a step, over all devices;
    `images`: that they are from; `positives`: the share of them that show an object.
    `positive_overlap`: of a positive with an object, at least. `negative_overlap`: of a
    negative with the objects, from the first to below the second.
    `drop_steps`: where the learning rate is divided by `drop_factor`.
    `memory_gb`: of pooled windows that are kept for the steps to come; images beyond
    that are pooled again whenever a step draws them. The result is the same.
    `units`: of fresh fc6 and fc7, for a network that has none.
    Of end-to-end training alone: `trainable`, the first layer that is trained, see
    `Architecture`; `trunk_rate`, the learning rate of convolutions for one of the head;
    `flip`, half the images are mirrored; `balanced`, an image's classes have the same
    share of its positives, and so have the objects of a class; `box_weight`, of the
    loss of boxes; `bfloat16`, activations are in it while training.
    """

    steps: Annotated[int, at_least(0)] = 300_000
    batch_size: Annotated[int, at_least(1)] = 128
    images: Annotated[int, at_least(1)] = 8
    positives: Annotated[float, between(0, 1)] = 0.25
    positive_overlap: Annotated[float, share(above_zero=True)] = 0.5
    negative_overlap: tuple[float, float] = (0.1, 0.5)
    learning_rate: Annotated[float, at_least(0)] = 1e-4
    drop_steps: tuple[Annotated[int, at_least(0)], ...] = (250_000,)
    drop_factor: Annotated[float, at_least(1)] = 10.0
    momentum: Annotated[float, between(0, 1)] = 0.9
    weight_decay: Annotated[float, at_least(0)] = 5e-4
    dropout: Annotated[float, between(0, 1)] = 0.5
    log_steps: Annotated[int, at_least(0)] = 50
    checkpoint_steps: Annotated[int, at_least(0)] = 500
    memory_gb: Annotated[float, at_least(0)] = 4.0
    units: Annotated[int, at_least(1)] = 1024
    trainable: str = "conv3"
    trunk_rate: Annotated[float, at_least(0)] = 1.0
    flip: bool = True
    balanced: bool = True
    box_weight: Annotated[float, at_least(0)] = 1.0
    bfloat16: bool = False

    def check(self) -> None:
        """Raises ValueError for settings that don't fit together."""
        low, high = self.negative_overlap
        if not 0 <= low < high <= 1:
            raise ValueError(
                "config.finetune.negative_overlap must be (low, high) with 0 ≤ low < "
                f"high ≤ 1, got {(low, high)}"
            )
        if self.positive_overlap < high:
            raise ValueError(
                f"config.finetune.positive_overlap, {self.positive_overlap}, must be "
                f"at least the upper negative_overlap, {high}: a box would be both"
            )
        if not self.positives:
            raise ValueError("config.finetune.positives must be more than 0")

    @property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result."""
        kept = ("log_steps", "checkpoint_steps", "memory_gb")
        return {k: v for k, v in self._asdict().items() if k not in kept}


def finetune(
    folder: Path,
    model: SPPNet,
    params: Any,
    features: WindowFeatures,
    examples: Sequence[Examples],
    settings: Finetuning,
    seed: int,
) -> dict[str, Any]:
    """Trains fc6, fc7 and a new fc8, from the newest checkpoint in `folder` if any.

    `model`: of as many classes as there are and one more, the last: background.
    `params`: of the trained classifier; its fc6 and fc7 are where training begins.
    `examples`: of each image, see examples.py. `seed`: of fc8, of dropout and of the
    windows that are drawn.

    Returns: a report of plain values; `load_finetuned` has the result.
    Raises: ValueError if no image has both positives and negatives; and as `loop.train`
    does.
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
    background = model.num_classes - 1
    load = _batch_loader(features, examples, usable, settings, background, seed)

    memory = train_on_windows(
        folder,
        "fine-tuning",
        settings,
        load,
        lambda: _fresh_fc(model, params, seed),
        functools.partial(_losses, model),
        seed=seed,
    )
    return {
        "steps": settings.steps,
        "images": len(usable),
        "positives": sum(len(examples[i].positives) for i in usable),
        "negatives": sum(len(examples[i].negatives) for i in usable),
        "loss": None,
        "accuracy": None,
        **memory["last"],
    }


def train_on_windows(
    folder: Path,
    name: str,
    settings: Finetuning,
    load: Callable[[int], Any],
    begin: Callable[[], Any],
    losses_of: Callable[..., tuple[jax.Array, jax.Array]],
    *,
    frozen: Sequence[str] = (),
    trunk_rate: float = 1.0,
    seed: int,
) -> dict[str, Any]:
    """Runs the steps of a training on windows; see `loop.train`.

    `load`: from a step's number to its batch, split over the devices. `begin`: makes
    the parameters to begin with. `losses_of`, `frozen`: see `make_step`.

    Returns: what `loop.train` does, with its errors.
    """
    optimizer = Optimizer(
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        trunk_rate=trunk_rate,
    )

    def make_state() -> TrainState:
        params, rng = begin(), jax.random.PRNGKey(seed + 1)
        momentum = optimizer.transform(frozen).init(params)
        return parallel.replicate(
            TrainState(jnp.zeros((), jnp.int32), params, momentum, rng)
        )

    with StepsAhead(load, settings.steps) as batches:
        return train(
            folder,
            name,
            Pace(
                settings.steps,
                settings.batch_size,
                log_steps=settings.log_steps,
                checkpoint_steps=settings.checkpoint_steps,
                unit="windows",
            ),
            make_state=make_state,
            batches=batches,
            place=lambda batch: batch,
            make_program=lambda size: make_step(losses_of, optimizer, frozen),
            rate=lambda step, errors: _learning_rate(settings, step),
        )


def load_finetuned(folder: Path, model: SPPNet, params: Any) -> Any:
    """The parameters `params` with the fine-tuned fc layers in place of theirs."""
    shapes = jax.eval_shape(lambda: _fresh_fc(model, params, 0))
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        return {**params, **checkpoints.restore_params(shapes)}


def _learning_rate(settings: Finetuning, step: int) -> float:
    """The learning rate of a step, from 0 on."""
    drops = sum(step >= drop for drop in settings.drop_steps)
    return settings.learning_rate / settings.drop_factor**drops


def draw_batch(
    examples: Sequence[Examples],
    usable: Sequence[int],
    settings: Finetuning,
    background: int,
    seed: int,
    step: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which windows a step sees: (images, rows of their boxes, labels), int [batch].

    Images come in a new random order each time all were seen. Of the windows of the
    step's images, positives and negatives are drawn at random; again, if there are too
    few.
    """
    images = _images_of(step, usable, settings.images, seed)
    rng = np.random.default_rng((seed, 1, step))
    wanted = round(settings.batch_size * settings.positives)
    positives: list[Any] = []
    negatives: list[Any] = []
    for image in images:
        found = examples[image]
        shown = zip(found.positives, found.labels, strict=True)
        positives += [(image, row, label) for row, label in shown]
        negatives += [(image, row, background) for row in found.negatives]
    chosen = [
        items[index]
        for items, count in (
            (positives, wanted),
            (negatives, settings.batch_size - wanted),
        )
        for index in rng.choice(len(items), size=count, replace=count > len(items))
    ]
    of_images, rows, labels = np.array(chosen).T
    return of_images, rows, labels


def _images_of(step: int, usable: Sequence[int], images: int, seed: int) -> list[int]:
    count = min(images, len(usable))
    found = []
    for position in range(step * count, (step + 1) * count):
        turn, place = divmod(position, len(usable))
        order = np.random.default_rng((seed, 0, turn)).permutation(len(usable))
        found.append(usable[order[place]])
    return found


def _batch_loader(
    features: WindowFeatures,
    examples: Sequence[Examples],
    usable: Sequence[int],
    settings: Finetuning,
    background: int,
    seed: int,
) -> Callable[[int], dict[str, np.ndarray]]:
    program = make_program(features, pooled_rows)
    kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    room = settings.memory_gb * 1e9

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
        images, rows, labels = draw_batch(
            examples, usable, settings, background, seed, step
        )
        mine = [np.flatnonzero(images == image) for image in np.unique(images)]
        parts = [pooled_of(int(images[own[0]]), rows[own]) for own in mine]
        batch = {
            "pooled": np.concatenate(parts)[np.argsort(np.concatenate(mine))],
            "label": labels.astype(np.int32),
            "mask": np.ones(len(labels), bool),
        }
        # Positives come first: every device gets its share of them.
        order = np.random.default_rng((seed, 2, step)).permutation(len(rows))
        return parallel.shard({name: values[order] for name, values in batch.items()})

    return load


def _losses(
    model: SPPNet, params: Any, batch: dict[str, jax.Array], rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Losses and logits of pooled windows, as `make_step` takes them."""
    import optax

    logits, _ = model.apply(
        {"params": params},
        batch["pooled"],
        train=True,
        rngs={"dropout": rng},
        method="classify",
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses, logits


def drawn_fc(inputs: int, units: int, seed: int) -> dict[str, Any]:
    """fc6 and fc7 of He's spread, for a network that has none; fc8 is drawn later."""
    params = {}
    keys = jax.random.split(jax.random.PRNGKey(seed))
    for name, key, rows in zip(("fc6", "fc7"), keys, (inputs, units), strict=True):
        kernel = jax.random.normal(key, (rows, units)) * np.sqrt(2 / rows)
        params[name] = {"kernel": kernel, "bias": jnp.zeros(units)}
    return params


def _fresh_fc(model: SPPNet, params: Any, seed: int) -> dict[str, Any]:
    """fc6 and fc7 as they were trained, and a new fc8 of N(0, 0.01)."""
    inputs = params["fc7"]["kernel"].shape[1]
    shape = (inputs, model.num_classes)
    kernel = 0.01 * jax.random.normal(jax.random.PRNGKey(seed), shape)
    fresh = {"kernel": kernel, "bias": jnp.zeros(model.num_classes)}
    return {"fc6": params["fc6"], "fc7": params["fc7"], "fc8": fresh}
