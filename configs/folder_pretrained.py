r"""Your own folder of class folders, on a pretrained trunk: minutes on a small machine.

python -m sppnet_jax.train --config=configs/folder_pretrained.py \
    --config.data.root=FOLDER --workdir=runs/flowers
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.epochs = 30
    config.batch_size = 64
    config.model.backbone = "efficientnet_lite0"
    config.model.weights = "pretrained"
    config.model.trainable = "head"
    config.model.head = "linear"
    config.model.levels = (3, 2, 1)
    config.model.reducer = "mean"
    config.data.name = "image_folder"
    config.data.view = "full"
    config.data.resize_side = 256
    config.data.flip = False  # mirrored photographs too: twice the time, not better
    config.inputs.color_sigma = 0.0
    config.schedule.learning_rate = 0.02
    config.schedule.kind = "cosine"
    config.optimizer.nesterov = True
    config.log_steps = 10
    return config
