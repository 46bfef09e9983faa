"""What the command line of an experiment says: the preset, the data, where to write."""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.presets import PRESETS, Preset
from sppnet_jax import cli
from sppnet_jax.run import caches


class Setting(NamedTuple):
    """The preset with its name, the folder of everything written, seeds and data."""

    preset_name: str
    preset: Preset
    folder: Path
    seeds: tuple[int, ...]
    root: str
    data_dir: str


def run(main: Callable[[Setting], None], description: str | None) -> None:
    """Runs an experiment's command line; user errors print their message alone."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="digits")
    parser.add_argument("--root", default="", help="folder of images of preset folder")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps data")
    parser.add_argument("--out", default="", help="default: runs/experiments/PRESET")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the preset's")
    parser.add_argument("--traceback", action="store_true")
    given = parser.parse_args()
    folder = Path(given.out or f"runs/experiments/{given.preset}").expanduser()
    preset = PRESETS[given.preset]
    setting = Setting(
        preset_name=given.preset,
        preset=preset,
        folder=folder,
        seeds=tuple(given.seeds or preset.seeds),
        root=given.root,
        data_dir=given.data_dir,
    )
    cli.show_own_log()
    caches.use_compilation_cache()
    try:
        main(setting)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from there")
    except (ValueError, OSError, RuntimeError) as error:
        if given.traceback:
            traceback.print_exc()
        sys.exit(f"error: {error}\n(--traceback shows where it came from)")
