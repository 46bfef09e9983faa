"""The pages that a reader sees, and the data that their examples need."""

import itertools
import re
from pathlib import Path

import pytest

from sppnet_jax.data import sources
from sppnet_jax.data.digit_scenes import DigitScenes
from tests.conftest import REPOSITORY

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
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


def prepare_few_scenes(folder: Path) -> None:
    """Makes a folder of TFDS with few images of the embedded data set in it."""
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
