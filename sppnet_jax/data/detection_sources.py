"""One function that opens a data set of images and boxes, whatever its kind.

    open_detection_source("digit_scenes/detection", "train")
    open_detection_source("voc_folder", "test", root="~/VOCdevkit/VOC2007")
    open_detection_source("voc/2007", "test", data_dir="/data/tfds")

A record's boxes are half-open, 0-based pixels, (ymin, xmin, ymax, xmax), of the image
that `decode_image` makes. TFDS stores them as float32 fractions of the image's size;
`recover_pixels` gets the pixels back exactly. TFDS's own `voc` divides VOC's 1-based
pixels, which include both ends, so its first row and column are moved by one; the boxes
of all other data sets are taken as half-open already.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features.bounding_boxes_utils import BBoxFormat

from sppnet_jax.data.images import image_size
from sppnet_jax.data.sources import (
    Keys,
    Objects,
    Record,
    Source,
    TfdsRecords,
    check_labels,
    check_split,
    class_label,
    find_multi_label_keys,
    is_own,
    open_builder,
)
from sppnet_jax.data.voc_annotations import clamp_boxes
from sppnet_jax.data.voc_folder import progress_bar

log = logging.getLogger(__name__)

_INSTEAD = {
    "digit_scenes/classification": "'digit_scenes/detection' has",
    "image_folder": "a folder with boxes, in Pascal VOC layout, is a 'voc_folder'",
}


class _DetectionRecords(TfdsRecords):
    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, keys: Keys
    ) -> None:
        super().__init__(builder, split, keys)
        self._is_voc = builder.info.name == "voc"

    def _to_record(self, example: dict[str, Any], name: str) -> Record:
        record = super()._to_record(example, name)
        record["objects"] = self._read_objects(example["objects"], record)
        return record

    def _read_objects(self, objects: dict[str, Any], record: Record) -> Objects:
        fractions = np.asarray(objects["bbox"], np.float32).reshape(-1, 4)
        labels = np.asarray(objects["label"], np.int32)
        difficult = objects.get("is_difficult", np.zeros(len(labels)))
        difficult = np.asarray(difficult, bool)
        if not np.isfinite(fractions).all():
            raise ValueError(f"{self._place(record)} has a box {fractions.tolist()}")
        try:
            size = image_size(record["image"])
        except ValueError as error:
            raise ValueError(
                f"{self._place(record)} can't be opened, so the pixels of its boxes "
                f"aren't known: {error}. Prepare the data set anew without it"
            ) from error
        boxes = recover_pixels(fractions, size)
        if self._is_voc:
            boxes = clamp_boxes(boxes - [1, 1, 0, 0], size)
        kept = np.all(boxes[:, :2] < boxes[:, 2:], axis=1)
        if not kept.all():
            log.warning(
                "%s: %d of %d boxes are empty: left out",
                self._place(record),
                (~kept).sum(),
                len(kept),
            )
        return Objects(boxes[kept], labels[kept], difficult[kept])

    def _place(self, record: Record) -> str:
        return f"{record['name']!r} in split {self._split!r} of {self._full_name!r}"


def open_detection_source(
    dataset: str, split: str, *, root: str = "", data_dir: str = ""
) -> Source:
    """Opens a split of a data set of images with boxes.

    A record has `image`, `name` (of its file), `objects`, and `labels` as in a
    multi-label source. Objects of difficult instances are among them; empty boxes are
    not, and a warning names their record.

    `dataset`: "digit_scenes/detection" or "voc_folder", which are prepared on first
    use, or the name of a TFDS data set with the features of its voc ("voc/2007",
    "voc/2012", "voc/2007:5.0.0"), already prepared as ArrayRecord.
    `split`: "train", "trainval", …, or a TFDS slice such as "train[:80%]".
    `root`: the folder of a "voc_folder".
    `data_dir`: where TFDS data sets lie; see `sources.open_source`.

    Returns: the source, with `multi_label`.
    Raises: ValueError for an unknown data set or split, an empty split, one without
    objects, a data set without boxes, a missing root, or labels outside the range of
    the classes; FileNotFoundError for a data set that isn't prepared, saying what to
    run. Reading a record raises a ValueError if its image can't be opened.
    """
    if dataset in _INSTEAD:
        # Nothing needs to be prepared to say so.
        raise ValueError(f"{dataset!r} has no boxes; {_INSTEAD[dataset]}")
    builder = open_builder(dataset, root, data_dir)
    _check_boxes(builder)
    check_split(builder, split)
    keys = find_multi_label_keys(builder)._replace(label="objects")
    records = _DetectionRecords(builder, split, keys)
    class_names = tuple(class_label(builder, keys).names)
    source = Source(records, class_names, dataset, split, multi_label=True)
    if not is_own(dataset):
        check_labels(source)
    return source


def read_objects(source: Source, threads: int = 8) -> list[Objects]:
    """The objects of every record of a detection source, in order.

    `threads`: threads that read.

    Raises: ValueError for a source without boxes, and as reading a record does.
    """

    def read(index: int) -> Objects:
        record = source.records[index]
        if "objects" not in record:
            raise ValueError(
                f"the records of split {source.split!r} of {source.name!r} have no "
                "boxes; open it with open_detection_source"
            )
        return record["objects"]

    total = len(source.records)
    objects = []
    bar = progress_bar("reading boxes", total)
    with bar, ThreadPoolExecutor(threads) as pool:
        for one in pool.map(read, range(total)):
            objects.append(one)
            bar.update()
    return objects


def recover_pixels(fractions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels that were divided by an image's size and stored as float32.

    Rounding the quotient to float32 changes a coordinate c by c · 2⁻²⁴ at most. What is
    within c · 2⁻²³ of a whole number is taken to be it, so whole numbers come back
    exactly, up to four million pixels; others come back within c · 2⁻²².

    `fractions`: float [N, 4], (ymin, xmin, ymax, xmax). `size`: (height, width).

    Returns: float64 [N, 4].
    """
    pixels = np.asarray(fractions, np.float64) * [*size, *size]
    nearest = np.round(pixels)
    bound = nearest * float(np.finfo(np.float32).eps)
    return np.where(np.abs(pixels - nearest) <= bound, nearest, pixels)


def _check_boxes(builder: tfds.core.DatasetBuilder) -> None:
    features = dict(builder.info.features.items())
    objects = features.get("objects")
    parts: dict[str, Any] = {}
    if isinstance(objects, tfds.features.Sequence) and isinstance(
        objects.feature, tfds.features.FeaturesDict
    ):
        parts = dict(objects.feature.items())
    box, label = parts.get("bbox"), parts.get("label")
    if not (
        isinstance(box, tfds.features.BBoxFeature)
        and isinstance(label, tfds.features.ClassLabel)
    ):
        raise ValueError(
            f"{builder.info.full_name!r} has no boxes: it has features "
            f"{list(features)}; there must be one image, and 'objects' with a 'label' "
            "and a 'bbox' each, as in TFDS's voc"
        )
    # Data sets prepared by an older TFDS don't say; theirs are all of this format.
    if box.bbox_format not in (None, BBoxFormat.REL_YXYX):
        raise ValueError(
            f"the boxes of {builder.info.full_name!r} are {box.bbox_format}, and must "
            f"be {BBoxFormat.REL_YXYX}: (ymin, xmin, ymax, xmax) over the image's size"
        )
