"""A split's images with the objects in them, and the boxes where to look for more."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sppnet_jax.data.datasets import open_box_split
from sppnet_jax.data.sources import Objects, Source, read_objects, subset
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.maps import decodable, image_sizes
from sppnet_jax.detection.proposals import load_proposals, proposal_recall, propose
from sppnet_jax.run import parallel
from sppnet_jax.run.shares import ALONE, Share

log = logging.getLogger(__name__)


class BoxSplit(NamedTuple):
    """A split's images, what is in them, and where to look for it.

    `sizes`: (height, width) of each image, int [N, 2]. `images`: a digest of each.
    """

    source: Source
    objects: list[Objects]
    sizes: np.ndarray
    proposals: list[np.ndarray]
    images: list[str]


def open_split_of(
    settings: DetectorSettings, purpose: str, workdir: Path, share: Share = ALONE
) -> BoxSplit:
    """The images of the "train" or "test" split, their objects and their proposals.

    An image that can't be decoded has no proposals, and no objects to train on; a test
    counts its objects as missed, as VOC's own program would.
    `share`: of several processes that find proposals.
    """
    source, threads = open_box_split(settings.data, purpose), settings.data.threads
    told = {"digest": source.digest, "images": len(source.records)}
    parallel.check_alike("data", {**told, "classes": source.class_names})
    objects = read_objects(source, threads)
    proposals = find_proposals(settings, source, purpose, workdir, share)
    recall = proposal_recall(proposals, objects, len(source.class_names))
    log.info(
        "%.0f proposals an image; they find %s of %d objects (IoU 0.5)",
        recall["mean_proposals"],
        "–" if recall["recall"] is None else f"{recall['recall']:.1%}",
        recall["objects"],
    )
    if purpose == "train":
        # Only what has no proposals may be broken, and takes decoding to know.
        without = [index for index, boxes in enumerate(proposals) if not len(boxes)]
        whole = decodable(subset(source, without), threads)
        nothing = Objects(np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0, bool))
        for index in np.array(without, int)[~whole]:
            objects[index] = nothing
    digests = [
        hashlib.sha256(source.records[index]["image"]).hexdigest()[:16]
        for index in range(len(source.records))
    ]
    return BoxSplit(source, objects, image_sizes(source, threads), proposals, digests)


def find_proposals(
    settings: DetectorSettings,
    source: Source,
    purpose: str,
    workdir: Path,
    share: Share = ALONE,
) -> list[np.ndarray]:
    """Where objects may be in each image of a source, from the cache if it is there."""
    given = settings.proposals
    if given.method == "file":
        path = given.file if purpose == "train" else given.test_file or given.file
        found = load_proposals(Path(path).expanduser(), source)
        # Searching finds nothing in a broken image; a file doesn't know of it.
        whole = decodable(source, settings.data.threads)
        none = np.zeros((0, 4), np.float32)
        return [p if ok else none for p, ok in zip(found, whole, strict=True)]
    folder = settings.cache_folder(workdir) / "proposals"
    return propose(source, given, folder, share)
