"""The progress bars of all that takes a while."""

import sys

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
