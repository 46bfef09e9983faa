"""Training a detector in stages: what each is made from, and what it makes.

    network      the trained classifier, copied: a detector needs nothing but its folder
    finetune     fc6, fc7 and a new fc8
    svm          an SVM for each class, with hard-negative mining
    regression   of boxes

Each is run once, and again if what goes into it changes; see run/stages.py. Proposals
and maps are no stages but a cache that detectors may share: each image has its own
entry. detector.json, the last that training writes, says which stages belong together.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sppnet_jax.data.datasets import open_box_split
from sppnet_jax.data.sources import FOLDERS
from sppnet_jax.detection.box_split import BoxSplit, open_split_of
from sppnet_jax.detection.detector import layer_head
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.detection.end_to_end import check_end_to_end, train_end_to_end
from sppnet_jax.detection.examples import finetuning_examples, with_objects
from sppnet_jax.detection.finetune import finetune
from sppnet_jax.detection.learn import ROUNDS_FILE, learn_regression, learn_svms
from sppnet_jax.detection.split_features import split_features
from sppnet_jax.detection.trained_detector import (
    DETECTOR_FILE,
    NETWORK,
    check_is_detector,
    detecting_network,
    detector_fc,
    end_to_end_begin,
    end_to_end_network,
    finetuned_model,
    finetuning_params,
    has_fitting_fc,
)
from sppnet_jax.network.model import Architecture
from sppnet_jax.network.pretrained import load_pretrained
from sppnet_jax.network.trained import Network, digest_arrays, load_network
from sppnet_jax.run import files, parallel, run_folder, stages
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.settings import plain, read
from sppnet_jax.run.shares import ALONE, Share

STAGES = (NETWORK, "finetune", "svm", "regression")

log = logging.getLogger(__name__)


def train_detector(
    settings: DetectorSettings, workdir: Path, share: Share = ALONE
) -> None:
    """Runs the stages of training that are not done yet.

    `share`: of several processes that find proposals and convolve images; only the
    first of them does the rest, and writes into the folder. End-to-end training runs on
    all that JAX has joined.

    Raises: ValueError for a folder that holds something else, and for a network that
    can't do what the settings ask; and as stages do.
    """
    check_is_detector(workdir)
    settings = settings.with_absolute_paths()
    network = _origin(settings, workdir)
    check_network(settings, network)
    together = jax.process_count() > 1
    if not (share.is_first or together):
        split = open_split_of(settings, "train", workdir, share)
        if settings.system != "end_to_end":  # whose trunk is not trained yet
            boxes = with_objects(split.objects, split.proposals)
            split_features(settings, network, split, boxes, workdir, share)
        return
    with run_folder.locked(workdir) if share.is_first else contextlib.nullcontext():
        for name in STAGES:  # before hours of work
            stages.check_is_stage(workdir / name)
        files.check_folder(settings.cache_folder(workdir))
        split = open_split_of(settings, "train", workdir, share)
        if share.is_first:
            # From here on stages may be of other settings than the config's.
            (workdir / DETECTOR_FILE).unlink(missing_ok=True)
            run_folder.save_config(workdir, plain(settings))
            run_folder.save_training_data(workdir, _data(settings, split))
        _copy_network(settings, network, workdir)
        made = {
            "classes": list(split.source.class_names),
            "stages": _run_stages(settings, network, workdir, split, share),
            "images": split.images,
        }
        if share.is_first:
            files.write_json(workdir / DETECTOR_FILE, made)
    parallel.wait_for_all_processes("the detector is trained")


def _data(settings: DetectorSettings, split: BoxSplit) -> run_folder.TrainingData:
    """What identifies the data that a detector is trained on, and tested on."""
    held_out, source = {}, split.source
    if settings.data.name in FOLDERS:
        with contextlib.suppress(ValueError):  # there may be no split to test on
            other = open_box_split(settings.data, "test")
            held_out[other.split] = other.digest
    return run_folder.TrainingData(
        name=source.name,
        root=settings.data.root,
        split=source.split,
        records=len(source.records),
        class_names=source.class_names,
        digest=source.digest,
        held_out=held_out,
    )


def check_network(settings: DetectorSettings, network: Network) -> None:
    """Raises ValueError if a classifier can't do what the settings ask."""
    model, origin = network.model, settings.network
    fits = has_fitting_fc(network)
    if settings.layer != "pyramid" and not (fits or settings.finetune.steps):
        raise ValueError(
            f"config.layer is {settings.layer!r}, but {origin} has no fc layers for "
            "these pyramids: use --config.layer=pyramid, or fine-tune fresh ones with "
            "--config.finetune.steps=600"
        )
    if settings.system != "rcnn":
        if model.levels is None:
            raise ValueError(
                f"the network in {origin} has no spatial pyramid (levels=None), so it "
                "can't pool windows from the map of a whole image: train one with "
                "levels such as (6, 3, 2, 1), or use --config.system=rcnn"
            )
        least = network.geometry.min_image_size
        if min(settings.scales) < least:
            raise ValueError(
                f"config.scales has {min(settings.scales)} pixels, and the network in "
                f"{origin} needs at least {least}"
            )
    elif 2 * settings.context >= model.image_size:
        raise ValueError(
            f"config.context of {settings.context} pixels on each side leaves nothing "
            f"of the {model.image_size} that the network in {origin} takes"
        )
    if settings.system == "end_to_end":
        check_end_to_end(settings.finetune, model)
        if settings.scorer == "svm" and jax.process_count() > 1:
            raise ValueError(
                "SVMs are not trained by several processes together: train with "
                "--config.scorer=softmax, then go on with svm without --coordinator"
            )
    elif settings.finetune.steps:
        parallel.check_batch_size(settings.finetune.batch_size)


