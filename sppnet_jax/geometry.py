"""Where a convolutional stack puts its units: map sizes, strides, receptive fields.

A stack is a sequence of (kernel, stride, padding), one for each layer that moves or
shrinks the map; padding is the same on every side and sizes round down, as in Caffe's
convolutions. Positions are 0-based pixels: unit i of the last map looks at the pixels
around `center + stride · i`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Sliding(NamedTuple):
    """How one layer slides: side of its kernel, stride, padding on each side."""

    kernel: int
    stride: int
    padding: int

    def output_size(self, size: Any) -> Any:
        """The size after the layer; `size` is an int or an array of ints."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


class Geometry(NamedTuple):
    """Stride, receptive field and map size of a stack of layers.

    `stride`: pixels between neighbouring units (the paper's S).
    `center`: the receptive-field centre of unit 0 in 0-based pixels; a whole or a half.
    `receptive_field`: the side, in pixels, of what one unit sees.
    """

    stride: int
    center: float
    receptive_field: int
    layers: tuple[Sliding, ...]

    def map_size(self, image_size: int) -> int:
        """The side of the last map for an image side in pixels.

        Raises: ValueError where the image is too small to give a single unit.
        """
        size = image_size
        for layer in self.layers:
            size = layer.output_size(size)
            if size < 1:
                raise ValueError(
                    f"an image side of {image_size} pixels is too small for this "
                    f"stack: it needs at least {self.min_image_size}"
                )
        return size

    @property
    def min_image_size(self) -> int:
        """The smallest image side, in pixels, that gives a map of one unit."""
        size = 1
        for layer in reversed(self.layers):
            size = max(1, (size - 1) * layer.stride + layer.kernel - 2 * layer.padding)
        return size


def stack_geometry(layers: Iterable[Sliding]) -> Geometry:
    """The geometry of layers applied one after the other."""
    layers = tuple(layers)
    stride, center, receptive_field = 1, 0.0, 1
    for layer in layers:
        center += stride * ((layer.kernel - 1) / 2 - layer.padding)
        receptive_field += stride * (layer.kernel - 1)
        stride *= layer.stride
    return Geometry(stride, center, receptive_field, layers)
