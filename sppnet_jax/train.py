"""Trains an SPP-net.

python -m sppnet_jax.train --config=configs/digits.py --workdir=runs/digits
"""

import logging
from collections.abc import Sequence
from pathlib import Path

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
    from sppnet_jax import from_config, parallel, plots, run_folder
    from sppnet_jax.classification.train import train

    parallel.check_batch_size(config.batch_size)
    source = from_config.open_split(config, "train")
    validation = from_config.open_split(config, "validation")
    if validation.class_names != source.class_names:
        raise ValueError(
            f"the splits {source.split!r} and {validation.split!r} have other classes"
        )
    batches = from_config.make_train_batches(config, source)
    if parallel.is_first_process():
        run_folder.save_config(workdir, config.to_dict())
        run_folder.save_class_names(workdir, source.class_names)
        from_config.prepare_statistics(config, source, workdir)
    parallel.wait_for_all_processes("the run's folder is prepared")
    log.info(
        "training on %d images of %d classes, testing on %d",
        len(source.records),
        len(source.class_names),
        len(validation.records),
    )
    with batches:
        metrics = train(
            workdir,
            from_config.make_model(config, len(source.class_names)),
            source,
            train_batches=batches,
            validation_batches=lambda: from_config.make_eval_batches(
                config, validation
            ),
            run=from_config.make_run(config),
            optimizer=from_config.make_optimizer(config),
            schedule=from_config.make_schedule(config),
            preprocessing=from_config.make_preprocessing(config, workdir),
        )
    if parallel.is_first_process():
        picture = plots.plot_training(workdir)
        log.info("the run's folder is %s, its curves are %s", workdir, picture)
    return metrics


if __name__ == "__main__":
    cli.run(main)
