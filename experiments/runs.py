"""What experiments compare: networks and detectors, each made once and found again.

Everything lies under a setting's folder, so the experiments share their networks and
detectors, and one that was killed goes on where it stopped. A detector that is another
with something on top goes on from that one's stages: they are put into its workdir, and
stages.py takes them as done, for their inputs agree.

    fine-tuned, scored by softmax → SVMs → box regression → a truncated SVD

So fine-tuning is done once for each way to pool windows, whatever is built on it.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from sppnet_jax.classification.evaluation import evaluate_once, result_name
from sppnet_jax.classification.feature_files import (
    file_name,
    load_features,
    write_features,
)
from sppnet_jax.detection import trained_detector as detectors
from sppnet_jax.detection.box_split import BoxSplit, open_split_of
from sppnet_jax.detection.detector_evaluation import evaluate_detectors
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.detector_training import train_detector
from sppnet_jax.network.trained import load_network
from sppnet_jax.run import files, run_folder, stages
from sppnet_jax.run.settings import plain, read
from sppnet_jax.training.layer_features import Features, default_side
from sppnet_jax.training.network_settings import NetworkSettings, network_settings
from sppnet_jax.training.once import DIVERGED, train_once
from sppnet_jax.training.step_log import DivergedError

DEFAULT_LEVELS = (6, 3, 2, 1)
PAPER_SIDE = 224  # that the paper's networks are trained at
NETWORKS, DETECTORS = "networks", "detectors"
TESTED = "experiment_test.json"
STAGES = ("network", "finetune", "svm", "regression")
_BACKBONES = {
    "zf5": "ZF-5",
    "convnet5": "Convnet*-5",
    "overfeat5": "Overfeat-5",
    "overfeat7": "Overfeat-7",
}
_TRAININGS = {
    "single": "single-size",
    "multi": "multi-size",
    "uniform": "uniform sizes",
}

log = logging.getLogger("sppnet_jax.experiments")


class Preset(NamedTuple):
    """Where networks are trained: data, width, sizes, epochs and seeds.

    `make_config`: the settings of a backbone's run, its levels and sizes left open.
    `small` and `large`: the sides of multi-size training (180 and 224).
    `svm_classes`: what linear SVMs are tested on, as on Caltech101: a data set with one
    class an image and a split of it; "" is the data set that the networks are trained
    on, and all its splits but "train". No network has seen them.
    `svm_multi_label`: a data set with several classes an image, with its training and
    test splits; None where there is none.
    """

    make_config: Callable[[str], ConfigDict]
    small: int
    large: int
    seeds: tuple[int, ...]
    svm_classes: tuple[str, str] = ("", "")
    svm_multi_label: tuple[str, str, str] | None = None


class Setting(NamedTuple):
    """The preset with its name, the folder of everything written, seeds and data."""

    preset_name: str
    preset: Preset
    folder: Path
    seeds: tuple[int, ...]
    root: str
    data_dir: str


class NetworkRecipe(NamedTuple):
    """One row of a table: a backbone, its pyramid, and the sizes it is trained at.

    `levels`: () for the twin without SPP. `training`: "single", "multi" (both sizes in
    turn) or "uniform" (a size drawn for each epoch).
    """

    backbone: str
    levels: tuple[int, ...] = DEFAULT_LEVELS
    training: str = "single"

    @property
    def name(self) -> str:
        """Its name in folders and result files."""
        pyramid = "".join(map(str, self.levels)) or "no_spp"
        return f"{self.backbone}-{pyramid}-{self.training}"

    @property
    def label(self) -> str:
        """Itself in the words of a table."""
        if not self.levels:
            return f"{_BACKBONES[self.backbone]}, no SPP"
        pyramid = ",".join(map(str, self.levels))
        return (
            f"{_BACKBONES[self.backbone]}, {{{pyramid}}}, {_TRAININGS[self.training]}"
        )


class DetectionSetting(NamedTuple):
    """What all detectors of an experiment share, and where it writes.

    `settings`: of a detector, its network and cache among them; each detector changes
    those that it is about. `image_size`: the side that the network was trained at.
    `seeds`: of the detectors; they share the network.
    """

    preset_name: str
    settings: DetectorSettings
    image_size: int
    folder: Path
    seeds: tuple[int, ...]


class DetectorRecipe(NamedTuple):
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
    def origin(self) -> "DetectorRecipe | None":
        """The detector that this one adds something to, if there is one."""
        if any(self.ranks):
            return self._replace(ranks=(0, 0))
        if self.regression:
            return self._replace(regression=False)
        if self.scorer == "svm" and self.finetuned:
            return self._replace(scorer="softmax", layer="fc7")
        return None


def settings_of(given: Setting, recipe: NetworkRecipe, seed: int) -> NetworkSettings:
    """The settings of one network."""
    config = given.preset.make_config(recipe.backbone)
    config.model.backbone = recipe.backbone
    config.model.levels = recipe.levels
    sizes: dict[str, tuple[int | str, ...]] = {
        "single": (),
        "multi": (given.preset.large, given.preset.small),
        "uniform": ("uniform", given.preset.small, given.preset.large),
    }
    config.sizes = sizes[recipe.training]
    config.seed = seed
    config.keep_checkpoints = 1
    config.data.root = given.root or config.data.root
    config.data.data_dir = given.data_dir or config.data.data_dir
    return read(NetworkSettings, config.to_dict())


def networks_of(
    given: Setting, recipes: Sequence[NetworkRecipe]
) -> Iterator[tuple[NetworkRecipe, int, Path]]:
    """Every network at every seed with its folder, trained if it is not yet.

    Seed by seed, so that an interrupted experiment has compared all networks at some.
    One whose training diverges is left out, here and in later runs; see `diverged`.
    """
    wanted = [(recipe, seed) for seed in given.seeds for recipe in recipes]
    any_trained = False
    for number, (recipe, seed) in enumerate(wanted, start=1):
        log.info(
            "network %d of %d: %s, seed %d", number, len(wanted), recipe.name, seed
        )
        workdir = _network_workdir(given, recipe, seed)
        try:
            train_once(settings_of(given, recipe, seed), workdir)
        except DivergedError as error:
            log.error("%s, seed %d, is left out: %s", recipe.name, seed, error)
            continue
        any_trained = True
        yield recipe, seed, workdir
        jax.clear_caches()  # dozens of networks' tests in one process
    if not any_trained:
        raise DivergedError("the training of every network diverged: see the log above")


def diverged(given: Setting, recipes: Sequence[NetworkRecipe]) -> list[str]:
    """A note for the report on each network that `networks_of` left out."""
    return [
        f"The training of {recipe.label}, seed {seed}, diverged: it is left out."
        for recipe in recipes
        for seed in given.seeds
        if (_network_workdir(given, recipe, seed) / DIVERGED).exists()
    ]


def network_test(workdirs: Sequence[Path], protocol: str) -> dict[str, Any]:
    """The test of a network, or of several together, by a protocol's own views.

    A result that is there is not measured again, unless a network was trained further.
    It has a file of its own: a person may have tested the network in other ways.
    """
    name = result_name(protocol, len(workdirs)).replace("evaluate_", "experiment_")
    return evaluate_once(workdirs, protocol, workdirs[0] / f"{name}.json")


def network_features(
    workdir: Path,
    layer: str,
    split: str,
    *,
    mode: str,
    data: str = "",
    paper_side: int | None = None,
    multi_label: bool = False,
) -> Features:
    """A network's features of a split: extracted, or from the file of before.

    `layer`, `mode`: see layer_features.py. `data`: another data set than the network's.
    `paper_side`: shorter side of whole images, for a network trained at 224 pixels.
    """
    settings = network_settings(workdir)
    if data:
        settings = settings._replace(data=settings.data._replace(name=data, root=""))
    here, size = settings.data, settings.data.image_size
    side = default_side(mode, image_size=size, resize_side=here.resize_side)
    if paper_side:
        side = round(size * paper_side / PAPER_SIDE)
    path = workdir / file_name(here, split, layer, mode, side)
    if path.exists():
        features, provenance = load_features(path)
        wanted = {
            "checkpoint_step": run_folder.newest_step(workdir),
            "data": here.name,
            "root": here.root,
        }
        if all(provenance[key] == value for key, value in wanted.items()):
            return features
    write_features(
        settings,
        load_network(workdir, plain(settings)),
        workdir=workdir,
        layer=layer,
        split=split,
        mode=mode,
        side=side,
        multi_label=multi_label,
        output=path,
    )
    jax.clear_caches()  # dozens of programs in one process
    return load_features(path)[0]


def detector_settings_of(
    given: DetectionSetting, recipe: DetectorRecipe, seed: int
) -> DetectorSettings:
    """The settings of a detector."""
    settings = given.settings
    finetune = settings.finetune
    made = settings._replace(
        seed=seed,
        system=recipe.system,
        layer=recipe.layer,
        scorer=recipe.scorer,
        window_side=recipe.window_side,
        scales=recipe.scales or settings.scales,
        regression=settings.regression._replace(enabled=recipe.regression),
        fc_rank=recipe.ranks,
        finetune=finetune if recipe.finetuned else finetune._replace(steps=0),
    )
    return read(DetectorSettings, plain(made))  # checked


def detector_workdir(
    given: DetectionSetting, recipe: DetectorRecipe, seed: int
) -> Path:
    """Where a detector is kept."""
    return given.folder / DETECTORS / f"{recipe.name}-seed{seed}"


def trained_detector(
    given: DetectionSetting, recipe: DetectorRecipe, seed: int
) -> Path:
    """Trains what of a detector is not trained yet; returns its workdir."""
    workdir = detector_workdir(given, recipe, seed)
    if recipe.origin:
        share_stages(trained_detector(given, recipe.origin, seed), workdir)
    log.info("detector %s, seed %d", recipe.name, seed)
    train_detector(detector_settings_of(given, recipe, seed), workdir)
    return workdir


def detector_test(
    given: DetectionSetting, recipe: DetectorRecipe, seed: int
) -> dict[str, Any]:
    """The test of a detector, trained first if it is not yet."""
    workdir = trained_detector(given, recipe, seed)
    return _tested(detector_settings_of(given, recipe, seed), workdir)


def tested_detector(settings: DetectorSettings, workdir: Path) -> dict[str, Any]:
    """The test of a detector of these settings, trained first if it is not yet."""
    log.info("detector %s", workdir.name)
    train_detector(settings, workdir)
    return _tested(settings, workdir)


def _tested(settings: DetectorSettings, workdir: Path) -> dict[str, Any]:
    """A result that is there is measured again only if a stage or a setting changed."""
    # As JSON gives it back; results don't depend on where things are kept.
    told = json.loads(json.dumps(plain(settings._replace(network="", cache=""))))
    inputs = {"settings": told, "stages": _digests(workdir)}
    path = workdir / TESTED
    if path.exists():
        known: dict[str, Any] = run_folder.read_json(path)
        if known["inputs"] == inputs:
            return known["report"]
    report = evaluate_detectors([workdir], settings=settings)
    jax.clear_caches()  # dozens of detectors in one process
    files.write_json(path, {"inputs": inputs, "report": report})
    return report


def load_detector(
    given: DetectionSetting, recipe: DetectorRecipe, seed: int
) -> detectors.Detector:
    """A trained detector as one value."""
    workdir = detector_workdir(given, recipe, seed)
    return detectors.load_detector(workdir, detector_settings_of(given, recipe, seed))


def open_test_split(
    given: DetectionSetting, recipe: DetectorRecipe, seed: int
) -> BoxSplit:
    """The test split as a detector sees it."""
    settings = detector_settings_of(given, recipe, seed)
    return open_split_of(settings, "test", detector_workdir(given, recipe, seed))


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


def _network_workdir(given: Setting, recipe: NetworkRecipe, seed: int) -> Path:
    return given.folder / NETWORKS / f"{recipe.name}-seed{seed}"


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
