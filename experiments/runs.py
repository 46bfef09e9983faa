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
from sppnet_jax import from_config, saved_config
from sppnet_jax.evaluate import evaluate_from_config, result_name
from sppnet_jax.run import files, run_folder
from sppnet_jax.run.metrics import read_metrics
from sppnet_jax.train import train_from_config
from sppnet_jax.training.step_log import DivergedError

DIVERGED = "diverged.txt"

log = logging.getLogger("sppnet_jax.experiments")


def networks_of(
    setting: Setting, networks: Sequence[Network]
) -> Iterator[tuple[Network, int, Path]]:
    """Every network at every seed with its folder, trained if it is not yet.

    Seed by seed, so that an interrupted experiment has compared all networks at some.
    One whose training diverges is left out, here and in later runs; see `diverged`.
    """
    wanted = [(network, seed) for seed in setting.seeds for network in networks]
    any_trained = False
    for number, (network, seed) in enumerate(wanted, start=1):
        log.info(
            "network %d of %d: %s, seed %d", number, len(wanted), network.name, seed
        )
        workdir = _workdir(setting, network, seed)
        try:
            _train(setting, network, seed, workdir)
        except DivergedError as error:
            log.error("%s, seed %d, is left out: %s", network.name, seed, error)
            (workdir / DIVERGED).write_text(f"{error}\n")
            continue
        any_trained = True
        yield network, seed, workdir
        jax.clear_caches()  # dozens of networks in one process
    if not any_trained:
        raise DivergedError("the training of every network diverged: see the log above")


def diverged(setting: Setting, networks: Sequence[Network]) -> list[str]:
    """A note for the report on each network that `networks_of` left out."""
    return [
        f"The training of {network.label}, seed {seed}, diverged: it is left out."
        for network in networks
        for seed in setting.seeds
        if (_workdir(setting, network, seed) / DIVERGED).exists()
    ]


def tested(workdirs: Sequence[Path], protocol: str) -> dict[str, Any]:
    """The test of a network, or of several together, by a protocol's own views.

    A result that is there is not measured again, unless a network was trained further.
    It has a file of its own: a person may have tested the network in other ways.
    """
    steps = [from_config.checkpoint_step(workdir) for workdir in workdirs]
    name = result_name(protocol, len(workdirs)).replace("evaluate_", "experiment_")
    path = workdirs[0] / f"{name}.json"
    if path.exists():
        report = json.loads(path.read_text())
        names = [str(workdir) for workdir in workdirs]
        if (report["workdirs"], report["checkpoint_steps"]) == (names, steps):
            return report
    config = saved_config.get_config(str(workdirs[0]))
    report = evaluate_from_config(config, workdirs, protocol)
    files.write_json(path, report)
    return report


def _workdir(setting: Setting, network: Network, seed: int) -> Path:
    return setting.folder / "networks" / f"{network.name}-seed{seed}"


def _train(setting: Setting, network: Network, seed: int, workdir: Path) -> None:
    """Trains a network to its end, unless it is there or diverged before."""
    if (workdir / DIVERGED).exists():
        raise DivergedError((workdir / DIVERGED).read_text().strip())
    config = network_config(
        setting.preset, network, seed, root=setting.root, data_dir=setting.data_dir
    )
    if run_folder.has_checkpoint(workdir):
        _check_same(config, workdir)
        if is_finished(workdir, config.epochs):
            return
    train_from_config(config, workdir)
    if not is_finished(workdir, config.epochs):
        raise KeyboardInterrupt  # the training was, and has saved where it stopped


def _check_same(config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError if a network was trained in another way or on other data."""
    before = saved_config.get_config(str(workdir))
    if json.dumps(before.to_dict()) != json.dumps(config.to_dict()):
        raise ValueError(
            f"{workdir} was trained with other settings than this preset has now: "
            "remove it, or give another --out"
        )
    from_config.check_can_resume(
        config, from_config.open_split(config, "train"), workdir
    )


def is_finished(workdir: Path, epochs: int) -> bool:
    """Whether a network was trained for so many epochs, and tested after the last."""
    step = from_config.checkpoint_step(workdir)
    return any(
        row["split"] == "validation" and row["epoch"] == epochs and row["step"] == step
        for row in read_metrics(workdir)
    )
