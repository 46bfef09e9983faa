r"""ImageNet 2012 by the paper's recipe, for each architecture of its Table 1.

python -m sppnet_jax.train --config=configs/imagenet.py:zf5,spp \
    --config.data.data_dir=DATA --workdir=runs/zf5_spp
python -m sppnet_jax.evaluate --workdir=runs/zf5_spp --protocol=single

The first argument is the architecture: zf5, convnet5, overfeat5 or overfeat7. The
second is the recipe: spp (levels 6, 3, 2, 1), spp30 (levels 4, 3, 2, 1; 30 bins),
spp_multi (epochs at 224 and 180 pixels in turn), spp_uniform (a size from 180 to 224
drawn for each epoch) or no_spp. docs/imagenet.md tells how to prepare the data in DATA.
Not run: there is no time and no result of ours. docs/results.md has the paper's.
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import base_config
from sppnet_jax.network.trunks import get_backbone

# Levels, and sizes of the training images.
RECIPES = {
    "spp": ((6, 3, 2, 1), ()),
    "spp30": ((4, 3, 2, 1), ()),
    "spp_multi": ((6, 3, 2, 1), (224, 180)),
    "spp_uniform": ((6, 3, 2, 1), ("uniform", 180, 224)),
    "no_spp": ((), ()),
}


def get_config(arguments: str = "zf5,spp") -> ConfigDict:
    backbone, _, recipe = arguments.partition(",")
    recipe = recipe or "spp"
    get_backbone(backbone)
    if recipe not in RECIPES:
        raise ValueError(
            f"unknown recipe {recipe!r} in configs/imagenet.py:{arguments}: choose "
            f"from {', '.join(RECIPES)}"
        )
    config = base_config()
    config.model.backbone = backbone
    config.model.levels, config.sizes = RECIPES[recipe]
    config.epochs = 70 if backbone == "zf5" else 90
    config.data.name = "imagenet2012"
    config.data.validation_split = "validation"
    config.data.test_split = "validation"
    config.inputs.mean = 0.0  # the mean image
    config.data.workers = 8
    config.checkpoint_steps = 2000
    return config
