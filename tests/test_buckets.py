"""Which static shape an image goes to."""

import numpy as np
import pytest

from sppnet_jax.buckets import aspect_buckets, pad_to_bucket, smallest_bucket


def test_aspect_buckets_hold_landscape_and_portrait_images():
    buckets = aspect_buckets(64, (1, 1.5, 2))
    assert buckets == ((64, 64), (64, 96), (96, 64), (64, 128), (128, 64))


def test_an_image_goes_to_the_smallest_bucket_that_holds_it():
    buckets = [(64, 128), (64, 64), (128, 64), (96, 96)]
    assert smallest_bucket((64, 64), buckets) == (64, 64)
    assert smallest_bucket((64, 65), buckets) == (64, 128)
    assert smallest_bucket((65, 64), buckets) == (128, 64)
    assert smallest_bucket((65, 65), buckets) == (96, 96)


def test_an_image_larger_than_every_bucket_is_refused_with_their_sizes():
    with pytest.raises(
        ValueError, match=r"no bucket holds an image of 129×64; .* 64×128"
    ):
        smallest_bucket((129, 64), [(64, 128), (128, 64)])


def test_padding_keeps_the_image_at_the_top_left():
    image = np.random.default_rng(0).integers(1, 256, (3, 5, 3)).astype(np.uint8)
    padded = pad_to_bucket(image, (4, 8))
    np.testing.assert_array_equal(padded[:3, :5], image)
    assert (padded.shape, padded.sum()) == ((4, 8, 3), image.sum())
