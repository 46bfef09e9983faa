"""What README.md, docs/ and the configs show works as it stands there."""

import argparse
import ast
import importlib
import itertools
import re
import runpy
import shlex
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import sppnet_jax as sn
from configs import folder as classifier_config
from sppnet_jax import ablation
from sppnet_jax.classification import views
from sppnet_jax.classification.feature_files import save_features
from sppnet_jax.classification.layer_features import Features
from sppnet_jax.cli import base_config, detector_base_config
from sppnet_jax.data import datasets, sources
from sppnet_jax.data.digit_scenes import DigitScenes
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.network import trunks
from sppnet_jax.run.settings import read, unknown_field
from sppnet_jax.training.network_settings import NetworkSettings
from tests.conftest import REPOSITORY
from tests.conftest import SMALL as SMALL_NETWORK
from tests.data_helpers import encode, picture, write_images, write_two_colors
from tests.mock_imagenet import prepare_mock_imagenet
from tests.network_helpers import write_network
from tests.test_detect_command import write_scenes

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What blocks of code may hold: commands, an example, a part of a file, or a text.
KINDS = r'bash|python|python title="sppnet_jax/[\w/]+\.py"|text'


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path, kind: str) -> list[str]:
    return [code for info, code in FENCE.findall(page.read_text()) if info == kind]


def part_of(file: str) -> str:
    """What the pages show of a file."""
    found = [code for page in PAGES for code in blocks(page, f'python title="{file}"')]
    (code,) = found
    return code


# ---- Python


def with_checks(code: str) -> ast.Module:
    """An example that checks what its comments say: # [8, 50, 256], or # 13."""
    lines, tree = code.splitlines(), ast.parse(code)
    body: list[ast.stmt] = []
    for node in tree.body:
        body.append(node)
        said = re.search(r"# (\[[\w, ]+\]|[\d.]+$)", lines[(node.end_lineno or 1) - 1])
        if said and isinstance(node, ast.Assign | ast.Expr):
            shown = node.targets[0] if isinstance(node, ast.Assign) else node.value
            check = f"_check({ast.unparse(shown)}, {said[1]!r})"
            body += ast.parse(check).body
    return ast.fix_missing_locations(ast.Module(body, []))


def check(value: Any, said: str) -> None:
    """Raises AssertionError where a value is not what the comment behind it says."""
    if not said.startswith("["):
        assert value == ast.literal_eval(said)
        return
    sizes = said.strip("[]").split(", ")
    assert len(value.shape) == len(sizes), f"{said} is {value.shape}"
    for size, word in zip(value.shape, sizes, strict=True):
        assert not word.isdigit() or size == int(word), f"{said} is {value.shape}"


@pytest.mark.parametrize("code", ["x = np.ones((2, 3))  # [2, 4]", "1 + 1  # 3"])
def test_an_example_that_does_not_give_what_it_says_fails(code):
    with pytest.raises(AssertionError):
        exec(compile(with_checks(code), "", "exec"), {"np": np, "_check": check})


def small_ablate(levels: Any, seeds: Any, **settings: Any) -> Any:
    """`ablate` of the first and the last of three pyramids or more, small, one seed."""
    settings |= {"epochs": 1, "batch_size": 8, "model": {"width": 0.02}}
    settings |= {"data.image_size": 64, "data.resize_side": 72, "log_steps": 0}
    settings |= {"schedule.warmup_epochs": 0.0}
    return ABLATE([levels[0], *levels[2:][-1:]], seeds[:1], **settings)


