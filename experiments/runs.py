"""Trained networks and their test results, each made once and found again.

Everything lies under one folder, so the experiments share their networks, and one that
was killed goes on where it stopped.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.presets import Network, network_config
from experiments.setting import Setting
from sppnet_jax import from_config, run_folder, saved_config
from sppnet_jax.evaluate import evaluate_from_config, result_name
from sppnet_jax.metrics import read_metrics
from sppnet_jax.train import train_from_config

log = logging.getLogger("sppnet_jax.experiments")


def networks_of(
    setting: Setting, networks: Sequence[Network]
) -> Iterator[tuple[Network, int, Path]]:
    """Every network at every seed with its folder, trained if it is not yet.

    Seed by seed, so that an interrupted experiment has compared all networks at some.
    """
    wanted = [(network, seed) for seed in setting.seeds for network in networks]
    for number, (network, seed) in enumerate(wanted, start=1):
        log.info(
            "network %d of %d: %s, seed %d", number, len(wanted), network.name, seed
        )
        yield network, seed, _trained(setting, network, seed)
        jax.clear_caches()  # dozens of networks in one process


def tested(workdirs: Sequence[Path], protocol: str) -> dict[str, Any]:
    """The test of a network, or of several together, by a protocol's own views.

    A result that is there is not measured again, unless a network was trained further.
    """
    steps = [from_config.checkpoint_step(workdir) for workdir in workdirs]
    path = workdirs[0] / f"{result_name(protocol, len(workdirs))}.json"
    if path.exists():
        report = json.loads(path.read_text())
        names = [str(workdir) for workdir in workdirs]
        if (report["workdirs"], report["checkpoint_steps"]) == (names, steps):
            return report
    config = saved_config.get_config(str(workdirs[0]))
    return evaluate_from_config(config, workdirs, protocol)


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
    if not _is_finished(workdir, config.epochs):
        raise KeyboardInterrupt  # the training was, and has saved where it stopped
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
    step = from_config.checkpoint_step(workdir)
    return any(
        row["split"] == "validation" and row["epoch"] == epochs and row["step"] == step
        for row in read_metrics(workdir)
    )
