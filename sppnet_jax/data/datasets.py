"""Which data set a run takes and how its images are read, as settings say it."""

import logging
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple

from sppnet_jax.data.images import CROPS
from sppnet_jax.data.sources import (
    FOLDERS,
    Source,
    available_splits,
    open_detection_source,
    open_source,
)
from sppnet_jax.run.files import absolute
from sppnet_jax.run.settings import helpers, one_of, pixels, share

VIEWS = ("crop", "warp", "full")

log = logging.getLogger(__name__)


class ImageData(NamedTuple):
    """A data set of images and classes, and how a network is shown them.

    `name`: of a TFDS data set, "digit_scenes/classification", or "image_folder", whose
    folder is `root`. `data_dir`: where TFDS keeps data; "" is its own default.
    `train_split`; `validation_split`: tested after each epoch, "" for validation or
    test; `test_split`: of a test, "" for test or validation.
    `image_size`: side of the crop that the network sees, in pixels. `resize_side`:
    images' shorter side before it.
    `crop`: "paper", "center", "random" or "random_resized", whose area is at least
    `min_area` of the image. `flip`: mirrors half of the images.
    `view`: of a frozen trunk, which sees each image once: the "full" image at its own
    aspect ratio, the centre "crop", or the image made a square, "warp".
    `workers`: processes that load; 0 loads in `threads` threads of this one.
    `strict`: a broken image is an error; else it is skipped, named and counted.
    """

    name: str = "imagenet2012"
    root: str = ""
    data_dir: str = ""
    train_split: str = "train"
    validation_split: str = ""
    test_split: str = ""
    image_size: Annotated[int, pixels()] = 224
    resize_side: Annotated[int, pixels()] = 256
    crop: Annotated[str, one_of(CROPS)] = "paper"
    min_area: Annotated[float, share(above_zero=True)] = 0.35
    flip: bool = True
    view: Annotated[str, one_of(VIEWS)] = "full"
    workers: Annotated[int, helpers()] = 0
    threads: Annotated[int, helpers(1)] = 8
    strict: bool = False

    def check(self) -> None:
        """Raises ValueError for settings that don't fit together."""
        if self.resize_side < self.image_size:
            raise ValueError(
                f"config.data.resize_side, {self.resize_side}, must be at least "
                f"config.data.image_size, {self.image_size}"
            )
        if not self.train_split:
            raise ValueError("config.data.train_split must name a split, such as train")
        if self.name in FOLDERS and not self.root:
            raise ValueError("give the folder of images: --config.data.root=FOLDER")

    def with_absolute_paths(self) -> "ImageData":
        """The same, found again from any folder."""
        return self._replace(root=absolute(self.root), data_dir=absolute(self.data_dir))

    @property
    def place(self) -> dict[str, Any]:
        """Where the data set is: what `open_source` takes beside its name."""
        return {"root": self.root, "data_dir": self.data_dir}

    @property
    def loading(self) -> dict[str, Any]:
        """How records are read, for the functions of `data.batches`."""
        names = ("workers", "threads", "strict")
        return {name: getattr(self, name) for name in names}

    @property
    def augmentation(self) -> dict[str, Any]:
        """How training images are cropped, for `train_batches`."""
        names = ("image_size", "resize_side", "crop", "min_area", "flip")
        return {name: getattr(self, name) for name in names}


class BoxData(NamedTuple):
    """A data set of images and boxes.

    `name`: "voc/2007", "voc/2012", "digit_scenes/detection", or the kind of the folder
    `root`: "voc_folder", "coco_folder", "yolo_folder", or "box_folder", which finds out
    which of these it is. `data_dir`: where TFDS keeps data; "" is its own default.
    `train_split`: "" for trainval, train+validation, or train. `test_split`: "" for
    test, or validation. `threads`: that read.
    """

    name: str = "voc/2007"
    root: str = ""
    data_dir: str = ""
    train_split: str = ""
    test_split: str = ""
    threads: Annotated[int, helpers(1)] = 8

    def check(self) -> None:
        """Raises ValueError for settings that don't fit together."""
        if self.name in FOLDERS and not self.root:
            raise ValueError("give the folder of images: --config.data.root=FOLDER")

    def with_absolute_paths(self) -> "BoxData":
        """The same, found again from any folder."""
        return self._replace(root=absolute(self.root), data_dir=absolute(self.data_dir))

    @property
    def place(self) -> dict[str, Any]:
        """Where the data set is: what `open_detection_source` takes beside its name."""
        return {"root": self.root, "data_dir": self.data_dir}


def open_split(data: ImageData, purpose: str) -> Source:
    """The source for a purpose: "train", "validation" or "test".

    Where the settings leave a split open, validation takes "validation" if the data set
    has it and else "test"; test the other way round.

    Raises: ValueError for a data set without such a split, and as `open_source` does.
    """
    order = {"validation": ("validation", "test"), "test": ("test", "validation")}
    split = _choose_split(
        data,
        purpose,
        lambda _: order[purpose],
        "neither a validation nor a test split",
        ", such as 'train[90%:]' (and train_split='train[:90%]')",
    )
    return open_source(data.name, split, **data.place)


def open_box_split(data: BoxData, purpose: str) -> Source:
    """The source for a purpose, "train" or "test".

    Where the settings leave a split open, one to train on has none of the images that
    are tested on.

    Raises: ValueError for a data set without such a split, and as
    `open_detection_source` does.
    """

    def choices(splits: tuple[str, ...]) -> tuple[str, ...]:
        if purpose == "test":
            return ("test", "validation", "val")
        joined = ("trainval", "train+validation", "train+val")
        return (*(joined if "test" in splits else ()), "train")

    split = _choose_split(data, purpose, choices, f"no split to {purpose} on")
    return open_detection_source(data.name, split, **data.place)


def _choose_split(
    data: ImageData | BoxData,
    purpose: str,
    choices: Callable[[tuple[str, ...]], Iterable[str]],
    lacks: str,
    hint: str = "",
) -> str:
    """The split of the settings, or else the first choice that the data set has."""
    split: str = getattr(data, f"{purpose}_split")
    if split:
        return split
    splits = available_splits(data.name, **data.place)
    for choice in choices(splits):
        if all(part in splits for part in choice.split("+")):
            log.info("%s uses the split %r", purpose, choice)
            return choice
    raise ValueError(
        f"{data.name} has {lacks}, only {', '.join(splits)}: give "
        f"--config.data.{purpose}_split{hint}"
    )
