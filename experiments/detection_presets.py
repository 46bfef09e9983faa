"""Where a detection experiment runs: its data, its network, and its command line.

    digits  the embedded digit scenes, and the network of configs/digits.py
    folder  a folder in Pascal VOC layout (--root), and a trained classifier (--network)

All else is that of configs/detect_digits.py or configs/detect_folder.py, but for the
scales: the paper's, in proportion to the side that the network was trained at.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import detect_digits, detect_folder, digits
from experiments.runs import is_finished
from sppnet_jax import cli, saved_config
from sppnet_jax.detection_config import check_detection_config
from sppnet_jax.run import caches, run_folder
from sppnet_jax.train import train_from_config

# Shorter sides for a network trained at 224 pixels, by the number of scales.
PAPER_SCALES = {1: (688,), 5: (480, 576, 688, 864, 1200)}
PAPER_SIDE = 224
PRESETS = {"digits": detect_digits.get_config, "folder": detect_folder.get_config}


class DetectionSetting(NamedTuple):
    """What all detectors of an experiment share, and where it writes.

    `config`: of a detector, its network and cache among it; each detector changes the
    settings that it is about. `image_size`: the side that the network was trained at.
    `seeds`: of the detectors; they share the network.
    """

    preset_name: str
    config: ConfigDict
    image_size: int
    folder: Path
    seeds: tuple[int, ...]


def paper_scales(given: DetectionSetting, count: int) -> tuple[int, ...]:
    """The paper's one or five shorter sides, in proportion to the network's."""
    ratio = given.image_size / PAPER_SIDE
    return tuple(round(side * ratio) for side in PAPER_SCALES[count])


def run(
    main: Callable[[DetectionSetting, argparse.Namespace], None],
    description: str | None,
    *,
    add_options: Callable[[argparse.ArgumentParser], object] | None = None,
    on_paper: Callable[[Path, argparse.Namespace], None] | None = None,
) -> None:
    """Runs an experiment's command line; user errors print their message alone.

    `add_options`: adds the experiment's own. `on_paper`: what --preset=paper runs, with
    the folder to write to; without it there is no such preset.
    """
    names = [*PRESETS, "paper"] if on_paper else list(PRESETS)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=names, default="digits")
    parser.add_argument("--network", default="", help="workdir of a trained classifier")
    parser.add_argument("--root", default="", help="VOC folder of preset folder")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data")
    parser.add_argument("--train_split", default="", help="default: the config's")
    parser.add_argument("--test_split", default="", help="default: the config's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of fine-tuning")
    parser.add_argument("--max_windows", type=int, help="proposals of an image")
    parser.add_argument("--out", default="", help="default: runs/experiments/PRESET")
    parser.add_argument("--traceback", action="store_true")
    if add_options:
        add_options(parser)
    options = parser.parse_args()
    folder = Path(options.out or f"runs/experiments/{options.preset}").expanduser()
    cli.show_own_log()
    caches.use_compilation_cache()
    try:
        if on_paper and options.preset == "paper":
            on_paper(folder, options)
        else:
            main(make_setting(options, folder), options)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from there")
    except (ValueError, OSError, RuntimeError) as error:
        if options.traceback:
            traceback.print_exc()
        sys.exit(f"error: {error}\n(--traceback shows where it came from)")


def make_setting(options: Any, folder: Path) -> DetectionSetting:
    """The setting of a command line; trains the network of the digits if need be."""
    config = PRESETS[options.preset]()
    if options.root:
        config.data.root = options.root
    for name in ("data_dir", "train_split", "test_split"):
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
    config.network = options.network or config.network
    config.cache = str((folder / "detection_cache").absolute())
    check_detection_config(config)  # before hours of training
    network = _find_network(options, config, folder)
    config.network = str(network)
    trained = saved_config.get_config(str(network))
    return DetectionSetting(
        options.preset, config, trained.data.image_size, folder, tuple(options.seeds)
    )


def _find_network(options: Any, config: ConfigDict, folder: Path) -> Path:
    """The trained classifier that was given, or else one that the digits' recipe makes.

    One in the place that the preset's config names is taken if its training is done.
    """
    usual = Path(config.network).expanduser().absolute()
    if options.network or options.preset != "digits":
        if run_folder.has_checkpoint(usual):
            return usual
        raise FileNotFoundError(
            f"{usual} holds no trained classifier: train one with python -m "
            "sppnet_jax.train, and give its workdir as --network"
        )
    recipe = digits.get_config()
    workdir = (folder / "networks" / "digits").absolute()
    for place in (usual, workdir):
        if run_folder.has_checkpoint(place) and is_finished(place, recipe.epochs):
            return place
    if options.data_dir:
        recipe.data.data_dir = options.data_dir
    train_from_config(recipe, workdir)
    if not is_finished(workdir, recipe.epochs):
        raise KeyboardInterrupt  # the training was, and has saved where it stopped
    return workdir
