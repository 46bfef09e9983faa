"""Turns a config into the plain arguments that everything below takes."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sppnet_jax import run_folder
from sppnet_jax.checkpoints import Checkpoints
from sppnet_jax.classification.preprocess import Preprocessing, color_shifts
from sppnet_jax.classification.schedule import Schedule
from sppnet_jax.classification.step import Optimizer, init_params
from sppnet_jax.classification.train import Run
from sppnet_jax.data.pipeline import Batches, eval_batches, train_batches
from sppnet_jax.data.sources import Source, available_splits, open_source
from sppnet_jax.data.statistics import image_statistics
from sppnet_jax.model import SPPNet, create_model

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
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} has no checkpoints: train first")
    model = make_model(config, num_classes)
    shapes = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.PRNGKey(0))
    with Checkpoints(folder) as checkpoints:
        return model, checkpoints.restore_params(shapes)


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
        log_steps=config.log_steps,
        checkpoint_steps=config.checkpoint_steps,
        keep_checkpoints=config.keep_checkpoints,
        max_steps=config.max_steps,
    )


def make_preprocessing(config: ConfigDict, workdir: Path) -> Preprocessing:
    """From the config and the statistics in the run's folder."""
    statistics = run_folder.load_statistics(workdir)
    mean = np.asarray(config.mean, np.float32)
    shifts = np.zeros((3, 3), np.float32)
    if statistics is not None:
        shifts = color_shifts(statistics.covariance, config.color_sigma)
        if not config.mean:
            mean = statistics.mean_image
    return Preprocessing(mean=mean, scale=config.scale, color_shifts=shifts)


def prepare_statistics(config: ConfigDict, source: Source, workdir: Path) -> None:
    """Computes the training set's statistics if the config needs them, once."""
    if config.mean and not config.color_sigma:
        return
    known = run_folder.load_statistics(workdir)
    side = config.data.image_size
    if known is not None and known.mean_image.shape[0] == side:
        return
    statistics = image_statistics(
        source,
        image_size=side,
        resize_side=config.data.resize_side,
        max_images=config.statistics_images,
        threads=config.data.threads,
    )
    run_folder.save_statistics(workdir, statistics)


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
        **_loading(config),
    )


def make_eval_batches(config: ConfigDict, source: Source) -> Batches:
    return eval_batches(
        source,
        batch_size=config.batch_size,
        image_size=config.data.image_size,
        resize_side=config.data.resize_side,
        **_loading(config),
    )


def _loading(config: ConfigDict) -> dict[str, Any]:
    return {
        "workers": config.data.workers,
        "threads": config.data.threads,
        "strict": config.data.strict,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
