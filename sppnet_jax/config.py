"""Every setting of a run with its meaning; the files in configs/ change some of them.

On the command line each can be overridden: `--config.batch_size=64`,
`--config.model.levels='(4, 3, 2, 1)'`.
"""

from typing import Any

from ml_collections import ConfigDict

from sppnet_jax.data.images import CROPS
from sppnet_jax.network.model import create_model
from sppnet_jax.network.trunks import backbone_geometry
from sppnet_jax.training.schedule import KINDS
from sppnet_jax.training.sizes import possible_sizes


def base_config() -> ConfigDict:
    """The paper's recipe for ImageNet (section 3.1)."""
    config = ConfigDict()
    config.seed = 0
    config.epochs = 70
    config.batch_size = 128  # over all devices of all processes
    config.sizes = ()  # (224, 180): an epoch at each in turn, the crop resized;
    # ("uniform", 180, 224): drawn for each epoch; (): all at data.image_size
    config.size_multiple = 4  # of a drawn size; each size compiles one program

    config.model = ConfigDict()
    config.model.backbone = "zf5"  # zf5, convnet5, overfeat5, overfeat7
    config.model.levels = (6, 3, 2, 1)  # () for the twin without SPP
    config.model.width = 1.0  # scales the filters and the units of fc6 and fc7
    config.model.dropout = 0.5
    config.model.weight_init = "paper"  # or "he", for narrow networks
    config.model.bfloat16 = False  # activations in bfloat16, parameters in float32

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS name, digit_scenes/…, or image_folder
    config.data.root = ""  # the folder of an image_folder
    config.data.data_dir = ""  # where TFDS keeps data; "" is its own default
    config.data.train_split = "train"
    config.data.validation_split = ""  # tested after each epoch; "": validation or test
    config.data.test_split = ""  # of evaluate; "": test, or validation
    config.data.image_size = 224  # side of the crop that the network sees
    config.data.resize_side = 256  # images' shorter side before the crop
    config.data.crop = "paper"  # or center, random, random_resized
    config.data.min_area = 0.35  # of a random_resized crop
    config.data.flip = True
    config.data.workers = 0  # processes that load; 0 loads in threads of this one
    config.data.threads = 8
    config.data.strict = False  # a broken image is an error, not skipped

    config.mean = 128.0  # subtracted; 0 subtracts the training set's mean image
    config.scale = 1.0  # pixels are divided by it after the mean is gone
    config.color_sigma = 0.1  # of the colour altering; 0 for none
    config.statistics_images = 10_000  # read for the mean image and the colours

    config.learning_rate = 0.01
    config.schedule = "plateau"  # plateau, epochs, cosine, constant
    config.drop_factor = 10.0
    config.drop_epochs = (30.0, 50.0)  # of schedule "epochs"
    config.plateau_epochs = 5  # without a better validation error
    config.plateau_improvement = 0.001
    config.plateau_drops = 2
    config.warmup_epochs = 0.0
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 5e-4  # not on biases
    config.label_smoothing = 0.0

    config.log_steps = 50
    config.checkpoint_steps = 0  # 0: at the end of each epoch only
    config.keep_checkpoints = 2
    config.max_steps = 0  # stops there, as if interrupted; 0 for the whole run
    config.profile_steps = 0  # traced after the first ones, into WORKDIR/profile
    return config


def check_config(config: ConfigDict) -> None:
    """Raises ValueError with the valid values for a setting that can't work.

    It needs no data and no device: mistakes are found before anything is loaded.
    """
    check_fields(config, base_config(), "config")
    create_model(
        config.model.backbone,
        tuple(config.model.levels) or None,
        width=config.model.width,
        image_size=config.data.image_size,
        dropout=config.model.dropout,
        weight_init=config.model.weight_init,
    )
    one_of(config, "data.crop", CROPS)
    one_of(config, "schedule", KINDS)
    for name in ("epochs", "batch_size", "scale"):
        at_least(config, name, 0, strictly=True)
    for name in (
        "seed",
        "data.workers",
        "color_sigma",
        "learning_rate",
        "warmup_epochs",
        "weight_decay",
        "log_steps",
        "checkpoint_steps",
        "max_steps",
        "profile_steps",
        "plateau_improvement",
        "plateau_drops",
    ):
        at_least(config, name, 0)
    for name in (
        "data.threads",
        "keep_checkpoints",
        "statistics_images",
        "plateau_epochs",
        "drop_factor",
    ):
        at_least(config, name, 1)
    if config.seed >= 2**32:
        raise ValueError(f"config.seed must be below 2**32, got {config.seed}")
    if not 0 < config.data.min_area <= 1:
        raise ValueError(
            f"config.data.min_area must be in (0, 1], got {config.data.min_area}"
        )
    if config.warmup_epochs > config.epochs:
        raise ValueError(
            f"config.warmup_epochs, {config.warmup_epochs}, is more than "
            f"config.epochs, {config.epochs}"
        )
    for name in ("momentum", "label_smoothing"):
        value = _get(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"config.{name} must be in [0, 1), got {value}")
    if config.data.resize_side < config.data.image_size:
        raise ValueError(
            f"config.data.resize_side, {config.data.resize_side}, must be at least "
            f"config.data.image_size, {config.data.image_size}"
        )
    if config.sizes:
        _check_training_sizes(config)
    if config.data.name == "image_folder" and not config.data.root:
        raise ValueError("give the folder of images: --config.data.root=FOLDER")


def _check_training_sizes(config: ConfigDict) -> None:
    sides = possible_sizes(config.sizes, config.size_multiple)
    if sides[-1] > config.data.image_size:
        raise ValueError(
            f"config.sizes has {sides[-1]}, more than config.data.image_size, "
            f"{config.data.image_size}: crops are only made smaller, so that must be "
            "the largest size"
        )
    if not config.model.levels and sides != (config.data.image_size,):
        raise ValueError(
            f"config.sizes is {tuple(config.sizes)}, but without a pyramid "
            "(model.levels=()) the network takes images of data.image_size, "
            f"{config.data.image_size}, only"
        )
    backbone_geometry(config.model.backbone).map_size(sides[0])


def check_fields(config: ConfigDict, base: ConfigDict, where: str) -> None:
    """Raises ValueError unless a config has the fields of another, and no more."""
    for name in config:
        if name not in base:
            raise ValueError(
                f"unknown field {name!r}: {where} has the fields {', '.join(base)}"
            )
    for name in base:
        if name not in config:
            raise ValueError(
                f"{where} lacks the field {name!r}: begin with base_config()"
            )
        if isinstance(base[name], ConfigDict):
            check_fields(config[name], base[name], f"{where}.{name}")


def _get(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def one_of(config: ConfigDict, name: str, values: tuple[str, ...]) -> None:
    """Raises ValueError unless a setting such as "data.crop" has one of the values."""
    value = _get(config, name)
    if value not in values:
        raise ValueError(f"config.{name} is {value!r}: choose from {', '.join(values)}")


def at_least(
    config: ConfigDict, name: str, low: float, *, strictly: bool = False
) -> None:
    """Raises ValueError for a setting below `low`; if `strictly`, also at it."""
    value = _get(config, name)
    if value < low or (strictly and value == low):
        bound = "more than" if strictly else "at least"
        raise ValueError(f"config.{name} must be {bound} {low}, got {value}")
