"""Turns a config into the plain arguments that everything below takes."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sppnet_jax.buckets.table import BucketTable
from sppnet_jax.classification.layer_features import Features, extract_features
from sppnet_jax.classification.scores import (
    OnExample,
    Scores,
    score_crops,
    score_maps,
)
from sppnet_jax.classification.views import ON_CROPS, Protocol
from sppnet_jax.data.batches import Batches, eval_batches, train_batches
from sppnet_jax.data.sources import Source, available_splits, open_source
from sppnet_jax.data.statistics import kept_statistics
from sppnet_jax.network.model import SPPNet, create_model, init_params
from sppnet_jax.network.preprocess import Preprocessing, color_shifts
from sppnet_jax.run import caches, parallel, run_folder
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.training.loop import Run
from sppnet_jax.training.schedule import Schedule
from sppnet_jax.training.steps import Optimizer

log = logging.getLogger(__name__)


def make_model(config: ConfigDict, num_classes: int) -> SPPNet:
    return create_model(
        config.model.backbone,
        tuple(config.model.levels) or None,
        num_classes,
        width=config.model.width,
        image_size=config.data.image_size,
        dropout=config.model.dropout,
        weight_init=config.model.weight_init,
        dtype=jnp.bfloat16 if config.model.bfloat16 else jnp.float32,
    )


def load_model(
    config: ConfigDict, workdir: Path, num_classes: int
) -> tuple[SPPNet, Any]:
    """The model of a config with the parameters of the newest checkpoint."""
    if not run_folder.has_checkpoint(workdir):
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: train first")
    shapes = _param_shapes(config, num_classes)
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        return make_model(config, num_classes), checkpoints.restore_params(shapes)


def checkpoint_step(workdir: Path) -> int | None:
    """The step of a run's newest checkpoint, or None."""
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        return checkpoints.latest_step()


def make_optimizer(config: ConfigDict) -> Optimizer:
    return Optimizer(
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
    )


def make_schedule(config: ConfigDict) -> Schedule:
    return Schedule(
        learning_rate=config.learning_rate,
        kind=config.schedule,
        warmup_epochs=config.warmup_epochs,
        drop_factor=config.drop_factor,
        drop_epochs=tuple(config.drop_epochs),
        patience=config.plateau_epochs,
        min_improvement=config.plateau_improvement,
        max_drops=config.plateau_drops,
    )


def make_run(config: ConfigDict) -> Run:
    return Run(
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        sizes=tuple(config.sizes),
        size_multiple=config.size_multiple,
        log_steps=config.log_steps,
        checkpoint_steps=config.checkpoint_steps,
        keep_checkpoints=config.keep_checkpoints,
        max_steps=config.max_steps,
        profile_steps=config.profile_steps,
    )


def make_preprocessing(config: ConfigDict, workdir: Path) -> Preprocessing:
    """From the config and the statistics in the run's folder."""
    statistics = run_folder.load_statistics(workdir)
    mean = np.asarray(config.mean, np.float32)
    shifts = np.zeros((3, 3), np.float32)
    if statistics is not None:
        shifts = color_shifts(statistics["covariance"], config.color_sigma)
        if not config.mean:
            mean = statistics["mean_image"]
    return Preprocessing(mean=mean, scale=config.scale, color_shifts=shifts)


def prepare_statistics(config: ConfigDict, source: Source, workdir: Path) -> None:
    """Computes the training set's statistics if the config needs them.

    A run that goes on keeps those it began with.
    """
    if (config.mean and not config.color_sigma) or (
        run_folder.has_checkpoint(workdir)
        and run_folder.load_statistics(workdir) is not None
    ):
        return
    try:
        folder = caches.cache_folder() / "statistics"
    except RuntimeError:  # a user without a home folder
        folder = None
    statistics = kept_statistics(
        source,
        folder,
        image_size=config.data.image_size,
        resize_side=config.data.resize_side,
        max_images=config.statistics_images,
        threads=config.data.threads,
    )
    run_folder.save_statistics(workdir, statistics._asdict())


def training_data(config: ConfigDict, source: Source) -> run_folder.TrainingData:
    """What identifies the data that a run is trained on."""
    return run_folder.TrainingData(
        name=source.name,
        root=config.data.root,
        split=source.split,
        records=len(source.records),
        class_names=source.class_names,
    )


def check_can_resume(config: ConfigDict, source: Source, workdir: Path) -> None:
    """Raises ValueError if the config can't go on with the run in a folder.

    Passes where there is no checkpoint yet.
    """
    if not run_folder.has_checkpoint(workdir):
        return
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        checkpoints.check_shapes(_param_shapes(config, len(source.class_names)))
    known = run_folder.load_training_data(workdir)
    given = training_data(config, source)
    if known != given:
        raise ValueError(
            f"the run in {workdir} was trained on {known}; now there are {given}. Use "
            "another --workdir, or restore the data"
        )
    before = run_folder.load_config(workdir)
    for name in ("seed", "batch_size"):
        if before[name] != config[name]:
            raise ValueError(
                f"the run in {workdir} began with {name}={before[name]}, which decides "
                f"the order of its data, and can't go on with {name}={config[name]}: "
                "use another --workdir"
            )


