"""The notebooks: how they are stored, and that they run from top to bottom."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from notebooks.store import execute
from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NEEDED = ("sppnet_jax", "configs", "experiments", "notebooks/pictures")
LONGEST_FUNCTION = 4  # lines
MOST_BYTES = 900_000
# /a/b, but no address, no end tag, no "this/or/that".
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:<])(?:/[\w.~-]+){2,}|[A-Z]:\\\w")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [
        cell
        for cell in cells
        if cell["cell_type"] == "code" and "".join(cell["source"])
    ]


def outputs_of(cells):
    return [output for cell in cells for output in cell["outputs"]]


def shown_texts(output):
    """All that an output says in letters; pictures are base64."""
    yield "".join(output.get("text", ""))
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield "".join(content) if isinstance(content, list) else str(content)


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def python_of(cell):
    """A cell's Python, without IPython's own lines."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join("" if line.startswith(("%", "!")) else line for line in lines)


def test_there_are_notebooks():
    assert NOTEBOOKS


@each
def test_a_notebook_is_stored_with_its_outputs_as_run_from_top_to_bottom(path):
    cells = code_cells(path)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run notebooks/store.py"
    assert pictures(outputs_of(cells)) >= 3
    assert path.stat().st_size < MOST_BYTES


@each
def test_no_stored_output_is_an_error_a_log_or_a_progress_bar(path):
    for output in outputs_of(code_cells(path)):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output["text"]
        assert "it/s" not in str(output.get("text", ""))


@each
def test_nothing_stored_names_a_path_of_a_machine(path):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    for output in outputs_of(code_cells(path)):
        texts += shown_texts(output)
    for text in texts:
        assert not ABSOLUTE_PATH.search(text), ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize("text", ["in /home/me/x", "'/var/lib'", r"C:\Users", "(/a/b)"])
def test_a_path_of_a_machine_is_seen(text):
    assert ABSOLUTE_PATH.search(text)


@pytest.mark.parametrize(
    "text",
    ["https://arxiv.org/abs/1", "runs/notebooks/x", "a</td></tr>", "1/2", "./a/b"],
)
def test_what_is_no_path_of_a_machine_is_not(text):
    assert not ABSOLUTE_PATH.search(text)


@each
def test_a_notebook_calls_the_library_and_defines_no_logic_of_its_own(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(python_of(cell))):
            if isinstance(node, kinds):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


@pytest.mark.slow
@pytest.mark.notebook
@each
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, digit_scenes_dir):
    # A copy, where nothing is trained yet and nothing that is written stays.
    copy = tmp_path / "notebooks" / path.name
    copy.parent.mkdir()
    for name in NEEDED:
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copy(path, copy)
    # One device, as a person has it; programs compiled once are found again.
    environment = {**os.environ, "XLA_FLAGS": "", "TFDS_DATA_DIR": digit_scenes_dir}
    executed = execute(copy, copy.parent, environment)
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    outputs = outputs_of([c for c in executed["cells"] if c["cell_type"] == "code"])
    assert pictures(outputs) == pictures(outputs_of(code_cells(path)))
    assert Path(copy).read_bytes() == path.read_bytes()
