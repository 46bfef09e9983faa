"""The commands in README.md, docs/ and the configs run as they stand there."""

import argparse
import ast
import importlib
import re
import runpy
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from absl import flags

from sppnet_jax.cli import base_config, detector_base_config
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.run.settings import read
from sppnet_jax.training.network_settings import NetworkSettings
from tests.conftest import REPOSITORY
from tests.conftest import SMALL as SMALL_NETWORK
from tests.data_helpers import encode, picture, write_two_colors
from tests.doc_pages import PAGES, blocks
from tests.mock_imagenet import prepare_mock_imagenet
from tests.test_detect_command import write_scenes

CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


def commands_of(text: str) -> Iterator[str]:
    """The commands of a shell, one a line; a line that ends with \\ goes on."""
    for line in text.replace("\\\n", " ").splitlines():
        command = shlex.join(shlex.split(line, comments=True))
        if command:
            yield command


def config_commands(file: Path) -> Iterator[str]:
    """The commands in a config's docstring: its lines that start as a command does."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    lines = text.replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith(("python ", "make ")):
            yield from commands_of(line)


COMMANDS = list(
    dict.fromkeys(
        command
        for found in (
            *(commands_of(code) for page in PAGES for code in blocks(page, "bash")),
            *(config_commands(file) for file in CONFIGS),
        )
        for command in found
    )
)

SMALL = [*SMALL_NETWORK, "--config.epochs=2"]
SEVERAL_SIZES = [*SMALL, "--config.data.image_size=64", "--config.data.resize_side=72"]
DETECTOR = [
    "--config.scales=(40,)",
    "--config.proposals.width=100",
    "--config.proposals.min_side=16",
    "--config.proposals.max_windows=40",
    "--config.finetune.steps=4",
    "--config.finetune.drop_steps=()",
    "--config.finetune.batch_size=16",
    "--config.svm.max_rounds=1",
]
# What is run, by how it begins, and what is appended to make it a matter of a second.
# The first that fits counts.
RUN: dict[str, list[str]] = {
    "train --config=configs/digits.py --workdir=runs/multi": SEVERAL_SIZES,
    "train --config=configs/digits.py --workdir=runs/uniform": [
        *SEVERAL_SIZES,
        "--config.epochs=1",
    ],
    "train --config=configs/digits.py": SMALL,
    "train --config=configs/folder.py": SMALL,
    "train --config=configs/folder_pretrained.py": [
        "--config.epochs=1",
        "--config.batch_size=8",
        "--config.data.image_size=64",
        "--config.data.resize_side=64",
    ],
    "train --config=configs/imagenet.py": [
        *SMALL,
        "--config.max_steps=2",
        "--config.data.workers=0",
    ],
    "evaluate --workdir=runs/digits --protocol=multi_view_full": [
        "--scales=36",
        "--buckets=1",
    ],
    "evaluate --workdir": ["--buckets=1"],
    "predict --workdir": [],
    "predict --trunk=efficientnet_lite0": ["--config.data.resize_side=224"],
    "features --workdir=runs/digits": [],
    "features --trunk=efficientnet_lite0": ["--side=64"],
    "export --workdir": [],
    "export --format=safetensors --workdir": [],
    "detect train --config=configs/detect_digits.py": [
        *DETECTOR,
        "--config.data.train_split=train[:6]",
        "--config.data.test_split=test[:4]",
    ],
    "detect train --config=configs/detect_folder.py": DETECTOR,
    "detect train --config=configs/detect_pretrained.py": [
        *(given for given in DETECTOR if "finetune" not in given),
        "--config.scales=(64,)",
    ],
    "detect train --config=configs/detect_end_to_end.py": [
        *(given for given in DETECTOR if "steps" not in given),
        "--config.scales=(64,)",
        "--config.buckets=1",
        "--config.finetune.steps=2",
        "--config.finetune.trainable=head",
    ],
    "detect test --workdir": [],
    "detect image --workdir": [],
    "inspect ": [],
    "benchmarks.allreduce": [],
}
# Stages in which commands are run, so that what they need is there.
STAGES = (
    "train ",
    "detect train ",
    "export ",
    ("evaluate ", "predict ", "features "),
    "",
)


class NotRun(NamedTuple):
    """A command that no test runs; `check` raises where it can't be right."""

    why: str
    check: Callable[[list[str]], None]


def has_target(words: list[str]) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in words[1:]:
        known = "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert known, f"there is no target {target} in the Makefile"


def has_requirements(words: list[str]) -> None:
    for file in re.findall(r"[\w-]+\.txt", " ".join(words)):
        assert (REPOSITORY / file).is_file(), f"there is no {file}"


def is_parsed(words: list[str]) -> None:
    """Lets a script that reads its arguments with argparse read them."""

    class Parsed(Exception):
        pass

    def parse(parser: argparse.ArgumentParser) -> Any:
        parser.exit_on_error = False
        given = parse_args(parser, words[3:])
        suites = importlib.import_module("sppnet_jax.bench").SUITES
        assert set(getattr(given, "suites", ())) <= set(suites)
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        with pytest.raises(Parsed):
            runpy.run_module(words[2], run_name="__main__")


def has_valid_settings(words: list[str]) -> None:
    """Reads the settings and the names of the flags of one of our commands."""
    _, _, module, *arguments = words
    importlib.import_module(module)
    detector = module.endswith("detect")
    config = detector_base_config() if detector else base_config()
    changes = {"network": "runs/any"} if detector else {}
    for word in arguments:
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config":
            path, _, argument = value.partition(":")
            file = runpy.run_path(str(REPOSITORY / path))
            config = file["get_config"](*([argument] if argument else []))
        elif name.startswith("config."):
            try:
                changes[name.removeprefix("config.")] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                changes[name.removeprefix("config.")] = value
        elif word.startswith("--"):
            assert name in flags.FLAGS, f"{module} has no flag --{name}"
    config.update_from_flattened_dict(changes)
    read(DetectorSettings if detector else NetworkSettings, config.to_dict())


