"""What a classifier says of an image's windows, with nothing trained: the paper's idea.

The image is convolved once at each scale; the windows of selective search are pooled
from its maps and scored by the classifier's own head.
"""

from typing import Any

import jax
import numpy as np

from sppnet_jax.detection.boxes import nms
from sppnet_jax.detection.detector import Detections
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.proposals import ProposalSettings, find_boxes
from sppnet_jax.detection.split_features import image_features
from sppnet_jax.detection.window_features import CHUNK, make_program, rows_of
from sppnet_jax.network.trained import Network


def classify_windows(
    network: Network,
    image: np.ndarray,
    *,
    most: int = 5,
    overlap: float = 0.3,
    least: float = 0.25,
    proposals: ProposalSettings = ProposalSettings(),  # noqa: B008, it can't be changed
) -> Detections:
    """The windows of an image whose class a network is the surest of, best first.

    Each window counts for its best class only, scored by the softmax over all classes,
    and goes where it overlaps a surer one.

    `image`: uint8 [height, width, 3], RGB. `most`: windows at most. `overlap`: IoU from
    which on a window goes. `least`: a window's shorter side, for 1 of the image's.

    Raises: ValueError for a network without a pyramid, or one that scores no classes.
    """
    if network.model.levels is None or not network.class_names:
        raise ValueError(
            "windows are scored by a network with a spatial pyramid and classes of its "
            "own: this one has none"
        )
    side = network.resize_side
    settings = DetectorSettings(scales=(side, 2 * side), proposals=proposals)
    boxes = find_boxes(image, proposals)
    # A smaller one is a unit or two: they see far beyond it, and are sure of too much.
    sides = np.minimum(*(boxes[:, 2:] - boxes[:, :2]).T)
    boxes = boxes[sides >= least * min(image.shape[:2])]
    if not len(boxes):
        return Detections(np.zeros((0, 4), np.float32), np.zeros(0, int), np.zeros(0))
    features = image_features(settings, network, [image], [boxes])

    def head(params: Any, pooled: jax.Array) -> jax.Array:
        logits, _ = network.model.apply({"params": params}, pooled, method="classify")
        return jax.nn.softmax(logits)

    fcs = {name: own for name, own in network.params.items() if name.startswith("fc")}
    program = make_program(features, head)
    scores = rows_of(features, program, fcs, 0, np.arange(len(boxes)))
    labels, best = scores.argmax(axis=1), scores.max(axis=1)
    size = -(-len(boxes) // CHUNK) * CHUNK  # few sizes, few programs
    padded, found = np.zeros((size, 4)), np.zeros(size)
    padded[: len(boxes)], found[: len(boxes)] = boxes, best
    kept = np.asarray(nms(padded, found, overlap, np.arange(size) < len(boxes)))
    order = np.flatnonzero(kept)
    order = order[np.argsort(-best[order], kind="stable")][:most]
    return Detections(boxes[order].astype(np.float32), labels[order], best[order])