ABLATE = ablation.ablate


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory) -> Path:
    """Where TFDS finds the embedded data set, with few images in it."""
    folder = tmp_path_factory.mktemp("tfds")
    made = DigitScenes._generate_examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DigitScenes,
            "_generate_examples",
            lambda self, split: itertools.islice(made(self, split), 16),
        )
        for kind in ("classification", "detection"):
            sources.open_source(
                f"digit_scenes/{kind}",
                "test",
                data_dir=str(folder),
                multi_label=kind == "detection",
            )
    return folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with stand-ins for all that the examples in Python read."""
    desk = tmp_path_factory.mktemp("desk")
    write_two_colors(desk / "flowers", 40, 48)
    write_images(desk, "photo.jpg", "scan.png")
    config = classifier_config.get_config()
    config.model.width = 0.02
    config.data.image_size, config.data.resize_side = 64, 72
    write_network(desk / "runs/flowers", config)
    values = np.random.default_rng(0).normal(size=(3 * 35, 8)).astype(np.float32)
    labels = np.arange(len(values)) % 3
    values[np.arange(len(values)), labels] += 9
    names = tuple(f"{number}.png" for number in range(len(values)))
    classes = ("a", "b", "c")
    features = Features(values, labels, np.arange(len(values)), names, classes, 0)
    path = desk / "runs/digits/features_digit_scenes_test_fc7_full_72.npz"
    save_features(path, features, {"layer": "fc7"})
    return desk


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=name_of
)
def test_the_examples_of_a_page_run_one_after_the_other_and_give_what_they_say(
    page, desk, few_scenes, monkeypatch
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(few_scenes))
    monkeypatch.chdir(desk)
    monkeypatch.setattr(ablation, "ablate", small_ablate)
    # As in a file that a person runs.
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    module.__dict__["_check"] = check
    for code in blocks(page, "python"):
        exec(compile(with_checks(code), name_of(page), "exec"), module.__dict__)


def test_a_new_trunk_is_one_table_and_one_line(monkeypatch):
    names = dict(vars(trunks))
    exec(part_of("sppnet_jax/network/trunks.py"), names)
    monkeypatch.setitem(trunks.BACKBONES, "tiny", names["TINY"])
    assert sn.backbone_geometry("tiny").map_size(64) == 13
    model = sn.create_model("tiny", (2, 1), 3, width=0.1, weight_init="he")
    images = jnp.ones((1, 64, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits, _ = jax.jit(model.apply)(variables, images)
    assert logits.shape == (1, 3)


def test_a_new_kind_of_folder_is_a_module_and_its_name(monkeypatch, tmp_path):
    module = types.ModuleType("sppnet_jax.data.listed_folder")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(part_of("sppnet_jax/data/listed_folder.py"), module.__dict__)
    for where in (sources, datasets):
        monkeypatch.setattr(where, "FOLDERS", (*sources.FOLDERS, "listed_folder"))
    write_images(tmp_path, "a b/1.png", "a b/2.png", "3.png")
    (tmp_path / "train.txt").write_text("a b/1.png daisy\n3.png rose\n")
    (tmp_path / "test.txt").write_text("a b/2.png rose\n")
    data = datasets.ImageData("listed_folder", str(tmp_path))
    train, test = (datasets.open_split(data, name) for name in ("train", "test"))
    assert train.class_names == test.class_names == ("daisy", "rose")
    labels = {record["name"]: record["label"] for record in map(dict, train.records)}
    assert labels == {"a b/1.png": 0, "3.png": 1}
    assert test.records[0]["image"] == (tmp_path / "a b/2.png").read_bytes()
    assert train.digest != test.digest
    one = datasets.open_split(data._replace(train_split="train[:1]"), "train")
    assert len(one.records) == 1
    with pytest.raises(ValueError, match="one class an image"):
        sources.open_detection_source("listed_folder", "train", root=str(tmp_path))


def test_a_new_protocol_is_its_name_and_its_views():
    source = Path(views.__file__).read_text()
    before = "    own_positions = tuple(positions)\n"
    assert source.count(before) == 1
    shown = textwrap.indent(part_of("sppnet_jax/classification/views.py"), "    ")
    changed = source.replace(before, before + shown)
    module = types.ModuleType("changed_views")
    exec(
        changed.replace('NAMES = (\n    "single"', 'NAMES = ("three_view", "single"'),
        module.__dict__,
    )
    given = {"view": 64, "resize_side": 72, "flip": False}
    three = module.named_protocol("three_view", **given)
    assert three == (True, (72,), ("left", "center", "right"), False, ())
    assert module.named_protocol("ten_view", **given).positions == (
        views.named_protocol("ten_view", **given).positions
    )


# ---- commands


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
    "features --workdir=runs/digits": [],
    "detect train --config=configs/detect_digits.py": [
        *DETECTOR,
        "--config.data.train_split=train[:6]",
        "--config.data.test_split=test[:4]",
    ],
    "detect train --config=configs/detect_folder.py": DETECTOR,
    "detect test --workdir=runs/detect_voc": ["not run"],
    "detect test --workdir": [],
    "detect image --workdir": [],
    "benchmarks.allreduce": [],
}
# Stages in which commands are run, so that what they need is there.
STAGES = ("train ", ("evaluate ", "predict ", "features "), "detect train ", "")


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
    "source .venv/bin/activate": NotRun("changes the shell", is_anything),
    "git clone": NotRun("needs a network", is_anything),
    "cd ": NotRun("changes the shell", is_anything),
    "tensorboard": NotRun("the reader installs it", is_anything),
    "python -m sppnet_jax.bench": NotRun("takes minutes; see test_bench.py", is_parsed),
    "python -m experiments.": NotRun("trains dozens of networks", is_parsed),
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
SAME = {
    "runs/folder": "runs/flowers",
    "runs/detect_folder": "runs/detect",
    "root=FOLDER": "root=flowers",
}


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
    return next((NOT_RUN[k] for k in NOT_RUN if command.startswith(k)), None)


def appended(command: str) -> list[str] | None:
    """What is appended to a command that is run; None for one that is not."""
    ours = command.removeprefix(OURS)
    if ours == command or not_run(command):
        return None
    return next((RUN[k] for k in RUN if ours.startswith(k)), None)


def stage_of(command: str) -> int:
    ours = command.removeprefix(OURS)
    return next(number for number, k in enumerate(STAGES) if ours.startswith(k))


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


# ---- what pages say and show


def words_of(page: Path) -> str:
    return re.sub(FENCE, "", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_of_code_says_what_it_holds(page):
    kinds = [info for info, _ in FENCE.findall(page.read_text())]
    assert [kind for kind in kinds if not re.fullmatch(KINDS, kind)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_setting_that_a_page_names_is_there(page):
    for name in set(re.findall(r"config\.([a-z_]\w*(?:\.\w+)*)", page.read_text())):
        if name in ("json", "py"):
            continue
        kinds = (NetworkSettings, DetectorSettings)
        faults = [unknown_field(kind, name) for kind in kinds]
        assert not all(faults), f"{name}: {faults}"


def slug(heading: str) -> str:
    """The anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip()
    return re.sub(r"[ -]+", "-", kept)


