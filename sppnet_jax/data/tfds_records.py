"""The records of data sets that TFDS prepared as ArrayRecord, and how to prepare one.

The images stay encoded. TensorFlow isn't needed, but for a data set that isn't prepared
yet; `digit_scenes`, the embedded one, is prepared here on first use.

TFDS stores boxes as float32 fractions of the image's size; `recover_pixels` gets the
pixels back exactly. TFDS's own `voc` divides VOC's 1-based pixels, which include both
ends, so its first row and column are moved by one; the boxes of all other data sets are
taken as half-open already.
"""

import difflib
import fcntl
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.features.bounding_boxes_utils import BBoxFormat

from sppnet_jax.data import digit_scenes
from sppnet_jax.data.annotations import clamp_boxes
from sppnet_jax.data.encoded_images import EncodedImage
from sppnet_jax.data.images import image_size
from sppnet_jax.data.sources import (
    FOLDERS,
    HOW_TO_OPEN_SEVERAL,
    Objects,
    Record,
    Source,
    check_labels,
    class_labels,
    split_spans,
)

log = logging.getLogger(__name__)


class Keys(NamedTuple):
    """Which features of a data set are the image, its label or labels and its name."""

    image: str
    label: str
    name: str  # "" where the data set names no files
    class_names: tuple[str, ...]
    multi_label: bool = False


def open_prepared(
    dataset: str, split: str, data_dir: str, multi_label: bool, with_boxes: bool
) -> Source:
    """Opens a split of a TFDS data set, or of the embedded one; see `open_source`."""
    builder = open_builder(dataset, data_dir)
    if with_boxes:
        _check_boxes(builder)
    full_name, splits = builder.info.full_name, builder.info.splits
    shards = {name: info.shard_lengths for name, info in splits.items()}
    split_spans(split, shards, full_name)
    if multi_label:
        keys = _find_multi_label_keys(builder, with_boxes)
    else:
        keys = _find_keys(builder)
    records = TfdsRecords(builder, split, keys, with_boxes)
    digest = f"{full_name} {split} {len(records)}"
    source = Source(records, keys.class_names, dataset, split, multi_label, digest)
    if not _is_embedded(dataset):
        check_labels(source)
    return source


class TfdsRecords:
    """The records of a split, as the features named by `keys` have them."""

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        split: str,
        keys: Keys,
        with_boxes: bool,
    ) -> None:
        images = {
            key: tfds.decode.SkipDecoding()
            for key, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._examples = builder.as_data_source(split, decoders=images)
        self._full_name = builder.info.full_name
        self._split = split
        self._keys = keys
        self._with_boxes = with_boxes
        self._is_voc = builder.info.name == "voc"

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index} in {len(self)} of {self._split!r}")
        return self._to_record(self._examples[index], f"{self._split}[{index}]")

    def _to_record(self, example: dict[str, Any], name: str) -> Record:
        if self._keys.name:
            name = bytes(example[self._keys.name]).decode("utf-8", "replace")
        image = EncodedImage(bytes(example[self._keys.image]), name)
        record: Record = {"image": image, "name": name}
        if self._keys.multi_label:
            record["labels"] = self._read_labels(example, self._place(name))
        else:
            record["label"] = int(example[self._keys.label])
        if self._with_boxes:
            record["objects"] = self._read_objects(
                example["objects"], record["image"], self._place(name)
            )
        return record

    def _place(self, name: str) -> str:
        return f"{name!r} in split {self._split!r} of {self._full_name!r}"

    def _read_labels(self, example: dict[str, Any], place: str) -> np.ndarray:
        if self._keys.label == "objects":
            present, difficult = _labels_of(example["objects"])
            certain = present[~difficult]
        else:
            present = np.asarray(example["labels"], int)
            certain = np.asarray(example.get("labels_no_difficult", present), int)
        total = len(self._keys.class_names)
        for label in (*present, *certain):
            if not 0 <= label < total:
                raise ValueError(
                    f"{place} has label {label}, outside 0…{total - 1} of the {total} "
                    "classes"
                )
        return class_labels(present, certain, total)

    def _read_objects(
        self, objects: dict[str, Any], image: bytes, place: str
    ) -> Objects:
        fractions = np.asarray(objects["bbox"], np.float32).reshape(-1, 4)
        labels, difficult = _labels_of(objects)
        if not np.isfinite(fractions).all():
            raise ValueError(f"{place} has a box {fractions.tolist()}")
        try:
            size = image_size(image)
        except ValueError as error:
            raise ValueError(
                f"{place} can't be opened, so the pixels of its boxes aren't known: "
                f"{error}. Prepare the data set anew without it"
            ) from error
        boxes = recover_pixels(fractions, size)
        if self._is_voc:
            boxes = clamp_boxes(boxes - [1, 1, 0, 0], size)
        kept = np.all(boxes[:, :2] < boxes[:, 2:], axis=1)
        if not kept.all():
            message = "%s: %d of %d boxes are empty: left out"
            log.warning(message, place, np.count_nonzero(~kept), len(kept))
        return Objects(boxes[kept], labels[kept], difficult[kept])


