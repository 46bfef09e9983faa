"""Training the head of a frozen trunk, on features that are computed once.

Each image goes through the trunk once, and once mirrored; every epoch after that is a
few matrix products. The loop, the steps and what is kept are those of any training.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sppnet_jax.data.sources import Source
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trained import as_network
from sppnet_jax.run import parallel
from sppnet_jax.training.layer_features import default_side, extract_features
from sppnet_jax.training.network_settings import NetworkSettings
from sppnet_jax.training.steps import Optimizer, make_step, smoothed_losses
from sppnet_jax.training.validation import make_counts

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


class Pooled(NamedTuple):
    """A split's pooled vectors, float32 [N, D], mirrored ones if any; labels [N]."""

    values: np.ndarray
    mirrored: np.ndarray | None
    labels: np.ndarray


def pool_split(
    settings: NetworkSettings,
    model: SPPNet,
    params: Any,
    preprocessing: Preprocessing,
    source: Source,
    *,
    mirror: bool,
) -> Pooled:
    """What the frozen trunk makes of a split's images, in the order of its records.

    `mirror`: also of the mirrored images. Broken images are left out.
    """
    data = settings.data
    network = as_network(model, params, preprocessing, source.class_names)

    def extract(mirrored: bool) -> Any:
        return extract_features(
            network,
            source,
            layer="pyramid",
            side=default_side(
                data.view, image_size=data.image_size, resize_side=data.resize_side
            ),
            mode=data.view,
            batch_size=min(settings.batch_size, 32),
            mirrored=mirrored,
            **data.loading,
        )

    own = extract(False)
    other = extract(True).values if mirror else None
    return Pooled(own.values, other, own.labels)


def batch_loader(
    pooled: Pooled, batch_size: int, seed: int
) -> tuple[Callable[[int], Batch], int]:
    """From the number of a step to this process's rows of its batch; steps an epoch.

    Every epoch sees each image once, in an order of its own, mirrored half of the
    times. The last batch of an epoch is left out where it is not full.
    """
    count = len(pooled.labels)
    if count < batch_size:
        raise ValueError(
            f"there are {count} images that can be read, and config.batch_size is "
            f"{batch_size}: lower it"
        )
    steps = count // batch_size

    def load(step: int) -> Batch:
        epoch, place = divmod(step, steps)
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(count)[place * batch_size : (place + 1) * batch_size]
        rows = order[jax.process_index() :: jax.process_count()]
        values = pooled.values[rows]
        if pooled.mirrored is not None:
            swap = np.random.default_rng((seed, epoch, place)).random(batch_size) < 0.5
            swap = swap[jax.process_index() :: jax.process_count()]
            values[swap] = pooled.mirrored[rows[swap]]
        return {
            "pooled": values,
            "label": pooled.labels[rows],
            "mask": np.ones(len(rows), bool),
        }

    return load, steps


def make_head_step(model: SPPNet, optimizer: Optimizer, frozen: Any) -> Any:
    """The step of a head, see `make_step`, on batches of pooled vectors."""

    def losses_of(
        params: Any, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits, _ = model.apply(
            {"params": params},
            batch["pooled"],
            train=True,
            rngs={"dropout": rng},
            method="classify",
        )
        return smoothed_losses(logits, batch["label"], optimizer), logits

    return make_step(losses_of, optimizer, frozen)


def make_head_test(model: SPPNet, pooled: Pooled, batch_size: int, records: int) -> Any:
    """From replicated parameters to the metrics of a split, see `count_correct`."""
    size = parallel.round_up_to_devices(batch_size)
    index, processes = jax.process_index(), jax.process_count()

    def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits, _ = model.apply({"params": params}, batch["pooled"], method="classify")
        return make_counts(logits, batch["label"], batch["mask"])

    program = parallel.data_parallel(step)

    def test(params: Any) -> dict[str, float]:
        sums: dict[str, float] = {}
        for start in range(0, len(pooled.labels), size):
            values = pooled.values[start : start + size]
            missing = size - len(values)
            batch = {
                "pooled": np.pad(values, ((0, missing), (0, 0))),
                "label": np.pad(pooled.labels[start : start + size], (0, missing)),
                "mask": np.arange(size) < len(values),
            }
            own = {name: rows[index::processes] for name, rows in batch.items()}
            counts = parallel.unreplicate(program(params, parallel.shard(own)))
            for name, value in counts.items():
                sums[name] = sums.get(name, 0) + float(value)
        count = int(sums.pop("count", 0))
        if not count:
            raise ValueError("there is no valid example to test: every image is broken")
        means = {name: value / count for name, value in sums.items()}
        return {**means, "count": count, "broken": records - count}

    return test
