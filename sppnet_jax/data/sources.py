"""One function that opens a data set of images and labels, whatever its kind.

    open_source("digit_scenes/classification", "train")
    open_source("image_folder", "test", root="~/flowers")
    open_source("voc_folder", "trainval", root="~/VOCdevkit", multi_label=True)
    open_source("imagenet2012", "validation", data_dir="/data/tfds")
    open_source("voc/2007", "test", multi_label=True)

Records are read at random from ArrayRecord files that TFDS prepared; the images stay
encoded. TensorFlow isn't needed.
"""

import contextlib
import difflib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np
import tensorflow_datasets as tfds

from sppnet_jax.data import digit_scenes, image_folder, voc_folder

log = logging.getLogger(__name__)

_OWN = ("digit_scenes", "image_folder", "voc_folder")


class Objects(NamedTuple):
    """The objects of an image: where they are, and of which classes."""

    boxes: np.ndarray  # float64 [N, 4], half-open, 0-based pixels of the image
    labels: np.ndarray  # int32 [N]
    difficult: np.ndarray  # bool [N]


class Record(TypedDict):
    """One image, still encoded, with its class or classes and a name to call it by.

    It has `label`, or in a multi-label source `labels`, int8 [classes]: 1 for a class
    that is present, 0 where all its instances are difficult ones, -1 if it is absent.
    In a detection source it has `objects` too.
    """

    image: bytes
    label: NotRequired[int]
    labels: NotRequired[np.ndarray]
    objects: NotRequired[Objects]
    name: str


class Records(Protocol):
    """Random access to records: `len(records)`, `records[3]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


class Source(NamedTuple):
    """A split of a data set; picklable, so worker processes can read it too."""

    records: Records
    class_names: tuple[str, ...]
    name: str
    split: str
    multi_label: bool = False
    digest: str = ""


class TfdsRecords:
    """The records of a split, as the features named by `keys` have them."""

    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, keys: "Keys"
    ) -> None:
        images = {
            key: tfds.decode.SkipDecoding()
            for key, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._examples = builder.as_data_source(split, decoders=images)
        self._folder = os.fspath(builder.data_path)
        self._full_name = builder.info.full_name
        self._split = split
        self._keys = keys
        self._num_classes = len(class_label(builder, keys).names)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index} in {len(self)} of {self._split!r}")
        return self._to_record(self._examples[index], f"{self._split}[{index}]")

    def state(self) -> str:
        """What changes if another split is read, or the files are made anew.

        Their names, sizes and times of change; "" if they are not on a local disk.
        """
        if not os.path.isdir(self._folder):
            return ""
        files = sorted(
            (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
            for entry in os.scandir(self._folder)
        )
        return repr((self._full_name, self._split, len(self), self._keys, files))

    def _to_record(self, example: dict[str, Any], name: str) -> Record:
        if self._keys.name:
            name = bytes(example[self._keys.name]).decode("utf-8", "replace")
        record: Record = {"image": bytes(example[self._keys.image]), "name": name}
        if self._keys.multi_label:
            record["labels"] = self._read_labels(example, name)
        else:
            record["label"] = int(example[self._keys.label])
        return record

    def _read_labels(self, example: dict[str, Any], name: str) -> np.ndarray:
        if self._keys.label == "objects":
            present = np.asarray(example["objects"]["label"], int)
            difficult = example["objects"].get("is_difficult", np.zeros(len(present)))
            certain = present[~np.asarray(difficult, bool)]
        else:
            present = np.asarray(example["labels"], int)
            certain = np.asarray(example.get("labels_no_difficult", present), int)
        for label in (*present, *certain):
            if not 0 <= label < self._num_classes:
                raise ValueError(
                    f"{name!r} in split {self._split!r} of {self._full_name!r} has "
                    f"label {label}, outside 0…{self._num_classes - 1} of the "
                    f"{self._num_classes} classes"
                )
        labels = np.full(self._num_classes, -1, np.int8)
        labels[present] = 0
        labels[certain] = 1
        return labels


class Keys(NamedTuple):
    """Which features of a data set are the image, its label or labels and its name."""

    image: str
    label: str
    name: str  # "" where the data set names no files
    multi_label: bool = False


def open_source(
    dataset: str,
    split: str,
    *,
    root: str = "",
    data_dir: str = "",
    multi_label: bool = False,
) -> Source:
    """Opens a split of a classification data set.

    `dataset`: "digit_scenes/classification" or "image_folder", which are prepared on
    first use, or the name of a TFDS data set ("name", "name/config", "name:1.2.3")
    already prepared as ArrayRecord.
    `split`: "train", "test", …, or a TFDS slice such as "train[:80%]".
    `root`: the folder of an "image_folder" or a "voc_folder".
    `data_dir`: where TFDS data sets lie; if empty, TFDS's default (environment variable
    TFDS_DATA_DIR, else ~/tensorflow_datasets).
    `multi_label`: opens a data set of images with several classes each, laid out as
    TFDS's voc is: "voc/2007", or "digit_scenes/detection" or "voc_folder", prepared on
    first use.

    Returns: the source; `check_labels` has passed for data sets of others' making.
    Raises: ValueError for an unknown data set or split, an empty split, a data set that
    is not for classification, has one class an image and not several or the reverse, or
    has labels outside the range of its classes; FileNotFoundError for a data set that
    isn't prepared, saying what to run.
    """
    builder = open_builder(dataset, root, data_dir)
    check_split(builder, split)
    keys = find_multi_label_keys(builder) if multi_label else _find_keys(builder)
    records = TfdsRecords(builder, split, keys)
    class_names = tuple(class_label(builder, keys).names)
    source = Source(records, class_names, dataset, split, multi_label)
    if not is_own(dataset):
        check_labels(source)
    return source


def available_splits(
    dataset: str, *, root: str = "", data_dir: str = ""
) -> tuple[str, ...]:
    """The names of a data set's splits; arguments as for `open_source`."""
    return tuple(open_builder(dataset, root, data_dir).info.splits)


