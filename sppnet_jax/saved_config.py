"""The config that a run was trained with, as a config file: `saved_config.py:WORKDIR`.

The command lines use it where no --config is given, so that single settings of a
trained run can still be overridden.
"""

from pathlib import Path

from ml_collections import ConfigDict

from sppnet_jax.config import base_config
from sppnet_jax.detection_config import detection_base_config
from sppnet_jax.run.run_folder import load_config


def get_config(workdir: str) -> ConfigDict:
    saved = load_config(Path(workdir).expanduser())
    config = detection_base_config() if "proposals" in saved else base_config()
    config.update(saved)
    return config
