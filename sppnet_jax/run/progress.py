"""The progress bars of all that takes a while."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from sppnet_jax.run import parallel


def progress_bar(name: str, images: int, *, done: int = 0, delay: float = 0) -> tqdm:
    """A bar over so many images, shown by the first process; a context manager.

    `done`: images that were done before. `delay`: seconds until it is shown.
    """
    return tqdm(
        total=images,
        initial=done,
        unit="img",
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
