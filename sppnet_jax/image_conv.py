"""The first convolution, whose weight gradient is five times as fast on a CPU.

XLA's own treats the three colours as a batch of three, which leaves a CPU idle: for 7×7
filters at stride 2 it took five times as long as the convolution itself. Here it is a
matrix product for each row of the filters, and takes as long as the convolution.
Elsewhere, and for the gradient of the images, everything is XLA's. It differentiates in
reverse mode only.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
FEW_FILTERS = 24  # with fewer, XLA is fast


def image_conv(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """Convolves images [batch, height, width, colours]; for flax's `nn.Conv`.

    `kernel`: [rows, columns, colours, filters]. `options`: the others that `nn.Conv`
    gives to `lax.conv_general_dilated`; all of them have to be at their defaults.

    Returns: [batch, rows, columns, filters].
    Raises: ValueError for an option that is not at its default.
    """
    for name, value in options.items():
        default = {1} if isinstance(value, tuple) else {1, None}
        seen = set(value) if isinstance(value, tuple) else {value}
        if name != "dimension_numbers" and not seen <= default:
            raise ValueError(f"image_conv takes no {name}, got {value}")
    stride = int(strides[0]), int(strides[1])
    (top, bottom), (left, right) = padding
    return _conv(images, kernel, stride, ((top, bottom), (left, right)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=LAYOUT
    )


def _forward(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(images, kernel, strides, padding), (images, kernel)


def _backward(
    strides: tuple[int, int],
    padding: Padding,
    saved: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    images, kernel = saved

    def xla(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            images, kernel, strides, padding, dimension_numbers=LAYOUT
        )

    def on_cpu(gradient: jax.Array) -> jax.Array:
        return _kernel_gradient(images, kernel, strides, padding, gradient)

    def elsewhere(gradient: jax.Array) -> jax.Array:
        return jax.vjp(functools.partial(xla, images), kernel)[1](gradient)[0]

    for_images = jax.vjp(lambda images: xla(images, kernel), images)[1](gradient)[0]
    if kernel.shape[-1] < FEW_FILTERS:
        return for_images, elsewhere(gradient)
    return for_images, jax.lax.platform_dependent(
        gradient, cpu=on_cpu, default=elsewhere
    )


_conv.defvjp(_forward, _backward)


def _kernel_gradient(
    images: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    gradient: jax.Array,
) -> jax.Array:
    """The gradient of the kernel, summed over one image after the other."""
    rows, columns, colors, filters = kernel.shape
    down, across = strides
    height, width = gradient.shape[1:3]
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))

    def add_image(
        total: jax.Array, one: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        image, own = one
        # What each filter's row sees at every place of the image's rows.
        seen = jnp.concatenate(
            [
                image[:, x : x + (width - 1) * across + 1 : across]
                for x in range(columns)
            ],
            axis=-1,
        )
        outputs = own.reshape(height * width, filters)
        products = [
            jnp.matmul(
                seen[y : y + (height - 1) * down + 1 : down]
                .reshape(height * width, columns * colors)
                .T,
                outputs,
                preferred_element_type=total.dtype,
            )
            for y in range(rows)
        ]
        return total + jnp.stack(products), None

    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    zeros = jnp.zeros((rows, columns * colors, filters), dtype)
    total, _ = jax.lax.scan(add_image, zeros, (padded, gradient))
    return total.reshape(kernel.shape).astype(kernel.dtype)