def _origin(settings: DetectorSettings, workdir: Path) -> Network:
    """The network that the settings name, or the copy of it if it is gone."""
    origin = Path(settings.network)
    if settings.is_published:
        try:
            published = load_pretrained(
                settings.network,
                settings.weights,
                cuts=settings.cuts,
                levels=settings.levels,
                reducer=settings.reducer,
            )
            return detecting_network(settings, published)
        except FileNotFoundError:
            if not _has_copy(settings, workdir):
                raise
    elif run_folder.has_checkpoint(origin):
        return detecting_network(settings, load_network(origin))
    elif not _has_copy(settings, workdir):
        raise FileNotFoundError(
            f"config.network, {origin}, holds no trained classifier: train one with "
            "python -m sppnet_jax.train, or correct --config.network"
        )
    gone = settings.weights if settings.is_published else origin
    log.info("%s is gone; going on with the copy of it", gone)
    return detecting_network(settings, load_network(workdir / NETWORK))


def _has_copy(settings: DetectorSettings, workdir: Path) -> bool:
    """Whether the detector's folder holds the network that the settings name."""
    copy = workdir / NETWORK
    if not stages.is_done(workdir, NETWORK):
        return False
    inputs = run_folder.read_json(copy / stages.STAGE_FILE)["inputs"]
    if not settings.is_published:
        return bool(inputs["workdir"] == settings.network)
    kept = read(Architecture, run_folder.load_config(copy)["model"], "config.model")
    told = ("weights", "cuts", "levels", "reducer")
    return kept.backbone == settings.network and all(
        getattr(kept, name) == getattr(settings, name) for name in told
    )


def _copy_network(settings: DetectorSettings, network: Network, workdir: Path) -> None:
    """Copies the trained classifier into the detector's folder, unless it is there."""
    origin = Path(settings.network)
    itself = origin.resolve() == (workdir / NETWORK).resolve()
    gone = not settings.is_published and not run_folder.has_checkpoint(origin)
    if itself or gone:
        return

    def copy(folder: Path) -> dict[str, Any]:
        run_folder.save_config(folder, dict(network.settings))
        run_folder.save_training_data(folder, network.trained_on)
        statistics = run_folder.load_statistics(origin)
        if statistics is not None:
            run_folder.save_statistics(folder, statistics)
        with Checkpoints(folder / run_folder.CHECKPOINTS) as checkpoints:
            if checkpoints.latest_step() is None:
                none = {"step": np.int32(network.step)}
                checkpoints.save(
                    network.step, params=network.params, training=none, host={}
                )
        return {"trained on": str(network.trained_on)}

    inputs = {"workdir": str(origin), "step": network.step, "network": network.digest}
    stages.run_stage(workdir, NETWORK, inputs, copy)


