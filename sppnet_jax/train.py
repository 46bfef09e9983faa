"""Trains an SPP-net.

python -m sppnet_jax.train --config=configs/digits.py --workdir=runs/digits
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sppnet_jax import cli

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    if argv:
        raise ValueError(f"unexpected arguments: {' '.join(argv)}")
    config, workdir = cli.given_config(), cli.given_workdir()
    cli.join_processes()
    train_from_config(config, workdir)


def train_from_config(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains what a config describes; returns the last validation metrics."""
    # Here, not above: a mistake in the config should show before these are loaded.
    from sppnet_jax import from_config
    from sppnet_jax.classification.accuracy import count_correct
    from sppnet_jax.run import parallel, run_folder
    from sppnet_jax.training.loop import train
    from sppnet_jax.training.steps import make_test_step

    parallel.check_batch_size(config.batch_size)
    if config.data.root:  # found again from any folder
        config.data.root = str(Path(config.data.root).expanduser().absolute())
    source = from_config.open_split(config, "train")
    validation = from_config.open_split(config, "validation")
    if validation.class_names != source.class_names:
        raise ValueError(
            f"the splits {source.split!r} and {validation.split!r} have other classes"
        )
    batches = from_config.make_train_batches(config, source)
    from_config.check_can_resume(config, source, workdir)
    if parallel.is_first_process():
        run_folder.save_config(workdir, config.to_dict())
        data = from_config.training_data(config, source)
        run_folder.save_training_data(workdir, data)
        from_config.prepare_statistics(config, source, workdir)
    parallel.wait_for_all_processes("the run's folder is prepared")
    log.info(
        "training on %d images of %d classes, testing on %d",
        len(source.records),
        len(source.class_names),
        len(validation.records),
    )
    model = from_config.make_model(config, len(source.class_names))
    preprocessing = from_config.make_preprocessing(config, workdir)
    test_step = make_test_step(model, preprocessing)

    def validate(params: Any) -> dict[str, float]:
        tests = from_config.make_eval_batches(config, validation)
        return count_correct(test_step, params, tests, records=len(validation.records))

    with batches:
        metrics = train(
            workdir,
            model,
            source,
            batches,
            validate=validate,
            run=from_config.make_run(config),
            optimizer=from_config.make_optimizer(config),
            schedule=from_config.make_schedule(config),
            preprocessing=preprocessing,
        )
    if parallel.is_first_process():
        # matplotlib, not before the first step
        from sppnet_jax.training.curves import plot_training

        picture = plot_training(workdir)
        log.info("the run's folder is %s, its curves are %s", workdir, picture)
    return metrics


if __name__ == "__main__":
    cli.run(main)
