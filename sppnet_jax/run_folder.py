"""The files of a run's folder that describe it: config, classes, image statistics."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sppnet_jax.data.statistics import Statistics

CONFIG_FILE = "config.json"
CLASSES_FILE = "classes.json"
STATISTICS_FILE = "statistics.npz"


def save_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes the settings of the run."""
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json(workdir / CONFIG_FILE, config)


def load_config(workdir: Path) -> dict[str, Any]:
    """The settings that a run was trained with; FileNotFoundError if there are none."""
    return _read_json(workdir / CONFIG_FILE)


def save_class_names(workdir: Path, names: tuple[str, ...]) -> None:
    """Writes the names of the classes, in the order of the labels."""
    _write_json(workdir / CLASSES_FILE, list(names))


def load_class_names(workdir: Path) -> tuple[str, ...]:
    """The names of the classes that a run was trained on."""
    return tuple(_read_json(workdir / CLASSES_FILE))


def save_statistics(workdir: Path, statistics: Statistics) -> None:
    """Writes the mean image and the colour covariance."""
    partial = workdir / ("partial_" + STATISTICS_FILE)
    np.savez(partial, **statistics._asdict())
    partial.rename(workdir / STATISTICS_FILE)


def load_statistics(workdir: Path) -> Statistics | None:
    """The mean image and the colour covariance, or None if they were not computed."""
    path = workdir / STATISTICS_FILE
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return Statistics(**arrays)


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.rename(path)


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent} holds no trained run ({path.name} is missing): train with "
            "python -m sppnet_jax.train, or check --workdir"
        )
    return json.loads(path.read_text())
