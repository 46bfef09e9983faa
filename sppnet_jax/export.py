r"""Writes a trained network or detector in a form that runs elsewhere.

python -m sppnet_jax.export --workdir=runs/flowers --format=onnx --out=flowers.onnx
python -m sppnet_jax.export --workdir=runs/flowers --format=stablehlo --out=programs
python -m sppnet_jax.export --workdir=runs/flowers --format=safetensors
python -m sppnet_jax.export --workdir=runs/end_to_end --format=onnx --suppressed
python -m sppnet_jax.export --trunk=efficientnet_lite0 --format=onnx

onnx: one file with the preprocessing inside, for images of any size. stablehlo: a
folder that `sppnet_jax.exported` runs with JAX and NumPy alone. safetensors: weights,
which another run takes as `--config.model.weights=FILE`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sppnet_jax import cli
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings
from sppnet_jax.run import run_folder
from sppnet_jax.run.files import check_can_write, check_folder
from sppnet_jax.training.network_settings import (
    NetworkSettings,
    network_settings,
    published_settings,
)

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "stablehlo": ""}
_FORMAT = flags.DEFINE_enum(
    "format", "safetensors", tuple(_SUFFIXES), "What is written, see above."
)
_PIXELS = flags.DEFINE_enum(
    "pixels", "uint8", ("uint8", "float32"), "onnx: the type of the images it takes."
)
_SUPPRESSED = flags.DEFINE_bool(
    "suppressed",
    False,
    "onnx, of a detector: non-maximum suppression is a part of it.",
)
_PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], "stablehlo: where the programs are to run."
)
_BUCKETS = flags.DEFINE_list(
    "buckets",
    [],
    "stablehlo: HEIGHTxWIDTH each, in place of eight for photographs up to 4:1.",
)
flags.declare_key_flag(cli.OUT.name)


def main(argv: Sequence[str]) -> None:
    cli.check_single_process()
    if argv:
        raise cli.UsageError(f"unexpected arguments: {' '.join(argv)}")
    kind, default = _FORMAT.value, f"{cli.TRUNK.value or 'model'}"
    folder = Path() if cli.TRUNK.value else cli.given_workdir()
    out = Path(cli.OUT.value or folder / f"{default}{_SUFFIXES[kind]}").expanduser()
    if kind != "stablehlo" and out.is_dir():
        raise cli.UsageError(f"{out} is a folder: give --out=FILE{_SUFFIXES[kind]}")
    if kind == "stablehlo" and out.is_file():
        raise cli.UsageError(f"{out} is a file: give --out=FOLDER")
    of_others = {
        "onnx": (_PLATFORMS, _BUCKETS),
        "stablehlo": (_PIXELS, _SUPPRESSED),
        "safetensors": (_PIXELS, _SUPPRESSED, _PLATFORMS, _BUCKETS),
    }
    for flag in of_others[kind]:
        if flag.present:
            raise cli.UsageError(f"--{flag.name} is not of --format={kind}")
    if kind == "stablehlo":
        check_folder(out)
    else:
        check_can_write(out, (_SUFFIXES[kind],))
    if "proposals" in flags.FLAGS.config:
        told = _export_detector(kind, out)
    else:
        told = _export_network(kind, out)
    print(f"{told}: {out}")


def _export_detector(kind: str, out: Path) -> str:
    if kind != "onnx":
        raise cli.UsageError(
            f"detectors are exported with --format=onnx; the weights of their networks "
            f"with --workdir={cli.given_workdir() / 'network'}"
        )
    from sppnet_jax.detection.trained_detector import load_detector
    from sppnet_jax.exports.onnx_files import detector_to_onnx, save_onnx

    settings = cli.given_settings(DetectorSettings)
    detector = load_detector(cli.given_workdir(), settings)
    model = detector_to_onnx(detector, _PIXELS.value, suppressed=_SUPPRESSED.value)
    save_onnx(model, out)
    return f"a detector of {', '.join(detector.class_names)}"


def _export_network(kind: str, out: Path) -> str:
    if _SUPPRESSED.value:
        raise cli.UsageError("--suppressed is of a detector; this is a network")
    network = cli.given_network(cli.given_settings(NetworkSettings))
    backbone = network.settings["model"]["backbone"]
    told = f"{backbone}, {len(network.class_names):,} classes"
    if kind == "onnx":
        from sppnet_jax.exports.onnx_files import network_to_onnx, save_onnx

        save_onnx(network_to_onnx(network, _PIXELS.value), out)
    elif kind == "stablehlo":
        from sppnet_jax.exports.stablehlo import export_stablehlo

        buckets = [_size(given) for given in _BUCKETS.value]
        export_stablehlo(network, out, buckets=buckets, platforms=_PLATFORMS.value)
    else:
        from sppnet_jax.network.described import describe
        from sppnet_jax.network.pretrained import named_params
        from sppnet_jax.network.weight_files import write_tensors

        tensors = named_params(network.params)
        write_tensors(out, tensors, describe(network))
        count = sum(tensor.size for tensor in tensors.values())
        told = f"{backbone}: {count:,} weights in {len(tensors)} tensors"
    return told


def _size(given: str) -> tuple[int, int]:
    height, cross, width = given.partition("x")
    if not (cross and (height + width).isdecimal() and given.isascii()):
        raise cli.UsageError(f"--buckets takes sizes such as 256x345, got {given!r}")
    return int(height), int(width)


def _settings_of(workdir: Path) -> Any:
    """The settings that a network or a detector was trained with."""
    if "proposals" in run_folder.load_config(workdir):
        return detector_settings(workdir)
    return network_settings(workdir)


if __name__ == "__main__":
    cli.run(main, NetworkSettings, _settings_of, published_settings)
