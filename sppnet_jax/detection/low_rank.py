"""The fully connected layers with fewer multiplications, by truncated SVD.

A kernel W ≈ U S Vᵀ of rank r becomes two layers, U S down to r numbers and Vᵀ up again
(Girshick, Fast R-CNN 2015, section 3.1): in·r + r·out multiplications instead of
in·out. No other two layers of that size come closer to W (Eckart and Young). Windows
are many and the layers large, so this is where a detector's time goes once the
convolutions are shared.

V comes from the eigenvectors of WᵀW, and U S is W V: exact, and fast at fc6's size.

Parameters are those of an `SPPNet`: a dict of layers, each with "kernel" [in, out] and
"bias" [out]; a truncated one has "down" [in, r] and "up" [r, out] for its "kernel", and
the network computes with either.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

FC_LAYERS = ("fc6", "fc7", "fc8")


def truncate_fc(params: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Replaces kernels by their best approximations of a lower rank.

    `params`: layers by name; those without a rank are passed on as they are.
    `ranks`: for each layer's name, its rank; 0, or a rank as high as the kernel's least
    side, leaves the layer whole. Above in·out / (in + out) a rank saves nothing, which
    the log says.

    Returns: the layers, the truncated ones as float32 arrays of NumPy.
    Raises: ValueError for unknown or already truncated layers and for weights that are
    not finite.
    """
    truncated = dict(params)
    for name, rank in ranks.items():
        if name not in params:
            raise ValueError(
                f"no layer {name!r} to truncate; there are {', '.join(params)}"
            )
        if "kernel" not in params[name]:
            raise ValueError(
                f"{name} is truncated already; truncate the whole network's layers"
            )
        kernel = np.asarray(params[name]["kernel"], np.float32)
        if kernel.ndim != 2:
            raise ValueError(
                f"{name} is not fully connected: its kernel has the shape "
                f"{kernel.shape}"
            )
        if not np.isfinite(kernel).all():
            raise ValueError(f"{name} has weights that are not finite: nothing to keep")
        if not 0 < rank < min(kernel.shape):
            continue
        if rank * sum(kernel.shape) >= kernel.size:
            log.warning(
                "%s of %d×%d saves nothing at rank %d; below %d it does",
                *(name, *kernel.shape, rank, kernel.size / sum(kernel.shape)),
            )
        down, up = _best_factors(kernel, rank)
        bias = np.asarray(params[name]["bias"], np.float32)
        truncated[name] = {"down": down, "up": up, "bias": bias}
    return truncated


def spectrum_kept(
    params: Mapping[str, Any], truncated: Mapping[str, Any]
) -> dict[str, float]:
    """The share of the squared singular values that each truncated layer kept, 0 to 1.

    `params`: what `truncate_fc` was given; `truncated`: what it returned.
    """
    kept = {}
    for name, layer in truncated.items():
        if "down" in layer:
            # The rows of "up" are orthonormal: all singular values are in "down".
            whole = _energy(params[name]["kernel"])
            kept[name] = _energy(layer["down"]) / whole if whole else 1.0
    return kept


def multiplications(params: Mapping[str, Any]) -> dict[str, int]:
    """Multiplications (each with an addition) of each fc layer for one window."""
    factors = ("kernel", "down", "up")
    return {
        name: sum(int(np.size(params[name][f])) for f in factors if f in params[name])
        for name in FC_LAYERS
    }


def _best_factors(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """W V [in, r] and Vᵀ [r, out] for the leading eigenvectors V of WᵀW."""
    # Singular values' squares would leave float32's range long before the values do.
    scale = np.abs(kernel).max() or np.float32(1)
    scaled = kernel / scale
    size = kernel.shape[1]
    # Here, not above: a start has no need of it, and it takes a while.
    import scipy.linalg

    _, vectors = scipy.linalg.eigh(
        scaled.T @ scaled, subset_by_index=[size - rank, size - 1]
    )
    leading = np.ascontiguousarray(vectors[:, ::-1])
    return kernel @ leading, np.ascontiguousarray(leading.T)


def _energy(values: Any) -> float:
    return float(np.square(np.asarray(values), dtype=np.float64).sum())
