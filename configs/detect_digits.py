r"""A detector of digits on the embedded scenes, with the network of configs/digits.py.

python -m sppnet_jax.detect train --config=configs/detect_digits.py \
    --config.network=runs/digits --workdir=runs/detect_digits
python -m sppnet_jax.detect test --workdir=runs/detect_digits

It trains on the first 300 of 1,500 scenes and tests on 200 of 400. Measured as the
second half of `make demo`: mAP 66.9 (11 points; 68.7 by area) on two CPU cores; 63.4
to 70.2 with sums that round otherwise. The training took 58 s on two cores after
proposals and maps, and 3 min 49 s on a slow day with nothing compiled before.
docs/detection.md tells what the stages are, docs/results.md has the table.
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import detector_base_config


def get_config() -> ConfigDict:
    config = detector_base_config()
    config.network = "runs/digits"
    config.data.name = "digit_scenes/detection"
    config.data.train_split = "train[:300]"
    config.data.test_split = "test[:200]"
    config.proposals.width = 150  # the scenes are small
    config.proposals.min_side = 8
    config.scales = (137, 165, 197, 247, 343)  # the paper's five for 64 pixels
    config.batch_size = 64
    config.finetune.steps = 1000
    config.finetune.learning_rate = 0.01
    config.finetune.drop_steps = (700,)
    config.svm.initial_per_image = 2
    config.svm.hard_per_image = 10
    return config