def check_labels(
    source: Source, *, all_up_to: int = 50_000, sample: int = 5_000
) -> None:
    """Checks that every label is the index of a class.

    Of a source with more than `all_up_to` records, only `sample` evenly spaced ones are
    read.

    Raises: ValueError naming the first record whose label lies outside the range, or if
    no record of a multi-label source has a class.
    """
    total = len(source.records)
    checked = total if total <= all_up_to else sample
    any_present = not source.multi_label
    for number in range(checked):
        record = source.records[number * total // checked]
        check_label(source, record)
        any_present = any_present or bool((record["labels"] == 1).any())
    if not any_present:
        raise ValueError(
            f"none of the {checked} records read from split {source.split!r} of "
            f"{source.name!r} has a class (TFDS leaves the classes of a split without "
            "labels empty); choose a split with labels"
        )


def check_label(source: Source, record: Record) -> None:
    """Raises a ValueError naming the record if its label is no index of a class.

    In a multi-label source, if its labels aren't one of 1, 0 and -1 for each class.
    """
    if source.multi_label:
        _check_multi_label(source, record)
        return
    if 0 <= record["label"] < len(source.class_names):
        return
    hint = " (TFDS marks a split without labels so)" if record["label"] == -1 else ""
    raise ValueError(
        f"{record['name']!r} in split {source.split!r} of {source.name!r} has label "
        f"{record['label']}{hint}, outside 0…{len(source.class_names) - 1} of the "
        f"{len(source.class_names)} classes"
    )


def _check_multi_label(source: Source, record: Record) -> None:
    labels = record["labels"]
    if (
        labels.shape != (len(source.class_names),)
        or not np.isin(labels, (-1, 0, 1)).all()
    ):
        raise ValueError(
            f"{record['name']!r} in split {source.split!r} of {source.name!r} has "
            f"labels {labels.tolist()}; there must be one of 1 (present), 0 (only "
            f"difficult instances) and -1 (absent) for each of the "
            f"{len(source.class_names)} classes"
        )


def is_own(dataset: str) -> bool:
    """Whether the project itself makes a data set, so that its labels are in order."""
    return dataset.split("/")[0] in _OWN


def open_builder(dataset: str, root: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The prepared TFDS builder of a data set; arguments as for `open_source`."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    directory = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if dataset in ("image_folder", "voc_folder"):
        if not root:
            raise ValueError(
                f"the data set {dataset!r} needs its folder: set root (on the command "
                "line, --config.data.root=FOLDER)"
            )
        if dataset == "voc_folder":
            return _prepare_voc_folder(root, directory)
        return _prepare_image_folder(root, directory)
    if dataset.split("/")[0] == "digit_scenes":
        return _prepare_digit_scenes(dataset, directory)
    return _open_prepared(dataset, directory)


def _prepare_image_folder(root: str, directory: Path) -> tfds.core.DatasetBuilder:
    scan = image_folder.scan_folder(root)
    version = str(image_folder.ImageFolder.VERSION)

    def make_builder() -> tfds.core.DatasetBuilder:
        for note in scan.notes:
            log.warning("%s", note)
        return image_folder.ImageFolder(scan, data_dir=str(directory))

    path = directory / image_folder.ImageFolder.name / scan.config_name / version
    return _prepare(path, make_builder)


def _prepare_voc_folder(root: str, directory: Path) -> tfds.core.DatasetBuilder:
    scan = voc_folder.scan_folder(root)
    version = str(voc_folder.VocFolder.VERSION)

    def make_builder() -> tfds.core.DatasetBuilder:
        annotations = voc_folder.read_annotations(scan)
        for note in scan.notes + annotations.notes:
            log.warning("%s", note)
        return voc_folder.VocFolder(scan, annotations, data_dir=str(directory))

    path = directory / voc_folder.VocFolder.name / scan.config_name / version
    return _prepare(path, make_builder)


def _prepare_digit_scenes(dataset: str, directory: Path) -> tfds.core.DatasetBuilder:
    config = dataset.partition("/")[2]
    configs = [config.name for config in digit_scenes.DigitScenes.BUILDER_CONFIGS]
    if config not in configs:
        names = " or ".join(f"'digit_scenes/{name}'" for name in configs)
        raise ValueError(f"unknown data set {dataset!r}; there is {names}")
    version = str(digit_scenes.DigitScenes.VERSION)
    return _prepare(
        directory / digit_scenes.DigitScenes.name / config / version,
        lambda: digit_scenes.DigitScenes(config=config, data_dir=str(directory)),
    )


def _prepare(
    path: Path, make_builder: Callable[[], tfds.core.DatasetBuilder]
) -> tfds.core.DatasetBuilder:
    """Prepares a data set unless it lies at `path`, and opens what lies there."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise type(error)(
                f"can't prepare a data set in {str(path)!r}: {error}. Set data_dir, or "
                "the environment variable TFDS_DATA_DIR, to a folder that you can "
                "write to"
            ) from error
        with _locked(path.parent / ".lock"):
            # Another process may have prepared it while this one waited.
            if not path.exists():
                _remove_leftovers(path.parent)
                make_builder().download_and_prepare(file_format="array_record")
    # A builder from files pickles as their path, so workers don't scan folders again.
    return tfds.builder_from_directory(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system if we are killed
        yield


def _remove_leftovers(directory: Path) -> None:
    """Removes what killed preparations left; the lock must be held."""
    for path in directory.glob("incomplete.*"):
        log.info("removing %s, left by an interrupted preparation", path)
        shutil.rmtree(path, ignore_errors=True)


def _open_prepared(dataset: str, directory: Path) -> tfds.core.DatasetBuilder:
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
    known = [*_OWN, *tfds.list_builders(with_community_datasets=False)]
    name = _name_and_arguments(dataset)[0]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        close = ["digit_scenes/classification" if c == _OWN[0] else c for c in close]
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"unknown data set {dataset!r}. {hint}There are "
            "'digit_scenes/classification', 'image_folder' (for your own images), and "
            "the classification data sets of tensorflow_datasets, such as "
            "'imagenet2012', 'imagenette', 'caltech101'; with boxes, "
            "'digit_scenes/detection', 'voc_folder' (for your own) and 'voc/2007'"
        )


def _how_to_prepare(dataset: str, directory: Path) -> str:
    command = f"tfds build {dataset} --file_format=array_record --data_dir={directory}"
    manual = _manual_instructions(_name_and_arguments(dataset)[0])
    if manual:
        command += " --manual_dir=FOLDER_OF_DOWNLOADS"
        manual = f"\nDownload by hand first: {manual}"
    return (
        "This takes TensorFlow, once, best in an environment of its own:\n"
        "    pip install -r requirements-prepare.txt\n"
        f"    {command}{manual}"
    )


def _manual_instructions(name: str) -> str:
    instructions = tfds.builder_cls(name).MANUAL_DOWNLOAD_INSTRUCTIONS
    return " ".join((instructions or "").split())


def check_split(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises a ValueError if a data set lacks a split, or it is empty."""
    splits = tuple(builder.info.splits)
    for part in split.split("+"):
        name = re.sub(r"\[.*\]$", "", part.strip())
        if name not in splits:
            raise ValueError(
                f"unknown split {name!r} of {builder.info.full_name!r}; it has "
                f"{', '.join(map(repr, splits))}"
            )
    try:
        size = builder.info.splits[split].num_examples
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"can't read the split {split!r} of {builder.info.full_name!r}: {error}. "
            "Slices look like 'train[:80%]' or 'train[1000:2000]'"
        ) from error
    if not size:
        raise ValueError(f"the split {split!r} of {builder.info.full_name!r} is empty")


def _find_keys(builder: tfds.core.DatasetBuilder) -> Keys:
    """Finds which features are the image, its class, and the name of its file."""
    features = builder.info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel, tfds.features.Text)
    preferred = builder.info.supervised_keys or ()
    found = []
    for kind in kinds:
        keys = [key for key, feature in features.items() if isinstance(feature, kind)]
        chosen = [key for key in keys if key in preferred]
        found.append(chosen if len(chosen) == 1 else keys)
    images, labels, texts = found
    if len(images) != 1 or len(labels) != 1:
        hint = ""
        if len(images) == 1 and _multi_label_key(builder):
            hint = (
                ". Its images have several classes each, and a network is trained on "
                "one class an image. Features of them, to train SVMs on, are made by "
                "python -m sppnet_jax.features --multi_label (in Python, open it with "
                "multi_label=True)"
            )
        raise ValueError(
            f"{builder.info.full_name!r} is not a data set of images with one class "
            f"each: of its features {list(features)}, images are {images}, class "
            f"labels {labels}; there must be one of each{hint}"
        )
    return Keys(images[0], labels[0], _name_key(texts))


