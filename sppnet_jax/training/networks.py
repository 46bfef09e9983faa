"""Training a network, from its settings to the test after the last epoch."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sppnet_jax.data.batches import (
    Batches,
    eval_batches,
    steps_per_epoch,
    train_batches,
)
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.datasets import ImageData, open_split
from sppnet_jax.data.sources import FOLDERS, Source
from sppnet_jax.data.statistics import kept_statistics
from sppnet_jax.network.described import PRETRAINED
from sppnet_jax.network.model import (
    HEAD_ONLY,
    SPPNet,
    frozen_convs,
    init_params,
    make_model,
    param_shapes,
)
from sppnet_jax.network.preprocess import Preprocessing, make_preprocessing
from sppnet_jax.network.pretrained import with_pretrained
from sppnet_jax.network.trained import load_network
from sppnet_jax.network.weight_files import find_weights
from sppnet_jax.run import caches, files, parallel, run_folder
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.settings import plain
from sppnet_jax.training.ahead import StepsAhead
from sppnet_jax.training.frozen import (
    Pooled,
    batch_loader,
    make_head_step,
    make_head_test,
    pool_split,
)
from sppnet_jax.training.loop import train
from sppnet_jax.training.network_settings import NetworkSettings, network_settings
from sppnet_jax.training.sizes import epoch_size
from sppnet_jax.training.step_log import Pace
from sppnet_jax.training.steps import (
    TrainState,
    create_state,
    make_train_step,
    shard_batch,
)
from sppnet_jax.training.validation import count_correct, make_test_step

log = logging.getLogger(__name__)


def train_network(
    settings: NetworkSettings, workdir: Path, features: Path | None = None
) -> dict[str, float]:
    """Trains a network to its end, from the newest checkpoint in a folder if any.

    `features`: a folder to keep what a frozen trunk gives in, for other heads.

    Returns: the last validation metrics.
    Raises: ValueError for data or settings that a run in the folder can't go on with;
    Interrupted and DivergedError as `loop.train` does.
    """
    settings = settings.with_absolute_paths()
    data = settings.data
    if settings.model.head == "none":
        raise ValueError(
            "config.model.head='none' has nothing to train: use 'fc' or 'linear'"
        )
    parallel.check_batch_size(settings.batch_size)
    in_data = data.root and workdir.resolve().is_relative_to(Path(data.root).resolve())
    if data.name == "image_folder" and in_data:
        raise ValueError(
            f"the run's folder {workdir} lies in that of the images, {data.root}, and "
            "would be taken for a class: give another --workdir"
        )
    source = open_split(data, "train")
    held_out = open_split(data, "validation")
    if held_out.class_names != source.class_names:
        raise ValueError(
            f"the splits {source.split!r} and {held_out.split!r} have other classes"
        )
    batches = train_batches(
        source,
        batch_size=settings.batch_size,
        seed=settings.seed,
        epochs=settings.epochs,
        **data.augmentation,
        **data.loading,
        **_this_process(),
    )
    now = training_data(data, source)
    check_can_resume(settings, now, workdir)
    named = settings.model.weights not in ("", PRETRAINED)
    if named and not run_folder.has_checkpoint(workdir):  # which has them by then
        find_weights(settings.model.weights)
    told = {
        **{f"{k} of split {now.split!r}": v for k, v in now._asdict().items()},
        f"records of split {held_out.split!r}": len(held_out.records),
        f"digest of split {held_out.split!r}": held_out.digest,
        "the newest checkpoint": run_folder.newest_step(workdir),
    }
    del told[f"root of split {now.split!r}"]  # each process may have its own place
    parallel.check_alike("data, or folders of the run", told)
    first = parallel.is_first_process()
    with run_folder.locked(workdir) if first else contextlib.nullcontext():
        files.check_folder(workdir / run_folder.CHECKPOINTS)
        metrics = _train(settings, workdir, now, source, held_out, batches, features)
    parallel.wait_for_all_processes("the network is trained")
    return metrics


def _train(
    settings: NetworkSettings,
    workdir: Path,
    now: run_folder.TrainingData,
    source: Source,
    held_out: Source,
    batches: Batches,
    features: Path | None,
) -> dict[str, float]:
    """Trains in a folder that no other process uses."""
    data = settings.data
    if parallel.is_first_process():
        run_folder.save_config(workdir, plain(settings))
        if run_folder.has_checkpoint(workdir):  # it is compared with what it began with
            known = run_folder.load_training_data(workdir)
            now = now._replace(held_out=known.held_out)
        run_folder.save_training_data(workdir, now)
        _prepare_statistics(settings, source, workdir)
    parallel.wait_for_all_processes("the run's folder is prepared")
    log.info(
        "training on %d images of %d classes, testing on %d",
        len(source.records),
        len(source.class_names),
        len(held_out.records),
    )
    model = make_model(settings.model, len(source.class_names), data.image_size)
    statistics = run_folder.load_statistics(workdir)
    preprocessing = make_preprocessing(
        settings.inputs, statistics, settings.model.published
    )
    frozen = frozen_convs(model, settings.model.trainable)
    begin, resumes = None, run_folder.has_checkpoint(workdir)
    if settings.model.weights and not resumes:  # the checkpoint has them by then
        begin = functools.partial(with_pretrained, architecture=settings.model)

    def make_state() -> TrainState:
        return create_state(
            model, settings.optimizer, settings.seed, frozen=frozen, begin=begin
        )

    if settings.model.trainable == HEAD_ONLY:
        if resumes:
            params = load_network(workdir, plain(settings)).params
        else:
            params = parallel.unreplicate(make_state().params)
        pool = functools.partial(
            pool_split, settings, model, params, preprocessing, folder=features
        )
        parts = _head_parts(settings, model, pool, source, held_out)
    else:
        parts = _image_parts(settings, model, preprocessing, source, held_out, batches)
    total_steps = settings.epochs * parts.epoch_steps

    def size_of(epoch: int) -> int | None:
        sizes, multiple = settings.sizes, settings.size_multiple
        if not sizes:
            return None
        return epoch_size(sizes, epoch, seed=settings.seed, multiple=multiple)

    with parts.batches:
        memory = train(
            workdir,
            "training",
            Pace(
                total_steps,
                settings.batch_size,
                parts.epoch_steps,
                settings.log_steps,
                settings.checkpoint_steps,
                settings.keep_checkpoints,
                settings.max_steps,
                settings.profile_steps,
            ),
            make_state=make_state,
            batches=parts.batches,
            place=parts.place,
            make_program=functools.partial(parts.make_program, frozen),
            rate=lambda step, errors: settings.schedule.rate(
                step,
                steps_per_epoch=parts.epoch_steps,
                total_steps=total_steps,
                validation_errors=errors,
            ),
            size_of=size_of,
            validate=parts.validate,
        )
    parts.end()
    return memory["validation"]


def pool_all(
    settings: NetworkSettings, sources: Sequence[Source], folder: Path
) -> None:
    """Keeps what a frozen trunk gives of several splits in a folder."""
    classes = len(sources[0].class_names)
    model = make_model(settings.model, classes, settings.data.image_size)
    drawn = init_params(model, jax.random.PRNGKey(settings.seed))
    params = with_pretrained(jax.device_get(drawn), settings.model)
    seen = make_preprocessing(settings.inputs, None, settings.model.published)
    for number, source in enumerate(sources):
        mirror = settings.data.flip and number == 0  # the one that is trained on
        pool_split(settings, model, params, seen, source, mirror=mirror, folder=folder)


def head_accuracy(
    settings: NetworkSettings, workdir: Path, source: Source, features: Path
) -> dict[str, float]:
    """The accuracy of a trained head on a split, as `count_correct` gives it.

    `features`: where what the frozen trunk gives is kept.
    """
    network = load_network(workdir)
    pooled = pool_split(
        settings,
        network.model,
        network.params,
        network.preprocessing,
        source,
        mirror=False,
        folder=features,
    )
    size, records = settings.batch_size, len(source.records)
    test = make_head_test(network.model, pooled, size, records)
    return test(parallel.replicate(network.params))


class _Parts(NamedTuple):
    """What the loop trains with; `end` is called after the last step."""

    batches: Any
    epoch_steps: int
    place: Callable[[Any], Any]
    make_program: Callable[..., Any]  # of frozen layers and a size
    validate: Callable[[Any], dict[str, float]]
    end: Callable[[], None]


def _image_parts(
    settings: NetworkSettings,
    model: SPPNet,
    preprocessing: Preprocessing,
    source: Source,
    held_out: Source,
    batches: Batches,
) -> _Parts:
    """Of a training on images, augmented anew in each epoch."""
    data, broken = settings.data, BrokenImages(source)
    test_step = make_test_step(model, preprocessing)

    def validate(params: Any) -> dict[str, float]:
        tests = eval_batches(
            held_out,
            batch_size=parallel.round_up_to_devices(settings.batch_size),
            image_size=data.image_size,
            resize_side=data.resize_side,
            **data.loading,
            **_this_process(),
        )
        return count_correct(test_step, params, tests, records=len(held_out.records))

    def place(batch: dict[str, np.ndarray]) -> Any:
        broken.report(batch)
        return shard_batch(batch)

    def make_program(frozen: Sequence[str], size: int | None) -> Any:
        return make_train_step(
            model, settings.optimizer, preprocessing, size=size, frozen=frozen
        )

    return _Parts(
        batches,
        steps_per_epoch(source, settings.batch_size),
        place,
        make_program,
        validate,
        broken.summarize,
    )


def _head_parts(
    settings: NetworkSettings,
    model: SPPNet,
    pool: Callable[..., Pooled],
    source: Source,
    held_out: Source,
) -> _Parts:
    """Of a training of the head on features of a frozen trunk, computed once."""
    pooled = pool(source, mirror=settings.data.flip)
    load, steps = batch_loader(pooled, settings.batch_size, settings.seed)
    test = make_head_test(
        model,
        pool(held_out, mirror=False),
        settings.batch_size,
        len(held_out.records),
    )
    return _Parts(
        StepsAhead(load, settings.epochs * steps),
        steps,
        parallel.shard,
        lambda frozen, size: make_head_step(model, settings.optimizer, frozen, pooled),
        test,
        lambda: None,
    )


def _this_process() -> dict[str, Any]:
    return {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def training_data(data: ImageData, source: Source) -> run_folder.TrainingData:
    """What identifies the data that a run is trained on, and that it is tested on."""
    held_out = {}
    if data.name in FOLDERS:  # the digests of others tell their versions
        for purpose in ("validation", "test"):
            with contextlib.suppress(ValueError):  # there may be no test split
                other = open_split(data, purpose)
                held_out[other.split] = other.digest
    return run_folder.TrainingData(
        name=source.name,
        root=data.root,
        split=source.split,
        records=len(source.records),
        class_names=source.class_names,
        digest=source.digest,
        held_out=held_out,
    )


def check_can_resume(
    settings: NetworkSettings, now: run_folder.TrainingData, workdir: Path
) -> None:
    """Raises ValueError if a run in a folder can't go on with settings and data.

    Passes where there is no checkpoint yet.
    """
    if (workdir / run_folder.CONFIG_FILE).exists():
        network_settings(workdir)  # refuses a detector's folder
    if not run_folder.has_checkpoint(workdir):
        return
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        classes = len(now.class_names)
        checkpoints.check_shapes(
            param_shapes(make_model(settings.model, classes, settings.data.image_size))
        )
    known = run_folder.load_training_data(workdir)
    difference = known.difference(now)
    if difference:
        raise ValueError(
            f"the run in {workdir} was trained on other data: {difference}. Use "
            "another --workdir, or restore the data"
        )
    known.warn_of_tests(now)
    before = run_folder.load_config(workdir)
    for name in ("seed", "batch_size"):
        given = getattr(settings, name)
        if before[name] != given:
            raise ValueError(
                f"the run in {workdir} began with {name}={before[name]}, which decides "
                f"the order of its data, and can't go on with {name}={given}: use "
                "another --workdir"
            )


def check_data_is_unchanged(
    data: ImageData, trained_on: run_folder.TrainingData
) -> None:
    """Raises ValueError if a data set was changed since a run was trained on it.

    A test on held-out images would then see images of the training. A warning says so
    of a folder in another place, which may be another data set, and of held-out images.
    """
    data = data._replace(train_split=trained_on.split).with_absolute_paths()
    if data.name != trained_on.name:
        return
    same = os.path.realpath(data.root) == os.path.realpath(trained_on.root)
    try:
        now = training_data(data, open_split(data, "train"))
    except (OSError, ValueError):
        if same:
            raise
        return  # another folder need not have a split to train on
    difference = trained_on.difference(now)
    if difference and same:
        raise ValueError(
            f"the data has changed since the training: {difference}. Images held out "
            "then may not be the same now: restore the data, or train again in another "
            "--workdir"
        )
    if difference:
        log.warning("this is other data than the run was trained on: %s", difference)
    else:
        trained_on.warn_of_tests(now)


def _prepare_statistics(
    settings: NetworkSettings, source: Source, workdir: Path
) -> None:
    """Computes the training set's statistics if the inputs need them.

    A run that goes on keeps those it began with.
    """
    known = run_folder.has_checkpoint(workdir) and run_folder.load_statistics(workdir)
    published = settings.model.published
    if not settings.inputs.need_statistics(published) or known:
        return
    try:
        folder = caches.cache_folder() / "statistics"
    except RuntimeError:  # a user without a home folder
        folder = None
    statistics = kept_statistics(
        source,
        folder,
        image_size=settings.data.image_size,
        resize_side=settings.data.resize_side,
        max_images=settings.inputs.statistics_images,
        threads=settings.data.threads,
    )
    run_folder.save_statistics(workdir, statistics._asdict())
