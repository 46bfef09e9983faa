"""What an experiment's command line says: its presets, the data, where to write.

Networks (tables 2, 3, 6 and 7, and the many views):

    digits    the embedded digit scenes, for a machine without a GPU
    folder    a folder of class folders (--root), for a machine without a GPU
    imagenet  the paper's setting

Learning rates and all else are those of the recipe of that name in configs/. Detectors:

    digits  the embedded digit scenes, and the network of configs/digits.py
    folder  a folder in Pascal VOC layout (--root), and a trained classifier (--network)

All else is that of configs/detect_digits.py or configs/detect_folder.py, but for the
scales: the paper's, in proportion to the side that the network was trained at.
"""

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import detect_digits, detect_folder, digits, folder, imagenet
from experiments.runs import (
    NETWORKS,
    PAPER_SIDE,
    DetectionSetting,
    Preset,
    Setting,
)
from sppnet_jax import cli
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.run import caches, run_folder
from sppnet_jax.run.memory import keep_memory
from sppnet_jax.run.settings import read
from sppnet_jax.training.network_settings import NetworkSettings, network_settings
from sppnet_jax.training.once import is_finished, train_once

# Shorter sides for a network trained at 224 pixels, by the number of scales.
PAPER_SCALES = {1: (688,), 5: (480, 576, 688, 864, 1200)}


def _digits(backbone: str) -> ConfigDict:
    config = digits.get_config()
    config.data.train_split = "train[:6000]"
    config.epochs = 10
    return config


def _folder(backbone: str) -> ConfigDict:
    config = folder.get_config()
    config.model.width = 1 / 6
    config.epochs = 8
    return config


def _imagenet(backbone: str) -> ConfigDict:
    return imagenet.get_config(f"{backbone},spp")


PRESETS = {
    "digits": Preset(
        _digits,
        small=52,
        large=64,
        seeds=(0, 1, 2),
        svm_classes=("", "test"),
        svm_multi_label=("digit_scenes/detection", "train", "test"),
    ),
    "folder": Preset(_folder, small=77, large=96, seeds=(0, 1, 2)),
    "imagenet": Preset(
        _imagenet,
        small=180,
        large=224,
        seeds=(0,),
        svm_classes=("caltech101", "train+test"),
        svm_multi_label=("voc/2007", "train+validation", "test"),
    ),
}
DETECTION_PRESETS = {
    "digits": detect_digits.get_config,
    "folder": detect_folder.get_config,
}


def run(main: Callable[[Setting], Path], description: str | None) -> None:
    """Runs the command line of an experiment on networks.

    `main`: writes the report and returns its folder.
    """
    parser = _parser(description, PRESETS, root="folder of images of preset folder")

    def start(options: argparse.Namespace, folder: Path) -> Path:
        preset = PRESETS[options.preset]
        seeds = tuple(options.seeds or preset.seeds)
        where = (options.root, options.data_dir)
        return main(Setting(options.preset, preset, folder, seeds, *where))

    _run(parser, start)


def run_detection(
    main: Callable[[DetectionSetting, argparse.Namespace], Path],
    description: str | None,
    *,
    add_options: Callable[[argparse.ArgumentParser], object],
    on_paper: Callable[[Path, argparse.Namespace], Path] | None = None,
) -> None:
    """Runs the command line of an experiment on detectors.

    `main`: writes the report and returns its folder. `add_options`: adds the
    experiment's own. `on_paper`: what --preset=paper runs, with the folder to write to;
    without it there is no such preset.
    """
    names = [*DETECTION_PRESETS, *(["paper"] if on_paper else [])]
    parser = _parser(description, names, root="VOC folder of preset folder")
    parser.add_argument("--network", default="", help="workdir of a trained classifier")
    parser.add_argument("--train_split", default="", help="default: the config's")
    parser.add_argument("--test_split", default="", help="default: the config's")
    parser.add_argument("--steps", type=int, help="of fine-tuning")
    parser.add_argument("--max_windows", type=int, help="proposals of an image")
    add_options(parser)

    def start(options: argparse.Namespace, folder: Path) -> Path:
        if on_paper and options.preset == "paper":
            return on_paper(folder, options)
        return main(detection_setting(options, folder), options)

    _run(parser, start)


