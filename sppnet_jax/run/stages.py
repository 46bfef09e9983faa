"""Training in stages, each done once, redone when what goes into it has changed.

A stage has a name, a folder of its own, and inputs: a dict of plain values that decide
its result, the digests of the stages before it among them. A stage that was finished
with the same inputs is not run again. One that was interrupted finds what it had left
in its folder and goes on from there. One whose inputs have changed is redone from an
empty folder, and the log says what has changed. A folder that no stage has made is
never removed.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sppnet_jax.run import parallel
from sppnet_jax.run.files import write_json
from sppnet_jax.run.memory import give_back

STAGE_FILE = "stage.json"

log = logging.getLogger(__name__)


def run_stage(
    workdir: Path, name: str, inputs: dict[str, Any], compute: Callable[[Path], Any]
) -> str:
    """Runs a stage unless it is done; returns the digest of its inputs.

    `inputs`: values that JSON can hold. `compute`: called with the stage's folder,
    where it leaves its results and what it needs to go on after an interrupt. What it
    returns is kept in stage.json for people to read. Of processes that JAX has joined,
    all call it at the same time, and the first keeps the record.

    Raises: ValueError where the stage's folder holds files of something else.
    """
    folder = workdir / name
    done = done_digest(workdir, name) == digest_of(inputs)
    parallel.wait_for_all_processes(f"each knows whether {name} is done")
    if parallel.is_first_process():
        _run_recorded(folder, inputs, compute)
    elif not done:
        parallel.wait_for_all_processes(f"{name} begins")
        compute(folder)
    parallel.wait_for_all_processes(f"{name} is done")
    return digest_of(inputs)


def _run_recorded(
    folder: Path, inputs: dict[str, Any], compute: Callable[[Path], Any]
) -> None:
    name, removed = folder.name, folder.with_name(f"{folder.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    digest = digest_of(inputs)
    inputs = json.loads(json.dumps(inputs))
    known = _read(folder / STAGE_FILE)
    if known and known["inputs"] != inputs:
        what = "; ".join(_differences(known["inputs"], inputs))
        log.info("stage %s is redone, for its inputs have changed: %s", name, what)
        known = None
    check_is_stage(folder)
    if known is None and folder.exists():
        # Renamed first: a folder half removed is not taken for a stage begun.
        folder.rename(removed)
        shutil.rmtree(removed)
    if known and known["done"]:
        log.info("stage %s is done", name)
        return
    log.info("stage %s %s", name, "goes on" if known else "begins")
    record = {"inputs": inputs, "digest": digest, "done": False}
    write_json(folder / STAGE_FILE, record)
    parallel.wait_for_all_processes(f"{name} begins")
    started = time.monotonic()
    report = compute(folder)
    give_back()
    seconds = round(time.monotonic() - started, 1)
    log.info("stage %s took %.1f s", name, seconds)
    done = {**record, "done": True, "seconds": seconds, "report": report}
    write_json(folder / STAGE_FILE, done)


def done_digest(workdir: Path, name: str) -> str | None:
    """The digest of a finished stage's inputs; None if it isn't finished."""
    known = _read(workdir / name / STAGE_FILE)
    return digest_of(known["inputs"]) if known and known["done"] else None


def is_done(workdir: Path, name: str) -> bool:
    """Whether a stage has been finished."""
    return done_digest(workdir, name) is not None


def digest_of(inputs: dict[str, Any]) -> str:
    """A short name for values, the same for the same values."""
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_is_stage(folder: Path) -> None:
    """Raises ValueError if there is something else where a stage's folder would be."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} would be a stage's folder, and is a file: move it")
    held = {path.name for path in folder.iterdir()}
    # A run killed before its first record leaves an empty folder, or a partial record.
    foreign = {name for name in held if not name.endswith(".partial")}
    if foreign and STAGE_FILE not in held:
        raise ValueError(
            f"{folder} would be a stage's folder, but holds something else "
            f"({', '.join(sorted(foreign)[:3])}): use another --workdir, or move that "
            "away"
        )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        known = json.loads(path.read_text())
        if {"inputs", "done"} <= set(known):
            return dict(known)
    except (ValueError, TypeError):
        pass
    log.warning("%s is damaged: the stage counts as not done", path)
    return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    before, now = _flat(before), _flat(now)
    return [
        f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dicts as one, its keys joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{path}{name}.") if nested else {f"{path}{name}": value}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
