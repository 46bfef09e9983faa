"""What the device does to pixels: mean, mean image, colour altering."""

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.network.preprocess import (
    Preprocessing,
    alter_colors,
    color_shifts,
    normalize,
)


def preprocessing(mean=128.0, scale=1.0, shifts=None):
    shifts = np.zeros((3, 3)) if shifts is None else shifts
    return Preprocessing(np.asarray(mean, np.float32), scale, shifts)


def random_pixels(*shape, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3))
    return pixels.astype(np.uint8)


def test_a_constant_mean_and_a_scale():
    pixels = random_pixels(2, 5, 7)
    inputs = normalize(jnp.asarray(pixels), preprocessing(scale=64.0))
    np.testing.assert_allclose(inputs, (pixels.astype(np.float32) - 128) / 64)


def test_a_mean_image_is_warped_to_the_size_of_the_images():
    ramp = np.linspace(0, 100, 8, dtype=np.float32)
    mean = np.broadcast_to(ramp[:, None, None], (8, 8, 3))
    zeros = jnp.zeros((1, 16, 4, 3), jnp.uint8)
    warped = -normalize(zeros, preprocessing(mean))[0]
    # Linear interpolation between pixel centres, held at the border.
    at = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
    expected = np.interp(at, np.arange(8), ramp)
    np.testing.assert_allclose(warped[:, 2, 1], expected, rtol=1e-5)


def test_in_a_bucket_the_mean_image_is_warped_to_each_valid_size():
    mean = random_pixels(12, 12).astype(np.float32)
    images, sizes = random_pixels(2, 20, 20), [(20, 13), (9, 17)]
    inputs = normalize(jnp.asarray(images), preprocessing(mean), jnp.array(sizes))
    for image, result, (height, width) in zip(images, inputs, sizes, strict=True):
        alone = normalize(
            jnp.asarray(image[None, :height, :width]), preprocessing(mean)
        )
        np.testing.assert_allclose(result[:height, :width], alone[0], atol=1e-3)


def test_color_shifts_are_eigenvalue_times_direction():
    covariance = np.diag([100.0, 400.0, 900.0])
    shifts = color_shifts(covariance, sigma=0.1)
    lengths = np.linalg.norm(shifts, axis=0)
    np.testing.assert_allclose(np.sort(lengths), 0.1 * np.array([100, 400, 900]) / 255)
    assert (np.count_nonzero(shifts, axis=0) == 1).all()


def test_altered_colors_shift_whole_images_with_the_stated_covariance():
    shifts = np.array([[3, 0, 1], [0, 2, 0], [1, 0, 0]], np.float32)
    images = jnp.asarray(random_pixels(4000, 2, 1))
    altered = alter_colors(images, jax.random.key(0), preprocessing(shifts=shifts))
    change = np.asarray(altered - images)
    np.testing.assert_allclose(np.ptp(change, axis=(1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(change[:, 0, 0].T), shifts @ shifts.T, atol=0.6)


def test_sigma_0_alters_nothing():
    assert not color_shifts(np.eye(3), 0.0).any()
