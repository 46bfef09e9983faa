"""Keeps count of the images that could not be decoded, and names each once."""

import logging

import numpy as np

from sppnet_jax.data.sources import Source

log = logging.getLogger(__name__)

MAX_NAMED = 20


class BrokenImages:
    """Counts a source's broken records as they come up."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def report(self, batch: dict[str, np.ndarray]) -> None:
        """Logs the records that this batch had to skip and no batch before it."""
        skipped = batch["index"][~batch["mask"]]
        for index in sorted(int(i) for i in skipped if i >= 0):
            self.add(index)

    def add(self, index: int) -> None:
        """Logs one broken record, unless it is known."""
        if index in self._seen:
            return
        self._seen.add(index)
        if len(self._seen) <= MAX_NAMED:
            # Here, not above: a start has no need of it, and it takes a while.
            from sppnet_jax.data.batches import describe_broken

            told = describe_broken(self._source, index)
            log.warning("skipping a broken image: %s", told)
        elif len(self._seen) == MAX_NAMED + 1:
            log.warning("more broken images are counted, not named")

    def summarize(self) -> None:
        """Logs how many records were broken, if any."""
        if self._seen:
            log.warning(
                "skipped %d broken images of the %d in split %r of %s",
                len(self._seen),
                len(self._source.records),
                self._source.split,
                self._source.name,
            )
