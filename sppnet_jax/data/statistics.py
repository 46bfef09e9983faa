"""The mean image and the colour covariance of a training set."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sppnet_jax.data.batches import eval_batches
from sppnet_jax.data.sources import Record, Records, Source, TfdsRecords
from sppnet_jax.run.files import read_arrays, write_arrays

log = logging.getLogger(__name__)


class Statistics(NamedTuple):
    """Of pixels in 0 to 255: `mean_image` [s, s, 3], RGB `covariance` [3, 3]."""

    mean_image: np.ndarray
    covariance: np.ndarray


_VERSION = 1


def kept_statistics(
    source: Source,
    folder: Path | None,
    *,
    image_size: int,
    resize_side: int,
    max_images: int = 10_000,
    threads: int = 4,
) -> Statistics:
    """`image_statistics` of the same arguments, computed once and kept in a folder.

    Found again by the files that the records are read from, their sizes and times, and
    the sizes of images here. What can't be written or read is computed, and where
    `folder` is None, all.
    """
    settings = {
        "image_size": image_size,
        "resize_side": resize_side,
        "max_images": max_images,
    }
    # Raise _VERSION when images are decoded or resized in another way.
    state = source.records.state() if isinstance(source.records, TfdsRecords) else ""
    if folder is None or not state:
        return image_statistics(source, **settings, threads=threads)
    key = hashlib.sha256(repr((_VERSION, state, settings)).encode()).hexdigest()[:32]
    path = folder / f"{key}.npz"
    try:
        if path.exists():
            return Statistics(**read_arrays(path))
    except Exception as error:  # NumPy raises errors of many types for odd files
        log.warning("%s can't be read, so it is made again: %s", path, error)
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
    threads: int = 4,
) -> Statistics:
    """Statistics of the centre crops of at most `max_images` evenly spaced records.

    Broken images do not count. Raises: ValueError if no image can be decoded.
    """
    total = len(source.records)
    indices = np.unique(np.linspace(0, total - 1, min(total, max_images)).astype(int))
    sample = source._replace(records=_Subset(source.records, indices))
    pixels, count = np.zeros((image_size, image_size, 3)), 0
    products = np.zeros((3, 3))
    batches = eval_batches(
        sample,
        batch_size=32,
        image_size=image_size,
        resize_side=resize_side,
        threads=threads,
    )
    with batches, tqdm(total=len(indices), desc="image statistics", unit="img") as bar:
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


class _Subset:
    """Some of the records of a source, by their numbers."""

    def __init__(self, records: Records, indices: np.ndarray) -> None:
        self._records = records
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._records[int(self._indices[index])]
