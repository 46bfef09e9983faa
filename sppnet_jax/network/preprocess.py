"""What the device does to uint8 images before the network: colour and mean.

Images are [batch, height, width, 3], RGB, 0 to 255.
"""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt8

from sppnet_jax.network.trunks import Published
from sppnet_jax.run.settings import above, at_least


class Inputs(NamedTuple):
    """What the device makes of pixels; `make_preprocessing` turns it into numbers.

    `mean`: subtracted; 0 subtracts the training set's mean image. `scale`: pixels are
    divided by it after that. `color_sigma`: of the colour altering; 0 for none.
    `statistics_images`: so many are read for the mean image and the colours, at most.
    Pretrained weights bring the mean and the scale that they were made with.
    """

    mean: float = 128.0
    scale: Annotated[float, above(0)] = 1.0
    color_sigma: Annotated[float, at_least(0)] = 0.1
    statistics_images: Annotated[int, at_least(1)] = 10_000

    def need_statistics(self, published: Published | None = None) -> bool:
        """Whether the training set's statistics take part."""
        return bool(self.color_sigma) or (not self.mean and published is None)


class Preprocessing(NamedTuple):
    """The numbers that turn pixels into inputs.

    `mean`: subtracted; a scalar (the paper's 128 for VOC and Caltech101), one for each
    colour [3], or a mean image [side, side, 3], warped to each image's size (ImageNet).
    `scale`: divides what is left, a scalar or [3]; 1 in the paper.
    `color_shifts`: [3, 3], column k the RGB shift for one standard deviation of the
    k-th principal component of the training pixels; zeros for none.
    """

    mean: np.ndarray
    scale: float | np.ndarray
    color_shifts: np.ndarray


def make_preprocessing(
    inputs: Inputs,
    statistics: Mapping[str, np.ndarray] | None,
    published: Published | None = None,
) -> Preprocessing:
    """The numbers of a run.

    `statistics`: "mean_image" [side, side, 3] and "covariance" [3, 3] of the training
    set, where the inputs need them; None changes no colours and subtracts `mean`.
    `published`: of pretrained weights, in place of the inputs' mean and scale.
    """
    mean = np.asarray(inputs.mean, np.float32)
    shifts = np.zeros((3, 3), np.float32)
    if statistics is not None:
        shifts = color_shifts(statistics["covariance"], inputs.color_sigma)
        if not inputs.mean:
            mean = statistics["mean_image"]
    scale: float | np.ndarray = inputs.scale
    if published is not None:
        mean = np.array(published.mean, np.float32)
        scale = np.array(published.std, np.float32)
    return Preprocessing(mean=mean, scale=scale, color_shifts=shifts)


def normalize(
    images: UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"],
    preprocessing: Preprocessing,
    valid_size: Int[Array, "batch 2"] | None = None,
) -> Float[Array, "batch height width 3"]:
    """Subtracts the mean and divides by the scale (section 3.1).

    A mean image is warped to the size of the images, or to each one's `valid_size`
    where they sit in a larger bucket.
    """
    mean = jnp.asarray(preprocessing.mean, jnp.float32)
    if mean.ndim == 3:
        mean = _warp(mean, (images.shape[1], images.shape[2]), valid_size)
    return (images.astype(jnp.float32) - mean) / preprocessing.scale


def mirror(
    images: Shaped[Array, "batch height width 3"],
    valid_size: Int[Array, "batch 2"] | None = None,
) -> Shaped[Array, "batch height width 3"]:
    """Each image's valid part, left and right swapped, at the top left again."""
    if valid_size is None:
        return images[:, :, ::-1]
    column = jnp.arange(images.shape[2])
    source = jnp.maximum(valid_size[:, 1:] - 1 - column, 0)
    return jnp.take_along_axis(images, source[:, None, :, None], axis=2)


def alter_colors(
    images: UInt8[Array, "batch height width 3"],
    rng: Array,
    preprocessing: Preprocessing,
) -> Float[Array, "batch height width 3"]:
    """Adds to each image one random multiple of each principal colour component.

    Krizhevsky et al. 2012, section 4.1.
    """
    amounts = jax.random.normal(rng, (len(images), 3))
    shifts = amounts @ jnp.asarray(preprocessing.color_shifts, jnp.float32).T
    return images.astype(jnp.float32) + shifts[:, None, None, :]


def resize(
    images: Float[Array, "batch height width 3"], side: int
) -> Float[Array, "batch side side 3"]:
    """Resizes square crops to `side` pixels: bilinear, anti-aliased if it shrinks."""
    if images.shape[1:3] == (side, side):
        return images
    return jax.image.resize(images, (len(images), side, side, 3), "linear")


def color_shifts(covariance: Float[np.ndarray, "3 3"], sigma: float) -> np.ndarray:
    """RGB shifts in grey levels for a standard deviation `sigma` (0.1 in the paper).

    `covariance`: of RGB pixels in 0 to 255. The shift along component k is sigma times
    its eigenvalue, with pixels counted from 0 to 1, as the unit has to be for the
    published 0.1 to be a small change.
    """
    unit = np.asarray(covariance, np.float64) / 255**2
    eigenvalues, directions = np.linalg.eigh(unit)
    return (directions * eigenvalues * sigma * 255).astype(np.float32)


def _warp(
    mean: jax.Array, bucket: tuple[int, int], valid_size: jax.Array | None
) -> jax.Array:
    if valid_size is None:
        return jax.image.resize(mean, (*bucket, 3), "linear")

    def warp_to(size: jax.Array) -> jax.Array:
        return jax.image.scale_and_translate(
            mean,
            (*bucket, 3),
            (0, 1),
            size / jnp.array(mean.shape[:2]),
            jnp.zeros(2),
            "linear",
        )

    return jax.vmap(warp_to)(valid_size)
