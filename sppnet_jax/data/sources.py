"""What a data set of images, labels and boxes is, and functions that open any kind.

    open_source("digit_scenes/classification", "train")
    open_source("image_folder", "test", root="~/flowers")
    open_source("imagenet2012", "validation", data_dir="/data/tfds")
    open_source("voc/2007", "test", multi_label=True)
    open_detection_source("box_folder", "trainval", root="~/VOCdevkit")

The images stay encoded, and are read when they are asked for: from the files of a
folder where they lie, or from ArrayRecord files that TFDS prepared. TFDS is imported
for its own data sets and for slices of splits.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import NamedTuple, NotRequired, Protocol, TypedDict

import numpy as np

from sppnet_jax.run.progress import map_in_threads

# Data sets that are folders, read by the module of the same name.
FOLDERS = ("image_folder", "box_folder", "voc_folder", "coco_folder", "yolo_folder")
_INSTEAD = {
    "digit_scenes/classification": "'digit_scenes/detection' has",
    "image_folder": "a folder with boxes is a 'box_folder'",
}
HOW_TO_OPEN_SEVERAL = (
    ". Its images have several classes each, and a network is trained on one class an "
    "image. Features of them, to train SVMs on, are made by python -m "
    "sppnet_jax.features --multi_label (in Python, open it with multi_label=True)"
)


class Objects(NamedTuple):
    """The objects of an image: where they are, and of which classes."""

    # float64 [N, 4], (ymin, xmin, ymax, xmax), half-open, 0-based pixels of the image
    # that `decode_image` makes.
    boxes: np.ndarray
    labels: np.ndarray  # int32 [N]
    difficult: np.ndarray  # bool [N]


class Record(TypedDict):
    """One image, still encoded, with its class or classes and a name to call it by.

    A multi-label source has `labels`, int8 [classes]: 1 for a class that is present, 0
    where all its instances are difficult ones, -1 if it is absent.
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
    """A split of a data set; picklable, so worker processes can read it too.

    `digest` identifies its data. Of a folder it is a hash of every record's path in the
    root, size in bytes and label; with boxes, of its annotation's path, size and
    objects too. So a moved root, new times of files, or another image of as many bytes
    don't change it. Of other data sets it is the full name with its version, the split
    and the number of records. "" for records in memory.
    """

    records: Records
    class_names: tuple[str, ...]
    name: str
    split: str
    multi_label: bool = False
    digest: str = ""


class _Subset:
    def __init__(self, records: Records, indices: Sequence[int] | np.ndarray) -> None:
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._records[int(self._indices[index])]


def subset(source: Source, indices: Sequence[int] | np.ndarray) -> Source:
    """A source of some of another's records, in the order of `indices`."""
    return source._replace(records=_Subset(source.records, indices), digest="")


def open_source(
    dataset: str,
    split: str,
    *,
    root: str = "",
    data_dir: str = "",
    multi_label: bool = False,
) -> Source:
    """Opens a split of a classification data set.

    `dataset`: "image_folder"; "digit_scenes/classification", which is prepared on first
    use; or the name of a TFDS data set ("name", "name/config", "name:1.2.3") already
    prepared as ArrayRecord.
    `split`: "train", "test", …, or a TFDS slice such as "train[:80%]".
    `root`: the folder of an "image_folder" or a "box_folder".
    `data_dir`: where TFDS data sets lie; if empty, TFDS's default (environment variable
    TFDS_DATA_DIR, else ~/tensorflow_datasets).
    `multi_label`: opens a data set of images with several classes each, laid out as
    TFDS's voc is: "voc/2007", "digit_scenes/detection" or "box_folder".

    Returns: the source; `check_labels` has passed for data sets of others' making.
    Raises: ValueError for an unknown data set or split, an empty split, a data set that
    is not for classification, has one class an image and not several or the reverse, or
    has labels outside the range of its classes; FileNotFoundError for a data set that
    isn't prepared, saying what to run.
    """
    return _open(dataset, split, root, data_dir, multi_label, with_boxes=False)


def open_detection_source(
    dataset: str, split: str, *, root: str = "", data_dir: str = ""
) -> Source:
    """Opens a split of a data set of images with boxes; arguments as `open_source`'s.

    A record has `image`, `name` (of its file), `objects`, and `labels` as in a
    multi-label source. Objects of difficult instances are among them; empty boxes are
    not, and a warning names their record.

    `dataset`: "voc_folder", "coco_folder", "yolo_folder", or "box_folder", which finds
    out which of these it is; "digit_scenes/detection", or a TFDS data set with the
    features of its voc ("voc/2007", "voc/2007:5.0.0").

    Raises: as `open_source`, and ValueError for a data set without boxes. Reading a
    record raises a ValueError if its image can't be opened.
    """
    if dataset in _INSTEAD:
        raise ValueError(f"{dataset!r} has no boxes; {_INSTEAD[dataset]}")
    return _open(dataset, split, root, data_dir, multi_label=True, with_boxes=True)


