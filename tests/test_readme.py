"""What the README shows works as it stands there."""

import re

import jax
import jax.numpy as jnp
import pytest

import sppnet_jax as sn
from sppnet_jax.network import trunks as backbones
from sppnet_jax.network.trunks import Backbone, Conv, MaxPool
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_examples_run_one_after_the_other_and_give_the_shapes_they_state():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    for code in blocks:
        if "Backbone(" not in code and "load_network(" not in code:
            exec(code, names)
        if "window_pyramid_pool" in code:
            assert names["pooled"].shape == (2, 50, 256)
            assert names["windows"].shape == (2, 4)
    assert sn.backbone_geometry("zf5").map_size(224) == 13
    assert len(names["buckets"]) == 3
    assert len(names["logits"]) == 5
    # Few images: what does not fill a batch may join a larger bucket.
    assert "of 3 buckets" in str(names["table"])


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


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "features"])
def test_each_command_line_has_help(name, command_line):
    result = command_line(name, "--help", check=False)
    assert "--workdir: The folder of the run." in result.stdout
