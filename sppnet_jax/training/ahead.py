"""Batches that follow from the number of their step, loaded ahead."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class StepsAhead:
    """Batches that follow from the number of their step; the next are loaded ahead.

    `ahead`: how many, at the same time. The first is loaded alone.

    A context manager, whose threads end with it.
    """

    def __init__(self, load: Callable[[int], Any], steps: int, ahead: int = 1) -> None:
        self._load, self._steps, self._step, self._ahead = load, steps, 0, ahead
        self._pool = ThreadPoolExecutor(ahead)
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> "StepsAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Any:
        self.start_prefetch()
        assert self._waiting, "there is no step left"
        batch = self._waiting.popleft().result()
        self._step += 1
        self.start_prefetch(self._ahead)
        return batch

    def start_prefetch(self, count: int = 1) -> None:
        """Begins to load the next batches, so many in all."""
        last = min(self._step + count, self._steps)
        for step in range(self._step + len(self._waiting), last):
            self._waiting.append(self._pool.submit(self._load, step))

    def get_state(self) -> dict[str, Any]:
        """The number of the next step."""
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on at a step."""
        self._step = int(state["step"])
        self._waiting.clear()
