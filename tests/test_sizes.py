"""The side of training images, epoch by epoch."""

import numpy as np
import pytest

from sppnet_jax.training.sizes import epoch_size, possible_sizes

UNIFORM = ("uniform", 180, 224)


def sequence(sizes, epochs, seed=0, multiple=4):
    return [epoch_size(sizes, e, seed=seed, multiple=multiple) for e in range(epochs)]


def test_listed_sizes_come_in_turn():
    assert sequence((224, 180), 5) == [224, 180, 224, 180, 224]
    assert sequence((224, 202, 180), 4) == [224, 202, 180, 224]
    assert sequence((64,), 2) == [64, 64]


def test_drawn_sizes_follow_from_seed_and_epoch_alone():
    drawn = sequence(UNIFORM, 200)
    assert drawn == sequence(UNIFORM, 200)
    assert drawn[120:] == [
        epoch_size(UNIFORM, epoch, seed=0, multiple=4) for epoch in range(120, 200)
    ]
    assert drawn != sequence(UNIFORM, 200, seed=1)


def test_drawn_sizes_are_uniform_over_the_multiples_in_the_range():
    assert possible_sizes(UNIFORM, 4) == tuple(range(180, 225, 4))
    assert possible_sizes(UNIFORM, 16) == (192, 208, 224)
    drawn = sequence(UNIFORM, 6000, multiple=4)
    values, counts = np.unique(drawn, return_counts=True)
    assert tuple(values) == possible_sizes(UNIFORM, 4)
    assert abs(counts - 500).max() < 5 * np.sqrt(500)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), r"sizes must be sides in pixels such as \(224, 180\)"),
        (("224", "180"), "sides in pixels"),
        ((0,), "sides in pixels"),
        (("uniform", 180), r"written \('uniform', 180, 224\)"),
        (("uniform", 181, 183), "no multiple of 4 from 181 to 183"),
        (("uniform", 224, 180), "no multiple of 4 from 224 to 180"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        possible_sizes(sizes, 4)
