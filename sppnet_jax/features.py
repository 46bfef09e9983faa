r"""Writes a layer's features of every image of a split into a file, to train SVMs on.

python -m sppnet_jax.features --workdir=runs/digits --layer=fc7 --mode=full
python -m sppnet_jax.features --workdir=runs/zf5_spp --config.data.name=voc/2007 \
    --split=train+validation --multi_label --mode=full --side=392 --output=voc07.npz
python -m sppnet_jax.features --trunk=efficientnet_lite0 \
    --config.data.name=image_folder --config.data.root=FOLDER --mode=full --side=320 \
    --config.model.cuts="('stride16',)" --config.model.levels="(3,2,1)" \
    --config.model.reducer=max

The data set is the run's own, or any other. `--trunk` takes a published network in
place of a run's, with any cuts, levels and reducer. `classification.feature_files`
reads the file, `classification.svm` trains on it. Several machines that share the
folder share the images: --process_index=I --process_count=N on each.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sppnet_jax import cli
from sppnet_jax.data.datasets import ImageData
from sppnet_jax.training.network_settings import (
    NetworkSettings,
    network_settings,
    published_settings,
)

_LAYER = flags.DEFINE_string(
    "layer",
    "",
    "conv1 … after their activation, a cut of the trunk, pyramid (what the head sees), "
    "fc6, fc7, or fc8 (logits); by default fc7, or pyramid where there is no fc7.",
)
_SPLIT = flags.DEFINE_string(
    "split", "test", "The split of the data set; slices such as 'train[:10%]' work."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "crop",
    ("crop", "warp", "full"),
    "crop, the centre crop; warp, the whole image made a square; full, the whole image "
    "at its own aspect ratio.",
)
_SIDE = flags.DEFINE_integer(
    "side",
    None,
    "In pixels: images' shorter side (crop, full), by default config.data.resize_side; "
    "the square's (warp), by default config.data.image_size.",
)
_MULTI_LABEL = flags.DEFINE_bool(
    "multi_label", False, "For data sets of images with several classes each."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "",
    "The .npz file to write; by default in the run's folder, or with --trunk in the "
    "current one, named after all these.",
)


def main(argv: Sequence[str]) -> None:
    cli.refuse_arguments(argv)
    settings = cli.given_settings(NetworkSettings)
    workdir = None if cli.TRUNK.value else cli.given_workdir()
    data = settings.data
    if cli.TRUNK.value and data.name == ImageData().name and not data.data_dir:
        raise ValueError(
            "give the images: --config.data.name=image_folder "
            "--config.data.root=FOLDER, or a data set of TFDS and its "
            "--config.data.data_dir"
        )
    share = cli.given_share()
    from sppnet_jax.classification.feature_files import write_features

    path, about = write_features(
        settings,
        cli.given_network(settings),
        workdir=workdir,
        layer=_LAYER.value,
        split=_SPLIT.value,
        mode=_MODE.value,
        side=_SIDE.value,
        multi_label=_MULTI_LABEL.value,
        output=Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None,
        share=share,
    )
    share.tell_end()
    if share.is_first:
        print(
            "{layer} of {images} images of {data}, split {split} ({mode}, side "
            "{side}): {numbers} numbers each".format(**about)
            + (f" ({about['broken']} broken left out)" if about["broken"] else "")
        )
        print(f"features: {path}")


if __name__ == "__main__":
    cli.run(main, NetworkSettings, network_settings, published_settings)
