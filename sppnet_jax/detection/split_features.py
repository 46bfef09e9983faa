"""The pooled features of boxes in a split's images, whichever system they are of.

SPP-net's come from the maps of whole images, R-CNN's from windows that were convolved
one by one. What the convolutions give is kept in the cache, by what decides it.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet_jax.buckets.whole_images import photo_buckets
from sppnet_jax.data.images import READING
from sppnet_jax.detection import rcnn
from sppnet_jax.detection.box_split import BoxSplit
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.maps import (
    convolve_image,
    convolve_split,
    load_maps,
    mean_cells,
)
from sppnet_jax.detection.scales import atlas_size, map_size_of
from sppnet_jax.detection.warp import warp_windows
from sppnet_jax.detection.window_features import (
    WindowFeatures,
    from_maps,
    from_warped,
)
from sppnet_jax.network.trained import Network, digest_arrays
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run.shares import ALONE, Share
from sppnet_jax.run.stages import digest_of

log = logging.getLogger(__name__)


def split_features(
    settings: DetectorSettings,
    network: Network,
    split: BoxSplit,
    boxes: list[np.ndarray],
    workdir: Path,
    share: Share = ALONE,
) -> tuple[WindowFeatures, dict[str, Any]]:
    """The pooled features of boxes in a split's images, and what decides them.

    Convolves what is not in the cache yet. `share`: of several processes that do.
    """
    decided_by = feature_settings(settings, network)
    inputs = {"images": digest_of({"images": split.images}), **decided_by}
    stored = ["trunk", "images", "dtype"]
    if settings.system == "rcnn":
        inputs["boxes"] = digest_arrays(boxes)
        stored += ["network", "pyramid", "boxes", "context", "side"]
    # The maps of a scale serve every pyramid, every list of scales, and both rules.
    name = digest_of({"reading": READING, **{name: inputs[name] for name in stored}})
    cache, model = settings.cache_folder(workdir), network.model
    windows = np.mean([len(own) for own in boxes])
    if settings.system == "rcnn":
        kept = rcnn.kept_as(model)
        log.info("on disk: %s, the smaller; %.0f windows an image", kept, windows)
        folder = cache / f"windows-{name}"
        rcnn.convolve_windows(
            network,
            split.source,
            boxes,
            folder,
            context=decided_by["context"],
            batch_size=max(settings.batch_size, 64),
            threads=settings.data.threads,
            dtype=settings.maps_dtype,
            share=share,
        )
        load = functools.partial(rcnn.load_windows, folder)
        levels = rcnn.levels_to_pool(model)
        return from_warped(load, boxes, levels, model.reducer), inputs
    log.info(
        "on disk: maps, %.0f cells an image; the %.0f windows' pooled vectors would be "
        "%.0f bins",
        mean_cells(
            split.sizes[split.sizes.all(axis=1)], settings.scales, network.geometry
        ),
        windows,
        windows * num_bins(model.levels or ()),
    )
    folder = cache / f"maps-{name}"
    convolve_split(
        network,
        split.source,
        folder,
        sides=settings.scales,
        batch_size=settings.batch_size,
        max_buckets=settings.buckets,
        threads=settings.data.threads,
        dtype=settings.maps_dtype,
        share=share,
    )
    load_all = functools.partial(load_maps, folder, settings.scales)
    return _pooled_from(settings, network, load_all, boxes, split.sizes), inputs


def image_features(
    settings: DetectorSettings,
    network: Network,
    images: Sequence[np.ndarray],
    boxes: list[np.ndarray],
) -> WindowFeatures:
    """The pooled features of boxes in images that are at hand; nothing is kept.

    Maps and windows are padded to few shapes, the same for all images.

    `images`: uint8 [height, width, 3] each. `boxes`: float [N, 4] for each.
    """
    model = network.model
    if settings.system == "rcnn":
        run = rcnn.windows_function(network, batch_size=max(settings.batch_size, 64))
        context = feature_settings(settings, network)["context"]
        fill = rcnn.fill_color(network.preprocessing)
        stored = [
            run(warp_windows(image, own, model.image_size, context=context, fill=fill))
            for image, own in zip(images, boxes, strict=True)
        ]
        levels = rcnn.levels_to_pool(model)
        return from_warped(stored.__getitem__, boxes, levels, model.reducer)
    maps = [convolve_image(network, one, sides=settings.scales) for one in images]
    sizes = np.array([image.shape[:2] for image in images])
    at_scales = zip(*map(photo_buckets, settings.scales), strict=True)
    buckets = [
        atlas_size([map_size_of(size, network.geometry) for size in own])
        for own in at_scales
    ]
    padding = {
        "buckets": buckets,
        "least_windows": settings.proposals.max_windows,
    }
    return _pooled_from(settings, network, maps.__getitem__, boxes, sizes, **padding)


def feature_settings(settings: DetectorSettings, network: Network) -> dict[str, Any]:
    """What decides the pooled features of a box."""
    side, model = network.model.image_size, network.model
    shared = {
        "network": network.digest,
        "trunk": network.trunk_digest,
        "pyramid": [list(model.levels or ()), model.reducer],
        "system": settings.system,
        "dtype": settings.maps_dtype,
    }
    if settings.system == "rcnn":
        context = settings.context
        if context < 0:
            context = round(side * rcnn.PAPER_CONTEXT)
        return {**shared, "side": side, "context": context}
    return {
        **shared,
        "scales": list(settings.scales),
        "area": (settings.window_side or side) ** 2,
        "rule": settings.rule,
    }


def _pooled_from(
    settings: DetectorSettings,
    network: Network,
    maps_of: Any,
    boxes: list[np.ndarray],
    sizes: np.ndarray,
    **padding: Any,
) -> WindowFeatures:
    return from_maps(
        maps_of,
        boxes,
        sizes,
        sides=settings.scales,
        geometry=network.geometry,
        levels=network.model.levels or (),
        reducer=network.model.reducer,
        area=feature_settings(settings, network)["area"],
        rule=settings.rule,
        max_buckets=settings.buckets,
        **padding,
    )
