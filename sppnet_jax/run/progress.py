"""The progress bars of all that takes a while, and who else wants to know."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from sppnet_jax.run import parallel

# Called with a bar's name and how many images are done, after each piece of long work:
# for what shows progress in another way, and for tests that end a run in its middle.
WATCHERS: list[Callable[[str, int], None]] = []


class _WatchedBar(tqdm):
    """A bar that tells the watchers too."""

    def __init__(self, *, initial: int, **options: Any) -> None:
        self._name, self._images = options["desc"], initial
        super().__init__(initial=initial, **options)

    def update(self, n: float | None = 1) -> bool | None:
        self._images += int(n or 0)  # tqdm does not count where it is not shown
        shown = super().update(n)
        for watch in WATCHERS:
            watch(self._name, self._images)
        return shown


def progress_bar(
    name: str, images: int, *, done: int = 0, delay: float = 0, unit: str = "img"
) -> tqdm:
    """A bar over so many images, shown by the first process; a context manager.

    `done`: images that were done before. `delay`: seconds until it is shown.
    `unit`: of what is counted, where it is no images.
    """
    return _WatchedBar(
        total=images,
        initial=done,
        unit=unit,
        desc=name,
        delay=delay,
        # In a file each update is a line of its own.
        mininterval=0.5 if sys.stderr.isatty() else 20,
        disable=not parallel.is_first_process(),
    )


def map_in_threads(
    function: Callable[[Any], Any], items: Sequence[Any], name: str, threads: int
) -> list[Any]:
    """What a function returns for each item, in order, with a bar if it takes long."""
    results = []
    bar = progress_bar(name, len(items), delay=2)
    with bar, ThreadPoolExecutor(threads) as pool:
        for result in pool.map(function, items):
            results.append(result)
            bar.update()
    return results
