"""Trained networks and their test results, each made once and found again.

Everything lies under one folder, so the experiments share their networks, and one that
was killed goes on where it stopped.
"""

import json
import logging
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments.presets import Network, network_config
from experiments.setting import Setting
from sppnet_jax import run_folder, saved_config
from sppnet_jax.checkpoints import Checkpoints
from sppnet_jax.metrics import read_metrics
from sppnet_jax.train import train_from_config

log = logging.getLogger("sppnet_jax.experiments")


def networks_of(
    setting: Setting, networks: list[Network]
) -> dict[tuple[Network, int], Path]:
    """The folder of every network at every seed; trains those that are missing."""
    wanted = [(network, seed) for seed in setting.seeds for network in networks]
    workdirs = {}
    for number, (network, seed) in enumerate(wanted, start=1):
        log.info(
            "network %d of %d: %s, seed %d", number, len(wanted), network.name, seed
        )
        workdirs[network, seed] = _trained(setting, network, seed)
    return workdirs


def _trained(setting: Setting, network: Network, seed: int) -> Path:
    workdir = setting.folder / "networks" / f"{network.name}-seed{seed}"
    config = network_config(
        setting.preset, network, seed, root=setting.root, data_dir=setting.data_dir
    )
    if run_folder.has_checkpoint(workdir):
        _check_same(config, workdir)
        if _is_finished(workdir, config.epochs):
            return workdir
    train_from_config(config, workdir)
    jax.clear_caches()  # dozens of networks in one process
    return workdir


def _check_same(config: ConfigDict, workdir: Path) -> None:
    before = saved_config.get_config(str(workdir))
    before.data.root = config.data.root  # saved absolute
    if json.dumps(before.to_dict()) != json.dumps(config.to_dict()):
        raise ValueError(
            f"{workdir} was trained with other settings than this preset has now: "
            "remove it, or give another --out"
        )


def _is_finished(workdir: Path, epochs: int) -> bool:
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        step = checkpoints.latest_step()
    return any(
        row["split"] == "validation" and row["epoch"] == epochs and row["step"] == step
        for row in read_metrics(workdir)
    )
