"""The test after each epoch: exact counts over a whole split, on all devices."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from sppnet_jax.data.batches import Batches
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.run import parallel
from sppnet_jax.training.steps import Batch, Metrics, shard_batch


def make_test_step(
    model: SPPNet, preprocessing: Preprocessing
) -> Callable[..., Metrics]:
    """The step `(params, batch) -> counts`.

    Counts: sums over all devices, "loss", "top1", "top5" and "count".
    """

    def step(params: Any, batch: Batch) -> Metrics:
        images = normalize(batch["image"], preprocessing)
        logits, _ = model.apply({"params": params}, images)
        return make_counts(logits, batch["label"], batch["mask"])

    return parallel.data_parallel(step)


def make_counts(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Metrics:
    """The sums over all devices, inside a data-parallel step; see `make_test_step`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    hits = best == labels[:, None]
    counts = {
        "loss": (losses * mask).sum(),
        "top1": (hits[:, 0] & mask).sum(),
        "top5": (hits.any(axis=1) & mask).sum(),
        "count": mask.sum(),
    }
    return parallel.sum_over_devices(counts)


def count_correct(
    test_step: Callable[..., Any],
    params: Any,
    batches: Batches,
    *,
    records: int,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy over batches, every valid example counted once.

    `params`: replicated. `batches`: of `eval_batches` over `records` records; closed at
    the end.

    Returns: "loss", "top1", "top5" as means in 0 to 1, and "count", "broken".
    Raises: ValueError if no example could be tested.
    """
    sums: dict[str, float] = dict.fromkeys(("loss", "top1", "top5", "count"), 0)
    with batches:
        for batch in batches:
            counts = test_step(params, shard_batch(batch))
            for name, value in parallel.unreplicate(counts).items():
                sums[name] += float(value)
    return mean_counts(sums, records)


def mean_counts(sums: dict[str, float], records: int) -> dict[str, float]:
    """The metrics that `count_correct` returns, from the sums over `records` records.

    Raises: ValueError if no example could be tested.
    """
    count = int(sums["count"])
    if not count:
        raise ValueError("there is no valid example to test: every image is broken")
    means = {name: value / count for name, value in sums.items() if name != "count"}
    return {**means, "count": count, "broken": records - count}
