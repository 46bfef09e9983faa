r"""A detector for your own folder whose trunk is trained with it, end to end.

python -m sppnet_jax.detect train --config=configs/detect_end_to_end.py \
    --config.data.root=FOLDER --workdir=runs/end_to_end
python -m sppnet_jax.detect test --workdir=runs/end_to_end

A step convolves two photographs and classifies 128 of their windows; the gradients go
through the windows' pyramids into the trunk, down to the layer
`--config.finetune.trainable`.

Measured with two CPU cores: 143 photographs of raccoons 12 min 42 s, proposals
included, mAP 98.4 on 53 others. 292 images of blood cells at
`--config.scales="(688,)"` took 13 min 25 s, with proposals with colour, which were
there: mAP 82.4 on 72 others, and 86.4 after 4 min 1 s more for SVMs:
`--config.scorer=svm --config.layer=pyramid`. docs/results.md has the table.
"""

from ml_collections import ConfigDict

from configs import detect_pretrained


def get_config() -> ConfigDict:
    config = detect_pretrained.get_config()
    config.system = "end_to_end"
    config.scorer = "softmax"
    config.finetune.steps = 600
    config.finetune.images = 2
    config.finetune.batch_size = 128
    config.finetune.trainable = "stride8"
    config.finetune.trunk_rate = 0.1
    config.finetune.learning_rate = 0.01
    config.finetune.dropout = 0.0
    config.finetune.drop_steps = (450,)
    config.finetune.log_steps = 10
    config.finetune.checkpoint_steps = 200
    return config
