"""ImageNet 2012 by the paper's recipe, for each architecture of its Table 1.

python -m sppnet_jax.train --config=configs/imagenet.py:zf5,spp --workdir=runs/zf5_spp
python -m sppnet_jax.evaluate --workdir=runs/zf5_spp --protocol=single

The first argument is the architecture: zf5, convnet5, overfeat5 or overfeat7. The
second is the recipe: spp (levels 6, 3, 2, 1), spp30 (levels 4, 3, 2, 1; 30 bins) or
no_spp. The README tells how to prepare the data. Not run yet: see its results table.
"""

from ml_collections import ConfigDict

from sppnet_jax.backbones import get_backbone
from sppnet_jax.config import base_config

LEVELS = {"spp": (6, 3, 2, 1), "spp30": (4, 3, 2, 1), "no_spp": ()}


def get_config(arguments: str = "zf5,spp") -> ConfigDict:
    backbone, _, recipe = arguments.partition(",")
    recipe = recipe or "spp"
    get_backbone(backbone)
    if recipe not in LEVELS:
        raise ValueError(
            f"unknown recipe {recipe!r} in configs/imagenet.py:{arguments}: choose "
            f"from {', '.join(LEVELS)}"
        )
    config = base_config()
    config.model.backbone = backbone
    config.model.levels = LEVELS[recipe]
    config.epochs = 70 if backbone == "zf5" else 90
    config.data.name = "imagenet2012"
    config.data.validation_split = "validation"
    config.data.test_split = "validation"
    config.mean = 0.0  # the mean image
    config.data.workers = 8
    config.checkpoint_steps = 2000
    return config