@contextlib.contextmanager
def messages_alone(show_traceback: bool, interrupted: str) -> Iterator[None]:
    """Shows the package's log, and of a user's errors the message alone.

    `interrupted`: what is said after "interrupted; ".
    """
    cli.show_own_log()
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"interrupted; {interrupted}")
    except (ValueError, OSError, RuntimeError) as error:
        if show_traceback:
            traceback.print_exc()
        sys.exit(f"error: {error}\n(--traceback shows where it came from)")


def paper_scales(given: DetectionSetting, count: int) -> tuple[int, ...]:
    """The paper's one or five shorter sides, in proportion to the network's."""
    ratio = given.image_size / PAPER_SIDE
    return tuple(round(side * ratio) for side in PAPER_SCALES[count])


def detection_setting(options: Any, folder: Path) -> DetectionSetting:
    """The setting of a command line; trains the network of the digits if need be."""
    config = DETECTION_PRESETS[options.preset]()
    config.network = options.network or config.network
    config.cache = str((folder / "detection_cache").absolute())
    for name in ("root", "data_dir", "train_split", "test_split"):
        if getattr(options, name):
            config.data[name] = getattr(options, name)
    if options.max_windows is not None:
        config.proposals.max_windows = options.max_windows
    if options.steps is not None:
        if options.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {options.steps}")
        ratio = options.steps / config.finetune.steps
        drops = tuple(round(step * ratio) for step in config.finetune.drop_steps)
        config.finetune.drop_steps = drops
        config.finetune.steps = options.steps
    settings = read(DetectorSettings, config.to_dict())  # before hours of training
    network = _find_network(options, settings.network, folder)
    settings = settings._replace(network=str(network))
    side = network_settings(network).data.image_size
    seeds = tuple(options.seeds or (0,))
    return DetectionSetting(options.preset, settings, side, folder, seeds)


def _find_network(options: Any, configured: str, folder: Path) -> Path:
    """The trained classifier that was given, or else one that the digits' recipe makes.

    The one that the preset's config names is taken if its training is done.
    """
    usual = Path(configured).expanduser().absolute()
    if options.network or options.preset != "digits":
        if run_folder.has_checkpoint(usual):
            return usual
        raise FileNotFoundError(
            f"{usual} holds no trained classifier: train one with python -m "
            "sppnet_jax.train, and give its workdir as --network"
        )
    recipe = digits.get_config()
    recipe.data.data_dir = options.data_dir
    workdir = (folder / NETWORKS / "digits").absolute()
    for place in (usual, workdir):
        if is_finished(place, recipe.epochs):
            return place
    train_once(read(NetworkSettings, recipe.to_dict()), workdir)
    return workdir


def _parser(
    description: str | None, presets: Iterable[str], *, root: str
) -> argparse.ArgumentParser:
    """The options of all experiments; `root`: what is said of --root."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=presets, default="digits")
    parser.add_argument("--root", default="", help=root)
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data")
    parser.add_argument("--out", default="", help="default: runs/experiments/PRESET")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: preset's or 0")
    parser.add_argument("--traceback", action="store_true")
    return parser


def _run(
    parser: argparse.ArgumentParser,
    start: Callable[[argparse.Namespace, Path], Path],
) -> None:
    """Runs an experiment into its folder, and shows its table."""
    options = parser.parse_args()
    keep_memory()
    folder = Path(options.out or f"runs/experiments/{options.preset}").expanduser()
    caches.use_compilation_cache()
    with messages_alone(options.traceback, "the same command goes on from there"):
        made = start(options, folder)
    print(f"\n{(made / 'table.md').read_text()}\nin {made}: table.md, plot.png")