def anchors_of(page: Path) -> set[str]:
    text = page.read_text()
    found = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    return found | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_to_what_is_there(page):
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", words_of(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{link}: there is no {file}"
        if anchor:
            assert anchor in anchors_of(target), f"{link}: there is no #{anchor}"


def test_the_readme_has_200_lines_at_most():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 200


def test_the_api_page_has_the_names_of_the_package_and_no_others():
    page = REPOSITORY / "docs/api.md"
    described = re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    for name in described:
        module, _, member = name.rpartition(".")
        assert getattr(importlib.import_module(module), member).__doc__
    assert set(sn.__all__) <= {name.rpartition(".")[2] for name in described}
    named = re.findall(r"`sn\.(\w+)`", page.read_text())
    assert sorted(named) == sorted(sn.__all__)


def group_settings(kind: Any) -> Iterator[type]:
    yield kind
    for default in kind._field_defaults.values():
        if hasattr(default, "_fields"):
            yield type(default)


@pytest.mark.parametrize("kind", [NetworkSettings, DetectorSettings])
def test_the_api_page_has_all_groups_of_settings(kind):
    described = anchors_of(REPOSITORY / "docs/api.md")
    for group in group_settings(kind):
        assert f"{group.__module__}.{group.__qualname__}" in described


COMMAND_NAMES: Sequence[str] = ("train", "evaluate", "predict", "features", "detect")


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_each_command_line_has_help(name, command_line):
    result = command_line(name, "--help", check=False)
    assert "--workdir: The folder of the run." in result.stdout
