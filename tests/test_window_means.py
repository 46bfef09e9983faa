"""Means of windows against slicing each out and averaging in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_spp import loop_pool, random_features
from test_windows import all_windows, random_windows

import sppnet_jax as sn
from sppnet_jax.pyramid.span_mean import span_mean, sum_table

EPSILON = 2.0**-24  # half of a float32's last digit


def pool(features, windows, levels):
    return sn.window_pyramid_pool(features, windows, levels, reducer="mean")


def loop_means(features, windows, levels):
    features = np.asarray(features, np.float64)
    return np.stack(
        [loop_pool(features[t:b, x:r], levels, np.mean) for t, x, b, r in windows]
    )


def assert_as_exact_as_promised(pooled, features, windows, levels):
    expected = loop_means(features, windows, levels)
    height, width = features.shape[:2]
    largest = np.abs(np.asarray(features, np.float64)).max(axis=(0, 1))
    bound = 4 * EPSILON * np.abs(expected) + (height * width) ** 2 * 2.0**-59 * largest
    error = np.abs(np.asarray(pooled, np.float64) - expected)
    assert (error <= bound).all(), (error - bound).max(axis=(0, 1))


@pytest.mark.quick
@pytest.mark.parametrize("levels", [(6, 3, 2, 1), (2, 4, 2)], ids=str)
@pytest.mark.parametrize("size", [(5, 6), (1, 5), (1, 1)], ids=str)
def test_every_window_of_small_maps(size, levels):
    features, windows = random_features(*size, 2), all_windows(*size)
    pooled = pool(features, windows, levels)
    assert_as_exact_as_promised(pooled, features, windows, levels)


@pytest.mark.parametrize("size", [(75, 100), (20, 27)], ids=str)
def test_means_of_large_maps_keep_a_float32_s_digits_whatever_the_channel(size):
    noise = np.random.default_rng(0).normal(size=(*size, 6))
    features = np.maximum(noise, 0)
    features[..., 1] = 1000 + noise[..., 1] / 1000  # all but constant
    features[: size[0] // 2, :, 2] += 1e4  # one half outshines the other
    features[..., 3] = noise[..., 3]
    features[7, 9, 4] = 1e6
    features[..., 5] = 0
    features = features.astype(np.float32)
    windows = random_windows(60, *size)
    windows[0] = (0, 0, *size)
    pooled = pool(features, windows, (6, 3, 2, 1))
    assert_as_exact_as_promised(pooled, features, windows, (6, 3, 2, 1))
    assert (pooled[..., 5] == 0).all()


def test_one_cell_keeps_digits_that_running_sums_of_floats_lose():
    features = (1000 + random_features(75, 100, 1)).astype(np.float32)
    sums = np.pad(features, ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
    cells = np.diff(np.diff(sums, axis=0), axis=1)
    assert np.abs(cells - features).max() > 0.1
    windows = [(74, column, 75, column + 1) for column in range(100)]
    np.testing.assert_array_equal(
        pool(features, np.array(windows), (1,))[:, 0], features[74]
    )


def test_a_window_of_one_cell_is_that_cell_in_every_bin():
    features = random_features(6, 7, 3)
    cells = list(itertools.product(range(6), range(7)))
    windows = np.array([(y, x, y + 1, x + 1) for y, x in cells])
    pooled = pool(features, windows, (3, 1))
    expected = np.repeat(features.reshape(42, 1, 3), 10, axis=1)
    np.testing.assert_array_equal(pooled, expected)


def test_the_whole_map_gives_what_the_layer_gives():
    features = random_features(13, 10, 5)
    pooled = pool(features, np.array([(0, 0, 13, 10)]), (6, 3, 2, 1))
    whole = sn.spatial_pyramid_pool(features, (6, 3, 2, 1), reducer="mean")
    np.testing.assert_allclose(pooled[0], whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [(1, 127), (1, 128), (63, 65), (64, 64)], ids=str)
@pytest.mark.parametrize("value", [1.9999999, -1.9999999, 1.0, 1e-30, -3e38])
def test_sums_of_integers_fit_for_the_largest_values_and_counts(size, value):
    features = np.full((*size, 1), value, np.float32)
    table = sum_table(jnp.asarray(features))
    means = span_mean(table, jnp.array([0, 0, *size])[:, None, None])
    np.testing.assert_allclose(means, features[:1, :1], rtol=3 * EPSILON)


def test_values_next_to_a_float32_s_limits():
    features = np.zeros((4, 5, 3), np.float32)
    features[..., 0] = np.linspace(2e38, 3.4e38, 20).reshape(4, 5)
    features[..., 1] = np.linspace(-3e-38, 3e-38, 20).reshape(4, 5)
    features[..., 2] = 1e-40  # subnormal: as good as zero
    windows = all_windows(4, 5)
    pooled = pool(features, windows, (2,))
    expected = loop_means(features, windows, (2,))
    np.testing.assert_allclose(pooled, expected, rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_floats_are_summed_in_full_and_rounded_once(dtype):
    features = jnp.asarray(100 + random_features(40, 50, 2), dtype)
    windows = random_windows(50, 40, 50)
    pooled = pool(features, windows, (3, 1))
    assert pooled.dtype == features.dtype
    expected = loop_means(np.asarray(features, np.float64), windows, (3, 1))
    half = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(pooled), expected, rtol=1.001 * half)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_and_infinities_reach_the_bins_that_hold_them_and_no_others(dtype):
    features = random_features(7, 9, 4)
    features[2, 3] = np.nan
    features[4, 8] = np.inf
    features[5:, :5, 1] = -np.inf
    features[6, 7, 2:] = np.inf, -np.inf
    features = np.asarray(jnp.asarray(features, dtype).astype(jnp.float32))
    windows = all_windows(7, 9)
    pooled = pool(jnp.asarray(features, dtype), windows, (3, 1))
    with np.errstate(invalid="ignore"):
        expected = loop_means(features, windows, (3, 1))
    assert np.isinf(expected).any()
    tolerance = 4 * EPSILON if dtype == "float32" else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.float64(pooled), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("count", "channels"), [(0, 3), (1, 0), (1, 70), (129, 67), (256, 1)]
)
def test_any_number_of_windows_and_channels(count, channels):
    features = random_features(5, 6, channels)
    windows = random_windows(count, 5, 6)
    pooled, back = jax.vjp(lambda x: pool(x, windows, (2, 1)), features)
    assert pooled.shape == (count, 5, channels)
    (gradient,) = back(jnp.ones_like(pooled))
    np.testing.assert_allclose(gradient.sum(), 5 * count * channels, rtol=1e-5)
    if pooled.size:
        assert_as_exact_as_promised(pooled, features, windows, (2, 1))


def spread(weights, windows, levels, size):
    """Each bin's weight, spread evenly over its cells, in float64."""
    total = np.zeros((*size, weights.shape[2]))
    for own, (top, left, bottom, right) in zip(weights, windows, strict=True):
        number = 0
        for level in levels:
            rows = sn.pyramid_bins(bottom - top, level) + top
            columns = sn.pyramid_bins(right - left, level) + left
            for (y, to_y), (x, to_x) in itertools.product(rows, columns):
                area = (to_y - y) * (to_x - x)
                total[y:to_y, x:to_x] += own[number].astype(np.float64) / area
                number += 1
    return total


