"""How a table of layers runs, with gradients of their own where XLA's are slow.

    run_table            every row of a table, and the masks of larger buckets
    conv                 filters over all channels
    depthwise_conv       a filter for each channel
    local_response_norm  normalisation across channels
    max_pool             of a table's row
    zero_beyond          the mask of images in larger buckets

On a CPU, XLA's gradient of filters treats the channels as a batch and the batch as
channels, and takes up to seven times as long as the convolution itself. Here it is a
matrix product for each row of the filters, over a few images at a time, and takes about
as long as the convolution. 1×1 filters are a matrix product, whose gradients are
two more. XLA's gradient of a sum over neighbouring channels is slow there too; here it
is that same sum again: what a channel takes from its neighbours, they take from it. Its
grouped convolution takes several times as long as a sum of shifted products, which
depthwise convolutions are here; so is the gradient of their maps, and that of their
filters adds up row by row. Elsewhere, and for the gradient of the maps, everything is
XLA's. They differentiate in reverse mode only.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sppnet_jax.network.stack import (
    ACTIVATIONS,
    JOINS,
    LRN,
    Branches,
    Conv,
    Cut,
    Layer,
    MaxPool,
    output_size,
)
from sppnet_jax.pyramid.geometry import Geometry, Sliding
from sppnet_jax.pyramid.span_max import materialized, span_max

ValidSize = Int[Array, "batch 2"]
Padding = tuple[tuple[int, int], tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
LEAST_ROWS = 1024  # of a product of windows, for which small maps are joined


def run_table(
    table: Sequence[Layer],
    maps: Float[Array, "batch height width channels"],
    size: ValidSize | None,
    convs: Iterator[tuple[str, Callable[[Array], Array]]],
) -> tuple[Array, ValidSize | None, dict[str, Array], dict[str, ValidSize | None]]:
    """Runs the rows of a table one after the other.

    `maps`: zero beyond `size`, the valid size of each, if there is one.
    `convs`: the name of each convolution and what convolves, in their order.

    Returns: the last map and its valid size; and by name, every convolution's output
    after its activation and the map at every cut, and their valid sizes. All are zero
    beyond these.
    """
    named: dict[str, Array] = {}
    sizes: dict[str, ValidSize | None] = {}
    masked: Array | None = maps  # zero beyond the valid size, once that is asked for

    def clean() -> Array:
        nonlocal masked
        if masked is None:
            masked = zero_beyond(maps, size)
        return masked

    for layer in table:
        if isinstance(layer, Cut):
            named[layer.name], sizes[layer.name] = clean(), size
        elif isinstance(layer, LRN):
            maps = masked = local_response_norm(clean(), *layer)
        elif isinstance(layer, Branches):
            maps = clean()
            ends = [run_table(own, maps, size, convs) for own in layer.tables]
            for _, _, own_named, own_sizes in ends:
                named |= own_named
                sizes |= own_sizes
            parts, size = [end[0] for end in ends], ends[0][1]
            maps = masked = activate(_join(parts, layer.join), layer.activation)
        else:
            if layer.kernel > 1 or layer.padding:  # one cell alone sees no other
                maps = clean()
            size = _size_after(layer, size)
            if isinstance(layer, MaxPool):
                maps, masked = max_pool(maps, layer), None
            else:
                name, convolve = next(convs)
                maps, masked = activate(convolve(maps), layer.activation), None
                named[name], sizes[name] = clean(), size
    return clean(), size, named, sizes


def _join(parts: Sequence[Array], join: str) -> Array:
    if join == "concat":
        return jnp.concatenate(parts, axis=-1)
    if join == "add":
        return functools.reduce(jnp.add, parts)
    raise ValueError(f"unknown join {join!r}: use one of {JOINS}")


def _size_after(layer: Conv | MaxPool, size: ValidSize | None) -> ValidSize | None:
    sliding = Sliding(layer.kernel, layer.stride, layer.padding)
    if size is None or (
        sliding.stride == 1 and sum(sliding.pads) == sliding.kernel - 1
    ):
        return size
    # In memory of its own: else every mask works it out anew, for each of its cells.
    return materialized(sliding.output_size(size))


def join_maps(
    maps: Sequence[Float[Array, "batch _rows _columns _channels"]],
    sizes: Sequence[ValidSize | None],
    grids: Sequence[Geometry],
) -> Float[Array, "batch rows columns channels"]:
    """Maps of several strides on the grid of the finest, their channels side by side.

    Each unit takes the unit of every map with the closest centre (hypercolumns,
    Hariharan et al. 2015). `sizes`: the valid sizes, if any. `grids`: of the maps.
    """
    finest = min(range(len(grids)), key=lambda number: grids[number].stride)
    own, shape = grids[finest], maps[finest].shape
    parts = []
    for found, size, grid in zip(maps, sizes, grids, strict=True):
        for axis in (1, 2):
            ratio, shift = join_indices(own, grid)
            closest = np.floor(ratio * np.arange(shape[axis]) + shift).astype(int)
            index = jnp.clip(closest, 0, found.shape[axis] - 1)[None]
            if size is not None:
                index = jnp.minimum(index, size[:, axis - 1, None] - 1)
            index = jnp.expand_dims(index, (3 - axis, 3))
            found = jnp.take_along_axis(found, index, axis, mode="clip")
        parts.append(found)
    return zero_beyond(jnp.concatenate(parts, axis=-1), sizes[finest])


def join_indices(finest: Geometry, grid: Geometry) -> tuple[float, float]:
    """A ratio and a shift: floor(ratio · i + shift) is a grid's unit closest to i."""
    return finest.stride / grid.stride, (
        finest.center - grid.center
    ) / grid.stride + 0.5


