"""The pages that a reader sees, and what their blocks of code hold."""

import re
from pathlib import Path

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
