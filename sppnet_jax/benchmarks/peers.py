"""Optional packages that suites compare with; without one, the rest runs."""

import importlib
import os
import sys
from typing import Any

import jax
import numpy as np


def find_peers(*names: str) -> tuple[dict[str, Any], list[str]]:
    """The modules that are installed, by name, and a note for each that is not."""
    found, notes = {}, []
    for name in names:
        try:
            found[name] = importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # or of another version
            notes.append(
                f"{name} can't be imported ({error}), so its rows are missing: "
                f"pip install -r requirements-bench.txt, or pip install {name}"
            )
    if "torch" in found:  # as many threads as JAX has
        found["torch"].set_num_threads(len(os.sched_getaffinity(0)))
    return found, notes


def find_torch() -> tuple[Any, list[str]]:
    """PyTorch if it can run on the device that JAX runs on, else None; and notes."""
    peers, notes = find_peers("torch")
    torch, platform = peers.get("torch"), jax.devices()[0].platform
    if torch is None:
        return None, notes
    if platform == "gpu" and not torch.cuda.is_available():
        return None, ["this PyTorch can't use the GPU, so its rows are missing"]
    if platform not in ("cpu", "gpu"):
        return None, [f"PyTorch has no {platform} here, so its rows are missing"]
    return torch, notes


def as_numpy(result: Any) -> np.ndarray:
    """A result as float32, channels last; a peer's, not JAX's, has them second."""
    if isinstance(result, jax.Array):
        return np.asarray(result, np.float32)
    if not isinstance(result, np.ndarray):
        result = result.float().cpu().numpy()
    return np.moveaxis(result, 1, -1)


def finish(result: Any) -> None:
    """Waits until JAX has the result, and PyTorch's GPU has done all its work."""
    torch = sys.modules.get("torch")
    if torch is not None and torch_device() == "cuda":
        torch.cuda.synchronize()
    jax.block_until_ready(result)


def torch_device() -> str:
    """PyTorch's name of the device that JAX runs on, if `find_torch` found it."""
    return "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
