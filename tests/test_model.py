"""The network: its parameters, its twin without SPP, and images in larger buckets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax.network.layers import conv, local_response_norm
from sppnet_jax.network.model import init_params, param_shapes, pooled_length
from sppnet_jax.network.stack import cut_names
from sppnet_jax.network.trunks import BACKBONES

pytestmark = pytest.mark.quick

CONVOLUTIONS = {  # (kernel, in, out)
    "zf5": [(7, 3, 96), (5, 96, 256), (3, 256, 384), (3, 384, 384), (3, 384, 256)],
    "convnet5": [
        (11, 3, 96),
        (5, 96, 256),
        (3, 256, 384),
        (3, 384, 384),
        (3, 384, 256),
    ],
    "overfeat5": [(7, 3, 96), (5, 96, 256), (3, 256, 512), *[(3, 512, 512)] * 2],
    "overfeat7": [(7, 3, 96), (5, 96, 256), (3, 256, 512), *[(3, 512, 512)] * 4],
}


def init(model, side=None, seed=0):
    side = side or model.image_size
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, side, side, 3)))


def random_images(*shape, seed=0):
    images = np.random.default_rng(seed).normal(size=(*shape, 3))
    return jnp.asarray(images, jnp.float32)


@pytest.mark.parametrize("levels", [None, (6, 3, 2, 1), (4, 3, 2, 1)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_parameter_counts_are_those_of_table_1(name, levels):
    shapes = jax.eval_shape(lambda: init(sn.create_model(name, levels)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    convs = sum(k * k * i * o + o for k, i, o in CONVOLUTIONS[name])
    bins = 36 if levels is None else sum(n * n for n in levels)
    fc6 = bins * CONVOLUTIONS[name][-1][2] * 4096 + 4096
    assert count == convs + fc6 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000


@pytest.mark.parametrize("name", BACKBONES)
def test_the_shapes_that_the_table_tells_are_those_of_tracing(name):
    backbone = BACKBONES[name]
    cuts = cut_names(backbone.layers)[-2:]
    given = [((3, 1), (), "fc")]
    given += [((2, 1), cuts, "linear"), ((1,), cuts[:1], "none")] if cuts else []
    given += [(None, (), "fc")] if backbone.last_pool else []
    for levels, chosen, head in given:
        model = sn.create_model(name, levels, 7, width=0.1, cuts=chosen, head=head)
        traced = jax.eval_shape(
            functools.partial(init_params, model), jax.random.key(0)
        )
        told = param_shapes(model)
        assert jax.tree.structure(told) == jax.tree.structure(traced)
        for one, other in zip(*map(jax.tree.leaves, (told, traced)), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        _, seen = jax.eval_shape(model.apply, {"params": traced}, images)
        assert pooled_length(model) == seen["pyramid"].shape[1]


@pytest.fixture(scope="module")
def narrow():
    """A narrow ZF-5, its parameters (biases not zero), its compiled forward pass."""
    model = sn.create_model("zf5", (3, 2, 1), 5, width=0.1, weight_init="he")
    noise = iter(jax.random.split(jax.random.key(7), 99))
    variables = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), init(model, 64)
    )
    return model, variables, jax.jit(model.apply)


def test_named_intermediates_of_every_layer(narrow):
    model, variables, apply = narrow
    logits, layers = apply(variables, random_images(2, 64, 100))
    convs = {"conv1", "conv2", "conv3", "conv4", "conv5"}
    assert set(layers) == convs | {"pyramid", "fc6", "fc7"}
    pooled = sn.spatial_pyramid_pool(layers["conv5"], (3, 2, 1)).reshape(2, -1)
    np.testing.assert_array_equal(layers["pyramid"], pooled)
    again, _ = model.apply(variables, layers["pyramid"], method="classify")
    np.testing.assert_allclose(again, logits, rtol=1e-6)
    assert all((layer >= 0).all() for layer in layers.values())


@pytest.mark.parametrize("size", [(64, 100), (31, 47), (77, 64), (50, 99)])
def test_an_image_in_a_larger_bucket_scores_as_at_its_own_size(narrow, size):
    _, variables, apply = narrow
    images = random_images(2, *size)
    alone, _ = apply(variables, images)
    beyond = jnp.full((2, 100, 100, 3), 9.0)
    padded = beyond.at[:, : size[0], : size[1]].set(images)
    scores, layers = apply(variables, padded, jnp.array([size, size]))
    np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-6)
    rows = sn.backbone_geometry("zf5").map_size(size[0])
    assert (layers["conv5"][:, rows:] == 0).all()


def test_the_twin_without_spp_refuses_other_sizes_and_says_why():
    model = sn.create_model("zf5", None, 5, width=0.1, image_size=64)
    variables = init(model)
    model.apply(variables, random_images(1, 64, 64))
    with pytest.raises(ValueError, match="of 64×64 pixels only, got 64×80"):
        model.apply(variables, random_images(1, 64, 80))


@pytest.mark.parametrize("size", [(10, 100), (101, 50), (0, 0)])
def test_valid_sizes_that_no_image_of_the_bucket_has_are_refused(narrow, size):
    model, variables, _ = narrow
    bucket = random_images(2, 100, 100)
    with pytest.raises(ValueError, match=rf"valid_size.*\[{size[0]}, {size[1]}\]"):
        model.apply(variables, bucket, jnp.array([(50, 50), size]))


def test_bfloat16_activations_keep_float32_parameters_and_logits():
    model = sn.create_model(
        "zf5", (2, 1), 5, width=0.1, weight_init="he", dtype=jnp.bfloat16
    )
    variables = init(model, 64)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, layers = model.apply(variables, random_images(1, 64, 64))
    assert (logits.dtype, layers["conv5"].dtype) == (jnp.float32, jnp.bfloat16)


def test_dropout_acts_in_training_only(narrow):
    model, variables, _ = narrow
    images = random_images(1, 64, 64)
    scores = [
        model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(k)})
        for k in (0, 0, 1)
    ]
    np.testing.assert_array_equal(scores[0][0], scores[1][0])
    assert (scores[0][0] != scores[2][0]).any()


def test_the_paper_s_initial_weights_and_biases():
    params = init(sn.create_model("zf5", (2, 1), 5, image_size=64, width=0.5))["params"]
    biases = {name: np.unique(layer["bias"]).tolist() for name, layer in params.items()}
    ones = ["conv2", "conv4", "conv5", "fc6", "fc7"]
    assert biases == {name: [float(name in ones)] for name in params}
    for name, layer in params.items():
        if layer["kernel"].size > 10_000:
            assert layer["kernel"].std() == pytest.approx(0.01, rel=0.03), name


def test_width_scales_filters_and_fc_units():
    params = init(sn.create_model("zf5", (1,), 5, width=0.25, image_size=64))["params"]
    widths = [layer["kernel"].shape[-1] for layer in params.values()]
    assert widths == [24, 64, 96, 96, 64, 1024, 1024, 5]


@pytest.mark.parametrize("size", [5, 4])
def test_local_response_norm_is_krizhevsky_s_formula(size):
    maps = np.random.default_rng(0).normal(size=(2, 3, 11), scale=30)
    expected = np.empty_like(maps)
    for i in range(11):
        around = maps[..., max(0, i - size // 2) : i - size // 2 + size]
        expected[..., i] = maps[..., i] / (2 + 1e-4 * (around**2).sum(-1)) ** 0.75
    normed = local_response_norm(jnp.asarray(maps, jnp.float32), size)
    np.testing.assert_allclose(normed, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg"}, "unknown backbone 'vgg': choose from zf5, convnet5"),
        ({"weight_init": "xavier"}, "unknown weight_init 'xavier'"),
        ({"width": 0.0}, "width must be positive"),
        ({"levels": (0,)}, "positive integer"),
        ({"levels": None, "image_size": 40}, "too small"),
    ],
)
def test_what_cannot_be_built_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        sn.create_model(**{"name": "zf5", **arguments})


UNEVEN = (2, 3), ((1, 2), (0, 1))


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "padding"),
    [
        ((2, 15, 18, 3), (5, 4, 3, 4), *UNEVEN),
        ((2, 15, 18, 3), (5, 4, 3, 32), *UNEVEN),
        ((2, 15, 18, 6), (5, 4, 6, 4), *UNEVEN),
        ((18, 33, 49, 5), (3, 3, 5, 4), *UNEVEN),  # some images at a time
        ((2, 33, 49, 5), (3, 3, 5, 4), (1, 1), ((1, 1), (0, 2))),  # one at a time
        ((2, 9, 10, 6), (1, 1, 6, 4), (2, 3), ((0, 0), (0, 0))),
        ((2, 9, 10, 6), (1, 1, 6, 4), (1, 1), ((0, 0), (0, 0))),
        ((2, 9, 10, 6), (1, 1, 6, 4), *UNEVEN),
    ],
)
def test_a_convolution_and_its_gradients_are_those_of_the_formula(
    shape, kernel, strides, padding
):
    random = np.random.default_rng(0)
    images = random.normal(size=shape).astype(np.float32)
    kernel = random.normal(size=kernel).astype(np.float32)
    (down, across), (rows, columns) = strides, kernel.shape[:2]

    def convolve(images, kernel):
        return conv(images, kernel, strides, padding)

    padded = np.pad(images, ((0, 0), *padding, (0, 0))).astype(np.float64)
    outputs, back = jax.vjp(convolve, images, kernel)
    expected = np.zeros(outputs.shape)
    weights = random.normal(size=outputs.shape).astype(np.float32)
    for_images, for_kernel = np.zeros(padded.shape), np.zeros(kernel.shape)
    for y, x in np.ndindex(outputs.shape[1:3]):
        top, left = down * y, across * x
        seen = (slice(None), slice(top, top + rows), slice(left, left + columns))
        expected[:, y, x] = np.einsum("bijc,ijcf->bf", padded[seen], kernel)
        own = weights[:, y, x]
        for_images[seen] += np.einsum("bf,ijcf->bijc", own, kernel)
        for_kernel += np.einsum("bijc,bf->ijcf", padded[seen], own)
    ours = back(jnp.asarray(weights))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    (top, bottom), (left, right) = padding
    inside = (slice(None), slice(top, -bottom or None), slice(left, -right or None))
    np.testing.assert_allclose(ours[0], for_images[inside], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(ours[1], for_kernel, rtol=1e-4, atol=1e-3)


def test_a_convolution_refuses_what_it_does_not_do():
    images, kernel = jnp.ones((1, 9, 9, 3)), jnp.ones((3, 3, 3, 2))
    with pytest.raises(ValueError, match=r"takes no rhs_dilation, got \(2, 2\)"):
        conv(images, kernel, (1, 1), ((0, 0), (0, 0)), rhs_dilation=(2, 2))


@pytest.mark.parametrize("size", [5, 4])
def test_the_gradient_of_response_norm_is_that_of_finite_differences(size):
    with jax.enable_x64(True):
        maps = np.random.default_rng(0).normal(size=(2, 11), scale=50)
        weights = np.random.default_rng(1).normal(size=(2, 11))

        def total(maps):
            return (weights * local_response_norm(jnp.asarray(maps), size)).sum()

        ours = jax.grad(total)(jnp.asarray(maps))
        for cell in np.ndindex(maps.shape):
            step = np.zeros_like(maps)
            step[cell] = 1e-4
            slope = (total(maps + step) - total(maps - step)) / 2e-4
            np.testing.assert_allclose(ours[cell], slope, rtol=1e-5, atol=1e-9)
