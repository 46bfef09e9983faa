"""A wheel of the repository, in a process that knows no other sppnet_jax."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, SMALL
from tests.data_helpers import write_class_folders

SOURCES = sorted((REPOSITORY / "sppnet_jax").rglob("*.py"))
DATA = {"sppnet_jax/py.typed", "sppnet_jax/network/imagenet_classes.txt"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The folder of an unpacked wheel, built from a copy: a build leaves files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("sppnet_jax", "configs", "experiments", "notebooks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(REPOSITORY / name, folder / "source" / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, *offline, "-w", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture
def elsewhere(unpacked, tmp_path):
    """Runs Python in an empty folder, where sppnet_jax is the wheel's."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(unpacked)},
            capture_output=True,
            text=True,
        )

    return run


def test_a_wheel_holds_every_module_its_types_and_its_licence_and_nothing_else(
    unpacked,
):
    wanted = {str(path.relative_to(REPOSITORY)) for path in SOURCES}
    files = [path.relative_to(unpacked) for path in unpacked.rglob("*")]
    found = {str(path) for path in files if (unpacked / path).is_file()}
    about = {name for name in found if name.split("/")[0].endswith(".dist-info")}
    assert found - about == wanted | DATA
    assert any(name.endswith("/licenses/LICENSE") for name in about)


def test_no_module_imports_what_a_wheel_leaves_out():
    outside = r"^\s*(?:from|import) (?:configs|experiments|notebooks|tests)\b"
    assert not [x for x in SOURCES if re.search(outside, x.read_text(), re.M)]


def test_a_config_by_its_path_trains_a_network_that_python_reads(
    elsewhere, unpacked, tmp_path
):
    write_class_folders(tmp_path / "pets", 10)
    given = f"--config={REPOSITORY}/configs/folder.py", "--workdir=runs/pets"
    two_steps = *SMALL, "--config.data.root=pets", "--config.max_steps=2"
    trained = elsewhere("-m", "sppnet_jax.train", *given, *two_steps)
    assert "the run's folder is runs/pets" in trained.stderr, trained.stderr
    read = elsewhere(
        "-c",
        "import sppnet_jax as sn; print(sn.__file__); "
        "print(*sn.load_network('runs/pets').class_names)",
    )
    where = str(unpacked / "sppnet_jax" / "__init__.py")
    assert read.stdout.splitlines() == [where, "cat dog"], read.stderr


def test_a_config_that_is_not_there_says_where_the_project_s_own_are(
    elsewhere, tmp_path
):
    result = elsewhere("-m", "sppnet_jax.train", "--config=configs/digits.py")
    assert result.returncode == 2
    assert f"no config file {tmp_path / 'configs' / 'digits.py'}" in result.stderr
    assert "in configs/ of its repository" in result.stderr
