"""Pooled windows against slicing each window out and looping over its bins."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_spp import loop_pool, random_features

import sppnet_jax as sn
from sppnet_jax.pyramid.windows import block_counts

pytestmark = pytest.mark.quick

PYRAMIDS = [(6, 3, 2, 1), (4, 3, 2, 1), (3, 2, 1), (2, 6, 4), (7, 6, 4), (5,), (1,)]


def all_windows(height, width):
    rows = itertools.combinations(range(height + 1), 2)
    columns = list(itertools.combinations(range(width + 1), 2))
    return np.array(
        [(t, left, b, r) for (t, b), (left, r) in itertools.product(rows, columns)]
    )


def random_windows(count, height, width, seed=0):
    """Corners anywhere, so sizes from one cell to nearly the whole map."""
    random = np.random.default_rng(seed)
    rows = np.sort(random.integers(0, height, (count, 2)), axis=1)
    columns = np.sort(random.integers(0, width, (count, 2)), axis=1)
    starts = np.stack([rows[:, 0], columns[:, 0]], axis=1)
    stops = np.stack([rows[:, 1], columns[:, 1]], axis=1) + 1
    return np.concatenate([starts, stops], axis=1)


def loop_windows(features, windows, levels):
    return np.stack([loop_pool(features[t:b, x:r], levels) for t, x, b, r in windows])


@pytest.mark.parametrize("levels", PYRAMIDS, ids=str)
@pytest.mark.parametrize("size", [(7, 9), (1, 5), (4, 1), (1, 1), (2, 3)], ids=str)
def test_every_window_of_small_maps_is_exact(size, levels):
    features, windows = random_features(*size, 2), all_windows(*size)
    pooled = sn.window_pyramid_pool(features, windows, levels)
    np.testing.assert_array_equal(pooled, loop_windows(features, windows, levels))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("levels", [(6, 3, 2, 1), (4, 3, 2, 1)], ids=str)
def test_random_windows_of_large_maps_are_exact_and_keep_the_dtype(levels, dtype):
    features = jnp.asarray(random_features(43, 58, 3), dtype)
    windows = random_windows(300, 43, 58)
    windows[0] = (0, 0, 43, 58)
    pooled = sn.window_pyramid_pool(features, windows, levels)
    assert pooled.dtype == dtype
    expected = loop_windows(np.asarray(features, np.float32), windows, levels)
    np.testing.assert_array_equal(np.asarray(pooled, np.float32), expected)


def test_the_table_holds_every_bin_s_blocks_where_a_finer_level_has_the_longer_bins():
    features, windows = random_features(28, 28, 1), random_windows(100, 28, 28)
    windows[0] = (0, 0, 28, 28)
    pooled = sn.window_pyramid_pool(features, windows, (13, 12))
    np.testing.assert_array_equal(pooled, loop_windows(features, windows, (13, 12)))


def test_the_table_s_largest_block_fits_into_the_longest_gathered_bin():
    for levels in itertools.combinations(range(1, 17), 2):
        gathered = [n for n in levels if not any(m > n and m % n == 0 for m in levels)]
        longest = 0
        for size in range(1, 41):
            bins = [sn.pyramid_bins(size, n) for n in gathered]
            longest = max(
                longest, *(int((b - a).max()) for a, b in (s.T for s in bins))
            )
            largest = 2 ** (block_counts((size, 1, 1), levels)[0] - 1)
            assert largest <= longest < 2 * largest


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_any_number_of_windows(count):
    features, windows = random_features(9, 12, 2), random_windows(130, 9, 12)
    pooled = sn.window_pyramid_pool(features, windows[:count], (3, 2))
    expected = loop_windows(features, windows, (3, 2))[:count]
    np.testing.assert_array_equal(pooled, expected)


def test_nan_and_infinities_reach_the_bins_that_hold_them_and_no_others():
    features = random_features(7, 9, 3)
    features[2, 3] = np.nan
    features[4, 8] = np.inf
    features[5:, :5, 1] = -np.inf
    windows = all_windows(7, 9)
    pooled = sn.window_pyramid_pool(features, windows, (3, 1))
    np.testing.assert_array_equal(pooled, loop_windows(features, windows, (3, 1)))


def test_bins_keep_the_order_of_levels_even_repeated():
    features, windows = random_features(12, 12, 2), random_windows(9, 12, 12)
    fine, coarse = (loop_windows(features, windows, (n,)) for n in (6, 2))
    pooled = sn.window_pyramid_pool(features, windows, (2, 6, 2))
    expected = np.concatenate([coarse, fine, coarse], axis=1)
    np.testing.assert_array_equal(pooled, expected)


@pytest.mark.parametrize("levels", [(6, 3, 2, 1), (4, 3, 1)], ids=str)
def test_the_gradient_equals_that_of_slicing_and_maximum(levels):
    features = np.random.default_rng(0).permutation(11 * 8 * 2).reshape(11, 8, 2)
    windows = random_windows(70, 11, 8)
    shape = (len(windows), sn.num_bins(levels), 2)
    weights = np.random.default_rng(1).integers(-9, 10, shape)

    # Distinct values: each bin's weight goes to the one cell that is its maximum.
    expected = np.zeros(features.shape)
    cells = {value: cell for cell, value in np.ndenumerate(features)}
    pooled = loop_windows(features, windows, levels)
    for value, weight in zip(pooled.flat, weights.flat, strict=True):
        expected[cells[value]] += weight

    def loss(features):
        return (sn.window_pyramid_pool(features, windows, levels) * weights).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(features, jnp.float32))
    np.testing.assert_array_equal(gradient, expected)


def test_equal_cells_share_a_gradient_that_still_sums_to_one_for_each_bin():
    windows = random_windows(20, 9, 9)

    def total(features):
        return sn.window_pyramid_pool(features, windows, (4, 2)).sum()

    gradient = jax.jit(jax.grad(total))(jnp.zeros((9, 9, 1)))
    assert (gradient >= 0).all()
    np.testing.assert_allclose(gradient.sum(), 20 * 20, rtol=1e-6)


def test_a_nan_in_a_window_makes_its_gradient_nan_and_leaves_others_alone():
    features = jnp.asarray(random_features(7, 9, 1)).at[2, 3].set(jnp.nan)
    windows = np.array([[1, 2, 5, 6], [5, 0, 7, 9]])
    for dtype in (jnp.float32, jnp.bfloat16):

        def loss(x):
            return sn.window_pyramid_pool(x, windows, (3, 1)).sum()

        gradient = np.asarray(
            jax.jit(jax.grad(loss))(features.astype(dtype)), np.float32
        )
        assert np.isnan(gradient[2, 3])
        assert gradient[5:].sum() == sn.num_bins((3, 1))
        assert (gradient[0] == 0).all()


def test_vmap_over_maps_each_with_its_own_windows():
    features = random_features(3, 10, 7, 2)
    windows = np.stack([random_windows(80, 10, 7, seed) for seed in range(3)])
    pool = jax.vmap(lambda x, w: sn.window_pyramid_pool(x, w, (3, 2, 1)))
    for one, some, pooled in zip(
        features, windows, pool(features, windows), strict=True
    ):
        np.testing.assert_array_equal(pooled, loop_windows(one, some, (3, 2, 1)))


def test_gradients_under_vmap_are_those_of_each_map():
    features = jnp.asarray(random_features(3, 10, 7, 2))
    windows = np.stack([random_windows(30, 10, 7, seed) for seed in range(3)])

    def total(x, w):
        return (sn.window_pyramid_pool(x, w, (3, 2, 1)) ** 2).sum()

    together = jax.vmap(jax.grad(total))(features, windows)
    for one, some, gradient in zip(features, windows, together, strict=True):
        np.testing.assert_allclose(gradient, jax.grad(total)(one, some), rtol=1e-6)


def test_one_program_serves_all_new_windows():
    pool = jax.jit(sn.window_pyramid_pool, static_argnums=2)
    features = random_features(20, 30, 2)
    for seed in range(4):
        windows = random_windows(50, 20, 30, seed)
        pooled = pool(features, windows, (6, 3, 2, 1))
        expected = loop_windows(features, windows, (6, 3, 2, 1))
        np.testing.assert_array_equal(pooled, expected)
    assert pool._cache_size() == 1


def test_traced_windows_are_clamped_to_the_map_and_to_one_cell():
    features = random_features(6, 8, 2)
    windows = np.array([(-3, 2, 4, 99), (5, 6, 2, 3), (50, -9, 60, -7), (3, 3, 3, 3)])
    clamped = np.array([(0, 2, 4, 8), (5, 6, 6, 7), (5, 0, 6, 1), (3, 3, 4, 4)])
    pooled = jax.jit(lambda w: sn.window_pyramid_pool(features, w, (3, 1)))(windows)
    np.testing.assert_array_equal(pooled, loop_windows(features, clamped, (3, 1)))


def test_memory_holds_a_table_of_some_channels_and_no_gathered_copies():
    levels, cells = (6, 3, 2, 1), 43 * 58 * 256 * 4
    lowered = jax.jit(lambda x, w: sn.window_pyramid_pool(x, w, levels)).lower(
        jax.ShapeDtypeStruct((43, 58, 256), jnp.float32),
        jax.ShapeDtypeStruct((2000, 4), jnp.int32),
    )
    memory = lowered.compile().memory_analysis()
    assert memory.output_size_in_bytes == 2000 * 50 * 256 * 4
    assert memory.temp_size_in_bytes < 2 * 16 * cells * 64 / 256 + 5e6


@pytest.mark.parametrize(
    ("window", "seen"),
    [
        ((2, 1, 2, 3), r"window 1 is \(2, 1, 2, 3\).*map of 5×6"),
        ((1, 4, 3, 2), r"window 1 is \(1, 4, 3, 2\)"),
        ((-1, 0, 3, 2), r"window 1 is \(-1, 0, 3, 2\)"),
        ((0, 0, 6, 2), r"window 1 is \(0, 0, 6, 2\)"),
        ((0, 0, 5, 7), r"window 1 is \(0, 0, 5, 7\)"),
    ],
)
def test_the_first_bad_window_is_named_with_the_map_s_size(window, seen):
    windows = np.array([(0, 0, 5, 6), window, (9, 9, 9, 9)])
    with pytest.raises(ValueError, match=seen):
        sn.window_pyramid_pool(random_features(5, 6, 1), windows, (2, 1))


def test_a_bad_window_that_is_a_constant_of_a_jitted_function_is_refused():
    windows = np.array([(0, 0, 9, 9)])
    pool = jax.jit(lambda features: sn.window_pyramid_pool(features, windows, (1,)))
    with pytest.raises(ValueError, match="window 0"):
        pool(random_features(5, 6, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"levels": ()}, ValueError, "levels must be a tuple"),
        ({"windows": [(0.0, 0.0, 1.0, 1.0)]}, TypeError, "got float32; boxes_to_windo"),
        ({"windows": (0, 0, 1, 1)}, ValueError, r"int \[N, 4\].*got shape \(4,\)"),
        ({"features": np.zeros((2, 5, 6, 1))}, ValueError, "use jax.vmap"),
        ({"features": np.zeros((0, 6, 1))}, ValueError, "empty map"),
        ({"features": np.zeros((5, 6, 1), int)}, TypeError, "must be floating point"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_seen(arguments, error, message):
    call = {
        "features": random_features(5, 6, 1),
        "windows": [(0, 0, 5, 6)],
        "levels": (2, 1),
    } | arguments
    with pytest.raises(error, match=message):
        sn.window_pyramid_pool(**call)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_infinities_and_nan_of_either_sign_are_kept_in_every_type(dtype):
    features = np.random.default_rng(0).normal(size=(6, 7, 3)).astype(np.float32)
    features[1, 2] = -np.inf, np.inf, np.nan
    features[4, 5] = -np.nan, -np.inf, -0.0
    features[5] = -features[5]
    features = jnp.asarray(features, dtype)
    windows = [(0, 0, 6, 7), (1, 2, 2, 3), (4, 5, 5, 6), (3, 3, 6, 7), (0, 0, 1, 2)]
    pooled = sn.window_pyramid_pool(features, np.array(windows), (3, 1))
    for own, (top, left, bottom, right) in zip(pooled, windows, strict=True):
        crop = sn.spatial_pyramid_pool(features[top:bottom, left:right], (3, 1))
        np.testing.assert_array_equal(np.float32(own), np.float32(crop))
    assert jnp.isnan(pooled[0, -1, [0, 2]]).all()
    assert pooled.dtype == features.dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_windows_are_exact_with_x64_too(dtype):
    with jax.enable_x64(True):
        features = np.random.default_rng(0).normal(size=(9, 7, 3)).astype(dtype)
        windows = np.array([[0, 0, 9, 7], [2, 1, 8, 6], [4, 4, 5, 5]])
        pooled = sn.window_pyramid_pool(jnp.asarray(features), windows, (3, 2))
        for own, (top, left, bottom, right) in zip(pooled, windows, strict=True):
            crop = features[top:bottom, left:right]
            np.testing.assert_array_equal(own, loop_pool(crop, (3, 2)))
        assert pooled.dtype == dtype