def _labels_of(objects: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The classes of objects, int32 [N], and which are difficult, bool [N]."""
    labels = np.asarray(objects["label"], np.int32)
    difficult = objects.get("is_difficult", np.zeros(len(labels)))
    return labels, np.asarray(difficult, bool)


def recover_pixels(fractions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels that were divided by an image's size and stored as float32.

    Rounding the quotient to float32 changes a coordinate c by c · 2⁻²⁴ at most. What is
    within c · 2⁻²³ of a whole number is taken to be it, so whole numbers come back
    exactly, up to four million pixels; others come back within c · 2⁻²².

    `fractions`: [N, 4], (ymin, xmin, ymax, xmax). `size`: (height, width).
    """
    pixels = np.asarray(fractions, np.float64) * [*size, *size]
    nearest = np.round(pixels)
    bound = nearest * float(np.finfo(np.float32).eps)
    return np.where(np.abs(pixels - nearest) <= bound, nearest, pixels)


def open_builder(dataset: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The prepared TFDS builder of a data set; arguments as for `open_source`."""
    kept = data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    directory = Path(kept).expanduser()
    if _is_embedded(dataset):
        return _prepare_digit_scenes(dataset, directory)
    return _find_prepared(dataset, directory)


def _is_embedded(dataset: str) -> bool:
    return dataset.split("/")[0] == digit_scenes.DigitScenes.name


def _prepare_digit_scenes(dataset: str, directory: Path) -> tfds.core.DatasetBuilder:
    config = dataset.partition("/")[2]
    configs = [config.name for config in digit_scenes.DigitScenes.BUILDER_CONFIGS]
    if config not in configs:
        names = " or ".join(f"'digit_scenes/{name}'" for name in configs)
        raise ValueError(f"unknown data set {dataset!r}; there is {names}")
    builder = digit_scenes.DigitScenes
    path = directory / builder.name / config / str(builder.VERSION)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"can't prepare a data set in {str(path)!r}: {error}. Set data_dir, or "
                "the environment variable TFDS_DATA_DIR, to a folder that you can "
                "write to"
            ) from error
        with (path.parent / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released by the system if we are killed
            # Another process may have prepared it while this one waited.
            if not path.exists():
                for leftover in path.parent.glob("incomplete.*"):
                    log.info(
                        "removing %s, left by an interrupted preparation", leftover
                    )
                    shutil.rmtree(leftover, ignore_errors=True)
                made = builder(config=config, data_dir=str(directory))
                made.download_and_prepare(file_format="array_record")
    # A builder from files pickles as their path.
    return tfds.builder_from_directory(path)


def _find_prepared(dataset: str, directory: Path) -> tfds.core.DatasetBuilder:
    name, arguments = _name_and_arguments(dataset)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(
            name, **arguments, data_dir=str(directory)
        )
    except tfds.core.DatasetNotFoundError as error:
        _check_known(dataset)
        raise FileNotFoundError(
            f"the data set {dataset!r} isn't prepared in {str(directory)!r}. "
            f"{_how_to_prepare(dataset, directory)}"
        ) from error
    formats = builder.info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(sorted(found.value for found in formats)) or "none"
        raise FileNotFoundError(
            f"the data set {dataset!r} is prepared in {str(builder.data_path)!r} as "
            f"{found}, which can't be read at random. Prepare it as array_record in "
            f"another data_dir, or remove that folder first. "
            f"{_how_to_prepare(dataset, directory)}"
        )
    return builder


def _name_and_arguments(dataset: str) -> tuple[str, dict[str, Any]]:
    try:
        name, arguments = tfds.core.naming.parse_builder_name_kwargs(dataset)
    except ValueError as error:
        raise ValueError(
            f"{dataset!r} is no name of a data set; write 'name', 'name/config' or "
            "'name:1.2.3'"
        ) from error
    return str(name), arguments


def _check_known(dataset: str) -> None:
    known = ["digit_scenes", *FOLDERS]
    known += tfds.list_builders(with_community_datasets=False)
    name = _name_and_arguments(dataset)[0]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        close = ["digit_scenes/classification" if c == known[0] else c for c in close]
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"unknown data set {dataset!r}. {hint}There are "
            "'digit_scenes/classification', 'image_folder' (for your own images), and "
            "the classification data sets of tensorflow_datasets, such as "
            "'imagenet2012', 'imagenette', 'caltech101'; with boxes, "
            "'digit_scenes/detection', 'box_folder' (for your own) and 'voc/2007'"
        )


def _how_to_prepare(dataset: str, directory: Path) -> str:
    command = f"tfds build {dataset} --file_format=array_record --data_dir={directory}"
    name, _ = _name_and_arguments(dataset)
    instructions = tfds.builder_cls(name).MANUAL_DOWNLOAD_INSTRUCTIONS or ""
    manual = " ".join(instructions.split())
    if manual:
        command += " --manual_dir=FOLDER_OF_DOWNLOADS"
        manual = f"\nDownload by hand first: {manual}"
    return (
        "This takes TensorFlow, once, best in an environment of its own:\n"
        "    pip install -r requirements-prepare.txt  # of the project's repository\n"
        f"    {command}{manual}"
    )


def _find_keys(builder: tfds.core.DatasetBuilder) -> Keys:
    """Finds which features are the image, its class, and the name of its file."""
    features = dict(builder.info.features.items())
    preferred = builder.info.supervised_keys or ()
    found = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        keys = _keys_of(features, kind)
        chosen = [key for key in keys if key in preferred]
        found.append(chosen if len(chosen) == 1 else keys)
    images, labels = found
    if len(images) != 1 or len(labels) != 1:
        several = len(images) == 1 and _several_labels(features)
        raise ValueError(
            f"{builder.info.full_name!r} is not a data set of images with one class "
            f"each: of its features {list(features)}, images are {images}, class "
            f"labels {labels}; there must be one of each"
            f"{HOW_TO_OPEN_SEVERAL if several else ''}"
        )
    names = features[labels[0]].names
    return Keys(images[0], labels[0], _name_key(features), tuple(names))


def _find_multi_label_keys(builder: tfds.core.DatasetBuilder, with_boxes: bool) -> Keys:
    """The same where images have several classes each."""
    features = dict(builder.info.features.items())
    images = _keys_of(features, tfds.features.Image)
    found = _several_labels(features)
    if len(images) != 1 or not found:
        single = _keys_of(features, tfds.features.ClassLabel)
        hint = ". It has one class an image: leave multi_label out" if single else ""
        raise ValueError(
            f"{builder.info.full_name!r} is not a data set of images with several "
            f"classes each: it has features {list(features)}; there must be one image, "
            "and a sequence of class labels named 'labels', or of 'objects' with a "
            f"'label' each, as in TFDS's voc{hint}"
        )
    # Objects tell which of them are difficult; labels alone may not.
    unsure = "labels_no_difficult" not in features and "objects" in found
    key = "objects" if with_boxes or unsure else next(iter(found))
    names = tuple(found[key].names)
    return Keys(images[0], key, _name_key(features), names, multi_label=True)


def _keys_of(features: dict[str, Any], kind: type) -> list[str]:
    return [key for key, feature in features.items() if isinstance(feature, kind)]


def _name_key(features: dict[str, Any]) -> str:
    texts = _keys_of(features, tfds.features.Text)
    return next((k for k in texts if re.search(r"file_?name|image_?id", k)), "")


def _several_labels(features: dict[str, Any]) -> dict[str, tfds.features.ClassLabel]:
    """The features that may hold several classes an image, with their class labels."""
    labels = features.get("labels")
    inner = labels.feature if isinstance(labels, tfds.features.Sequence) else None
    found = {"labels": inner, "objects": _parts_of_objects(features).get("label")}
    return {key: found[key] for key in _keys_of(found, tfds.features.ClassLabel)}


def _parts_of_objects(features: dict[str, Any]) -> dict[str, Any]:
    objects = features.get("objects")
    inner = objects.feature if isinstance(objects, tfds.features.Sequence) else None
    return dict(inner.items()) if isinstance(inner, tfds.features.FeaturesDict) else {}


def _check_boxes(builder: tfds.core.DatasetBuilder) -> None:
    features = dict(builder.info.features.items())
    parts = _parts_of_objects(features)
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