@pytest.mark.quick
@pytest.mark.parametrize("levels", [(6, 3, 2, 1), (4, 3)], ids=str)
def test_the_gradient_spreads_each_bin_s_over_its_cells(levels):
    size, windows = (23, 31), random_windows(150, 23, 31)
    weights = random_features(150, sn.num_bins(levels), 2)
    weights[..., 1] = np.abs(weights[..., 1]) + 100
    gradient = jax.jit(
        lambda x: jax.vjp(lambda x: pool(x, windows, levels), x)[1](weights)[0]
    )(jnp.zeros((*size, 2)))
    expected = spread(weights, windows, levels, size)
    largest = np.abs(expected).max(axis=(0, 1))
    assert (np.abs(gradient - expected) <= 4 * EPSILON * largest).all()


def test_the_gradient_equals_finite_differences_of_the_cropped_maps():
    features, windows = random_features(5, 6, 1), random_windows(12, 5, 6)
    weights = random_features(12, 14, 1, seed=1).astype(np.float64)

    def oracle(x):
        return (loop_means(x, windows, (3, 2, 1)) ** 2 * weights).sum()

    expected, step = np.zeros(features.shape), 1e-4
    for cell in np.ndindex(features.shape):
        moved = np.zeros(features.shape)
        moved[cell] = step
        expected[cell] = oracle(features + moved) - oracle(features - moved)
    gradient = jax.grad(lambda x: (pool(x, windows, (3, 2, 1)) ** 2 * weights).sum())(
        jnp.asarray(features)
    )
    np.testing.assert_allclose(gradient, expected / (2 * step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_gradient_of_half_floats_adds_up_in_float32(dtype):
    windows = np.array([(0, 0, 1, 1)] * 3000 + [(0, 1, 1, 2)])
    back = jax.grad(lambda x: pool(x, windows, (1,)).sum().astype(jnp.float32))
    gradient = back(jnp.ones((1, 2, 1), dtype))
    assert gradient.dtype == dtype
    np.testing.assert_allclose(np.float32(gradient[0, :, 0]), (3000, 1), rtol=4e-3)


def test_a_nan_of_the_map_spares_the_gradient_and_one_of_its_own_stays_in_its_channel():
    features = jnp.full((4, 4, 2), jnp.nan)
    windows = np.array([(0, 0, 4, 4)])
    back = jax.vjp(lambda x: pool(x, windows, (1,)), features)[1]
    (gradient,) = back(jnp.array([[[1.0, jnp.nan]]]))
    np.testing.assert_array_equal(gradient[..., 0], np.full((4, 4), 1 / 16))
    assert jnp.isnan(gradient[..., 1]).all()


def test_vmap_over_maps_each_with_its_own_windows_one_with_a_nan():
    features = random_features(3, 10, 7, 2)
    features[1, 2, 3] = np.nan
    windows = np.stack([random_windows(30, 10, 7, seed) for seed in range(3)])
    pooled = jax.vmap(lambda x, w: pool(x, w, (3, 2, 1)))(features, windows)
    for own, one, some in zip(pooled, features, windows, strict=True):
        expected = loop_means(one, some, (3, 2, 1))
        np.testing.assert_allclose(own, expected, rtol=1e-6, atol=1e-7)

    def total(x, w):
        return (pool(x, w, (3, 2, 1)) * jnp.arange(2.0)).sum()

    gradients = jax.vmap(jax.grad(total))(features, windows)
    for own, some in zip(gradients, windows, strict=True):
        weights = np.broadcast_to(np.arange(2.0), (30, 14, 2))
        expected = spread(weights, some, (3, 2, 1), (10, 7))
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)


def test_one_program_serves_all_new_windows_and_clamps_them():
    program = jax.jit(pool, static_argnums=2)
    features = random_features(20, 30, 2)
    for seed in range(3):
        windows = random_windows(50, 20, 30, seed)
        given = np.array(windows)
        given[windows[:, 2] == 20, 2] = 99
        pooled = program(features, given, (6, 3, 2, 1))
        assert_as_exact_as_promised(pooled, features, windows, (6, 3, 2, 1))
    assert program._cache_size() == 1


def test_memory_holds_tables_of_some_channels_and_no_second_result():
    lowered = jax.jit(lambda x, w: pool(x, w, (6, 3, 2, 1))).lower(
        jax.ShapeDtypeStruct((43, 58, 256), jnp.float32),
        jax.ShapeDtypeStruct((2000, 4), jnp.int32),
    )
    memory = lowered.compile().memory_analysis()
    assert memory.output_size_in_bytes == 2000 * 50 * 256 * 4
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 2


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_means_and_their_gradient_lower_for_accelerators(platform):
    def both(features, windows):
        bins, back = jax.vjp(lambda x: pool(x, windows, (3, 1)), features)
        return bins, back(bins)

    shapes = (
        jax.ShapeDtypeStruct((43, 58, 32), jnp.bfloat16),
        jax.ShapeDtypeStruct((200, 4), jnp.int32),
    )
    program = export.export(jax.jit(both), platforms=[platform])(*shapes)
    assert [out.shape for out in program.out_avals] == [(200, 10, 32), (43, 58, 32)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_means_keep_the_dtype_with_x64_and_a_float64_its_digits(dtype):
    with jax.enable_x64(True):
        features = 1000 + np.random.default_rng(0).normal(size=(9, 7, 3)).astype(dtype)
        windows = random_windows(20, 9, 7)
        pooled, back = jax.vjp(lambda x: pool(x, windows, (3, 2)), features)
        (gradient,) = back(jnp.ones_like(pooled))
    expected = loop_means(features, windows, (3, 2))
    digits = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(pooled, expected, rtol=digits)
    weights = np.ones(expected.shape)
    np.testing.assert_allclose(
        gradient, spread(weights, windows, (3, 2), (9, 7)), rtol=10 * digits
    )
    assert pooled.dtype == gradient.dtype == dtype


def test_an_unknown_reducer_is_refused_as_by_the_layer():
    with pytest.raises(ValueError, match="unknown reducer 'min': use 'max' or 'mean'"):
        sn.window_pyramid_pool(
            random_features(5, 6, 1), [(0, 0, 5, 6)], (1,), reducer="min"
        )
