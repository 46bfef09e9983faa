"""Where an experiment runs: data, width, sizes, epochs and seeds.

    digits    the embedded digit scenes, for a machine without a GPU
    folder    a folder of class folders (--root), for a machine without a GPU
    imagenet  the paper's setting

Learning rates and all else are those of the recipe of that name in configs/.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import digits, folder, imagenet

DEFAULT_LEVELS = (6, 3, 2, 1)
_BACKBONES = {
    "zf5": "ZF-5",
    "convnet5": "Convnet*-5",
    "overfeat5": "Overfeat-5",
    "overfeat7": "Overfeat-7",
}
_TRAININGS = {
    "single": "single-size",
    "multi": "multi-size",
    "uniform": "uniform sizes",
}


class Preset(NamedTuple):
    """`small` and `large`: the sides of multi-size training (180 and 224).

    `make_config`: the settings of a backbone's run, its levels and sizes left open.
    """

    make_config: Callable[[str], ConfigDict]
    small: int
    large: int
    seeds: tuple[int, ...]


class Network(NamedTuple):
    """One row of a table: a backbone, its pyramid, and the sizes it is trained at.

    `levels`: () for the twin without SPP. `training`: "single", "multi" (both sizes in
    turn) or "uniform" (a size drawn for each epoch).
    """

    backbone: str
    levels: tuple[int, ...] = DEFAULT_LEVELS
    training: str = "single"

    @property
    def name(self) -> str:
        """Its name in folders and result files."""
        pyramid = "".join(map(str, self.levels)) or "no_spp"
        return f"{self.backbone}-{pyramid}-{self.training}"

    @property
    def label(self) -> str:
        """Itself in the words of a table."""
        if not self.levels:
            return f"{_BACKBONES[self.backbone]}, no SPP"
        pyramid = ",".join(map(str, self.levels))
        return (
            f"{_BACKBONES[self.backbone]}, {{{pyramid}}}, {_TRAININGS[self.training]}"
        )


class SVMData(NamedTuple):
    """Data that linear SVMs are tested on (tables 6 and 7).

    `classes`: a data set with one class an image and a split of it, for the protocol of
    Caltech101; "" is the data set that the networks are trained on, and all its splits
    but "train". No network has seen them.
    `multi_label`: a data set with several classes an image, with its training and test
    splits; None where there is none.
    """

    classes: tuple[str, str]
    multi_label: tuple[str, str, str] | None


def network_config(
    preset: Preset, network: Network, seed: int, *, root: str = "", data_dir: str = ""
) -> ConfigDict:
    """The config of one run."""
    config = preset.make_config(network.backbone)
    config.model.backbone = network.backbone
    config.model.levels = network.levels
    sizes: dict[str, tuple[int | str, ...]] = {
        "single": (),
        "multi": (preset.large, preset.small),
        "uniform": ("uniform", preset.small, preset.large),
    }
    config.sizes = sizes[network.training]
    config.seed = seed
    config.keep_checkpoints = 1
    if root:
        config.data.root = str(Path(root).expanduser().absolute())
    if data_dir:
        config.data.data_dir = data_dir
    return config


def _digits(backbone: str) -> ConfigDict:
    config = digits.get_config()
    config.data.train_split = "train[:6000]"
    config.epochs = 10
    return config


def _folder(backbone: str) -> ConfigDict:
    config = folder.get_config()
    config.model.width = 1 / 6
    config.epochs = 8
    return config


def _imagenet(backbone: str) -> ConfigDict:
    return imagenet.get_config(f"{backbone},spp")


PRESETS = {
    "digits": Preset(_digits, small=52, large=64, seeds=(0, 1, 2)),
    "folder": Preset(_folder, small=77, large=96, seeds=(0, 1, 2)),
    "imagenet": Preset(_imagenet, small=180, large=224, seeds=(0,)),
}

SVM_DATA = {
    "digits": SVMData(
        classes=("", "test"), multi_label=("digit_scenes/detection", "train", "test")
    ),
    "folder": SVMData(classes=("", ""), multi_label=None),
    "imagenet": SVMData(
        classes=("caltech101", "train+test"),
        multi_label=("voc/2007", "train+validation", "test"),
    ),
}
