"""COCO's average precision, by its own program: pycocotools, an optional extra.

It averages over IoUs of 0.50, 0.55, …, 0.95 and takes the 100 best detections of a
class in an image. Objects are small below 32², large from 96² pixels on, by the areas
of their boxes. A difficult object is a crowd there: detections in it count neither way.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.detection_table import DetectionTable
from sppnet_jax.detection.result_files import coco_ground_truth, coco_records

HOW_TO_GET = (
    "COCO's average precision takes pycocotools: pip install pycocotools, or the extra "
    "coco of this project"
)
# What pycocotools calls 0 to 11, each over all classes.
_NAMES = (
    *("ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)


def coco_precision(
    detections: DetectionTable,
    ground_truth: Sequence[Objects],
    class_names: Sequence[str],
) -> dict[str, float | None] | None:
    """COCO's twelve numbers, 0 to 1, or None without pycocotools.

    `detections`, `ground_truth`, `class_names`: as `evaluate_detections` takes them.

    Returns: by name, `ap` over all IoUs, `ap_50`, `ap_75`, `ap_small`, `ap_medium`,
    `ap_large`, and recalls `ar_1`, `ar_10`, `ar_100` of so many detections an image and
    `ar_small`, `ar_medium`, `ar_large`; None for sizes of which there is no object.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        return None

    count = len(ground_truth)
    truth = coco_ground_truth(
        [str(number) for number in range(count)],
        np.zeros((count, 2), int),
        ground_truth,
        class_names,
    )
    records = [
        {
            **one,
            "id": number,
            "area": one["bbox"][2] * one["bbox"][3],
            "iscrowd": 0,
        }
        for number, one in enumerate(coco_records(detections), start=1)
    ]

    def indexed(annotations: list[dict[str, Any]]) -> Any:
        made = COCO()
        made.dataset = {**truth, "annotations": annotations}
        made.createIndex()
        return made

    # It prints its progress and a table of its own.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(indexed(truth["annotations"]), indexed(records), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [float(value) for value in evaluation.stats]
    return {
        name: None if value < 0 else value
        for name, value in zip(_NAMES, values, strict=True)
    }
