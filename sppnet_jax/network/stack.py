"""Convolutional stacks as tables: one row a layer, and what follows from the rows.

A table reads from the image to the last map. Sizes, strides, receptive fields and the
masks of images in larger buckets follow from its rows, and `layers.run_table` runs it.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Union

from sppnet_jax.pyramid.geometry import Geometry, Sliding, stack_geometry

ACTIVATIONS = ("relu", "relu6", "silu", "none")
JOINS = ("add", "concat")


class Conv(NamedTuple):
    """A convolution and the activation after it.

    `padding`: on every side, or (before, after) alike for rows and columns. `bias`: its
    initial bias in the paper's recipe. `groups`: of channels; as many as `filters` is a
    depthwise convolution.
    """

    filters: int
    kernel: int
    stride: int = 1
    padding: int | tuple[int, int] = 0
    bias: float = 0.0
    activation: str = "relu"
    groups: int = 1


class MaxPool(NamedTuple):
    """A maximum over windows; of maps that are nowhere negative in larger buckets."""

    kernel: int
    stride: int
    padding: int | tuple[int, int] = 0


class LRN(NamedTuple):
    """Local response normalisation across channels (Krizhevsky et al. 2012)."""

    size: int = 5
    k: float = 2.0
    alpha: float = 1e-4
    beta: float = 0.75


class Branches(NamedTuple):
    """Tables that start from one map and are joined into one map again.

    An empty table hands the map on as it is. `join`: "add", or "concat" of channels.
    `activation`: of what is joined.
    """

    tables: tuple["Table", ...]
    join: str
    activation: str = "none"


class Cut(NamedTuple):
    """A named place where a table can end; it changes nothing."""

    name: str


Layer = Union[Conv, MaxPool, LRN, Branches, Cut]  # noqa: UP007, it names itself
Table = tuple[Layer, ...]


def convs_of(table: Sequence[Layer]) -> Iterator[Conv]:
    """The convolutions in the order of their numbers: "conv1", "conv2", …"""
    for layer in table:
        if isinstance(layer, Conv):
            yield layer
        elif isinstance(layer, Branches):
            for branch in layer.tables:
                yield from convs_of(branch)


def cut_names(table: Sequence[Layer]) -> tuple[str, ...]:
    """The names of the places where a table can end."""
    return tuple(layer.name for layer in table if isinstance(layer, Cut))


def cut_table(table: Sequence[Layer], cut: str) -> Table:
    """A table up to one of its cuts; the whole for "".

    Raises: ValueError with the table's cuts if it has no such one.
    """
    if not cut:
        return tuple(table)
    names = cut_names(table)
    if cut not in names:
        close = difflib.get_close_matches(cut, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = f"choose from {', '.join(names)}" if names else "this trunk has none"
        raise ValueError(f"unknown cut {cut!r}: {known}{hint}")
    return tuple(table[: table.index(Cut(cut)) + 1])


def table_geometry(table: Sequence[Layer]) -> Geometry:
    """Stride, receptive field and map sizes of a table's last map.

    Raises: ValueError for branches whose maps don't lie on each other.
    """
    return stack_geometry(_slidings(table))


def output_size(layer: Layer, size: Any) -> Any:
    """The size of a map after a layer; `size` is an int or an array of ints."""
    for sliding in _slidings((layer,)):
        size = sliding.output_size(size)
    return size


def _slidings(table: Sequence[Layer]) -> Iterator[Sliding]:
    for layer in table:
        if isinstance(layer, Conv | MaxPool):
            yield Sliding(layer.kernel, layer.stride, layer.padding)
        elif isinstance(layer, Branches):
            stacks = [tuple(_slidings(branch)) for branch in layer.tables]
            grids = {stack_geometry(stack)[:2] for stack in stacks}
            if len(grids) > 1:
                raise ValueError(
                    f"the branches {stacks} put their units at other places, (stride, "
                    f"centre) {sorted(grids)}: their maps can't be joined"
                )
            yield from max(stacks, key=lambda stack: stack_geometry(stack)[2])
