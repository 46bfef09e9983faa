r"""A detector for your own folder of images and boxes, on a small machine.

python -m sppnet_jax.detect train --config=configs/detect_folder.py \
    --config.data.root=FOLDER --config.network=runs/scratch \
    --workdir=runs/detect_scratch
python -m sppnet_jax.detect test --workdir=runs/detect_scratch
python -m sppnet_jax.detect image --workdir=runs/detect_scratch photo.jpg

The network is a classifier of 96-pixel crops, trained by configs/folder.py.

Measured with one of 1/6 width, two CPU cores: on 143 photographs of raccoons 1 min 20 s
(after proposals and maps), mAP 58.3 on 53 others; on 292 images of blood cells 4 min
50 s, mAP 54.8 on 72 others. docs/detection.md tells what the folder holds and what can
be set, docs/results.md has the table.
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import detector_base_config


def get_config() -> ConfigDict:
    config = detector_base_config()
    config.network = "runs/scratch"
    config.data.name = "box_folder"
    config.scales = (206, 247, 295, 370, 514)  # the paper's five for 96 pixels
    config.finetune.steps = 1000
    config.finetune.learning_rate = 0.01
    config.finetune.drop_steps = (700,)
    return config
