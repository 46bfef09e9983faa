"""What an exported file of weights says of its network, so that it can be taken up."""

import json
from typing import NamedTuple

from sppnet_jax.network.model import Architecture
from sppnet_jax.network.trained import Network
from sppnet_jax.network.weight_files import find_weights, read_metadata
from sppnet_jax.run.files import absolute, own_version
from sppnet_jax.run.settings import read

PRETRAINED = "pretrained"  # of `weights`: those of the backbone's package
# As they are; what else of `Architecture` is needed is made words, or is of training.
_PLAIN = ("backbone", "reducer", "head")
_OURS = "sppnet_jax "
_LARGEST = 4096  # pixels; a file of others may say anything


class Described(NamedTuple):
    """What an exported file says of its network.

    `image_size`, `resize_side`: in pixels, as it was tested. `published_inputs`: images
    are normalised as those of the published network; else by what the run measured.
    """

    architecture: Architecture
    class_names: tuple[str, ...]
    image_size: int
    resize_side: int
    published_inputs: bool


def describe(network: Network) -> dict[str, str]:
    """What a network is, in words, to be written beside its weights."""
    architecture = read(Architecture, network.settings["model"], "config.model")
    return {
        **{name: getattr(architecture, name) for name in _PLAIN},
        "cuts": ",".join(architecture.cuts),
        "levels": ",".join(map(str, architecture.levels)),
        "width": str(architecture.width),
        "classes": json.dumps(network.class_names, ensure_ascii=False),
        "image_size": str(network.model.image_size),
        "resize_side": str(network.resize_side),
        "inputs": "published" if architecture.published else "of the run",
        "version": _OURS + own_version(),
    }


def absolute_weights(where: str) -> str:
    """Where weights are, see `find_weights`; a file's path is found from any folder."""
    elsewhere = where == PRETRAINED or where.startswith(("package:", "hub:"))
    return where if elsewhere else absolute(where)


def described(weights: str) -> Described | None:
    """What a file of weights says of its network; None for others than our own.

    `weights`: "pretrained", or see `find_weights`.

    Raises: FileNotFoundError; ValueError for words that describe no network.
    """
    if weights == PRETRAINED:
        return None
    path = find_weights(weights)
    told = read_metadata(path)
    if not told.get("version", "").startswith(_OURS):
        return None
    try:
        values = {name: told[name] for name in _PLAIN} | {
            "weights": weights,
            "cuts": tuple(filter(None, told["cuts"].split(","))),
            "levels": tuple(map(int, filter(None, told["levels"].split(",")))),
            "width": float(told["width"]),
        }
        image_size, resize_side = int(told["image_size"]), int(told["resize_side"])
        if not 1 <= image_size <= resize_side <= _LARGEST:
            raise ValueError(f"images of {image_size} and {resize_side} pixels")
        return Described(
            architecture=read(Architecture, values, path.name),
            class_names=tuple(map(str, json.loads(told["classes"]))),
            image_size=image_size,
            resize_side=resize_side,
            published_inputs=told["inputs"] == "published",
        )
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} doesn't say which network its weights are of ({error}): export "
            "it anew"
        ) from error
