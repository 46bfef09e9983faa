"""Where a convolutional stack puts its units: map sizes, strides, receptive fields.

`boxes_to_windows` turns boxes in an image into windows on its features.

A stack is a sequence of (kernel, stride, padding), one for each layer that moves or
shrinks the map; padding is alike for rows and columns, and sizes round down, as in
Caffe's convolutions. Positions are 0-based pixels: unit i of the last map looks at the
pixels around `center + stride · i`.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Int

RULES = ("paper", "closest")  # from boxes to windows


class Sliding(NamedTuple):
    """How one layer slides: side of its kernel, stride, padding on each side.

    `padding`: a number, or (before, after).
    """

    kernel: int
    stride: int
    padding: int | tuple[int, int]

    @property
    def pads(self) -> tuple[int, int]:
        """The padding before and after."""
        if isinstance(self.padding, tuple):
            return self.padding
        return self.padding, self.padding

    def output_size(self, size: Any) -> Any:
        """The size after the layer; `size` is an int or an array of ints."""
        return (size + sum(self.pads) - self.kernel) // self.stride + 1


class Geometry(NamedTuple):
    """Stride, receptive field and map size of a stack of layers.

    `stride`: pixels between neighbouring units (the paper's S).
    `center`: the receptive-field centre of unit 0 in 0-based pixels; a whole or a half.
    `receptive_field`: the side, in pixels, of what one unit sees.
    `deepest`: the layers of the stack that needs the largest images, where maps of
    several are joined into one; else none.
    """

    stride: int
    center: float
    receptive_field: int
    layers: tuple[Sliding, ...]
    deepest: tuple[Sliding, ...] = ()

    def map_size(self, image_size: int) -> int:
        """The side of the last map for an image side in pixels.

        Raises: ValueError where the image is too small to give a single unit.
        """
        size = image_size
        if image_size < self.min_image_size:
            raise ValueError(
                f"an image side of {image_size} pixels is too small for this "
                f"stack: it needs at least {self.min_image_size}"
            )
        for layer in self.layers:
            size = layer.output_size(size)
        return size

    @property
    def min_image_size(self) -> int:
        """The smallest image side, in pixels, that gives a map of one unit."""
        size = 1
        for layer in reversed(self.deepest or self.layers):
            size = max(1, (size - 1) * layer.stride + layer.kernel - sum(layer.pads))
        return size


def stack_geometry(layers: Iterable[Sliding]) -> Geometry:
    """The geometry of layers applied one after the other."""
    layers = tuple(layers)
    stride, center, receptive_field = 1, 0.0, 1
    for layer in layers:
        center += stride * ((layer.kernel - 1) / 2 - layer.pads[0])
        receptive_field += stride * (layer.kernel - 1)
        stride *= layer.stride
    return Geometry(stride, center, receptive_field, layers)


def boxes_to_windows(
    boxes: Float[ArrayLike, "boxes 4"],
    geometry: Geometry,
    map_size: Sequence[Any],
    scale: Float[ArrayLike, "*#boxes"] | float = 1.0,
    rule: str = "paper",
) -> Int[ArrayLike, "boxes 4"]:
    """The cells (top, left, bottom, right) that stand for boxes of an image.

    `boxes`: float [N, 4], (ymin, xmin, ymax, xmax) in pixels of the image.
    `scale`: pixels of the network's input for one of the image, scalar or [N].
    `map_size`: the (rows, columns) of the map that hold the image; may be traced.
    `rule="paper"`: the units whose receptive-field centres lie strictly inside the
    scaled box, from floor((ymin − center)/stride) + 1 to ceil((ymax − center)/stride)
    − 1. `rule="closest"`: from the unit with the centre closest to one edge to that of
    the other; halfway between two centres, the one further inside.

    A box that gets no unit gets the one with the centre closest to its middle (halfway,
    the earlier). Then windows are clamped to the map. They are never empty.

    NumPy computes in float64, jax.Arrays and traced values in float32. Edges as close
    to a centre as rounding errors reach (4 ulp) lie on it, so that both give the same
    windows where `scale` is a rounded ratio.

    Returns: int32 [N, 4], half-open, of NumPy where all arguments are.
    Raises: ValueError for arguments that do not fit.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: use 'paper' or 'closest'")
    arguments = jax.tree.leaves((boxes, scale, tuple(map_size)))
    in_jax = any(isinstance(argument, jax.Array) for argument in arguments)
    xp: Any = jnp if in_jax else np
    known = not any(isinstance(argument, jax.core.Tracer) for argument in arguments)
    dtype = xp.float32 if in_jax else xp.float64
    sides, factor = xp.asarray(boxes, dtype), xp.asarray(scale, dtype)
    sizes = xp.stack([xp.asarray(size) for size in map_size])
    _check_boxes(sides, factor, sizes, known)
    edges = sides * factor[..., None]
    rounding = 4 * float(xp.finfo(dtype).eps) / geometry.stride
    slack = rounding * xp.abs(edges).max(axis=1, keepdims=True, initial=1.0)
    # Positions count units: k is the centre of unit k, k + 1/2 is halfway to the next.
    position = _snap((edges - geometry.center) / geometry.stride, slack, xp)
    starts, stops = position[:, :2], position[:, 2:]
    if rule == "paper":
        first, last = xp.floor(starts) + 1, xp.ceil(stops) - 1
    else:
        first, last = xp.floor(starts + 0.5), xp.ceil(stops - 0.5)
    middle = xp.ceil(_snap((starts + stops) / 2, slack, xp) - 0.5)
    empty = first > last
    first = xp.clip(xp.where(empty, middle, first), 0, sizes - 1)
    last = xp.clip(xp.where(empty, middle, last), 0, sizes - 1)
    return xp.concatenate([first, last + 1], axis=1).astype(xp.int32)


def _snap(position: Any, slack: Any, xp: ModuleType) -> Any:
    """Moves what lies within `slack` of a whole or a half onto it."""
    nearest = xp.round(2 * position) / 2
    return xp.where(xp.abs(position - nearest) <= slack, nearest, position)


def _check_boxes(boxes: Any, scale: Any, sizes: Any, known: bool) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            "boxes must be float [N, 4], (ymin, xmin, ymax, xmax) in pixels, got shape "
            f"{boxes.shape}"
        )
    if scale.shape not in ((), (1,), boxes.shape[:1]):
        raise ValueError(
            f"scale must be a number or one for each of the {len(boxes)} boxes, got "
            f"shape {scale.shape}"
        )
    if sizes.shape != (2,):
        raise ValueError(f"map_size must be (rows, columns), got shape {sizes.shape}")
    if not known:
        return
    if (sizes < 1).any():
        raise ValueError(f"map_size must be at least 1×1, got {sizes.tolist()}")
    if not (scale > 0).all():
        raise ValueError(f"scale must be above 0, got {scale.min()}")
    bad = ~np.isfinite(boxes).all(axis=1)
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(f"box {first} is not finite: {boxes[first].tolist()}")
