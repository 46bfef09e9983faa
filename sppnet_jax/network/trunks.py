"""The paper's four convolutional stacks (Table 1), as tables of layers.

Each table reads from the image to the last map before the pyramid. The paper says that
"the padding is adjusted to produce the expected output feature map size"; these
paddings give every size that it states, for 224 and for 180 pixels. No convolution is
grouped, and a ReLU follows each.

To add a backbone, write its table and add one line to `BACKBONES`.
"""

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from sppnet_jax.pyramid.geometry import Geometry, Sliding, stack_geometry


class Conv(NamedTuple):
    """A convolution with its ReLU; `bias` is its initial bias in the paper's recipe."""

    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: float = 0.0


class MaxPool(NamedTuple):
    kernel: int
    stride: int
    padding: int = 0


class LRN(NamedTuple):
    """Local response normalisation across channels (Krizhevsky et al. 2012)."""

    size: int = 5
    k: float = 2.0
    alpha: float = 1e-4
    beta: float = 0.75


Layer = Conv | MaxPool | LRN


class Backbone(NamedTuple):
    """A stack of layers, and the last pooling of its twin without SPP.

    `last_pool` gives 6×6 bins at the paper's 224 pixels.
    """

    layers: tuple[Layer, ...]
    last_pool: MaxPool


# fmt: off
ZF5 = Backbone(
    layers=(
        Conv(96, kernel=7, stride=2, padding=1),              # 224 -> 110
        LRN(),
        MaxPool(kernel=3, stride=2, padding=1),               # 55
        Conv(256, kernel=5, stride=2, padding=1, bias=1.0),   # 27
        LRN(),
        MaxPool(kernel=3, stride=2),                          # 13
        Conv(384, kernel=3, padding=1),
        Conv(384, kernel=3, padding=1, bias=1.0),
        Conv(256, kernel=3, padding=1, bias=1.0),             # 13; 180 pixels give 10
    ),
    last_pool=MaxPool(kernel=3, stride=2),
)

CONVNET5 = Backbone(
    layers=(
        Conv(96, kernel=11, stride=4, padding=2),             # 224 -> 55
        LRN(),
        Conv(256, kernel=5, padding=2, bias=1.0),
        LRN(),
        MaxPool(kernel=3, stride=2),                          # 27
        Conv(384, kernel=3, padding=1),
        MaxPool(kernel=3, stride=2),                          # 13
        Conv(384, kernel=3, padding=1, bias=1.0),
        Conv(256, kernel=3, padding=1, bias=1.0),             # 13; 180 pixels give 10
    ),
    last_pool=MaxPool(kernel=3, stride=2),
)

OVERFEAT5 = Backbone(
    layers=(
        Conv(96, kernel=7, stride=2),                         # 224 -> 109
        MaxPool(kernel=3, stride=3),                          # 36
        LRN(),
        Conv(256, kernel=5, padding=2, bias=1.0),
        MaxPool(kernel=2, stride=2),                          # 18
        Conv(512, kernel=3, padding=1),
        Conv(512, kernel=3, padding=1, bias=1.0),
        Conv(512, kernel=3, padding=1, bias=1.0),             # 18; 180 pixels give 14
    ),
    last_pool=MaxPool(kernel=3, stride=3),
)

OVERFEAT7 = Backbone(
    layers=(
        *OVERFEAT5.layers,
        Conv(512, kernel=3, padding=1, bias=1.0),
        Conv(512, kernel=3, padding=1, bias=1.0),             # 18; 180 pixels give 14
    ),
    last_pool=MaxPool(kernel=3, stride=3),
)
# fmt: on

BACKBONES: dict[str, Backbone] = {
    "zf5": ZF5,
    "convnet5": CONVNET5,
    "overfeat5": OVERFEAT5,
    "overfeat7": OVERFEAT7,
}


def get_backbone(name: str) -> Backbone:
    """A backbone's table; ValueError with the valid names if there is none."""
    if name not in BACKBONES:
        close = difflib.get_close_matches(str(name), BACKBONES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}{hint}"
        )
    return BACKBONES[name]


def backbone_geometry(name: str) -> Geometry:
    """Stride, receptive field and map sizes of a backbone's last map."""
    return layers_geometry(get_backbone(name).layers)


def layers_geometry(layers: Iterable[Layer]) -> Geometry:
    """The geometry of a table of layers."""
    return stack_geometry(
        Sliding(layer.kernel, layer.stride, layer.padding)
        for layer in layers
        if not isinstance(layer, LRN)
    )


def output_size(layer: Layer, size: Any) -> Any:
    """The size of a map after a layer; `size` is an int or an array of ints."""
    if isinstance(layer, LRN):
        return size
    return Sliding(layer.kernel, layer.stride, layer.padding).output_size(size)
