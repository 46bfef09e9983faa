"""All the settings of a network's training: what its config holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from sppnet_jax.data.datasets import ImageData
from sppnet_jax.network.described import PRETRAINED, absolute_weights, described
from sppnet_jax.network.model import (
    HEAD_ONLY,
    Architecture,
    joined_geometry,
    make_model,
)
from sppnet_jax.network.preprocess import Inputs
from sppnet_jax.network.pretrained import (
    published_architecture,
    published_of,
)
from sppnet_jax.network.trunks import get_backbone
from sppnet_jax.run.run_folder import load_config
from sppnet_jax.run.settings import at_least, between, read
from sppnet_jax.training.schedule import Schedule
from sppnet_jax.training.sizes import possible_sizes
from sppnet_jax.training.steps import Optimizer


class NetworkSettings(NamedTuple):
    """Everything that a network's training is made from; the paper's ImageNet recipe.

    `seed`: of weights, of the order of images and of augmentation. `batch_size`: over
    all devices of all processes.
    `sizes`: sides of the training images, an epoch at each in turn, the crop resized,
    as (224, 180); or ("uniform", 180, 224), drawn for each epoch; () is all epochs at
    `data.image_size`. `size_multiple`: of a drawn size; each size compiles one program.
    `log_steps`: between two rows of the log. `checkpoint_steps`: between checkpoints; 0
    saves at the end of each epoch only. `keep_checkpoints`: the newest so many.
    `max_steps`: ends there, to go on later; 0 for the whole run. `profile_steps`:
    traced after the first ones, into WORKDIR/profile.
    """

    seed: Annotated[int, between(0, 2**32)] = 0
    epochs: Annotated[int, at_least(1)] = 70
    batch_size: Annotated[int, at_least(1)] = 128
    sizes: tuple[int | str, ...] = ()
    size_multiple: Annotated[int, at_least(1)] = 4
    model: Architecture = Architecture()
    data: ImageData = ImageData()
    inputs: Inputs = Inputs()
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    log_steps: Annotated[int, at_least(0)] = 50
    checkpoint_steps: Annotated[int, at_least(0)] = 0
    keep_checkpoints: Annotated[int, at_least(1)] = 2
    max_steps: Annotated[int, at_least(0)] = 0
    profile_steps: Annotated[int, at_least(0)] = 0

    def check(self) -> None:
        """Raises ValueError for settings that don't fit together."""
        side = self.data.image_size
        try:
            make_model(self.model, 1, side)
        except ValueError as error:
            raise ValueError(
                f"config.model, at config.data.image_size={side}: {error}"
            ) from None
        if self.schedule.warmup_epochs > self.epochs:
            raise ValueError(
                f"config.schedule.warmup_epochs, {self.schedule.warmup_epochs}, is "
                f"more than config.epochs, {self.epochs}"
            )
        if self.model.trainable != "all" and not self.model.weights:
            raise ValueError(
                f"config.model.trainable={self.model.trainable!r} freezes layers that "
                "were never trained: give config.model.weights='pretrained', or a file"
            )
        if self.model.trainable == HEAD_ONLY and not self.model.levels:
            raise ValueError(
                "a frozen trunk (config.model.trainable='head') is pooled by a pyramid:"
                " give config.model.levels such as (1,)"
            )
        if self.model.trainable == HEAD_ONLY and self.sizes:
            raise ValueError(
                "config.sizes is of images that are resized in each epoch, but a "
                "frozen trunk (config.model.trainable='head') sees each image once"
            )
        if self.sizes:
            try:
                self._check_sizes()
            except ValueError as error:
                raise ValueError(f"config.sizes: {error}") from None

    def with_absolute_paths(self) -> "NetworkSettings":
        """The same, found again from any folder."""
        weights = absolute_weights(self.model.weights)
        return self._replace(
            model=self.model._replace(weights=weights),
            data=self.data.with_absolute_paths(),
        )

    def _check_sizes(self) -> None:
        sides = possible_sizes(self.sizes, self.size_multiple)
        largest = self.data.image_size
        if sides[-1] > largest:
            raise ValueError(
                f"{sides[-1]} is more than config.data.image_size, "
                f"{largest}: crops are only made smaller, so that must be the largest "
                "size"
            )
        if not self.model.levels and sides != (largest,):
            raise ValueError(
                "without a pyramid (model.levels=()) the network takes images of "
                f"data.image_size, {largest}, only; got {self.sizes}"
            )
        backbone = get_backbone(self.model.backbone)
        joined_geometry(backbone, self.model.cuts).map_size(sides[0])


def published_settings(trunk: str, weights: str = PRETRAINED) -> NetworkSettings:
    """The settings of a published network, with its own classifier, as it is tested.

    `weights`: "pretrained", or see `find_weights`; of an export, its run's network.

    Raises: as `published_architecture`.
    """
    architecture = published_architecture(trunk, weights)
    told = described(weights) or published_of(trunk)
    data = ImageData(image_size=told.image_size, resize_side=told.resize_side)
    return NetworkSettings(
        model=architecture,
        data=data,
        inputs=Inputs(color_sigma=0.0),
        batch_size=16,
    )


def network_settings(workdir: Path) -> NetworkSettings:
    """The settings that a run was trained with.

    Raises: FileNotFoundError for a folder without a run.
    """
    saved: Mapping[str, Any] = load_config(workdir)
    if "proposals" in saved:
        raise ValueError(
            f"{workdir} holds a detector, no network: give a network's own --workdir"
        )
    return read(NetworkSettings, saved)
