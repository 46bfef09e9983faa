"""A network as programs that need no code of it: `sppnet_jax.exported` runs them.

    export_stablehlo(load_network("runs/flowers"), "flowers")

The folder holds a serialised program for each bucket, the weights in one safetensors
file and what a person and `exported.load` need to know in `model.json`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from sppnet_jax import exported
from sppnet_jax.buckets.choice import Bucket
from sppnet_jax.buckets.whole_images import MAX_ASPECT, photo_buckets
from sppnet_jax.classification.image_scores import scores_of
from sppnet_jax.network.pretrained import named_params
from sppnet_jax.network.trained import Network
from sppnet_jax.network.weight_files import write_tensors
from sppnet_jax.run.files import own_version, whole_file, write_text

PLATFORMS = ("cpu", "cuda", "tpu")
_LARGEST = 2**15


def export_stablehlo(
    network: Network,
    folder: str | Path,
    *,
    buckets: Sequence[Bucket] = (),
    platforms: Sequence[str] = PLATFORMS,
) -> Path:
    """Writes a network's programs, weights and description into a folder; returns it.

    `buckets`: (height, width) each, of images at the network's `resize_side`; by
    default eight that hold them all up to 4:1. `platforms`: that the programs run on.

    Raises: ValueError for a bucket that is too small for the network.
    """
    folder, side = Path(folder).expanduser(), network.resize_side
    unknown = sorted(set(platforms) - set(PLATFORMS))
    if unknown or not platforms:
        raise ValueError(
            f"programs are exported for {', '.join(PLATFORMS)}, one or several; got "
            f"{', '.join(unknown) or 'none'}"
        )
    platforms = tuple(dict.fromkeys(platforms))
    crop_side = network.model.image_size if network.model.levels is None else 0
    buckets = tuple(dict.fromkeys(buckets)) or photo_buckets(side)
    if crop_side:
        buckets = ((crop_side, crop_side),)
    for bucket in buckets:
        if max(bucket) > _LARGEST:
            raise ValueError(
                f"the bucket {bucket[0]}×{bucket[1]} is larger than any image: give "
                f"sides of {_LARGEST:,} pixels at most"
            )
        if min(bucket) < side and not crop_side:
            raise ValueError(
                f"the bucket {bucket[0]}×{bucket[1]} holds no image whose shorter side "
                f"has {side} pixels, as all have that this network sees"
            )
    tensors = named_params(network.params)
    specs = {
        name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
        for name, tensor in tensors.items()
    }
    program = export.export(jax.jit(_by_name(network)), platforms=list(platforms))
    folder.mkdir(parents=True, exist_ok=True)
    for bucket in buckets:
        made = program(
            specs,
            jax.ShapeDtypeStruct((1, *bucket, 3), jnp.uint8),
            jax.ShapeDtypeStruct((1, 2), jnp.int32),
        )
        with whole_file(folder / exported.program_file(bucket)) as file:
            file.write(made.serialize())
    write_tensors(folder / exported.WEIGHTS, tensors)
    described = {
        "format": exported.FORMAT,
        "classes": list(network.class_names),
        "buckets": [list(bucket) for bucket in buckets],
        "resize_side": side,
        "max_aspect": MAX_ASPECT,
        "crop_side": crop_side,
        "preprocessing": "uint8 RGB; the programs subtract the mean and divide",
        "platforms": list(platforms),
        "backbone": network.settings["model"]["backbone"],
        "levels": list(network.model.levels or ()),
        "versions": {"jax": jax.__version__, "sppnet_jax": own_version()},
    }
    # The last: a folder that has it is whole.
    text = json.dumps(described, indent=2, ensure_ascii=False)
    write_text(folder / exported.DESCRIPTION, f"{text}\n")
    return folder


def _by_name(network: Network) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """`scores_of`, of parameters by one name each."""
    score = scores_of(network)

    def score_by_name(tensors: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        params: dict[str, dict[str, jax.Array]] = {}
        for name, tensor in tensors.items():
            layer, part = name.split(".")
            params.setdefault(layer, {})[part] = tensor
        return score(params, images, sizes)

    return score_by_name
