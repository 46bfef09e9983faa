"""What README.md and docs/ show and say is so: examples, links, names, settings."""

import ast
import functools
import importlib
import itertools
import re
import sys
import textwrap
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from configs import folder as classifier_config
from sppnet_jax import ablation
from sppnet_jax.classification import views
from sppnet_jax.classification.feature_files import save_features
from sppnet_jax.data import datasets, sources
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.exports.onnx_files import (
    detector_to_onnx,
    network_to_onnx,
    save_onnx,
)
from sppnet_jax.exports.stablehlo import export_stablehlo
from sppnet_jax.network import pretrained, trunks
from sppnet_jax.network.stack import cut_names, cut_table, table_geometry
from sppnet_jax.network.trained import load_network
from sppnet_jax.network.weight_files import write_tensors
from sppnet_jax.run.settings import unknown_field
from sppnet_jax.training.layer_features import Features
from sppnet_jax.training.network_settings import NetworkSettings
from tests.conftest import REPOSITORY
from tests.data_helpers import write_images, write_two_colors
from tests.doc_pages import (
    FENCE,
    KINDS,
    PAGES,
    blocks,
    name_of,
    part_of,
)
from tests.network_helpers import TINY, TINY_TRUNK, write_network
from tests.test_exports import make_detector


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
    settings |= {"epochs": 1, "batch_size": 8}
    if "trunk" not in settings:
        settings |= {"model.width": 0.02}
    settings |= {"data.image_size": 64, "data.resize_side": 72, "log_steps": 0}
    settings |= {"schedule.warmup_epochs": 0.0}
    return ABLATE([levels[0], *levels[2:][-1:]], seeds[:1], **settings)


ABLATE = ablation.ablate


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with stand-ins for all that the examples in Python read."""
    desk = tmp_path_factory.mktemp("desk")
    write_two_colors(desk / "flowers", 40, 48)
    write_images(desk, "photo.jpg", "scan.png")
    config = classifier_config.get_config()
    config.model.width = 0.02
    config.data.image_size, config.data.resize_side = 64, 72
    network = load_network(write_network(desk / "runs/flowers", config))
    save_onnx(network_to_onnx(network), desk / "flowers.onnx")
    export_stablehlo(network, desk / "programs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trunks.BACKBONES, TINY_TRUNK, TINY)
        model = detector_to_onnx(make_detector("pyramid"), suppressed=True)
    save_onnx(model, desk / "animals.onnx")
    values = np.random.default_rng(0).normal(size=(3 * 35, 8)).astype(np.float32)
    labels = np.arange(len(values)) % 3
    values[np.arange(len(values)), labels] += 9
    names = tuple(f"{number}.png" for number in range(len(values)))
    classes = ("a", "b", "c")
    features = Features(values, labels, np.arange(len(values)), names, classes, 0)
    path = desk / "runs/digits/features_digit_scenes_test_fc7_full_72.npz"
    save_features(path, features, {"layer": "fc7"})
    return desk


@pytest.mark.slow
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


def test_a_new_trunk_is_one_table_and_one_line_and_its_weights_a_table_of_names(
    monkeypatch, tmp_path
):
    names = dict(vars(trunks))
    exec(part_of("sppnet_jax/network/trunks.py"), names)
    monkeypatch.setitem(trunks.BACKBONES, "tiny", names["TINY"])
    assert sn.backbone_geometry("tiny").map_size(64) == 13
    model = sn.create_model("tiny", (2, 1), 3, width=0.1, weight_init="he")
    images = jnp.ones((1, 64, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits, _ = jax.jit(model.apply)(variables, images)
    assert logits.shape == (1, 3)

    names = dict(vars(pretrained))
    exec(part_of("sppnet_jax/network/pretrained.py"), names)
    monkeypatch.setitem(pretrained.NAMES, "tiny", (names["TINY"],))
    rng = np.random.default_rng(0)
    shapes = {"stem.conv.weight": (32, 3, 5, 5), "block.conv.weight": (32, 32, 3, 3)}
    shapes |= {"last.weight": (64, 32, 3, 3), "last.bias": (64,)}
    shapes |= {"fc.weight": (7, 64), "fc.bias": (7,)}
    for norm in ("stem.bn", "block.bn"):
        parts = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{norm}.{part}": (32,) for part in parts}
    tensors = {name: rng.uniform(1, 2, shape) for name, shape in shapes.items()}
    write_tensors(tmp_path / "tiny", tensors)
    weights = str(tmp_path / "tiny")
    architecture = pretrained.published_architecture("tiny", weights)
    network = pretrained.pretrained_network(architecture)
    assert network.class_names == tuple("0123456")
    of_norm = [tensors[f"block.bn.{part}"] for part in parts]
    scale = of_norm[0] / np.sqrt(of_norm[3] + 1e-5)
    block = network.params["conv2"]
    expected = tensors["block.conv.weight"].transpose(2, 3, 1, 0) * scale
    np.testing.assert_allclose(block["kernel"], expected, rtol=1e-5)
    expected = of_norm[1] - of_norm[2] * scale
    np.testing.assert_allclose(block["bias"], expected, rtol=1e-5, atol=1e-6)
    image = np.zeros((40, 60, 3), np.uint8)
    assert sn.score_images(network, [image]).shape == (1, 7)
    cut = architecture._replace(cuts=("stride4",), levels=(2, 1))
    assert pretrained.pretrained_network(cut).geometry.stride == 4


def tables_of(page: Path) -> Iterator[list[list[str]]]:
    """The tables of a page: rows of cells, without backquotes."""
    text = page.read_text().replace("`", "")
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        yield [rows[0], *rows[2:]]


def test_the_tables_of_cuts_are_those_of_the_trunks():
    shown: dict[str, dict[str, str]] = defaultdict(dict)
    for (kind, *columns), *rows in tables_of(REPOSITORY / "docs/pretrained.md"):
        if kind == "cut":
            for (cut, *cells), trunk in itertools.product(rows, columns):
                cell = cells[columns.index(trunk)]
                if cell != "–":
                    shown[trunk]["" if cut == "none" else cut] = cell
    published = {name for name, own in trunks.BACKBONES.items() if own.published}
    assert set(shown) == published
    for name, cells in shown.items():
        own = trunks.get_backbone(name)
        assert set(cells) - {""} == set(cut_names(own.layers))
        model = sn.create_model(name, (1,), 1, head="none")
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
        (pooled, maps), _ = jax.eval_shape(
            functools.partial(model.init_with_output, jax.random.key(0)), image
        )
        for cut, cell in cells.items():
            channels = (maps[cut] if cut else pooled).shape[-1]
            geometry = table_geometry(cut_table(own.layers, cut))
            assert cell == f"{channels}, {geometry.receptive_field}", f"{name}, {cut}"
            assert not cut or int(re.findall(r"\d+", cut)[0]) == geometry.stride


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
