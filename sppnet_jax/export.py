r"""Writes the weights of a network into one file that others can read.

python -m sppnet_jax.export --format=safetensors --workdir=runs/flowers
python -m sppnet_jax.export --trunk=efficientnet_lite0 --output=lite0.safetensors

The file says which network it is: another run of the same backbone begins with
`--config.model.weights=FILE`, and where the run began from published weights,
`predict --trunk=… --weights=FILE` names its classes.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sppnet_jax import cli
from sppnet_jax.training.network_settings import (
    NetworkSettings,
    network_settings,
    published_settings,
)

_FORMAT = flags.DEFINE_enum(
    "format",
    "safetensors",
    ("safetensors",),
    "safetensors: the parameters by name, and words that say what network they are of.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "",
    "The file to write; by default WORKDIR/model.safetensors, or with --trunk "
    "TRUNK.safetensors in the current folder.",
)


def main(argv: Sequence[str]) -> None:
    cli.refuse_arguments(argv)
    cli.check_single_process()
    network = cli.given_network(cli.given_settings(NetworkSettings))
    from sppnet_jax.network.exported import describe
    from sppnet_jax.network.pretrained import named_params
    from sppnet_jax.network.weight_files import write_tensors

    default = f"{cli.TRUNK.value}.{_FORMAT.value}"
    if not cli.TRUNK.value:
        default = str(cli.given_workdir() / f"model.{_FORMAT.value}")
    path = Path(_OUTPUT.value or default).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give --output=FILE.{_FORMAT.value}")
    tensors, told = named_params(network.params), describe(network)
    write_tensors(path, tensors, told)
    count = sum(tensor.size for tensor in tensors.values())
    print(f"{told['backbone']}: {count:,} weights in {len(tensors)} tensors: {path}")


if __name__ == "__main__":
    cli.run(main, NetworkSettings, network_settings, published_settings)
