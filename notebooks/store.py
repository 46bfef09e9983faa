"""Runs notebooks from top to bottom and stores them with their outputs.

python notebooks/store.py notebooks/01_pyramid_levels.ipynb

A notebook that fails is left as it was.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

CELL_SECONDS = 1800


def execute(path: Path, folder: Path, environment: dict[str, str]) -> NotebookNode:
    """A notebook with the outputs of a fresh kernel that ran it from top to bottom.

    `folder`: where it runs. Outputs have no times in them, so that storing a notebook
    again changes nothing but what has changed.

    Raises: nbclient.exceptions.CellExecutionError with the cell that failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    _plain(notebook.metadata)
    return notebook


def _plain(metadata: Any) -> None:
    """Leaves out what the machine at hand put in: the versions of its Python."""
    metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    metadata["language_info"] = {"name": "python"}


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("give notebooks: python notebooks/store.py notebooks/*.ipynb")
    for path in map(Path, sys.argv[1:]):
        notebook = execute(path, path.parent, dict(os.environ))
        nbformat.write(notebook, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
