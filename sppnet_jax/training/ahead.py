"""Batches that follow from the number of their step, loaded one ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class StepsAhead:
    """Batches that follow from the number of their step; the next is loaded ahead.

    A context manager, whose thread ends with it.
    """

    def __init__(self, load: Callable[[int], Any], steps: int) -> None:
        self._load, self._steps, self._step = load, steps, 0
        self._pool = ThreadPoolExecutor(1)
        self._waiting: Future[Any] | None = None

    def __enter__(self) -> "StepsAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Any:
        self.start_prefetch()
        assert self._waiting is not None, "there is no step left"
        batch = self._waiting.result()
        self._waiting, self._step = None, self._step + 1
        self.start_prefetch()
        return batch

    def start_prefetch(self) -> None:
        """Begins to load the next batch."""
        if self._waiting is None and self._step < self._steps:
            self._waiting = self._pool.submit(self._load, self._step)

    def get_state(self) -> dict[str, Any]:
        """The number of the next step."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at a step."""
        self._step, self._waiting = int(state["step"]), None
