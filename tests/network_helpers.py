"""Networks of few layers, and with drawn weights: little to train or to compile."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sppnet_jax.network import trunks
from sppnet_jax.network.model import Architecture, SPPNet, make_model
from sppnet_jax.network.pretrained import named_params
from sppnet_jax.network.stack import Conv, Cut
from sppnet_jax.network.trunks import ZF5, Backbone, Published
from sppnet_jax.network.weight_files import write_tensors
from sppnet_jax.run import run_folder
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.settings import read
from sppnet_jax.training.network_settings import NetworkSettings
from tests.processes import run_command

# ZF-5 without its last three convolutions and a normalisation: maps of the same sizes,
# compiled in half the time. For what does not depend on the network.
SHALLOW = ZF5._replace(layers=(*ZF5.layers[:4], ZF5.layers[5]))

# In place of a published network, with cuts and a classifier of its own.
TINY_TRUNK = "resnet18"
TINY = Backbone(
    layers=(
        Conv(6, kernel=3, stride=2, padding=(0, 1)),
        Cut("stride2"),
        Conv(8, kernel=3, stride=2, padding=1, activation="relu6"),
        Cut("stride4"),
    ),
    published=Published((127.0,) * 3, (128.0,) * 3, image_size=32, resize_side=40),
)


def write_tiny_weights(path: Path, classes: int = 1000) -> Path:
    """Writes weights of the tiny trunk and a classifier on it; returns the file."""
    model = make_model(
        Architecture(TINY_TRUNK, levels=(1,), head="linear"), classes, 32
    )
    write_tensors(path, named_params(drawn_params(model)))
    return path


@functools.cache
def _tiny_program() -> Any:
    def conv(maps: Any, layer: Any, pads: tuple[int, int]) -> Any:
        order = ("NHWC", "HWIO", "NHWC")
        found = jax.lax.conv_general_dilated(
            maps, layer["kernel"], (2, 2), [pads, pads], dimension_numbers=order
        )
        return found + layer["bias"]

    def maps(params: Any, images: Any) -> Any:
        fine = jax.nn.relu(conv((images - 127.0) / 128.0, params["conv1"], (0, 1)))
        return fine[0], jnp.clip(conv(fine, params["conv2"], (1, 1)), 0, 6)[0]

    return jax.jit(maps)


def tiny_maps(params: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tiny trunk's maps of an image at strides 2 and 4, without the package."""
    fine, coarse = _tiny_program()(params, jnp.asarray(image[None], jnp.float32))
    return np.asarray(fine), np.asarray(coarse)


def joined_by_hand(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Each unit of stride 2 beside that of stride 4 whose centre is the closest."""
    rows, columns = (
        [
            min(reversed(range(m)), key=lambda j, i=i: abs(4 * j - 2 * i))
            for i in range(n)
        ]
        for n, m in zip(fine.shape[:2], coarse.shape[:2], strict=True)
    )
    return np.concatenate([fine, coarse[np.ix_(rows, columns)]], axis=-1)


def pooled_by_hand(
    maps: np.ndarray, levels: Sequence[int], reduce: Callable[..., np.ndarray]
) -> np.ndarray:
    """Bin i of n over a side a is [floor(i·a/n), ceil((i+1)·a/n)); one vector."""

    def bins(size: int, level: int) -> list[slice]:
        return [
            slice(i * size // level, -(-(i + 1) * size // level)) for i in range(level)
        ]

    rows, columns = maps.shape[:2]
    return np.concatenate(
        [
            reduce(maps[down, right], axis=(0, 1))
            for n in levels
            for down in bins(rows, n)
            for right in bins(columns, n)
        ]
    )


def run_with_tiny_trunk(module: str, arguments: list[str]) -> None:
    """`python -m MODULE ARGUMENTS…`, in this process, with the tiny trunk."""
    trunks.BACKBONES[TINY_TRUNK] = TINY
    run_command(module, arguments)


def drawn_params(model: SPPNet) -> dict[str, Any]:
    """A model's parameters, of He's spread; its biases are not zero."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        spread = np.sqrt(2 / max(1, np.prod(leaf.shape[:-1])))
        return rng.normal(0, spread, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def write_network(workdir: Path, config: ConfigDict) -> Path:
    """Writes the folder of a classifier of three classes; returns the folder."""
    config.data.root = "photos"
    settings = read(NetworkSettings, config.to_dict())
    names = ("one", "two", "three")
    run_folder.save_config(workdir, config.to_dict())
    data = run_folder.TrainingData("image_folder", "photos", "train", 9, names)
    run_folder.save_training_data(workdir, data)
    params = drawn_params(make_model(settings.model, 3, settings.data.image_size))
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        checkpoints.save(3, params=params, training={"step": np.int32(3)}, host={})
    return workdir
