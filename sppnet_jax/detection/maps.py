"""The feature maps of every image of a split, computed once and kept on disk.

Each image is convolved whole, once for each scale, in buckets. What is kept are maps,
not pooled vectors: an image's maps have some thousand cells, its 2,000 windows 50 bins
each. All that follows pools its windows from these files.

A file a scale and image, FOLDER/SIDE/INDEX.npy, float [rows, columns, channels], is
written whole or not at all, so an interrupted run goes on where it stopped.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.buckets.table import pad_to_bucket, smallest_bucket
from sppnet_jax.buckets.whole_images import (
    MAX_ASPECT,
    fit_table,
    map_whole_images,
    photo_buckets,
)
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.images import decode_part, image_size, resize_whole, whole_size
from sppnet_jax.data.sources import Source
from sppnet_jax.detection.scales import Size, map_size_of
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.network.trained import Network
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.run.caches import jit_once
from sppnet_jax.run.files import read_array, write_array
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.run.shares import ALONE, Share

log = logging.getLogger(__name__)


def convolve_split(
    network: Network,
    source: Source,
    folder: Path,
    *,
    sides: Sequence[int],
    batch_size: int,
    max_buckets: int = 4,
    threads: int = 8,
    dtype: str = "float32",
    share: Share = ALONE,
) -> None:
    """Writes the last map of every image at every scale, those that are not there yet.

    A map is the same to the last bit whichever process makes it, in whichever run.

    `sides`: the image's shorter side at each scale, in pixels.
    `batch_size`: of images of the training size; larger images come in smaller batches.
    `max_buckets`: compiled programs for each scale.
    `dtype`: of the files; "float16" halves them, at the cost of some exactness.
    `share`: of several processes that write into the folder.

    Raises: ValueError for a network without a pyramid, or a scale that is too small.
    """
    if network.model.levels is None:
        raise ValueError(
            "this network has no spatial pyramid (levels=None): it can't pool windows "
            "from the map of a whole image. Train one with levels such as (6, 3, 2, 1)"
        )
    function = map_function(network.model, network.preprocessing)
    broken = BrokenImages(source)
    images = range(len(source.records))
    for side in sides:
        files = [map_file(folder, side, index) for index in images]
        done = sum(file.exists() for file in files)
        if done == len(files):
            continue
        # Fitted to all images, not to the missing ones: buckets decide the last bits.
        table = fit_table(
            function,
            network,
            source,
            side,
            batch_size=batch_size,
            max_buckets=max_buckets,
            threads=threads,
        )
        sizes = scaled_sizes(image_sizes(source, threads), side)
        with progress_bar(f"maps at {side}", len(files), done=done) as bar:

            def seen(example: Any, files: Any = files) -> None:
                if not example["mask"]:
                    index = int(example["index"])
                    broken.add(index)
                    write_array(files[index], np.zeros((0, 0, 0)))

            for index, found in map_whole_images(
                table,
                source,
                side,
                threads=threads,
                strict=False,
                on_example=seen,
                indices=share.missing(files, f"maps at {side}"),
                join=False,
            ):
                rows, columns = map_size_of(sizes[index], network.geometry)
                write_array(files[index], found[:rows, :columns].astype(dtype))
                bar.update()
        log.info("shorter side %d\n%s", side, table)
    broken.summarize()


def mean_cells(sizes: np.ndarray, sides: Sequence[int], geometry: Geometry) -> float:
    """How many cells the maps of an image have at all scales together, on average.

    `sizes`: (height, width) of the images, int [N, 2].
    """
    scaled = np.concatenate([scaled_sizes(sizes, side) for side in sides])
    cells = sum(math.prod(map_size_of(tuple(size), geometry)) for size in scaled)
    return cells / max(len(sizes), 1)


def map_function(model: SPPNet, preprocessing: Preprocessing) -> Any:
    """From (params, images uint8, valid sizes) to the last maps, as `BucketTable` runs.

    The maps are float32, zero beyond each image's own map.
    """

    def maps(params: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        inputs = normalize(images, preprocessing, sizes)
        found, _ = model.apply({"params": params}, inputs, sizes, method="features")
        return found.astype(jnp.float32)

    return maps


def convolve_image(
    network: Network, image: np.ndarray, *, sides: Sequence[int]
) -> list[np.ndarray]:
    """The maps of an image that is at hand, one at each scale.

    It is padded into one of `photo_buckets`: their programs serve all images that any
    network of this model sees in this process.

    `image`: uint8 [height, width, 3]. `sides`: as for `convolve_split`.

    Returns: float32 [rows, columns, channels] each.
    """
    maps = []
    for side in sides:
        resized = resize_whole(image, side, MAX_ASPECT)
        size = resized.shape[0], resized.shape[1]
        padded = pad_to_bucket(resized, smallest_bucket(size, photo_buckets(side)))
        found = _last_maps(network.model)(
            tuple(network.preprocessing),
            network.params,
            padded[None],
            np.array([size], np.int32),
        )
        rows, columns = map_size_of(size, network.geometry)
        maps.append(np.asarray(found)[0, :rows, :columns])
    return maps


@functools.cache
def _last_maps(model: SPPNet) -> Callable[..., jax.Array]:
    """The program of `map_function`, of (preprocessing, params, images, sizes)."""

    def maps(preprocessing: Any, *arguments: Any) -> jax.Array:
        return map_function(model, Preprocessing(*preprocessing))(*arguments)

    return jit_once(maps, repr(model))


def load_maps(folder: Path, sides: Sequence[int], index: int) -> list[np.ndarray]:
    """The maps of one image at all scales, float [rows, columns, channels] each.

    Those of a broken image are empty. Raises: FileNotFoundError where there are none.
    """
    return [read_array(map_file(folder, side, index)) for side in sides]


def map_file(folder: Path, side: int, index: int) -> Path:
    """Where the map of an image at a scale is kept."""
    return folder / str(side) / f"{index:06d}.npy"


def image_sizes(source: Source, threads: int = 8) -> np.ndarray:
    """The (height, width) of every image, int [N, 2]; (0, 0) if it can't be read."""

    def measure(index: int) -> Size:
        try:
            return image_size(source.records[index]["image"])
        except ValueError:
            return 0, 0

    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(measure, range(len(source.records))))
    return np.array(sizes, np.int64).reshape(-1, 2)


def decodable(source: Source, threads: int = 8) -> np.ndarray:
    """Which images can be decoded, bool [N]; it takes decoding them."""

    def try_one(index: int) -> bool:
        try:
            decode_part(source.records[index]["image"], 1)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        return np.array(list(pool.map(try_one, range(len(source.records)))), bool)


def scaled_sizes(sizes: np.ndarray, side: int) -> np.ndarray:
    """The (height, width) that images have at a scale, int [N, 2].

    Images longer than 4:1 are squeezed to it; unreadable ones count as squares.
    """
    scaled = [
        whole_size(int(height), int(width), side, MAX_ASPECT)
        if height and width
        else (side, side)
        for height, width in sizes
    ]
    return np.array(scaled, np.int64).reshape(-1, 2)