def open_split(config: ConfigDict, purpose: str) -> Source:
    """The source for a purpose: "train", "validation" or "test".

    Where the config leaves a split open, validation takes "validation" if the data set
    has it and else "test"; test the other way round.
    """
    where = {"root": config.data.root, "data_dir": config.data.data_dir}
    split = config.data[f"{purpose}_split"]
    if not split:
        splits = available_splits(config.data.name, **where)
        order = {"validation": ("validation", "test"), "test": ("test", "validation")}
        found = [name for name in order[purpose] if name in splits]
        if not found:
            raise ValueError(
                f"{config.data.name} has neither a validation nor a test split, only "
                f"{', '.join(splits)}: give --config.data.{purpose}_split, such as "
                "'train[90%:]' (and train_split='train[:90%]')"
            )
        split = found[0]
        log.info("%s uses the split %r", purpose, split)
    return open_source(config.data.name, split, **where)


def check_training_data_is_unchanged(
    config: ConfigDict, trained_on: run_folder.TrainingData
) -> None:
    """Raises ValueError if the data set was changed since a run was trained on it.

    A test on held-out images would then see images of the training.
    """
    if (config.data.name, config.data.root) != (trained_on.name, trained_on.root):
        return
    now = training_data(config, open_split(config, "train"))
    if now.split == trained_on.split and now.records != trained_on.records:
        raise ValueError(
            f"the data has changed since the training: then {trained_on}, now {now}. "
            "Images held out then may not be the same now: restore the data, or train "
            "again in another --workdir"
        )


def make_train_batches(config: ConfigDict, source: Source) -> Batches:
    return train_batches(
        source,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        resize_side=config.data.resize_side,
        crop=config.data.crop,
        min_area=config.data.min_area,
        flip=config.data.flip,
        seed=config.seed,
        epochs=config.epochs,
        **_loading(config.data),
    )


def make_eval_batches(config: ConfigDict, source: Source) -> Batches:
    return eval_batches(
        source,
        batch_size=parallel.round_up_to_devices(config.batch_size),
        image_size=config.data.image_size,
        resize_side=config.data.resize_side,
        **_loading(config.data),
    )


def score_split(
    config: ConfigDict,
    workdir: Path,
    source: Source,
    protocol: Protocol,
    *,
    loading: ConfigDict,
    max_buckets: int,
    on_example: OnExample | None = None,
) -> tuple[Scores, list[BucketTable]]:
    """The scores of a run's newest checkpoint, and the programs of whole images.

    `loading`: the group of settings that says how the data is loaded.
    """
    model, params = load_model(config, workdir, len(source.class_names))
    preprocessing = make_preprocessing(config, workdir)
    batch_size = parallel.round_up_to_devices(config.batch_size)
    if protocol.on_map:
        return score_maps(
            model,
            params,
            preprocessing,
            protocol,
            source,
            batch_size=batch_size,
            max_buckets=max_buckets,
            threads=loading.threads,
            strict=loading.strict,
            on_example=on_example,
        )
    batches = eval_batches(
        source,
        batch_size=parallel.round_up_to_devices(
            max(1, batch_size // len(protocol.positions))
        ),
        image_size=config.data.image_size,
        resize_side=protocol.scales[0],
        positions=protocol.positions,
        **_loading(loading),
    )
    scores = score_crops(
        model,
        params,
        preprocessing,
        protocol,
        batches,
        records=len(source.records),
        on_example=on_example,
    )
    return scores, []


def extract_split(
    config: ConfigDict,
    workdir: Path,
    source: Source,
    *,
    layer: str,
    side: int,
    mode: str,
    max_buckets: int,
) -> Features:
    """The features that a run's newest checkpoint gives the images of a source.

    The source need not have the classes that the run was trained on.
    """
    classes = run_folder.load_training_data(workdir).class_names
    model, params = load_model(config, workdir, len(classes))
    return extract_features(
        model,
        params,
        make_preprocessing(config, workdir),
        source,
        layer=layer,
        side=side,
        mode=mode,
        batch_size=config.batch_size,
        max_buckets=max_buckets,
        workers=config.data.workers,
        threads=config.data.threads,
        strict=config.data.strict,
    )


def check_can_test(config: ConfigDict, workdir: Path, protocol_name: str) -> None:
    """Raises ValueError or FileNotFoundError if a run can't be tested by a protocol."""
    if not run_folder.has_checkpoint(workdir):
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: train first")
    if not config.model.levels and protocol_name not in ON_CROPS:
        raise ValueError(
            f"the network in {workdir} has no spatial pyramid (levels=None), so it "
            f"can't be tested with {protocol_name}, which pools from maps of any size: "
            f"use --protocol={' or '.join(ON_CROPS)}"
        )


def check_classes(source: Source, workdir: Path) -> None:
    """Raises ValueError if a run was trained on other classes than a source has."""
    trained_on = run_folder.load_training_data(workdir)
    if source.class_names != trained_on.class_names:
        raise ValueError(
            f"{source.name!r} has the {len(source.class_names)} classes "
            f"{', '.join(source.class_names[:5])} …; the run in {workdir} was trained "
            f"on {trained_on}"
        )


def _param_shapes(config: ConfigDict, num_classes: int) -> Any:
    model = make_model(config, num_classes)
    return jax.eval_shape(lambda rng: init_params(model, rng), jax.random.PRNGKey(0))


def _loading(data: ConfigDict) -> dict[str, Any]:
    return {
        "workers": data.workers,
        "threads": data.threads,
        "strict": data.strict,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
