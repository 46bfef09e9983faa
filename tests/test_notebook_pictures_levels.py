"""Pictures of a pyramid, and the arrays that they draw."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from notebooks.pictures.levels import (
    bin_boxes,
    bin_gradient,
    bin_windows,
    plot_gradients,
    plot_levels,
    plot_sizes,
    plot_winners,
    winning_cells,
)
from sppnet_jax import boxes_to_windows, num_bins, spatial_pyramid_pool
from sppnet_jax.network.trunks import backbone_geometry
from tests.data_helpers import picture

LEVELS = (3, 2, 1)
ZF5 = backbone_geometry("zf5")


def random_map(rows=5, columns=7, channels=4, seed=0):
    """Distinct values, so that no two cells tie."""
    size = (rows, columns, channels)
    values = np.random.default_rng(seed).permutation(np.prod(size))
    return values.reshape(size).astype(np.float32)


def drawn(figure):
    """The figure as a notebook makes it."""
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


def test_bins_come_in_the_order_of_the_pyramid():
    features = random_map()
    windows = bin_windows((5, 7), LEVELS)
    pooled = np.asarray(spatial_pyramid_pool(features, LEVELS))
    assert len(windows) == num_bins(LEVELS)
    for number, (top, left, bottom, right) in enumerate(windows):
        inside = features[top:bottom, left:right].reshape(-1, 4)
        np.testing.assert_array_equal(pooled[number], inside.max(axis=0))


@pytest.mark.parametrize("name", ["zf5", "overfeat5"])
@pytest.mark.parametrize("size", [(3, 3), (5, 7), (13, 10)])
def test_the_box_of_a_bin_leads_back_to_its_cells(name, size):
    geometry = backbone_geometry(name)
    boxes = bin_boxes(size, (6, 3, 2, 1), geometry)
    back = boxes_to_windows(boxes, geometry, size)
    np.testing.assert_array_equal(back, bin_windows(size, (6, 3, 2, 1)))


def test_the_winning_cells_hold_the_pooled_values():
    features = random_map()
    cells = winning_cells(features, LEVELS)
    pooled = np.asarray(spatial_pyramid_pool(features, LEVELS))
    for number, (top, left, bottom, right) in enumerate(bin_windows((5, 7), LEVELS)):
        for channel, (row, column) in enumerate(cells[number]):
            assert features[row, column, channel] == pooled[number, channel]
            assert top <= row < bottom
            assert left <= column < right


def test_of_cells_that_tie_the_first_wins():
    cells = winning_cells(np.zeros((3, 4, 2)), (1,))
    np.testing.assert_array_equal(cells, np.zeros((1, 2, 2)))


@pytest.mark.slow
def test_max_gives_the_gradient_to_the_winning_cells_and_mean_to_all():
    features = random_map()
    cells = winning_cells(features, LEVELS)
    for number, (top, left, bottom, right) in enumerate(bin_windows((5, 7), LEVELS)):
        expected = np.zeros_like(features)
        for channel, (row, column) in enumerate(cells[number]):
            expected[row, column, channel] = 1
        np.testing.assert_array_equal(bin_gradient(features, LEVELS, number), expected)
        expected[:] = 0
        expected[top:bottom, left:right] = 1 / ((bottom - top) * (right - left))
        mean = bin_gradient(features, LEVELS, number, reducer="mean")
        np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_levels_are_drawn_over_the_image_and_over_the_map():
    image = picture(96, 128)
    features = random_map(ZF5.map_size(96), ZF5.map_size(128))
    figure = plot_levels(image, features, LEVELS, ZF5)
    above, below = figure.axes[:4], figure.axes[4:]
    assert [axes.get_title() for axes in above][1:] == [
        f"level {n}: {n}×{n} bins" for n in LEVELS
    ]
    for row in (above, below):  # a frame and a tint for each bin
        assert [len(axes.patches) for axes in row] == [0, 18, 8, 2]
    assert len(drawn(figure)) > 1000


def test_a_silent_channel_has_no_winner_and_the_others_one_in_every_bin():
    features = random_map() + 1
    features[..., 3] = 0
    figure = plot_winners(features, LEVELS)
    for axes, level in zip(figure.axes, LEVELS, strict=False):
        (shown,) = axes.images
        assert shown.get_array().sum() == pytest.approx(level * level * 3 / 4)
        assert len(axes.patches) == level * level
    cells = winning_cells(features, LEVELS)[:, :3]
    places = {(k, *cell) for bins in cells for k, cell in enumerate(bins.tolist())}
    (shown,) = figure.axes[-1].images
    assert shown.get_array().sum() * 4 == pytest.approx(len(places))
    assert f"{len(places) / (5 * 7 * 3):.0%}" in figure.axes[-1].get_title()
    assert len(drawn(figure)) > 1000


@pytest.mark.slow
def test_gradients_reach_the_image_through_the_network():
    image = picture(62, 80)
    rows, columns = ZF5.map_size(62), ZF5.map_size(80)
    shape = (rows, columns, 2, 62, 80)
    weights = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    weights[:, :, 1] *= -1  # a channel that is silent

    def features_of(pixels):
        return jnp.einsum("ijchw,hwk->ijc", weights, pixels)

    number = num_bins(LEVELS) - 1
    figure = plot_gradients(image, features_of, LEVELS, [0, number], ZF5)
    features = np.asarray(features_of(jnp.asarray(image, jnp.float32)))
    shown = [axes.images[0].get_array() for axes in figure.axes[5:]]
    for column, reducer in enumerate(("max", "mean")):
        on_map = bin_gradient(features, LEVELS, number, reducer=reducer)[..., :1]
        np.testing.assert_array_equal(shown[1 + column], on_map.sum(axis=2))
        # The network is linear: the oracle multiplies by its weights.
        on_image = 3 * np.einsum("ijchw,ijc->hw", weights[:, :, :1], on_map)
        blocks = [
            [on_image[y : y + 4, x : x + 4].mean() for x in range(0, 80, 4)]
            for y in range(0, 62, 4)
        ]
        np.testing.assert_allclose(shown[3 + column], blocks, rtol=1e-4)
    assert figure.axes[5].get_title() == "level 1, bin (0, 0)"
    assert len(drawn(figure)) > 1000


def test_images_of_several_sizes_give_vectors_of_one():
    images = [picture(48, 64), picture(80, 60), picture(64, 64)]
    maps = [random_map(*(ZF5.map_size(n + 16) for n in x.shape[:2])) for x in images]
    figure = plot_sizes(images, maps, LEVELS)
    vectors = [axes.images[0].get_array() for axes in figure.axes[6:]]
    for vector, features in zip(vectors, maps, strict=True):
        np.testing.assert_array_equal(vector, spatial_pyramid_pool(features, LEVELS))
    # Pixels are as large in all three: the panels have the same limits.
    assert len({axes.get_xlim() for axes in figure.axes[:3]}) == 1
    assert len(drawn(figure)) > 1000


def test_arguments_that_do_not_fit_are_errors():
    image, features = picture(64, 64), random_map(3, 3)
    with pytest.raises(ValueError, match="64×64 pixels has a map of 3×3"):
        plot_levels(image, random_map(4, 3), LEVELS, ZF5)
    with pytest.raises(ValueError, match=r"one map \[rows, columns, channels\]"):
        winning_cells(features[None], LEVELS)
    with pytest.raises(ValueError, match=r"no bin 14: .* has 14, counted from 0"):
        bin_gradient(features, LEVELS, 14)
    with pytest.raises(ValueError, match="unknown reducer 'median'"):
        bin_gradient(features, LEVELS, 0, reducer="median")
    with pytest.raises(ValueError, match="2 images and 1 maps"):
        plot_sizes([image, image], [features], LEVELS)
    with pytest.raises(ValueError, match="positive integer"):
        plot_winners(features, (0,))
