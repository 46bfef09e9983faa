"""The layer against a plain NumPy loop written from the paper's formulas."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn

pytestmark = pytest.mark.quick

PYRAMIDS = [(6, 3, 2, 1), (4, 3, 2, 1), (4, 2, 1), (3, 2, 1), (5,)]


def loop_pool(features, levels, reduce=np.max):
    """Appendix A, one bin at a time: [floor(i·a/n), ceil((i+1)·a/n)) for each side."""
    height, width = features.shape[:2]
    bins = []
    for n in levels:
        for i, j in itertools.product(range(n), range(n)):
            rows = slice(math.floor(i * height / n), math.ceil((i + 1) * height / n))
            columns = slice(math.floor(j * width / n), math.ceil((j + 1) * width / n))
            bins.append(reduce(features[rows, columns], axis=(0, 1)))
    return np.stack(bins)


def random_features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def pool_valid():
    """One compiled program a pyramid for every size: the size is a traced value."""
    return {
        levels: jax.jit(
            lambda x, size, levels=levels: sn.spatial_pyramid_pool(
                x, levels, valid_size=size
            )
        )
        for levels in PYRAMIDS
    }


@pytest.mark.parametrize("levels", PYRAMIDS, ids=str)
def test_every_map_size_from_1_to_40_equals_the_formula_exactly(levels, pool_valid):
    sizes = np.array(list(itertools.product(range(1, 41), range(1, 41))))
    maps = random_features(len(sizes), 40, 40, 1)
    pooled = np.concatenate(
        [
            pool_valid[levels](part, size)
            for part, size in zip(np.split(maps, 16), np.split(sizes, 16), strict=True)
        ]
    )
    for features, (height, width), bins in zip(maps, sizes, pooled, strict=True):
        expected = loop_pool(features[:height, :width], levels)
        np.testing.assert_array_equal(bins, expected, err_msg=f"{height}×{width}")


@pytest.mark.parametrize("levels", PYRAMIDS, ids=str)
def test_static_maps_of_every_size_equal_the_formula_exactly(levels):
    # Rows and columns pool separately: each length in each direction covers all pairs.
    maps = [random_features(size, 41 - size, 2, seed=size) for size in range(1, 41)]
    pool_all = jax.jit(lambda maps: [sn.spatial_pyramid_pool(x, levels) for x in maps])
    for features, pooled in zip(maps, pool_all(maps), strict=True):
        np.testing.assert_array_equal(pooled, loop_pool(features, levels))


def test_valid_size_ignores_what_lies_beyond_even_nan_and_infinity():
    features = np.full((3, 20, 17, 2), np.nan, np.float32)
    features[1] = np.inf
    sizes = [(20, 17), (7, 3), (1, 1)]
    for k, (height, width) in enumerate(sizes):
        features[k, :height, :width] = random_features(height, width, 2, seed=k)
    pooled = sn.spatial_pyramid_pool(features, (4, 3, 1), valid_size=np.array(sizes))
    for k, (height, width) in enumerate(sizes):
        alone = sn.spatial_pyramid_pool(features[k, :height, :width], (4, 3, 1))
        np.testing.assert_array_equal(pooled[k], alone)


def test_valid_size_may_be_a_pair_of_traced_numbers():
    features = random_features(9, 9, 2)
    pool = jax.jit(
        lambda h, w: sn.spatial_pyramid_pool(features, (3, 1), valid_size=(h, w))
    )
    np.testing.assert_array_equal(pool(5, 7), loop_pool(features[:5, :7], (3, 1)))


@pytest.mark.parametrize("shape", [(0, 7, 7, 3), (2, 7, 7, 0)])
def test_no_maps_and_no_channels_give_empty_bins(shape):
    pooled = sn.spatial_pyramid_pool(np.zeros(shape, np.float32), (3, 2, 1))
    assert pooled.shape == (shape[0], 14, shape[3])


def test_one_program_serves_every_valid_size(pool_valid):
    pool = pool_valid[(6, 3, 2, 1)]
    features = random_features(100, 40, 40, 1)
    pool(features, np.full((100, 2), 40))
    before = pool._cache_size()
    for size in (1, 9, 33):
        pool(features, np.full((100, 2), size))
    assert pool._cache_size() == before


@pytest.mark.parametrize("shape", [(13, 9, 4), (2, 13, 9, 4), (2, 3, 13, 9, 4)])
def test_any_number_of_leading_dimensions(shape):
    features = random_features(*shape)
    pooled = sn.spatial_pyramid_pool(features, (3, 2))
    assert pooled.shape == (*shape[:-3], 13, 4)
    flat = features.reshape(-1, 13, 9, 4)
    expected = np.stack([loop_pool(one, (3, 2)) for one in flat])
    np.testing.assert_array_equal(pooled.reshape(-1, 13, 4), expected)


def test_valid_size_broadcasts_over_leading_dimensions():
    features = random_features(2, 3, 10, 10, 1)
    sizes = np.array([[[4, 7]], [[10, 2]]])
    pooled = sn.spatial_pyramid_pool(features, (2, 1), valid_size=sizes)
    for i, j in itertools.product(range(2), range(3)):
        height, width = sizes[i, 0]
        expected = loop_pool(features[i, j, :height, :width], (2, 1))
        np.testing.assert_array_equal(pooled[i, j], expected)


def test_bins_keep_the_order_of_levels():
    features = random_features(12, 12, 2)
    fine, coarse = loop_pool(features, (6,)), loop_pool(features, (2,))
    pooled = sn.spatial_pyramid_pool(features, (2, 6, 2))
    np.testing.assert_array_equal(pooled, np.concatenate([coarse, fine, coarse]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("reducer", ["max", "mean"])
def test_dtype_in_is_dtype_out(dtype, reducer):
    features = jnp.asarray(random_features(13, 13, 8), dtype)
    pooled = sn.spatial_pyramid_pool(features, (6, 1), reducer=reducer)
    assert pooled.dtype == dtype
    reduce = {"max": np.max, "mean": np.mean}[reducer]
    expected = loop_pool(np.asarray(features, np.float32), (6, 1), reduce)
    tolerance = {"max": 0, "mean": 1e-2 if dtype == jnp.bfloat16 else 1e-6}[reducer]
    np.testing.assert_allclose(np.asarray(pooled, np.float32), expected, atol=tolerance)


@pytest.mark.parametrize("size", [(7, 11), (6, 6), (2, 3)])
def test_mean_pools_the_same_bins(size):
    features = random_features(*size, 3)
    expected = loop_pool(features, (4, 3, 1), np.mean)
    pooled = sn.spatial_pyramid_pool(features, (4, 3, 1), reducer="mean")
    np.testing.assert_allclose(pooled, expected, atol=1e-6)
    padded = np.pad(features, ((0, 5), (0, 2), (0, 0)), constant_values=9)
    masked = sn.spatial_pyramid_pool(
        padded, (4, 3, 1), reducer="mean", valid_size=np.array(size)
    )
    np.testing.assert_allclose(masked, expected, atol=1e-6)


@pytest.mark.parametrize("valid_size", [None, (7, 8)])
@pytest.mark.parametrize("reducer", ["max", "mean"])
def test_gradients_agree_with_finite_differences(reducer, valid_size):
    levels = (6, 4, 3, 1)
    # Values a tenth apart and a step of a hundredth: no maximum changes hands.
    values = np.random.default_rng(1).permutation(9 * 8).reshape(9, 8, 1) / 10
    weights = random_features(sn.num_bins(levels), 1, seed=2).astype(np.float64)

    def loss(x):
        pooled = sn.spatial_pyramid_pool(
            x, levels, reducer=reducer, valid_size=valid_size
        )
        return (pooled * weights.astype(x.dtype)).sum()

    def oracle(x):
        height, width = valid_size or x.shape[:2]
        reduce = {"max": np.max, "mean": np.mean}[reducer]
        return (loop_pool(x[:height, :width], levels, reduce) * weights).sum()

    step, expected = 1e-2, np.zeros_like(values)
    for index in np.ndindex(values.shape):
        moved = values.copy()
        moved[index] += step
        expected[index] = (oracle(moved) - oracle(values)) / step
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


def test_the_paper_s_sliding_examples_on_a_13_map():
    expected = {4: (4, 3), 3: (5, 4), 2: (7, 6), 1: (13, 13)}
    for level, (window, stride) in expected.items():
        bins = sn.pyramid_bins(13, level, rule="sliding")
        assert bins.tolist() == [
            [k * stride, k * stride + window] for k in range(level)
        ]


def test_the_rules_agree_exactly_where_the_remainder_is_0_or_1():
    for level, size in itertools.product(range(1, 8), range(1, 41)):
        if size < level:
            continue
        try:
            sliding = sn.pyramid_bins(size, level, rule="sliding")
        except ValueError:
            sliding = None
        same = sliding is not None and (sliding == sn.pyramid_bins(size, level)).all()
        assert same == (size % level in (0, 1)), (size, level)


WRONG_COUNTS = {
    3: [1, 2, 5],
    4: [1, 2, 3, 6, 7, 11],
    6: [1, 2, 3, 4, 5, 8, 9, 10, 11, 15, 16, 17, 22, 23, 29],
}


@pytest.mark.parametrize("level", WRONG_COUNTS)
def test_the_sliding_rule_refuses_the_sizes_where_it_fails(level):
    refused = []
    for size in range(1, 41):
        try:
            sn.pyramid_bins(size, level, rule="sliding")
        except ValueError:
            refused.append(size)
    assert refused == WRONG_COUNTS[level]


def test_the_refusal_names_size_level_and_outputs_of_the_180_pixel_case():
    with pytest.raises(ValueError, match=r"9×9 outputs on a map of size 10 at level 6"):
        sn.spatial_pyramid_pool(random_features(10, 10, 1), (6,), rule="sliding")


def test_sliding_pooling_equals_its_own_windows():
    features = random_features(13, 12, 2)
    bins = []
    for row, column in itertools.product(range(4), range(4)):
        window = features[row * 3 : row * 3 + 4, column * 3 : column * 3 + 3]
        bins.append(window.max(axis=(0, 1)))
    pooled = sn.spatial_pyramid_pool(features, (4,), rule="sliding")
    np.testing.assert_array_equal(pooled, np.stack(bins))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": ()}, "levels must be a tuple"),
        ({"levels": 3}, "levels must be a tuple"),
        ({"levels": None}, "levels must be a tuple"),
        ({"levels": (3, 0)}, "positive integer"),
        ({"levels": (2.5,)}, "positive integer"),
        ({"rule": "torch"}, "unknown rule 'torch'"),
        ({"reducer": "min"}, "unknown reducer 'min'"),
        ({"features": np.zeros((5, 5), np.float32)}, "height, width, channels"),
        ({"features": np.zeros((0, 5, 1), np.float32)}, "empty map"),
        ({"valid_size": (6, 5)}, r"\(5, 5\), got \[6, 5\]"),
        ({"valid_size": (0, 5)}, "valid_size must lie within"),
        ({"valid_size": (5, 5, 1)}, r"int \[..., 2\], got shape \(3,\)"),
        ({"valid_size": [(5, 5)] * 2}, r"\(2, 2\) does not fit .* dimensions are \(\)"),
        ({"valid_size": (5, 5), "rule": "sliding"}, "needs rule='adaptive'"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_seen(arguments, message):
    call = {"features": np.zeros((5, 5, 1), np.float32), "levels": (2,)} | arguments
    with pytest.raises(ValueError, match=message):
        sn.spatial_pyramid_pool(call.pop("features"), call.pop("levels"), **call)


def test_integer_features_are_refused():
    with pytest.raises(TypeError, match="floating point, got int32"):
        sn.spatial_pyramid_pool(np.zeros((5, 5, 1), np.int32), (2,))
