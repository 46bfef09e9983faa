"""Maxima of static bins and their gradient, beside plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.pyramid.span_max import span_max

TILES = ((0, 2), (2, 4), (4, 6))
OVERLAPPING = ((0, 3), (2, 5), (4, 7))
PADDED = ((0, 2), (1, 4), (3, 6), (5, 7))  # of a pooling with padding
UNEVEN = ((0, 2), (1, 4), (3, 5), (5, 7))
GAPS = ((1, 2), (4, 6))
REPEATED = ((0, 1), (0, 1), (0, 2))
LONG = ((0, 7), (1, 8), (0, 20))
CASES = [
    (TILES, TILES),
    (OVERLAPPING, TILES),
    (PADDED, OVERLAPPING),
    (UNEVEN, PADDED),
    (GAPS, UNEVEN),
    (REPEATED, GAPS),
    (LONG, OVERLAPPING),
    (((0, 5), (4, 9)), ((0, 5), (3, 8))),  # rows first, then columns
]


def loops(maps, rows, columns, weights):
    """Every bin's maximum, and the gradient of their weighted sum."""
    pooled = np.empty((len(maps), len(rows), len(columns), maps.shape[3]))
    gradient = np.zeros(maps.shape)
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            cells = maps[:, top:bottom, left:right]
            pooled[:, i, j] = cells.max(axis=(1, 2))
            wins = cells == pooled[:, i, j][:, None, None]
            share = weights[:, i, j] / wins.sum(axis=(1, 2))
            gradient[:, top:bottom, left:right] += wins * share[:, None, None]
    return pooled, gradient


def with_distinct_cells(rows, columns, seed=0):
    shape = max(stop for _, stop in rows), max(stop for _, stop in columns)
    random = np.random.default_rng(seed)
    cells = [random.permutation(shape[0] * shape[1]) for _ in range(6)]
    maps = np.stack(cells, axis=-1).reshape(*shape, 2, 3)
    weights = random.integers(-9, 9, (2, len(rows), len(columns), 3))
    return maps.transpose(2, 0, 1, 3).astype(np.float32), weights.astype(np.float32)


@pytest.mark.parametrize(("rows", "columns"), CASES)
def test_maxima_and_gradient_are_those_of_loops_over_the_bins(rows, columns):
    maps, weights = with_distinct_cells(rows, columns)
    expected, gradient = loops(maps, rows, columns, weights)
    pooled, back = jax.vjp(lambda x: span_max(x, rows, columns), jnp.asarray(maps))
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(back(jnp.asarray(weights))[0], gradient)


@pytest.mark.parametrize("rows", [TILES, OVERLAPPING, PADDED, UNEVEN])
def test_cells_that_tie_share_the_gradient_evenly(rows):
    maps, weights = with_distinct_cells(rows, rows)
    maps = np.floor(maps / 10)  # ten of each value
    _, gradient = loops(maps, rows, rows, weights)
    _, back = jax.vjp(lambda x: span_max(x, rows, rows), jnp.asarray(maps))
    ours = back(jnp.asarray(weights))[0]
    if len({stop - start for start, stop in rows}) > 1:
        # Reduced in two passes: ties are shared out in each row of bins first.
        np.testing.assert_allclose(
            ours.sum(axis=(1, 2)), gradient.sum(axis=(1, 2)), 1e-5
        )
    else:
        np.testing.assert_allclose(ours, gradient, rtol=1e-5)


def test_bfloat16_is_exact_and_its_gradient_is_summed_in_float32():
    random = np.random.default_rng(0)
    maps = jnp.asarray(random.normal(size=(1, 7, 7, 4)), jnp.bfloat16)
    weights = jnp.ones((1, 3, 3, 4), jnp.bfloat16)
    pooled, back = jax.vjp(lambda x: span_max(x, OVERLAPPING, OVERLAPPING), maps)
    wide, wide_back = jax.vjp(
        lambda x: span_max(x, OVERLAPPING, OVERLAPPING), maps.astype(jnp.float32)
    )
    assert pooled.dtype == back(weights)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(pooled.astype(jnp.float32), wide)
    expected = wide_back(weights.astype(jnp.float32))[0].astype(jnp.bfloat16)
    np.testing.assert_array_equal(back(weights)[0], expected)


def test_a_nan_makes_its_bins_nan():
    maps = jnp.zeros((1, 7, 7, 1)).at[0, 0, 0, 0].set(jnp.nan)
    pooled = np.asarray(span_max(maps, OVERLAPPING, OVERLAPPING))[0, :, :, 0]
    assert np.isnan(pooled[0, 0])
    assert np.isnan(pooled).sum() == 1


def test_a_nan_s_bins_have_a_nan_for_a_gradient_and_others_their_own():
    maps = np.random.default_rng(0).permutation(49).reshape(1, 7, 7, 1)
    maps = jnp.asarray(maps, jnp.float32)

    def gradient(maps):
        pooled, back = jax.vjp(lambda x: span_max(x, OVERLAPPING, OVERLAPPING), maps)
        return back(jnp.ones_like(pooled))[0]

    found = gradient(maps.at[0, 0, 0, 0].set(jnp.nan))
    (rows, columns) = OVERLAPPING[0], OVERLAPPING[0]
    in_bin = np.zeros((1, 7, 7, 1), bool)
    in_bin[:, slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(np.isnan(found), in_bin)
    np.testing.assert_array_equal(
        found[~in_bin], gradient(maps.at[0, 0, 0, 0].set(-1.0))[~in_bin]
    )


def test_second_maps_of_a_batch_and_vmap_give_the_same():
    maps, _ = with_distinct_cells(PADDED, UNEVEN)
    whole = span_max(jnp.asarray(maps), PADDED, UNEVEN)
    one = jax.vmap(lambda m: span_max(m[None], PADDED, UNEVEN)[0])(jnp.asarray(maps))
    np.testing.assert_array_equal(whole, one)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), CASES)
def test_other_platforms_maxima_are_the_cpu_s_also_of_ties_and_nans(
    rows, columns, dtype, monkeypatch
):
    maps, weights = with_distinct_cells(rows, columns)
    maps = np.floor(maps / 5) - 3  # five of each value
    maps[0, rows[0][0], columns[-1][0], 0] = np.nan
    maps[1, -1, -1, 2] = np.inf
    maps[1, :4, :4, 1] = -np.inf

    def pooled_and_gradient():
        function = lambda x: span_max(x, rows, columns)  # noqa: E731
        pooled, back = jax.vjp(function, jnp.asarray(maps, dtype))
        gradient = back(jnp.asarray(weights, dtype))[0]
        return pooled.astype(jnp.float32), gradient.astype(jnp.float32)

    here = pooled_and_gradient()
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
    elsewhere = pooled_and_gradient()
    for one, other in zip(here, elsewhere, strict=True):
        assert np.isnan(one).any()
        np.testing.assert_array_equal(one, other)
