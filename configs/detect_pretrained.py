r"""A detector for your own folder in Pascal VOC layout, on a pretrained trunk.

python -m sppnet_jax.detect train --config=configs/detect_pretrained.py \
    --config.data.root=FOLDER --workdir=runs/detect
python -m sppnet_jax.detect test --workdir=runs/detect
python -m sppnet_jax.detect image --workdir=runs/detect photo.jpg
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import detector_base_config


def get_config() -> ConfigDict:
    config = detector_base_config()
    config.network = "efficientnet_lite0"
    config.cuts = ("stride16",)
    config.levels = (6, 3, 2, 1)
    config.reducer = "max"
    config.layer = "pyramid"
    config.data.name = "voc_folder"
    config.scales = (480,)
    config.finetune.steps = 0
    return config
