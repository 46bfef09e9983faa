"""Networks that are made once and found again, as comparisons of many need them."""

import time
from pathlib import Path
from typing import Any

import jax

from sppnet_jax.data.datasets import open_split
from sppnet_jax.run import run_folder
from sppnet_jax.run.files import write_json, write_text
from sppnet_jax.run.metrics import read_metrics
from sppnet_jax.run.settings import fields_of
from sppnet_jax.training.network_settings import NetworkSettings, network_settings
from sppnet_jax.training.networks import (
    check_can_resume,
    train_network,
    training_data,
)
from sppnet_jax.training.step_log import DivergedError

DIVERGED, SECONDS = "diverged.txt", "seconds.json"
# How a network is trained, not what becomes of it.
_NO_MATTER = (
    *("log_steps", "checkpoint_steps", "keep_checkpoints", "profile_steps"),
    *("max_steps", "data.workers", "data.threads", "data.data_dir"),
)


def train_once(
    settings: NetworkSettings, workdir: Path, features: Path | None = None
) -> None:
    """Trains a network to its end, from where it was left; one that is done is kept.

    `features`: see `train_network`.

    Raises: DivergedError where this training diverges, or did before; ValueError where
    it was begun with other settings or on other data; Interrupted after it was
    interrupted and saved.
    """
    if (workdir / DIVERGED).exists():
        raise DivergedError((workdir / DIVERGED).read_text().strip())
    settings = settings.with_absolute_paths()._replace(max_steps=0)
    if run_folder.has_checkpoint(workdir):
        _check_same(settings, workdir)
        if is_finished(workdir, settings.epochs):
            return
    before, started = training_seconds(workdir), time.monotonic()
    try:
        train_network(settings, workdir, features)
    except DivergedError as error:
        write_text(workdir / DIVERGED, f"{error}\n")
        raise
    finally:
        seconds = before + time.monotonic() - started
        write_json(workdir / SECONDS, round(seconds, 2))
        jax.clear_caches()  # there may be dozens of networks in one process


def is_finished(workdir: Path, epochs: int) -> bool:
    """Whether a network was trained for so many epochs, and tested after the last."""
    step = run_folder.newest_step(workdir)
    return step is not None and any(
        (row["split"], row["step"]) == ("validation", step)
        and row.get("epoch") == epochs
        for row in read_metrics(workdir)
    )


def training_seconds(workdir: Path) -> float:
    """The seconds that `train_once` has trained in a folder; 0 if it has not.

    With compiling and the tests after each epoch, without what was killed on the way.
    """
    path = workdir / SECONDS
    return float(run_folder.read_json(path)) if path.exists() else 0.0


def deciding(settings: NetworkSettings) -> dict[str, Any]:
    """The settings that decide what becomes of a network, by their dotted names."""
    told = {}
    for name, _ in fields_of(NetworkSettings):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        if name not in _NO_MATTER:
            told[name] = value
    return told


def _check_same(settings: NetworkSettings, workdir: Path) -> None:
    """Raises ValueError if a network was trained in another way or on other data."""
    before = deciding(network_settings(workdir).with_absolute_paths())
    now = deciding(settings)
    others = [name for name in now if before[name] != now[name]]
    if others:
        name = others[0]
        raise ValueError(
            f"{workdir} was trained with other settings, {name}={before[name]!r}, not "
            f"{now[name]!r}: remove it, or use another folder"
        )
    data = training_data(settings.data, open_split(settings.data, "train"))
    check_can_resume(settings, data, workdir)