def is_anything(_: list[str]) -> None:
    """Nothing can be told of it here."""


# What is not run, by how it begins, why, and what is checked instead.
NOT_RUN: dict[str, NotRun] = {
    "make ": NotRun("takes minutes; CI runs it", has_target),
    "pip install": NotRun("installs packages", has_requirements),
    ".venv-prepare/bin/pip install": NotRun("installs packages", has_requirements),
    ".venv-prepare/bin/tfds build": NotRun("needs TensorFlow, archives", is_anything),
    "python3 -m venv": NotRun("makes an environment", is_anything),
    "python3.11 -m venv": NotRun("makes an environment", is_anything),
    ". .venv/bin/activate": NotRun("changes the shell", is_anything),
    "git clone": NotRun("needs a network", is_anything),
    "cd ": NotRun("changes the shell", is_anything),
    "tensorboard": NotRun("the reader installs it", is_anything),
    "python -m sppnet_jax.bench ": NotRun(
        "takes minutes; see test_bench.py", is_parsed
    ),
    "python -m experiments.": NotRun("trains dozens of networks", is_parsed),
    "python -m sppnet_jax.predict --trunk=squeezenet": NotRun(
        "needs a package", has_valid_settings
    ),
    "python -m sppnet_jax.predict --trunk=resnet": NotRun(
        "needs a file of others", has_valid_settings
    ),
    "python -m sppnet_jax.train --config=configs/folder_finetuned.py": NotRun(
        "trains convolutions for minutes", has_valid_settings
    ),
    "python -m sppnet_jax.evaluate --workdir=runs/finetuned": NotRun(
        "needs a training of minutes", has_valid_settings
    ),
    "python -m sppnet_jax.features --workdir=runs/zf5_spp": NotRun(
        "needs VOC", has_valid_settings
    ),
    "python -m sppnet_jax.detect train --config=configs/detect_voc.py": NotRun(
        "needs VOC", has_valid_settings
    ),
    "python -m sppnet_jax.detect test --workdir=runs/detect_voc": NotRun(
        "needs VOC", has_valid_settings
    ),
}
OURS = "python -m sppnet_jax."


# What stands for a reader's own folder; commands that differ in it alone run once.
SAME = {"root=FOLDER": "root=flowers"}


def only_once(commands: Sequence[str]) -> list[str]:
    """The commands without those that say the same in other words, in their order."""
    seen: dict[tuple[str, ...], str] = {}
    for command in commands:
        same = command
        for name, other in SAME.items():
            same = re.sub(rf"{name}\b", other, same)
        if " detect " in same.replace(".", " "):
            same = same.replace("root=flowers", "root=animals")
        seen.setdefault(tuple(sorted(shlex.split(same))), command)
    return list(seen.values())


def not_run(command: str) -> NotRun | None:
    return next((NOT_RUN[k] for k in NOT_RUN if f"{command} ".startswith(k)), None)


def appended(command: str) -> list[str] | None:
    """What is appended to a command that is run; None for one that is not."""
    ours = command.removeprefix(OURS)
    if ours == command or not_run(command):
        return None
    return next((RUN[k] for k in RUN if ours.startswith(k)), None)


def stage_of(command: str) -> int:
    ours = command.removeprefix(OURS)
    return next(number for number, k in enumerate(STAGES) if ours.startswith(k))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_or_says_why_it_is_not(command):
    told = not_run(command)
    assert told or appended(command) is not None, (
        f"no test runs {command!r}: add how it begins to RUN in {__file__}, with what "
        "makes it fast; or to NOT_RUN, with the reason and a check"
    )
    if told:
        told.check(shlex.split(command))


@pytest.fixture
def home(tmp_path, few_scenes, monkeypatch) -> Path:
    """The reader's folder: the repository, images of his own, prepared data."""
    for name in ("sppnet_jax", "configs", "experiments"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    write_two_colors(tmp_path / "flowers", 40, 48)
    write_scenes(tmp_path / "animals")
    prepare_mock_imagenet(tmp_path / "DATA")
    (tmp_path / "DATA/digit_scenes").symlink_to(few_scenes / "digit_scenes")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "DATA"))
    return tmp_path


def provide(command: str, home: Path) -> None:
    """Puts the files into the reader's folder that only this command names."""
    ours = command.removeprefix(OURS)
    kind = home / ("animals" if ours.startswith("detect") else "flowers")
    (home / "FOLDER").unlink(missing_ok=True)
    (home / "FOLDER").symlink_to(kind)
    if ours.startswith(("predict ", "detect image ")):
        words = shlex.split(ours.removeprefix("detect "))
        for photo in (word for word in words[1:] if not word.startswith("-")):
            suffix = Path(photo).suffix or ".png"
            (home / photo).write_bytes(encode(picture(60, 90), suffix))


@pytest.mark.slow
def test_every_command_runs_as_it_stands_with_small_settings_behind(home, command_line):
    for command in sorted(only_once(COMMANDS), key=stage_of):
        more = appended(command)
        if more is None:
            continue
        provide(command, home)
        name, *arguments = shlex.split(command.removeprefix(OURS))
        result = command_line(name, *arguments, *more, devices=1, check=False, cwd=home)
        told = f"{command} {shlex.join(more)}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == 0, told


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "predict", "features", "export", "detect"]
)
def test_each_command_line_has_help(name, command_line):
    result = command_line(name, "--help", check=False, imported=False)
    assert "--workdir: The folder of the run." in result.stdout
