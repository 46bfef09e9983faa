"""Trains an SPP-net.

python -m sppnet_jax.train --config=configs/digits.py --workdir=runs/digits
"""

import logging
from collections.abc import Sequence

from sppnet_jax import cli
from sppnet_jax.training.network_settings import NetworkSettings

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    cli.refuse_arguments(argv)
    settings, workdir = cli.given_settings(NetworkSettings), cli.given_workdir()
    cli.join_processes(settings)
    # Here, not above: a mistake in the settings should show before these are loaded.
    from sppnet_jax.run import parallel
    from sppnet_jax.training.networks import train_network

    train_network(settings, workdir)
    if parallel.is_first_process():
        # matplotlib, not before the first step
        from sppnet_jax.training.curves import plot_training

        picture = plot_training(workdir)
        log.info("the run's folder is %s, its curves are %s", workdir, picture)


if __name__ == "__main__":
    cli.run(main, NetworkSettings)
