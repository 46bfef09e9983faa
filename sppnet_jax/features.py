"""Writes a layer's features of every image of a split into a file, to train SVMs on.

python -m sppnet_jax.features --workdir=runs/digits --layer=fc7 --mode=full
python -m sppnet_jax.features --workdir=runs/zf5_spp --config.data.name=voc/2007 \
    --split=train+validation --multi_label --mode=full --side=392 --output=voc07.npz

The data set is the run's own, or any other. `classification.features.load_features`
reads the file, `classification.svm` trains on it.
"""

import datetime
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from sppnet_jax import cli

_LAYER = flags.DEFINE_string(
    "layer",
    "fc7",
    "conv1 … after their ReLU, pyramid (what fc6 sees), fc6, fc7, or fc8 (logits).",
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
    "The .npz file to write; by default in the run's folder, named after all these.",
)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"unexpected arguments: {' '.join(argv)}")
    config, workdir = cli.given_config(), cli.given_workdir()
    cli.join_processes()
    features_from_config(
        config,
        workdir,
        layer=_LAYER.value,
        split=_SPLIT.value,
        mode=_MODE.value,
        side=_SIDE.value,
        multi_label=_MULTI_LABEL.value,
        output=Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None,
    )


def features_from_config(
    config: ConfigDict,
    workdir: Path,
    *,
    layer: str = "fc7",
    split: str = "test",
    mode: str = "crop",
    side: int | None = None,
    multi_label: bool = False,
    output: Path | None = None,
    max_buckets: int = 4,
) -> Path:
    """Extracts features with the newest checkpoint; prints where they are, returns it.

    `config`: of the run in `workdir`, whose `data.name`, `data.root` and
    `data.data_dir` may name any data set. `layer`, `mode`, `side`: see
    `classification.features.extract_features`.
    """
    from sppnet_jax import from_config
    from sppnet_jax.classification.layer_features import (
        check_request,
        default_side,
        save_features,
    )
    from sppnet_jax.data.sources import open_source
    from sppnet_jax.run import parallel, run_folder

    data = config.data
    if side is None:
        side = default_side(
            mode, image_size=data.image_size, resize_side=data.resize_side
        )
    if output is None:
        output = workdir / file_name(config, split, layer, mode, side)
    trained_on = run_folder.load_training_data(workdir)
    model = from_config.make_model(config, len(trained_on.class_names))
    check_request(model, layer=layer, side=side, mode=mode)  # before data is opened
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(
            f"can't write {output}: give --output=FILE.npz in a folder that you can "
            "write to"
        )
    step = from_config.checkpoint_step(workdir)
    source = open_source(
        data.name,
        split,
        root=data.root,
        data_dir=data.data_dir,
        multi_label=multi_label,
    )
    features = from_config.extract_split(
        config,
        workdir,
        source,
        layer=layer,
        side=side,
        mode=mode,
        max_buckets=max_buckets,
    )
    provenance = {
        "workdir": str(workdir.absolute()),
        "checkpoint_step": step,
        "trained_on": str(trained_on),
        "layer": layer,
        "mode": mode,
        "side": side,
        "data": data.name,
        "root": str(Path(data.root).expanduser().absolute()) if data.root else "",
        "split": split,
        "multi_label": multi_label,
        "records": len(source.records),
        "images": len(features.values),
        "broken": features.broken,
        "numbers": features.values.shape[1],
        "version": _version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": json.loads(config.to_json()),
    }
    if parallel.is_first_process():
        save_features(output, features, provenance)
        images, numbers = features.values.shape
        print(
            f"{layer} of {images} images of {data.name}, split {split} ({mode}, side "
            f"{side}): {numbers} numbers each"
            + (f" ({features.broken} broken left out)" if features.broken else "")
        )
        print(f"features: {output}")
    return output


def file_name(config: ConfigDict, split: str, layer: str, mode: str, side: int) -> str:
    """What a file of features is called, unless the user says otherwise."""
    name = config.data.name
    if name == "image_folder":
        name = f"image_folder-{Path(config.data.root).name}"
    return f"features_{name}_{split}_{layer}_{mode}_{side}.npz".replace("/", "-")


def _version() -> str:
    try:
        return importlib.metadata.version("sppnet_jax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (run from a folder that is not installed)"


if __name__ == "__main__":
    cli.run(main, saved_config=True)
