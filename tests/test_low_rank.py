"""Truncated fully connected layers against the exact SVD and the network itself."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.detection.detector import layer_head, scoring_head
from sppnet_jax.detection.low_rank import (
    multiplications,
    spectrum_kept,
    truncate_fc,
)
from sppnet_jax.network.model import create_model

POOLED = 96


@pytest.fixture(scope="module")
def network():
    """A narrow network's fc layers, with biases that are not zero."""
    model = create_model("zf5", num_classes=7, width=0.01, weight_init="he")
    init = jax.jit(model.init, static_argnames="method")
    pyramid = jnp.zeros((1, POOLED))
    params = init(jax.random.key(0), pyramid, method="classify")["params"]
    rng = np.random.default_rng(0)
    for layer in params.values():
        layer["bias"] = jnp.asarray(rng.normal(size=layer["bias"].shape), jnp.float32)
    return model, params


def pooled_windows(count=5):
    return np.random.default_rng(1).random((count, POOLED), np.float32)


def kernel(name, rows, columns):
    """A kernel whose singular values fall in a certain way."""
    rng = np.random.default_rng(2)
    rank = min(rows, columns)
    u = np.linalg.qr(rng.normal(size=(rows, rank)))[0]
    v = np.linalg.qr(rng.normal(size=(columns, rank)))[0]
    index = np.arange(rank)
    values = {
        "noise": 1 + 0.01 * rng.random(rank),
        "slow": 1 / (1 + index),
        "steep": 1e3 * 0.7**index,
        "tiny": 1e-22 / (1 + index),
        "low rank": np.where(index < 5, 1.0, 0.0),
    }[name]
    return ((u * values) @ v.T).astype(np.float32)


def test_truncated_layers_compute_with_the_approximated_kernels(network):
    model, params = network
    ranks = {"fc6": 9, "fc7": 11}
    truncated = truncate_fc(params, ranks)
    pooled = jnp.asarray(pooled_windows())
    logits, fcs = model.apply({"params": truncated}, pooled, method="classify")
    expected = pooled_windows().astype(np.float64)
    for name in ("fc6", "fc7", "fc8"):
        weights = np.asarray(params[name]["kernel"], np.float64)
        u, s, vt = np.linalg.svd(weights, full_matrices=False)
        s[ranks.get(name, len(s)) :] = 0
        expected = expected @ ((u * s) @ vt) + np.asarray(params[name]["bias"])
        if name != "fc8":
            expected = np.maximum(expected, 0)
        layer = {**fcs, "fc8": logits}[name]
        np.testing.assert_allclose(layer, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [{}, {"fc6": 9, "fc7": 11}])
def test_a_head_computes_no_layer_above_its_own(network, ranks):
    model, params = network
    truncated, used = truncate_fc(params, ranks), 0
    for layer in ("fc6", "fc7"):
        used += multiplications(truncated)[layer]
        head = jax.jit(layer_head(model, layer))
        compiled = head.lower(truncated, pooled_windows(256)).compile()
        flops = compiled.cost_analysis()["flops"] / 256
        # Beside products, some operations for each unit; fc8's products are 574.
        assert 2 * used <= flops < 2 * used + 400


def test_a_head_takes_layers_of_other_classes_than_the_network_s(network):
    model, params = network
    pooled = jnp.asarray(pooled_windows())
    expected, fcs = model.apply({"params": params}, pooled, method="classify")
    other = model.clone(num_classes=99)
    np.testing.assert_array_equal(layer_head(other, "fc7")(params, pooled), fcs["fc7"])
    head, weights = scoring_head(other, params)
    scores, deltas = head(weights, pooled)
    assert deltas is None
    np.testing.assert_array_equal(scores, jax.nn.softmax(expected)[:, :-1])


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("name", ["noise", "slow", "steep", "tiny", "low rank"])
def test_no_approximation_of_that_rank_comes_closer(name, shape):
    weights, rank = kernel(name, *shape), 12
    layer = {"kernel": weights, "bias": np.zeros(shape[1], np.float32)}
    truncated = truncate_fc({"fc6": layer}, {"fc6": rank})
    down, up = truncated["fc6"]["down"], truncated["fc6"]["up"]
    assert down.shape == (shape[0], rank)
    assert up.shape == (rank, shape[1])
    exact = weights.astype(np.float64)
    values = np.linalg.svd(exact, compute_uv=False)
    error = np.linalg.norm(exact - down.astype(np.float64) @ up)
    best = np.linalg.norm(values[rank:])
    # Rounding of the weights themselves is all that an exact fit leaves.
    assert error <= 1.001 * best + 2e-6 * np.linalg.norm(exact)
    np.testing.assert_allclose(up @ up.T, np.eye(rank), atol=1e-5)
    kept = spectrum_kept({"fc6": layer}, truncated)
    expected = (values[:rank] ** 2).sum() / (values**2).sum()
    assert kept == {"fc6": pytest.approx(expected, rel=1e-5)}


def test_layers_without_a_lower_rank_stay_as_they_are(network):
    _, params = network
    least = min(params["fc6"]["kernel"].shape)
    truncated = truncate_fc(params, {"fc6": least, "fc7": 0})
    assert truncated == dict(params)
    assert spectrum_kept(params, truncated) == {}
    assert "kernel" in truncate_fc(params, {"fc7": 3})["fc6"]
    assert "kernel" in params["fc7"]


def test_a_kernel_of_zeros_has_nothing_to_lose():
    layers = {"fc6": {"kernel": np.zeros((6, 5), np.float32), "bias": np.zeros(5)}}
    truncated = truncate_fc(layers, {"fc6": 2})
    np.testing.assert_array_equal(truncated["fc6"]["down"], np.zeros((6, 2)))
    assert spectrum_kept(layers, truncated) == {"fc6": 1.0}


def test_multiplications_are_those_of_the_matrices(network):
    _, params = network
    units = params["fc7"]["kernel"].shape[0]
    assert multiplications(params) == {
        "fc6": POOLED * units,
        "fc7": units * units,
        "fc8": units * 7,
    }
    truncated = multiplications(truncate_fc(params, {"fc6": 9}))
    assert truncated["fc6"] == 9 * (POOLED + units)
    assert truncated["fc7"] == units * units


def test_a_rank_that_saves_nothing_is_said(network, caplog):
    _, params = network
    units = params["fc7"]["kernel"].shape[0]
    with caplog.at_level(logging.WARNING):
        truncate_fc(params, {"fc7": units // 2 - 1})
        assert not caplog.records
        truncate_fc(params, {"fc7": units // 2 + 1})
    assert f"fc7 of {units}×{units} saves nothing at rank" in caplog.text


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"fc9": 3}, "no layer 'fc9' to truncate; there are .*fc6"),
        ({"short": 2}, "short is truncated already"),
        ({"conv1": 2}, r"conv1 is not fully connected: .* \(3, 3, 3, 8\)"),
        ({"broken": 1}, "broken has weights that are not finite"),
    ],
)
def test_layers_that_cannot_be_truncated_are_errors(network, ranks, message):
    params = {
        **network[1],
        "short": {"down": np.ones((4, 2)), "up": np.ones((2, 4)), "bias": np.ones(4)},
        "conv1": {"kernel": np.ones((3, 3, 3, 8)), "bias": np.ones(8)},
        "broken": {"kernel": np.full((4, 4), np.nan), "bias": np.ones(4)},
    }
    with pytest.raises(ValueError, match=message):
        truncate_fc(params, ranks)
