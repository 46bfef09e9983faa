"""Optional packages that suites compare with; without one, the rest runs."""

import importlib
import os
from typing import Any


def find_peers(*names: str) -> tuple[dict[str, Any], list[str]]:
    """The modules that are installed, by name, and a note for each that is not."""
    found, notes = {}, []
    for name in names:
        try:
            found[name] = importlib.import_module(name)
        except ImportError as error:
            notes.append(
                f"{name} can't be imported ({error}), so its rows are missing: "
                "pip install -r requirements-bench.txt"
            )
    if "torch" in found:  # as many threads as JAX has
        found["torch"].set_num_threads(len(os.sched_getaffinity(0)))
    return found, notes
