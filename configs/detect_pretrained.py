r"""A detector for your own folder of images and boxes, on a pretrained trunk.

python -m sppnet_jax.detect train --config=configs/detect_pretrained.py \
    --config.data.root=FOLDER --workdir=runs/detect
python -m sppnet_jax.detect test --workdir=runs/detect
python -m sppnet_jax.detect image --workdir=runs/detect photo.jpg

The trunk is frozen. The windows are pooled from its maps at strides 16 and 32, joined;
SVMs and box regression learn from the pooled vectors. Small objects want larger images:
`--config.scales="(688,)"`.

Proposals are those of selective search without colour, in at most 187,500 pixels. They
take half the time of the paper's (`--config.proposals.method=selective_search`), for
0.7 points on blood cells' validation images.

Measured with two CPU cores, proposals included: 143 photographs of raccoons 4 min 32 s,
mAP 89.0 on 53 others; 292 images of blood cells at `--config.scales="(688,)"` mAP 85.0
on 72 others, in 8 min 40 s before, with colour. docs/results.md has the table.
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import detector_base_config


def get_config() -> ConfigDict:
    config = detector_base_config()
    config.network = "efficientnet_lite0"
    config.cuts = ("stride16", "stride32")
    config.levels = (3, 2, 1)
    config.reducer = "max"
    config.layer = "pyramid"
    config.data.name = "box_folder"
    config.scales = (480,)
    config.proposals.method = "selective_search_no_colour"
    config.proposals.max_pixels = 187_500
    config.finetune.steps = 0
    config.svm.calibration_parts = 3
    config.test.vote = 0.5
    return config
