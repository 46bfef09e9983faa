"""Training the head of a frozen trunk, on features that are computed once.

Each image goes through the trunk once, and once mirrored; every epoch after that is a
few matrix products. The loop, the steps and what is kept are those of any training.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sppnet_jax.data.images import READING
from sppnet_jax.data.sources import Source
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trained import Network, as_network
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run import parallel
from sppnet_jax.run.files import read_array, write_array
from sppnet_jax.run.stages import digest_of
from sppnet_jax.training.layer_features import (
    Features,
    default_side,
    extract_features,
)
from sppnet_jax.training.network_settings import NetworkSettings
from sppnet_jax.training.steps import Optimizer, make_step, smoothed_losses
from sppnet_jax.training.validation import make_counts, mean_counts

Batch = dict[str, np.ndarray]
LENGTH = 20.0


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
    folder: Path | None = None,
) -> Pooled:
    """What the frozen trunk makes of a split's images, in the order of its records.

    `mirror`: also of the mirrored images. Broken images are left out.
    `folder`: keeps each level's bins there, for other pyramids and other heads.
    """
    network = as_network(model, params, preprocessing, source.class_names)
    get = functools.partial(_pooled_levels, settings, network, source, folder=folder)
    values, labels = get(mirrored=False)
    return Pooled(values, get(mirrored=True)[0] if mirror else None, labels)


def _pooled_levels(
    settings: NetworkSettings,
    network: Network,
    source: Source,
    *,
    mirrored: bool,
    folder: Path | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled vectors [N, D] and labels [N], of levels in the folder and new ones."""
    data, model = settings.data, network.model
    side = default_side(
        data.view, image_size=data.image_size, resize_side=data.resize_side
    )

    def extract(levels: Sequence[int]) -> Features:
        pooled = dataclasses.replace(network, model=model.clone(levels=tuple(levels)))
        return extract_features(
            pooled,
            source,
            layer="pyramid",
            side=side,
            mode=data.view,
            batch_size=min(settings.batch_size, 32),
            mirrored=mirrored,
            **data.loading,
        )

    levels = model.levels or ()
    if folder is None:
        found = extract(levels)
        return found.values, found.labels
    key = {
        "trunk": network.trunk_digest,
        "data": [source.name, source.split, source.digest, list(source.class_names)],
        "seen": [data.view, side, model.image_size, mirrored, model.reducer],
        "reading": READING,
    }
    folder = folder / digest_of(key)
    files = {level: folder / f"{level}.npy" for level in levels}
    missing = [level for level, file in files.items() if not file.exists()]
    if missing:
        found = extract(missing)
        ends = np.cumsum([n * n for n in missing]) * (
            found.values.shape[1] // num_bins(missing)
        )
        parts = np.split(found.values, ends[:-1], axis=1)
        write_array(folder / "labels.npy", found.labels)
        for level, values in zip(missing, parts, strict=True):
            write_array(files[level], values)
    values = np.concatenate([read_array(files[level]) for level in levels], axis=1)
    return values, read_array(folder / "labels.npy")


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


def make_head_step(
    model: SPPNet, optimizer: Optimizer, frozen: Any, pooled: Pooled
) -> Any:
    """The step of a head, see `make_step`, on batches of pooled vectors.

    One learning rate suits every pyramid: the first layer learns as if the vectors had
    a mean length of 20, as detectors' SVMs see them.
    """
    lengths = np.linalg.norm(pooled.values, axis=1)
    gain = float((LENGTH / max(lengths.mean(), 1e-6)) ** 2)
    first = "fc6" if model.head == "fc" else "fc8"

    def faster(kernel: jax.Array) -> jax.Array:
        """The same kernel, with so many times its gradient."""
        return gain * kernel + jax.lax.stop_gradient((1 - gain) * kernel)

    def losses_of(
        params: Any, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        layer = {**params[first], "kernel": faster(params[first]["kernel"])}
        logits, _ = model.apply(
            {"params": {**params, first: layer}},
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
        sums: dict[str, float] = {"count": 0}
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
        return mean_counts(sums, records)

    return test
