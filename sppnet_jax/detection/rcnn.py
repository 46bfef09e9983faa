"""The R-CNN twin: each box is warped to the network's input and convolved by itself.

The same network, proposals, SVMs and evaluation as SPP-net's (section 4.3 of the paper
compares both so), but 2,000 passes through the convolutions for an image, not one.
What they give is kept on disk for each image, FOLDER/INDEX.npy, whole or not at all:
the map of each window, or its pooled vector where that is smaller.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import Source
from sppnet_jax.detection.warp import warp_windows
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.network.trained import Network
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run import parallel
from sppnet_jax.run.files import read_array, write_array
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.run.shares import ALONE, Share
from sppnet_jax.training.ahead import StepsAhead

PAPER_CONTEXT = 16 / 227  # of the warped side, on each side of the window

log = logging.getLogger(__name__)


def convolve_windows(
    network: Network,
    source: Source,
    boxes: Sequence[np.ndarray],
    folder: Path,
    *,
    context: int,
    batch_size: int = 128,
    threads: int = 8,
    dtype: str = "float32",
    share: Share = ALONE,
) -> None:
    """Writes what the convolutions give each box of each image, where it is not there.

    `boxes`: float [N, 4] for each image, in its pixels.
    `context`: pixels of the warped window that show the surroundings, on each side.
    `batch_size`: warped windows that are convolved at a time.
    `share`: of several processes that write into the folder.
    """
    files = [_windows_file(folder, index) for index in range(len(boxes))]
    done = sum(file.exists() for file in files)
    missing = share.missing(files, "windows of R-CNN")
    run = windows_function(network, batch_size=batch_size)
    fill, side = fill_color(network.preprocessing), network.model.image_size
    broken = BrokenImages(source)

    def load(_: int) -> tuple[int, np.ndarray | None] | None:
        index = next(missing, None)
        if index is None:
            return None
        try:
            image = decode_image(source.records[index]["image"])
        except ValueError:
            return index, None
        own = boxes[index]
        return index, warp_windows(image, own, side, context=context, fill=fill)

    with (
        StepsAhead(load, len(files) + 1) as ahead,
        progress_bar("windows of R-CNN", len(files), done=done) as bar,
    ):
        while (loaded := next(ahead)) is not None:
            index, warped = loaded
            if warped is None:
                broken.add(index)
                found = np.zeros((0, 0, 0, 0))
            else:
                found = run(warped)
            write_array(files[index], found.astype(dtype))
            bar.update()
    broken.summarize()


def load_windows(folder: Path, index: int) -> np.ndarray:
    """What is kept of an image's windows, [N, …]; read as far as it is used."""
    return read_array(_windows_file(folder, index), mmap_mode="r")


def _windows_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"


def windows_function(
    network: Network, *, batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """From warped windows uint8 [N, side, side, 3] to what is kept of each, [N, …].

    Runs in batches on all devices.
    """
    model, preprocessing = network.model, network.preprocessing
    pooled = stores_pooled(model)

    def convolve(params: Any, images: jax.Array) -> jax.Array:
        inputs = normalize(images, preprocessing)
        maps, _ = model.apply({"params": params}, inputs, method="features")
        if pooled:
            maps = model.apply({"params": params}, maps, method="pool")
        return maps.astype(jnp.float32)

    program = parallel.data_parallel(convolve)
    replicated = parallel.replicate(network.params)
    batch = parallel.round_up_to_devices(batch_size)

    def run(warped: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, max(1, len(warped)), batch):
            part = warped[start : start + batch]
            padded = np.zeros((batch, *warped.shape[1:]), np.uint8)
            padded[: len(part)] = part
            result = program(replicated, parallel.shard(padded))
            found.append((len(part), result))
        return np.concatenate(
            [np.asarray(rows).reshape(batch, *rows.shape[2:])[:n] for n, rows in found]
        )

    return run


def kept_as(model: SPPNet) -> str:
    """What is kept of each window, in words."""
    return "pooled vectors" if stores_pooled(model) else "maps of windows"


def stores_pooled(model: SPPNet) -> bool:
    """Whether a window's pooled vector is smaller than its map, and so is kept."""
    if model.levels is None:
        return True
    side = model.geometry.map_size(model.image_size)
    return side * side > num_bins(model.levels)


def levels_to_pool(model: SPPNet) -> tuple[int, ...] | None:
    """The pyramid's levels where a window's map is kept, None for its pooled vector."""
    return None if stores_pooled(model) else model.levels


def fill_color(preprocessing: Preprocessing) -> np.ndarray:
    """The colour of what lies outside an image, 3 values: the mean, so zero after."""
    mean = np.asarray(preprocessing.mean, np.float32)
    return np.broadcast_to(mean.mean(axis=(0, 1)) if mean.ndim == 3 else mean, (3,))
