"""Which split of a data set is for what."""

import logging

from sppnet_jax.data.datasets import BoxData, ImageData
from sppnet_jax.data.detection_sources import open_detection_source
from sppnet_jax.data.sources import Source, available_splits, open_source

log = logging.getLogger(__name__)


def open_split(data: ImageData, purpose: str) -> Source:
    """The source for a purpose: "train", "validation" or "test".

    Where the settings leave a split open, validation takes "validation" if the data set
    has it and else "test"; test the other way round.

    Raises: ValueError for a data set without such a split, and as `open_source` does.
    """
    split = getattr(data, f"{purpose}_split")
    if not split:
        splits = available_splits(data.name, **data.place)
        order = {"validation": ("validation", "test"), "test": ("test", "validation")}
        found = [name for name in order[purpose] if name in splits]
        if not found:
            raise ValueError(
                f"{data.name} has neither a validation nor a test split, only "
                f"{', '.join(splits)}: give --config.data.{purpose}_split, such as "
                "'train[90%:]' (and train_split='train[:90%]')"
            )
        split = found[0]
        log.info("%s uses the split %r", purpose, split)
    return open_source(data.name, split, **data.place)


def open_box_split(data: BoxData, purpose: str) -> Source:
    """The source for a purpose, "train" or "test".

    Where the settings leave a split open, one to train on has none of the images that
    are tested on.

    Raises: ValueError for a data set without such a split, and as
    `open_detection_source` does.
    """
    place = {"root": data.root, "data_dir": data.data_dir}
    split = getattr(data, f"{purpose}_split")
    if not split:
        splits = available_splits(data.name, **place)
        joined = ("trainval", "train+validation", "train+val")
        choices = {
            "test": ("test", "validation", "val"),
            "train": (*(joined if "test" in splits else ()), "train"),
        }
        known = [
            choice
            for choice in choices[purpose]
            if all(part in splits for part in choice.split("+"))
        ]
        if not known:
            raise ValueError(
                f"{data.name} has no split to {purpose} on, only {', '.join(splits)}: "
                f"give --config.data.{purpose}_split"
            )
        split = known[0]
        log.info("%s uses the split %r", purpose, split)
    return open_detection_source(data.name, split, **place)
