"""One training step, data parallel.

Broken and padded examples have mask False: they weigh nothing in losses and counts.
"""

from collections.abc import Callable, Collection
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.network.model import SPPNet, init_params
from sppnet_jax.network.preprocess import (
    Preprocessing,
    alter_colors,
    normalize,
    resize,
)
from sppnet_jax.run import parallel
from sppnet_jax.run.settings import at_least, between

Batch = dict[str, jax.Array]  # "image", "label", "mask"
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step reads and writes on the device."""

    step: jax.Array
    params: Any
    optimizer: Any
    rng: jax.Array


class Optimizer(NamedTuple):
    """SGD with momentum; the learning rate is given to each step (see schedule.py).

    `weight_decay`: of kernels, not of biases. `label_smoothing`: the share of a label
    that all classes have alike. `trunk_rate`: the learning rate of the convolutions,
    for one of the head.
    """

    momentum: Annotated[float, between(0, 1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, at_least(0)] = 5e-4
    label_smoothing: Annotated[float, between(0, 1)] = 0.0
    trunk_rate: Annotated[float, at_least(0)] = 1.0

    def transform(self, frozen: Collection[str] = ()) -> Any:
        """The updates for a learning rate of 1; none of the `frozen` layers."""
        import optax

        sgd = optax.chain(
            optax.add_decayed_weights(self.weight_decay, mask=_is_kernel),
            optax.trace(decay=self.momentum, nesterov=self.nesterov),
        )
        if not frozen and self.trunk_rate == 1:
            return sgd

        def groups(params: Any) -> dict[str, str]:
            return {
                name: "frozen"
                if name in frozen
                else ("trunk" if name.startswith("conv") else "head")
                for name in params
            }

        kinds = {
            "frozen": optax.set_to_zero(),
            "trunk": optax.chain(sgd, optax.scale(self.trunk_rate)),
            "head": sgd,
        }
        return optax.multi_transform(kinds, groups)


def create_state(
    model: SPPNet,
    optimizer: Optimizer,
    seed: int,
    *,
    frozen: Collection[str] = (),
    begin: Callable[[Any], Any] | None = None,
) -> TrainState:
    """A fresh state, replicated over the devices.

    `frozen`: layers that are not trained. `begin`: from drawn parameters to those that
    training begins with.
    """
    transform = optimizer.transform(frozen)

    def init(rng: jax.Array) -> TrainState:
        params_rng, state_rng = jax.random.split(rng)
        params = init_params(model, params_rng)
        momentum = transform.init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, momentum, state_rng)

    if begin is None:
        return parallel.make_replicated(init, jax.random.PRNGKey(seed))
    state = jax.jit(init)(jax.random.PRNGKey(seed))
    return parallel.replicate(state._replace(params=begin(state.params)))


def shard_batch(batch: dict[str, Any]) -> Batch:
    """What the steps take of a host batch, its rows split over the local devices."""
    return parallel.shard({name: batch[name] for name in ("image", "label", "mask")})


def make_step(
    losses_of: Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array]],
    optimizer: Optimizer,
    frozen: Collection[str] = (),
) -> Any:
    """The jitted step `(state, batch, learning_rate) -> (state, metrics)`.

    The state is donated. Metrics: sums over the batch of all devices, "loss",
    "correct" and "count".

    `losses_of`: from parameters, a device's batch ("label", "mask" and what else it
    takes) and a key for random numbers to the losses [rows] and logits [rows, classes].
    `frozen`: layers that stay as they are.
    """
    import optax  # not above: settings have no need of it

    transform = optimizer.transform(frozen)

    def step(
        state: TrainState, batch: Batch, learning_rate: jax.Array
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        rng = jax.random.fold_in(rng, parallel.device_index())
        count = parallel.sum_over_devices(batch["mask"].sum())

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            losses, logits = losses_of(params, batch, rng)
            losses = losses * batch["mask"]
            # This device's share of the mean over the whole batch.
            return losses.sum() / jnp.maximum(count, 1), (losses, logits)

        grads, (losses, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        grads = parallel.sum_over_devices(grads)
        updates, momentum = transform.update(grads, state.optimizer, state.params)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        correct = (logits.argmax(-1) == batch["label"]) & batch["mask"]
        metrics = {
            "loss": parallel.sum_over_devices(losses.sum()),
            "correct": parallel.sum_over_devices(correct.sum()),
            "count": count,
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, momentum, state.rng), metrics

    return parallel.data_parallel(step, scalars=1, donate_state=True)


def make_train_step(
    model: SPPNet,
    optimizer: Optimizer,
    preprocessing: Preprocessing,
    *,
    size: int | None = None,
    frozen: Collection[str] = (),
) -> Any:
    """The step of a whole network, see `make_step`, on batches of uint8 images.

    `size`: the side that the batch's images are resized to on the device; None trains
    on them as they come. A smaller input is the same crop, resized (section 2.3).
    `frozen`: layers that stay as they are.
    """

    def losses_of(
        params: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        color_rng, dropout_rng = jax.random.split(rng)
        images = alter_colors(batch["image"], color_rng, preprocessing)
        if size is not None:
            images = resize(images, size)
        logits, _ = model.apply(
            {"params": params},
            normalize(images, preprocessing),
            train=True,
            rngs={"dropout": dropout_rng},
        )
        return smoothed_losses(logits, batch["label"], optimizer), logits

    return make_step(losses_of, optimizer, frozen)


def smoothed_losses(
    logits: jax.Array, labels: jax.Array, optimizer: Optimizer
) -> jax.Array:
    """The cross entropy of each row, with the optimizer's label smoothing."""
    import optax

    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, logits.shape[-1]), optimizer.label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets)


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda x: np.ndim(x) > 1, params)