def _train_end_to_end(
    settings: DetectorSettings,
    network: Network,
    workdir: Path,
    split: BoxSplit,
    boxes: list[np.ndarray],
    about: dict[str, Any],
) -> str:
    """Runs the stage if it is not done; returns its digest."""
    classes = len(about["classes"])
    inputs = {
        **about,
        "network": network.digest,
        "scales": list(settings.scales),
        "rule": settings.rule,
        "buckets": settings.buckets,
        "finetune": settings.finetune.deciding,
    }
    return stages.run_stage(
        workdir,
        "finetune",
        inputs,
        lambda folder: train_end_to_end(
            folder,
            network,
            finetuned_model(settings, network, classes),
            end_to_end_begin(settings, network, classes),
            split,
            boxes,
            settings.finetune,
            settings.scales,
            rule=settings.rule,
            max_buckets=settings.buckets,
            scaled=not has_fitting_fc(network),
            seed=settings.seed,
        ),
    )


def _run_stages(
    settings: DetectorSettings,
    network: Network,
    workdir: Path,
    split: BoxSplit,
    share: Share,
) -> dict[str, str]:
    """Runs what is not done; returns the digest of each stage."""
    boxes = with_objects(split.objects, split.proposals)
    names = split.source.class_names
    labels = np.concatenate([f.labels[~f.difficult] for f in split.objects])
    absent = np.setdiff1d(np.arange(len(names)), labels)
    if len(absent):
        log.warning(
            "no object to train on, or difficult ones only: %s; they will never be "
            "detected",
            ", ".join(names[label] for label in absent),
        )
    digests: dict[str, str] = {}
    finetuning = settings.finetune
    about: dict[str, Any] = {
        "boxes": digest_arrays(boxes),
        "objects": digest_arrays(part for found in split.objects for part in found),
        "classes": list(names),
        "seed": settings.seed,
    }
    end_to_end = settings.system == "end_to_end"
    head = finetuned_model(settings, network, len(names))
    if end_to_end:
        digests["finetune"] = _train_end_to_end(
            settings, network, workdir, split, boxes, about
        )
        network = end_to_end_network(settings, network, workdir, len(names))
        if settings.scorer != "svm":
            return digests
    features, made_of = split_features(settings, network, split, boxes, workdir, share)
    shared = {**made_of, **about}
    if finetuning.steps and not end_to_end:
        digests["finetune"] = stages.run_stage(
            workdir,
            "finetune",
            {**shared, "finetune": finetuning.deciding},
            lambda folder: finetune(
                folder,
                head,
                finetuning_params(settings, network),
                features,
                [
                    finetuning_examples(
                        own,
                        found,
                        positive=finetuning.positive_overlap,
                        negative=finetuning.negative_overlap,
                    )
                    for own, found in zip(boxes, split.objects, strict=True)
                ],
                finetuning,
                settings.seed,
            ),
        )
    if settings.scorer == "svm":
        fc = detector_fc(settings, network, workdir, len(names))
        learnt_on = {"finetuned": digests.get("finetune", ""), "layer": settings.layer}
        digests["svm"] = stages.run_stage(
            workdir,
            "svm",
            {**shared, **learnt_on, "svm": plain(settings.svm)},
            lambda folder: learn_svms(
                folder,
                features,
                split.objects,
                len(names),
                head=layer_head(head, settings.layer),
                fc=fc,
                mining=settings.svm,
                seed=settings.seed,
            ),
        )
        # Large, and of use to a run that is cut off only.
        (workdir / "svm" / ROUNDS_FILE).unlink(missing_ok=True)
    if settings.regression.enabled and not end_to_end:
        norm = settings.svm.feature_norm
        digests["regression"] = stages.run_stage(
            workdir,
            "regression",
            {**shared, "feature_norm": norm, "regression": plain(settings.regression)},
            lambda folder: learn_regression(
                folder,
                features,
                split.objects,
                len(names),
                settings.regression,
                feature_norm=norm,
                seed=settings.seed,
            ),
        )
    return digests
