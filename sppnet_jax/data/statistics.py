"""The mean image and the colour covariance of a training set."""

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sppnet_jax.data.batches import eval_batches
from sppnet_jax.data.images import READING
from sppnet_jax.data.sources import Source, subset
from sppnet_jax.run.files import read_arrays, write_arrays
from sppnet_jax.run.progress import progress_bar

log = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """Of pixels in 0 to 255: `mean_image` [s, s, 3], RGB `covariance` [3, 3]."""

    mean_image: np.ndarray
    covariance: np.ndarray


def kept_statistics(
    source: Source, folder: Path | None, *, threads: int = 8, **settings: int
) -> Statistics:
    """`image_statistics` of the same arguments, computed once and kept in a folder.

    Found again by the source's `digest` and the settings. Where `folder` is None or the
    source has no digest, nothing is kept.
    """
    if folder is None or not source.digest:
        return image_statistics(source, **settings, threads=threads)
    key = repr((READING, source.digest, sorted(settings.items())))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    with contextlib.suppress(Exception):  # absent, damaged or closed: computed
        return Statistics(**read_arrays(path))
    statistics = image_statistics(source, **settings, threads=threads)
    try:
        write_arrays(path, **statistics._asdict())
    except OSError as error:
        log.warning("the statistics of the images are not kept: %s", error)
    return statistics


def image_statistics(
    source: Source,
    *,
    image_size: int,
    resize_side: int,
    max_images: int = 10_000,
    threads: int = 8,
) -> Statistics:
    """Statistics of the centre crops of at most `max_images` evenly spaced records.

    Broken images do not count. Raises: ValueError if no image can be decoded.
    """
    total = len(source.records)
    indices = np.unique(np.linspace(0, total - 1, min(total, max_images)).astype(int))
    pixels, count = np.zeros((image_size, image_size, 3)), 0
    products = np.zeros((3, 3))
    batches = eval_batches(
        subset(source, indices),
        batch_size=32,
        image_size=image_size,
        resize_side=resize_side,
        threads=threads,
    )
    with batches, progress_bar("image statistics", len(indices)) as bar:
        for batch in batches:
            images = batch["image"][batch["mask"]].astype(np.float32)
            pixels += images.sum(axis=0, dtype=np.float64)
            flat = images.reshape(-1, 3)
            products += flat.T @ flat
            count += len(images)
            bar.update(int((batch["index"] >= 0).sum()))
    if not count:
        raise ValueError(
            f"none of the {len(indices)} images read from {source.name!r}, split "
            f"{source.split!r}, can be decoded"
        )
    mean_image = pixels / count
    mean = mean_image.mean(axis=(0, 1))
    covariance = products / (count * image_size**2) - np.outer(mean, mean)
    return Statistics(mean_image.astype(np.float32), covariance.astype(np.float32))