def activate(maps: Array, activation: str) -> Array:
    """One of `stack.ACTIVATIONS`, all of which leave zeros zeros."""
    if activation == "relu":
        return jax.nn.relu(maps)
    if activation == "relu6":
        return jnp.clip(maps, 0, 6)
    if activation == "silu":
        return jax.nn.silu(maps)
    if activation == "none":
        return maps
    raise ValueError(f"unknown activation {activation!r}: use one of {ACTIVATIONS}")


def depthwise_conv(
    maps: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    feature_group_count: int,
    **options: Any,
) -> jax.Array:
    """Convolves each group of channels with one filter; for flax's `nn.Conv`.

    `maps`: [batch, height, width, channels]. `kernel`: [rows, columns, channels of a
    group, filters]; fast for groups of one channel.

    Returns: [batch, rows, columns, filters].
    """
    del options  # nn.Conv's defaults
    down, across = int(strides[0]), int(strides[1])
    (top, bottom), (left, right) = padding

    def on_cpu(maps: jax.Array, kernel: jax.Array) -> jax.Array:
        # Sums in bfloat16 would round at every term.
        dtype = jnp.promote_types(maps.dtype, jnp.float32)
        edges = (0, 0), (top, bottom), (left, right), (0, 0)
        padded = jnp.pad(maps.astype(dtype), edges)
        filters = kernel[:, :, 0].astype(dtype)
        return _shifted_products(padded, filters, (down, across)).astype(maps.dtype)

    def elsewhere(maps: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            maps,
            kernel,
            strides,
            padding,
            dimension_numbers=LAYOUT,
            feature_group_count=feature_group_count,
        )

    if kernel.shape[2] > 1:
        return elsewhere(maps, kernel)
    return jax.lax.platform_dependent(maps, kernel, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _shifted_products(
    maps: jax.Array, filters: jax.Array, strides: tuple[int, int]
) -> jax.Array:
    """Convolves each channel with its filter [rows, columns, channels]; no padding."""
    rows, columns = filters.shape[:2]
    down, across = strides
    height = (maps.shape[1] - rows) // down + 1
    width = (maps.shape[2] - columns) // across + 1
    images, _, _, channels = maps.shape
    steps, shape = (1, down, across, 1), (images, height, width, channels)

    # In lax's words, not jnp's, which take longer to trace.
    def product(y: int, x: int) -> jax.Array:
        ends = y + (height - 1) * down + 1, x + (width - 1) * across + 1
        seen = jax.lax.slice(maps, (0, y, x, 0), (images, *ends, channels), steps)
        own = jax.lax.slice(filters, (y, x, 0), (y + 1, x + 1, channels))
        return seen * jax.lax.broadcast_in_dim(own, shape, (1, 2, 3))

    products = [product(y, x) for y in range(rows) for x in range(columns)]
    return functools.reduce(jax.lax.add, products)


def _shifted_forward(
    maps: jax.Array, filters: jax.Array, strides: tuple[int, int]
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _shifted_products(maps, filters, strides), (maps, filters)


def _shifted_backward(
    strides: tuple[int, int], saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of the maps: the gradient convolved with the mirrored filters, zeros between.

    Of the filters: a row of the gradient after the other, which stays in the caches.
    """
    maps, filters = saved
    rows, columns = filters.shape[:2]
    down, across = strides
    height, width = gradient.shape[1:3]
    spread = [
        (length - 1, size - length - (count - 1) * stride + length - 1, stride - 1)
        for length, size, count, stride in zip(
            (rows, columns), maps.shape[1:3], (height, width), strides, strict=True
        )
    ]
    dilated = jax.lax.pad(
        gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *spread, (0, 0, 0)]
    )
    of_maps = _shifted_products(dilated, filters[::-1, ::-1], (1, 1))

    def add_row(found: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        own = jax.lax.dynamic_index_in_dim(gradient, row, 1)
        seen = jax.lax.dynamic_slice_in_dim(maps, row * down, rows, 1)
        ends = [x + (width - 1) * across + 1 for x in range(columns)]
        sums = [
            (seen[:, :, x:end:across] * own).sum(axis=(0, 2))
            for x, end in enumerate(ends)
        ]
        return found + jnp.stack(sums, axis=1), None

    of_filters, _ = jax.lax.scan(add_row, jnp.zeros_like(filters), jnp.arange(height))
    return of_maps, of_filters


_shifted_products.defvjp(_shifted_forward, _shifted_backward)


def conv(
    maps: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolves with filters over all channels; for flax's `nn.Conv`.

    `maps`: [batch, height, width, channels]. `kernel`: [rows, columns, channels,
    filters]. `options`: the others that `nn.Conv`
    gives to `lax.conv_general_dilated`; all of them have to be at their defaults.

    Returns: [batch, rows, columns, filters].
    Raises: ValueError for an option that is not at its default.
    """
    for name, value in options.items():
        default = {1} if isinstance(value, tuple) else {1, None}
        seen = set(value) if isinstance(value, tuple) else {value}
        if name != "dimension_numbers" and not seen <= default:
            raise ValueError(f"conv takes no {name}, got {value}")
    stride = int(strides[0]), int(strides[1])
    (top, bottom), (left, right) = padding
    if kernel.shape[:2] == (1, 1) and not any((top, bottom, left, right)):
        some = maps[:, :: stride[0], :: stride[1]]
        return jax.lax.dot_general(some, kernel[0, 0], (((3,), (0,)), ((), ())))
    return _conv(maps, kernel, stride, ((top, bottom), (left, right)))


def local_response_norm(
    maps: Float[Array, "*batch channels"],
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> Float[Array, "*batch channels"]:
    """Divides each value by (k + α Σ x²)^β, the sum over the `size` channels around it.

    Krizhevsky et al. 2012, section 3.3, whose α is not divided by the number of
    channels (Caffe's and PyTorch's is). Channels beyond the ends count as zero. All but
    `maps` are static; it differentiates in reverse mode.
    """
    return _norm(maps, size, k, alpha, beta)


def max_pool(maps: Array, layer: MaxPool) -> Array:
    """The maximum of each window; what is padding counts for nothing."""
    rows, columns = (_pool_spans(layer, size) for size in maps.shape[1:3])
    return span_max(maps, rows, columns)


def zero_beyond(maps: Array, size: ValidSize | None) -> Array:
    """Zeros outside each map's valid size: what the padding of the next layer holds."""
    if size is None:
        return maps
    size = jnp.asarray(size)
    inside = [
        jax.lax.broadcasted_iota(size.dtype, maps.shape[:3], axis)
        < jax.lax.broadcast_in_dim(size[:, axis - 1], maps.shape[:3], (0,))
        for axis in (1, 2)
    ]
    mask = jax.lax.broadcast_in_dim(inside[0] & inside[1], maps.shape, (0, 1, 2))
    return jax.lax.select(mask, maps, jax.lax.full_like(maps, 0))


def _xla_conv(
    maps: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        maps, kernel, strides, padding, dimension_numbers=LAYOUT
    )


_conv = jax.custom_vjp(_xla_conv, nondiff_argnums=(2, 3))


def _conv_forward(
    maps: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(maps, kernel, strides, padding), (maps, kernel)


def _conv_backward(
    strides: tuple[int, int],
    padding: Padding,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    maps, kernel = saved

    def by_rows(maps: jax.Array, gradient: jax.Array) -> jax.Array:
        return _kernel_gradient(maps, kernel, strides, padding, gradient)

    def at_once(maps: jax.Array, gradient: jax.Array) -> jax.Array:
        _, back = jax.vjp(lambda k: _xla_conv(maps, k, strides, padding), kernel)
        return back(gradient)[0]

    _, back = jax.vjp(lambda m: _xla_conv(m, kernel, strides, padding), maps)
    return back(gradient)[0], jax.lax.platform_dependent(
        maps, gradient, cpu=by_rows, default=at_once
    )


_conv.defvjp(_conv_forward, _conv_backward)


def _kernel_gradient(
    maps: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    gradient: jax.Array,
) -> jax.Array:
    """The gradient of the kernel, summed over some images after the others."""
    rows, columns, channels, filters = kernel.shape
    down, across = strides
    images, height, width, _ = gradient.shape
    some = next(
        number
        for number in range(1, images + 1)
        if images % number == 0
        and (number == images or number * height * width >= LEAST_ROWS)
    )
    padded = jnp.pad(maps, ((0, 0), *padding, (0, 0)))

    def add_images(
        total: jax.Array, few: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        own, outputs = few
        # What each filter's row sees at every place of the images' rows.
        seen = jnp.concatenate(
            [
                own[:, :, x : x + (width - 1) * across + 1 : across]
                for x in range(columns)
            ],
            axis=-1,
        )
        products = [
            jnp.matmul(
                seen[:, y : y + (height - 1) * down + 1 : down]
                .reshape(-1, columns * channels)
                .T,
                outputs.reshape(-1, filters),
                preferred_element_type=total.dtype,
            )
            for y in range(rows)
        ]
        return total + jnp.stack(products), None

    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    zeros = jnp.zeros((rows, columns * channels, filters), dtype)
    parts = padded, gradient
    total, _ = jax.lax.scan(
        add_images,
        zeros,
        jax.tree.map(lambda x: x.reshape(-1, some, *x.shape[1:]), parts),
    )
    return total.reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _norm(maps: jax.Array, size: int, k: float, alpha: float, beta: float) -> jax.Array:
    wide = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
    energy = k + alpha * _around(jnp.square(wide), size // 2, size)
    return (wide * _power(energy, beta)).astype(maps.dtype)


def _norm_forward(
    maps: jax.Array, size: int, k: float, alpha: float, beta: float
) -> tuple[jax.Array, jax.Array]:
    return _norm(maps, size, k, alpha, beta), maps


def _norm_backward(
    size: int, k: float, alpha: float, beta: float, maps: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    # It is read twice, and XLA would compute it in both places for a CPU.
    gradient = jax.lax.platform_dependent(
        gradient, cpu=materialized, default=lambda gradient: gradient
    )
    wide, own = (
        x.astype(jnp.promote_types(maps.dtype, jnp.float32)) for x in (maps, gradient)
    )
    energy = k + alpha * _around(jnp.square(wide), size // 2, size)
    scale = _power(energy, beta)
    # Those that have this channel around them lie on the other side of it.
    taken = _around(own * wide * scale / energy, size - 1 - size // 2, size)
    return ((own * scale - 2 * alpha * beta * wide * taken).astype(maps.dtype),)


_norm.defvjp(_norm_forward, _norm_backward)


def _around(values: jax.Array, before: int, size: int) -> jax.Array:
    """The sum over `size` channels from `before` ones below each; zero beyond."""
    outside = ((0, 0),) * (values.ndim - 1)
    padded = jnp.pad(values, (*outside, (before, size - 1 - before)))
    channels = values.shape[-1]
    parts = [padded[..., i : i + channels] for i in range(size)]
    return functools.reduce(jnp.add, parts)


def _power(energy: jax.Array, beta: float) -> jax.Array:
    """energy^-beta; roots for the usual β, several times as fast as a power."""
    if beta == 0.75:
        root = jax.lax.rsqrt(energy)
        return root * jnp.sqrt(root)
    return energy**-beta


def _pool_spans(layer: MaxPool, size: int) -> list[tuple[int, int]]:
    """The spans that a pooling sees along a side, less what is padding."""
    before, _ = Sliding(*layer).pads
    starts = layer.stride * np.arange(output_size(layer, size)) - before
    return [(max(0, s), min(size, s + layer.kernel)) for s in starts.tolist()]
