"""Testing a classifier: exact counts over a whole split, on any number of devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from sppnet_jax import parallel
from sppnet_jax.classification.step import shard_batch
from sppnet_jax.data.pipeline import Batches, Example


def count_correct(
    test_step: Callable[..., Any],
    params: Any,
    batches: Batches,
    *,
    records: int,
    show_progress: bool = False,
    on_batch: Callable[[Example, np.ndarray], None] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy over batches, every valid example counted once.

    `params`: replicated. `batches`: of `eval_batches` over `records` records; closed at
    the end. `on_batch`: called with each batch and its softmax scores [rows, classes],
    on this process.

    Returns: "loss", "top1", "top5" as means in 0 to 1, and "count", "broken".
    Raises: ValueError if no example could be tested.
    """
    sums: dict[str, float] = dict.fromkeys(("loss", "top1", "top5", "count"), 0)
    hidden = not (show_progress and parallel.is_first_process())
    with batches, tqdm(total=records, unit="img", disable=hidden) as bar:
        for batch in batches:
            counts, scores = test_step(params, shard_batch(batch))
            for name, value in parallel.unreplicate(counts).items():
                sums[name] += float(value)
            if on_batch is not None:
                on_batch(batch, np.asarray(scores).reshape(len(batch["mask"]), -1))
            seen = int((batch["index"] >= 0).sum()) * jax.process_count()
            bar.update(min(seen, records - bar.n))
    count = int(sums.pop("count"))
    if not count:
        raise ValueError("there is no valid example to test: every image is broken")
    means = {name: value / count for name, value in sums.items()}
    return {**means, "count": count, "broken": records - count}


class Scored(NamedTuple):
    """One tested example: what the network saw, its scores [classes], its label."""

    image: np.ndarray
    scores: np.ndarray
    label: int


class Sample:
    """Keeps `size` evenly spaced examples of a test, to show to a person."""

    def __init__(self, records: int, size: int) -> None:
        spaced = np.linspace(0, records - 1, min(size, records))
        self._wanted = {int(index) for index in spaced}
        self._kept: dict[int, Scored] = {}

    def add(self, batch: Example, scores: np.ndarray) -> None:
        """Takes what it wants from a batch and its scores [rows, classes]."""
        for row, index in enumerate(batch["index"].tolist()):
            if index in self._wanted and batch["mask"][row]:
                self._kept[index] = Scored(
                    batch["image"][row], scores[row], int(batch["label"][row])
                )

    def examples(self) -> list[Scored]:
        """The kept examples in the order of the records."""
        return [self._kept[index] for index in sorted(self._kept)]
