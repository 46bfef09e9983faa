r"""Your own folder of class folders, from scratch, on a small machine.

python -m sppnet_jax.train --config=configs/folder.py --config.data.root=FOLDER \
    --workdir=runs/scratch
python -m sppnet_jax.evaluate --workdir=runs/scratch --protocol=single
python -m sppnet_jax.predict --workdir=runs/scratch photo.jpg scan.png

Measured on 3,068 photographs of 10 kinds of clothes, two CPU cores: 20 min 38 s (34
CPU-minutes), 76.3 % top-1 of 372 test photographs. docs/training.md tells what the
folder holds and what can be set, docs/results.md has the table.

A ZF-5 of half the width on 96-pixel crops, for some thousand images. With more images
and a GPU, go back towards the paper: `--config.model.width=1.0
--config.data.image_size=224 --config.data.resize_side=256`.
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.epochs = 45
    config.batch_size = 64
    config.model.width = 0.5
    config.model.weight_init = "he"
    config.data.name = "image_folder"
    config.data.image_size = 96
    config.data.resize_side = 104
    config.data.crop = "random_resized"
    config.inputs.scale = 64.0
    config.schedule.learning_rate = 0.02
    config.optimizer.nesterov = True
    config.schedule.kind = "cosine"
    config.schedule.warmup_epochs = 2.0
    config.optimizer.label_smoothing = 0.1
    config.log_steps = 10
    return config
