r"""VOC 2007 by the paper's recipe, with a ZF-5 trained on ImageNet (section 4).

python -m sppnet_jax.detect train --config=configs/detect_voc.py:5 \
    --config.network=runs/zf5_spp --config.data.data_dir=DATA --workdir=runs/detect_voc
python -m sppnet_jax.detect test --workdir=runs/detect_voc

The argument is the number of scales, 1 or 5. docs/imagenet.md tells how to prepare VOC
for TFDS in DATA; `--config.data.name=voc_folder --config.data.root=VOCdevkit/VOC2007`
reads the devkit's folder as it is. Not run: there is no time and no result of ours.
docs/results.md has the paper's, 58.0 mAP with one scale and 59.2 with five.
"""

from ml_collections import ConfigDict

from sppnet_jax.cli import detector_base_config

SCALES = {"1": (688,), "5": (480, 576, 688, 864, 1200)}


def get_config(scales: str = "1") -> ConfigDict:
    if scales not in SCALES:
        raise ValueError(
            f"configs/detect_voc.py:{scales} has no such scales: choose 1 or 5"
        )
    config = detector_base_config()
    config.network = "runs/zf5_spp"
    config.scales = SCALES[scales]
    return config