def find_multi_label_keys(builder: tfds.core.DatasetBuilder) -> Keys:
    """Finds which features are the image, its classes, and the name of its file.

    Raises: ValueError if the images don't have several classes each.
    """
    features = builder.info.features
    images, texts = (
        [key for key, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.Text)
    )
    label = _multi_label_key(builder)
    if len(images) != 1 or not label:
        single = any(isinstance(f, tfds.features.ClassLabel) for f in features.values())
        hint = ". It has one class an image: leave multi_label out" if single else ""
        raise ValueError(
            f"{builder.info.full_name!r} is not a data set of images with several "
            f"classes each: it has features {list(features)}; there must be one image, "
            "and a sequence of class labels named 'labels', or of 'objects' with a "
            f"'label' each, as in TFDS's voc{hint}"
        )
    return Keys(images[0], label, _name_key(texts), multi_label=True)


def _multi_label_key(builder: tfds.core.DatasetBuilder) -> str:
    """The feature that holds several classes an image; "" if there is none."""
    features = builder.info.features
    sequences = {
        key: feature.feature
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Sequence)
    }
    objects = sequences.get("objects")
    parts: dict[str, Any] = {}
    if isinstance(objects, tfds.features.FeaturesDict):
        parts = dict(objects.items())
    candidates = {"labels": sequences.get("labels"), "objects": parts.get("label")}
    found = [
        key
        for key, feature in candidates.items()
        if isinstance(feature, tfds.features.ClassLabel)
    ]
    # Objects tell which of them are difficult; labels alone may not.
    if found == ["labels", "objects"] and "labels_no_difficult" not in features:
        return "objects"
    return found[0] if found else ""


def class_label(
    builder: tfds.core.DatasetBuilder, keys: Keys
) -> tfds.features.ClassLabel:
    """The feature that names the classes."""
    feature = builder.info.features[keys.label]
    if not keys.multi_label:
        return feature
    return feature.feature["label"] if keys.label == "objects" else feature.feature


def _name_key(texts: list[str]) -> str:
    names = [key for key in texts if re.search(r"file_?name|image_?id", key)]
    return names[0] if names else ""
