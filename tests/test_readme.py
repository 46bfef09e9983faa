"""What the README shows works as it stands there."""

import re

import jax
import jax.numpy as jnp
import pytest

import sppnet_jax as sn
from sppnet_jax import backbones
from sppnet_jax.backbones import Backbone, Conv, MaxPool
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_layer_s_example_runs_and_gives_the_shapes_it_states():
    (code,) = [
        x for x in re.findall(r"```python\n(.*?)```", README, re.S) if "sn." in x
    ]
    names: dict = {}
    exec(code, names)
    assert names["pooled"].shape == (8, 50, 256)
    assert sn.backbone_geometry("zf5").map_size(224) == 13


def test_a_new_backbone_is_one_table_and_one_line(monkeypatch):
    (table,) = re.findall(r"(TINY = Backbone\(.*?\n\))", README, re.S)
    names = {"Backbone": Backbone, "Conv": Conv, "MaxPool": MaxPool}
    exec(table, names)
    monkeypatch.setitem(backbones.BACKBONES, "tiny", names["TINY"])
    assert sn.backbone_geometry("tiny").map_size(64) == 13
    model = sn.create_model("tiny", (2, 1), 3, width=0.1, weight_init="he")
    images = jnp.ones((1, 64, 64, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits, _ = model.apply(variables, images)
    assert logits.shape == (1, 3)


@pytest.mark.parametrize("path", re.findall(r"\]\((\w[^):]*)\)", README))
def test_files_that_the_readme_shows_are_there(path):
    assert (REPOSITORY / path).is_file()


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
def test_each_command_line_has_help(name, command_line):
    result = command_line(name, "--help", check=False)
    assert "--workdir: The folder of the run." in result.stdout
