r"""Your own folder of class folders, on a pretrained trunk: minutes on a small machine.

python -m sppnet_jax.train --config=configs/folder_pretrained.py \
    --config.data.root=FOLDER --workdir=runs/flowers
python -m sppnet_jax.evaluate --workdir=runs/flowers --protocol=full_image

Measured on 3,068 photographs of 10 kinds of clothes, two CPU cores: 2 min 54 s, and
91.5 % top-1 of 372 test photographs, each seen whole (three seeds; docs/results.md).

Every photograph goes through EfficientNet-Lite0 once, and a linear layer is trained on
the pyramid of its last map. `--config.model.head=fc` trains fc6 to fc8 in its place,
configs/folder_finetuned.py the trunk's later layers as well. For a folder of few
images, `--config.batch_size=16`.
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
