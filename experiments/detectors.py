"""Trained detectors and their tests, each made once and found again.

A detector that is another with something on top goes on from that one's stages: they
are put into its workdir, and stages.py takes them as done, for their inputs agree.

    fine-tuned, scored by softmax → SVMs → box regression → a truncated SVD

So fine-tuning is done once for each way to pool windows, whatever is built on it. All
lie under one folder, DETECTORS, with one cache of proposals and maps, so experiments
share them, and one that was killed goes on where it stopped.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments.detection_presets import DetectionSetting
from sppnet_jax.detect import evaluate_from_config, train_from_config
from sppnet_jax.run import files, run_folder, stages

DETECTORS = "detectors"
TESTED = "experiment_test.json"
STAGES = ("network", "finetune", "svm", "regression")

log = logging.getLogger("sppnet_jax.experiments")


class Detector(NamedTuple):
    """One cell of a table: how a detector sees windows, and what it makes of them.

    `scales`: the images' shorter sides; R-CNN has none. `window_side`: 0 for the
    network's. `ranks`: of fc6 and fc7, 0 for whole.
    """

    scales: tuple[int, ...] = ()
    system: str = "spp"
    layer: str = "fc7"
    finetuned: bool = True
    scorer: str = "svm"
    regression: bool = True
    window_side: int = 0
    ranks: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Its name in folders."""
        parts = [self.system, *map(str, self.scales)]
        parts += [f"side{self.window_side}"] if self.window_side else []
        parts += ["finetuned"] if self.finetuned else []
        parts += [self.layer] if self.scorer == "svm" else ["softmax"]
        parts += ["boxes"] if self.regression else []
        parts += ["rank{}_{}".format(*self.ranks)] if any(self.ranks) else []
        return "-".join(parts)

    @property
    def origin(self) -> "Detector | None":
        """The detector that this one adds something to, if there is one."""
        if any(self.ranks):
            return self._replace(ranks=(0, 0))
        if self.regression:
            return self._replace(regression=False)
        if self.scorer == "svm" and self.finetuned:
            return self._replace(scorer="softmax", layer="fc7")
        return None


def detector_config(given: DetectionSetting, detector: Detector, seed: int) -> Any:
    """The config of a detector."""
    config = given.config.copy_and_resolve_references()
    config.seed = seed
    config.system = detector.system
    if detector.scales:
        config.scales = detector.scales
    config.layer = detector.layer
    config.scorer = detector.scorer
    config.regression.enabled = detector.regression
    config.window_side = detector.window_side
    config.fc_rank = detector.ranks
    if not detector.finetuned:
        config.finetune.steps = 0
    return config


def workdir_of(given: DetectionSetting, detector: Detector, seed: int) -> Path:
    """Where a detector is kept."""
    return given.folder / DETECTORS / f"{detector.name}-seed{seed}"


def trained(given: DetectionSetting, detector: Detector, seed: int) -> Path:
    """Trains what of a detector is not trained yet; returns its workdir."""
    workdir = workdir_of(given, detector, seed)
    if detector.origin:
        share_stages(trained(given, detector.origin, seed), workdir)
    log.info("detector %s, seed %d", detector.name, seed)
    train_from_config(detector_config(given, detector, seed), workdir)
    return workdir


def tested(given: DetectionSetting, detector: Detector, seed: int) -> dict[str, Any]:
    """The test of a detector, trained first if it is not yet.

    A result that is there is not measured again, unless a stage or a setting changed.
    """
    workdir = trained(given, detector, seed)
    config = detector_config(given, detector, seed)
    inputs = {"config": _plain(config), "stages": _digests(workdir)}
    path = workdir / TESTED
    if path.exists():
        known = json.loads(path.read_text())
        if known["inputs"] == inputs:
            return known["report"]
    report = evaluate_from_config(config, [workdir])
    jax.clear_caches()  # dozens of detectors in one process
    files.write_json(path, {"inputs": inputs, "report": report})
    return report


def share_stages(origin: Path, workdir: Path) -> None:
    """Copies the finished stages of a detector that another does not have, or not so.

    Each copy is whole or not there. It is made of hard links where the disk has them:
    a finished stage's files are replaced or removed, but never changed.
    """
    theirs, ours = _digests(origin), _digests(workdir)
    for name in STAGES:
        if name not in theirs or theirs[name] == ours.get(name):
            continue
        partial = workdir / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(workdir / name, ignore_errors=True)
        shutil.copytree(origin / name, partial, copy_function=_link_or_copy)
        partial.rename(workdir / name)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _digests(workdir: Path) -> dict[str, str]:
    """The digest of each finished stage in a workdir."""
    return {
        name: run_folder.read_json(workdir / name / stages.STAGE_FILE)["digest"]
        for name in STAGES
        if stages.is_done(workdir, name)
    }


def _plain(config: ConfigDict) -> Any:
    """A config as JSON gives it back, without what results don't depend on."""
    values = json.loads(json.dumps(config.to_dict()))
    for name in ("network", "cache"):
        del values[name]
    return values
