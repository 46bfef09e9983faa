"""One function that opens a data set of images and labels, whatever its kind.

    open_source("digit_scenes/classification", "train")
    open_source("image_folder", "test", root="~/flowers")
    open_source("imagenet2012", "validation", data_dir="/data/tfds")

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
from typing import Any, NamedTuple, Protocol, TypedDict

import tensorflow_datasets as tfds

from sppnet_jax.data import image_folder

log = logging.getLogger(__name__)


class Record(TypedDict):
    """One image, still encoded, with its class and a name to call it by."""

    image: bytes
    label: int
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


class _TfdsRecords:
    def __init__(
        self, builder: tfds.core.DatasetBuilder, split: str, keys: "_Keys"
    ) -> None:
        images = {
            key: tfds.decode.SkipDecoding()
            for key, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._examples = builder.as_data_source(split, decoders=images)
        self._split = split
        self._keys = keys

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index} in {len(self)} of {self._split!r}")
        example = self._examples[index]
        name = f"{self._split}[{index}]"
        if self._keys.name:
            name = bytes(example[self._keys.name]).decode("utf-8", "replace")
        return {
            "image": bytes(example[self._keys.image]),
            "label": int(example[self._keys.label]),
            "name": name,
        }


class _Keys(NamedTuple):
    image: str
    label: str
    name: str  # "" where the data set names no files


def open_source(
    dataset: str, split: str, *, root: str = "", data_dir: str = ""
) -> Source:
    """Opens a split of a classification data set.

    `dataset`: "digit_scenes/classification" or "image_folder", which are prepared on
    first use, or the name of a TFDS data set ("name", "name/config", "name:1.2.3")
    already prepared as ArrayRecord.
    `split`: "train", "test", …, or a TFDS slice such as "train[:80%]".
    `root`: the folder of an "image_folder".
    `data_dir`: where TFDS data sets lie; if empty, TFDS's default (environment variable
    TFDS_DATA_DIR, else ~/tensorflow_datasets).

    Returns: the source; `check_labels` has passed for data sets of others' making.
    Raises: ValueError for an unknown data set or split, an empty split, a data set that
    is not for classification or has labels outside the range of its classes;
    FileNotFoundError for a data set that isn't prepared, saying what to run.
    """
    builder = _open_builder(dataset, root, data_dir)
    _check_split(builder, split)
    keys = _find_keys(builder)
    records = _TfdsRecords(builder, split, keys)
    class_names = tuple(builder.info.features[keys.label].names)
    source = Source(records, class_names, dataset, split)
    if not _is_own(dataset):
        check_labels(source)
    return source


def available_splits(
    dataset: str, *, root: str = "", data_dir: str = ""
) -> tuple[str, ...]:
    """The names of a data set's splits; arguments as for `open_source`."""
    return tuple(_open_builder(dataset, root, data_dir).info.splits)


def check_labels(
    source: Source, *, all_up_to: int = 50_000, sample: int = 5_000
) -> None:
    """Checks that every label is the index of a class.

    Of a source with more than `all_up_to` records, only `sample` evenly spaced ones are
    read.

    Raises: ValueError naming the first record whose label lies outside the range.
    """
    total = len(source.records)
    checked = total if total <= all_up_to else sample
    for number in range(checked):
        check_label(source, source.records[number * total // checked])


def check_label(source: Source, record: Record) -> None:
    """Raises a ValueError naming the record if its label is no index of a class."""
    if 0 <= record["label"] < len(source.class_names):
        return
    hint = " (TFDS marks a split without labels so)" if record["label"] == -1 else ""
    raise ValueError(
        f"{record['name']!r} in split {source.split!r} of {source.name!r} has label "
        f"{record['label']}{hint}, outside 0…{len(source.class_names) - 1} of the "
        f"{len(source.class_names)} classes"
    )


def _is_own(dataset: str) -> bool:
    return dataset.split("/")[0] in ("digit_scenes", "image_folder")


def _open_builder(dataset: str, root: str, data_dir: str) -> tfds.core.DatasetBuilder:
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    directory = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    if dataset == "image_folder":
        if not root:
            raise ValueError(
                "the data set 'image_folder' needs its folder: set root (on the "
                "command line, --config.data.root=FOLDER)"
            )
        return _prepare_folder(root, directory)
    if dataset.split("/")[0] == "digit_scenes":
        return _prepare_digit_scenes(dataset, directory)
    return _open_prepared(dataset, directory)


def _prepare_folder(root: str, directory: Path) -> tfds.core.DatasetBuilder:
    scan = image_folder.scan_folder(root)
    version = str(image_folder.ImageFolder.VERSION)

    def make_builder() -> tfds.core.DatasetBuilder:
        for note in scan.notes:
            log.warning("%s", note)
        return image_folder.ImageFolder(scan, data_dir=str(directory))

    path = directory / image_folder.ImageFolder.name / scan.config_name / version
    return _prepare(path, make_builder)


def _prepare_digit_scenes(dataset: str, directory: Path) -> tfds.core.DatasetBuilder:
    # Worker processes import this module, but have no need of scikit-learn.
    from sppnet_jax.data import digit_scenes

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
    own = ["digit_scenes", "image_folder"]
    known = own + tfds.list_builders(with_community_datasets=False)
    name = _name_and_arguments(dataset)[0]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        close = ["digit_scenes/classification" if c == own[0] else c for c in close]
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"unknown data set {dataset!r}. {hint}There are "
            "'digit_scenes/classification', 'image_folder' (for your own images), and "
            "the classification data sets of tensorflow_datasets, such as "
            "'imagenet2012', 'imagenette', 'caltech101'"
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


def _check_split(builder: tfds.core.DatasetBuilder, split: str) -> None:
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


def _find_keys(builder: tfds.core.DatasetBuilder) -> _Keys:
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
        raise ValueError(
            f"{builder.info.full_name!r} is not a data set of images with one class "
            f"each: of its features {list(features)}, images are {images}, class "
            f"labels {labels}; there must be one of each"
        )
    names = [key for key in texts if re.search(r"file_?name|image_?id", key)]
    return _Keys(images[0], labels[0], names[0] if names else "")
