"""The files of a run's folder that describe it: config, training data, statistics."""

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sppnet_jax.run.files import (
    check_folder,
    named,
    read_arrays,
    write_arrays,
    write_json,
)
from sppnet_jax.run.settings import at_new_names

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
STATISTICS_FILE = "statistics.npz"
CHECKPOINTS = "checkpoints"


class TrainingData(NamedTuple):
    """What a run is trained on; class names are in the order of the labels.

    `digest`: of every file's place, size and label; "" where a run knows none.
    `held_out`: such digests of the splits to test on, by name.
    """

    name: str
    root: str
    split: str
    records: int
    class_names: tuple[str, ...]
    digest: str = ""
    held_out: dict[str, str] = {}  # noqa: RUF012  of a tuple, so never changed

    def difference(self, now: "TrainingData") -> str:
        """How data differs from these, in words; "" if it is the same.

        The same files in a folder that was moved are the same data.
        """
        parts = (self.name, self.split, self.records, self.class_names)
        if parts != (now.name, now.split, now.records, now.class_names):
            return f"then {self}, now {now}"
        if self.digest and self.digest != now.digest:
            return (
                f"{now} as before, but files have since been renamed, exchanged, "
                "relabelled or changed"
            )
        return ""

    def warn_of_tests(self, now: "TrainingData") -> None:
        """Says so where the images that were held out are others now."""
        for split, digest in self.held_out.items():
            if now.held_out.get(split, digest) != digest:
                log.warning(
                    "files of the split %r, which is tested on, have been renamed, "
                    "exchanged, relabelled or changed since the training began: "
                    "results of before were of others",
                    split,
                )

    def __str__(self) -> str:
        names = ", ".join(self.class_names[:5])
        more = ", …" if len(self.class_names) > 5 else ""
        where = f" in {self.root}" if self.root else ""
        return (
            f"{self.records} images of {self.name}{where}, split {self.split}, of "
            f"{len(self.class_names)} classes ({names}{more})"
        )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes from writing the same folder's files.

    Raises: ValueError if one does.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file, no folder: give another --workdir")
    check_folder(workdir)
    with named(workdir):
        file = (workdir / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is at work in {workdir}: wait for it, or use another "
                "--workdir"
            ) from error
        yield  # released by the system if we are killed


def newest_step(workdir: Path) -> int | None:
    """The step of a run's newest checkpoint; None before the first."""
    folder = workdir / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has got as far as its first checkpoint."""
    return newest_step(workdir) is not None


def save_config(workdir: Path, config: dict[str, Any]) -> None:
    """Writes the settings of the run."""
    write_json(workdir / CONFIG_FILE, config)


def load_config(workdir: Path) -> dict[str, Any]:
    """The settings that a run was trained with; FileNotFoundError if there are none."""
    return at_new_names(read_json(workdir / CONFIG_FILE, "data", "seed"))


def save_training_data(workdir: Path, data: TrainingData) -> None:
    """Writes what the run is trained on."""
    write_json(workdir / DATA_FILE, data._asdict())


def load_training_data(workdir: Path) -> TrainingData:
    """What a run was trained on; FileNotFoundError if there is none."""
    stored = read_json(workdir / DATA_FILE, "class_names")
    try:
        return TrainingData(**{**stored, "class_names": tuple(stored["class_names"])})
    except TypeError as error:
        raise ValueError(f"{workdir / DATA_FILE} is damaged: {error}") from error


def save_statistics(workdir: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the mean image and the colour covariance."""
    write_arrays(workdir / STATISTICS_FILE, **arrays)


def load_statistics(workdir: Path) -> dict[str, np.ndarray] | None:
    """The mean image and the colour covariance, or None if they were not computed."""
    path = workdir / STATISTICS_FILE
    if not path.exists():
        return None

    def both(mean_image: np.ndarray, covariance: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean_image": mean_image, "covariance": covariance}

    return read_arrays(path, both)


def read_json(path: Path, *names: str) -> Any:
    """The value of a file in a run's folder, which has these names.

    Raises: FileNotFoundError if it isn't there; ValueError for a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.parent} holds no trained run ({path.name} is missing): train one "
            "first, or check --workdir"
        )
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lacks = [name for name in names if not isinstance(value, dict) or name not in value]
    if lacks:
        raise ValueError(f"{path} is damaged: it doesn't tell {', '.join(lacks)}")
    return value
