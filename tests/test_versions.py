"""Ranges in pyproject.toml, exact versions in the requirements files: they agree."""

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sppnet_jax.run.settings import MOVED
from tests.conftest import REPOSITORY

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
# By requirements file, what of pyproject.toml it pins.
RANGES = {"requirements.txt": PROJECT["dependencies"]} | {
    f"requirements-{name}.txt": ranges for name, ranges in EXTRAS.items()
}


def named(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in found}


def pins(file: str) -> dict[str, str]:
    """The one version of each package that a requirements file names."""
    lines = [x.split("#")[0].strip() for x in (REPOSITORY / file).open()]
    found = named([line for line in lines if line])
    versions = {name: str(one.specifier) for name, one in found.items()}
    assert all(version.startswith("==") for version in versions.values()), versions
    return {name: version.removeprefix("==") for name, version in versions.items()}


@pytest.mark.parametrize("file", RANGES)
def test_every_dependency_is_pinned_within_its_range(file):
    ranges, pinned = named(RANGES[file]), pins(file)
    assert not set(ranges) - set(pinned)
    outside = [n for n in ranges if not ranges[n].specifier.contains(pinned[n])]
    assert not outside


@pytest.mark.parametrize("extra", ["bench", "coco", "dev", "weights"])
def test_an_extra_and_its_file_name_the_same_packages(extra):
    assert set(pins(f"requirements-{extra}.txt")) == set(named(EXTRAS[extra]))


def test_no_package_is_pinned_at_two_versions():
    chosen: dict[str, str] = {}
    for file in RANGES:
        for name, version in pins(file).items():
            assert chosen.setdefault(name, version) == version, f"{file}: {name}"


def test_the_pinned_setuptools_can_build_a_wheel():
    (build,) = PYPROJECT["build-system"]["requires"]
    assert Requirement(build).specifier.contains(
        pins("requirements-dev.txt")["setuptools"]
    )


def test_the_changelog_begins_with_this_version_and_names_every_moved_setting():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    first = next(x for x in changelog.splitlines() if x.startswith("## "))
    assert first.startswith(f"## [{PROJECT['version']}]")
    moved = [f"| `{old}` | `{new}` |" for old, new in MOVED.items()]
    assert not [row for row in moved if row not in changelog]
