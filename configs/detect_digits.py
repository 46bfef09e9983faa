r"""A detector of digits on the embedded scenes, from the network of configs/digits.py.

python -m sppnet_jax.detect train --config=configs/detect_digits.py \
    --workdir=runs/detect_digits --config.network=runs/digits
python -m sppnet_jax.detect test --workdir=runs/detect_digits
"""

from ml_collections import ConfigDict

from sppnet_jax.detection_config import detection_base_config


def get_config() -> ConfigDict:
    config = detection_base_config()
    config.network = "runs/digits"
    config.data.name = "digit_scenes/detection"
    config.data.train_split = "train[:500]"
    config.proposals.width = 150  # the scenes are small
    config.proposals.min_side = 8
    config.scales = (197,)  # 688 of the paper for 224 pixels, in proportion
    config.batch_size = 64
    config.finetune.steps = 400
    config.finetune.learning_rate = 0.002
    config.finetune.drop_steps = (300,)
    return config