def read_objects(source: Source, threads: int = 8) -> list[Objects]:
    """The objects of every record of a detection source, in order, read by threads.

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

    indices = range(len(source.records))
    return map_in_threads(read, indices, "reading boxes", threads)


def available_splits(
    dataset: str, *, root: str = "", data_dir: str = ""
) -> tuple[str, ...]:
    """The names of a data set's splits; arguments as for `open_source`."""
    if dataset in FOLDERS:
        return tuple(_folder_module(dataset, root).scan_folder(root).splits)
    from sppnet_jax.data.tfds_records import open_builder

    return tuple(open_builder(dataset, data_dir).info.splits)


def _open(
    dataset: str,
    split: str,
    root: str,
    data_dir: str,
    multi_label: bool,
    with_boxes: bool,
) -> Source:
    if dataset in FOLDERS:
        folder = _folder_module(dataset, root)
        source: Source = folder.open_folder(root, split, multi_label, with_boxes)
        _check_class_names(source.class_names, root)
        return source
    from sppnet_jax.data.tfds_records import open_prepared

    return open_prepared(dataset, split, data_dir, multi_label, with_boxes)


def _check_class_names(names: Sequence[str], root: str) -> None:
    """Raises ValueError for names that tables and lists of classes couldn't hold."""
    known: dict[str, str] = {}
    for name in names:
        written = " ".join(name.split())
        if not written or name.splitlines() != [name]:
            raise ValueError(
                f"a class of {root!r} is called {name!r}: lists of classes have a line "
                "for each, so rename it to one line of text"
            )
        if written in known:
            raise ValueError(
                f"the classes {known[written]!r} and {name!r} of {root!r} differ in "
                "white space only: rename one, or put them together"
            )
        known[written] = name


def split_spans(
    split: str, shards: Mapping[str, Sequence[int]], what: str
) -> list[tuple[str, int, int]]:
    """The spans of records that a split, a slice of one or a sum of these means.

    `shards`: by a split's name, how many records each of its files holds. `what`: the
    data set's name in an error.

    Returns: (name, first, end) of each span, as TFDS resolves them.
    Raises: ValueError for an unknown split, an impossible slice, or no record at all.
    """
    for part in split.split("+"):
        name = re.sub(r"\[.*\]$", "", part.strip())
        if name not in shards:
            raise ValueError(
                f"unknown split {name!r} of {what!r}; it has "
                f"{', '.join(map(repr, shards))}"
            )
    if split in shards:
        spans = [(split, 0, sum(shards[split]))]
    else:
        spans = _resolve(split, shards, what)
    if all(end <= first for _, first, end in spans):
        raise ValueError(f"the split {split!r} of {what!r} is empty")
    return spans


def class_labels(
    present: Sequence[int] | np.ndarray,
    certain: Sequence[int] | np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """A record's `labels`, from the classes of all and of its not difficult objects."""
    labels = np.full(num_classes, -1, np.int8)
    labels[present] = 0
    labels[certain] = 1
    return labels


def check_labels(
    source: Source, *, all_up_to: int = 50_000, sample: int = 5_000
) -> None:
    """Checks that every label is the index of a class.

    Of a source with more than `all_up_to` records, only `sample` evenly spaced ones are
    read. Raises ValueError naming the first record whose label lies outside the range,
    or if no record of a multi-label source has a class.
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
    total = len(source.class_names)
    place = f"{record['name']!r} in split {source.split!r} of {source.name!r}"
    if source.multi_label:
        labels = record["labels"]
        if labels.shape != (total,) or not np.isin(labels, (-1, 0, 1)).all():
            raise ValueError(
                f"{place} has labels {labels.tolist()}; there must be one of 1 "
                "(present), 0 (only difficult instances) and -1 (absent) for each of "
                f"the {total} classes"
            )
    elif not 0 <= (label := record["label"]) < total:
        hint = " (TFDS marks a split without labels so)" if label == -1 else ""
        raise ValueError(
            f"{place} has label {label}{hint}, outside 0…{total - 1} of the {total} "
            "classes"
        )


def _folder_module(dataset: str, root: str) -> ModuleType:
    if not root:
        raise ValueError(
            f"the data set {dataset!r} needs its folder: set root (on the command "
            "line, --config.data.root=FOLDER)"
        )
    return importlib.import_module(f"sppnet_jax.data.{dataset}")


def _resolve(
    split: str, shards: Mapping[str, Sequence[int]], what: str
) -> list[tuple[str, int, int]]:
    import tensorflow_datasets as tfds  # takes half a second

    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=list(lengths), num_bytes=0)
        for name, lengths in shards.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"can't read the split {split!r} of {what!r}: {error}. "
            "Slices look like 'train[:80%]' or 'train[1000:2000]'"
        ) from error
    return [
        (
            one.splitname,
            one.from_ or 0,
            sum(shards[one.splitname]) if one.to is None else one.to,
        )
        for one in parts
    ]
