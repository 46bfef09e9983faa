"""How tables run: branches, groups, cuts and masks, against loops and XLA's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.network import trunks
from sppnet_jax.network.layers import activate, depthwise_conv, join_maps, run_table
from sppnet_jax.network.model import create_model, frozen_convs
from sppnet_jax.network.stack import (
    LRN,
    Branches,
    Conv,
    Cut,
    MaxPool,
    convs_of,
    cut_names,
    cut_table,
    table_geometry,
)
from sppnet_jax.network.trunks import BACKBONES, Backbone
from sppnet_jax.pyramid.geometry import Geometry
from tests.network_helpers import drawn_params

LAYOUT = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def grouped(maps, kernel, strides, padding):
    """XLA's convolution with a group for each channel."""
    return jax.lax.conv_general_dilated(
        maps,
        kernel,
        strides,
        padding,
        dimension_numbers=LAYOUT,
        feature_group_count=maps.shape[-1],
        precision="highest",
    )


@pytest.mark.parametrize(
    ("side", "strides", "padding"),
    [
        (3, (1, 1), ((1, 1), (1, 1))),
        (3, (2, 2), ((0, 1), (0, 1))),
        (5, (2, 2), ((1, 2), (1, 2))),
        (5, (3, 2), ((0, 0), (2, 2))),
    ],
)
def test_a_depthwise_convolution_and_its_gradients_are_xla_s(side, strides, padding):
    maps, kernel = normal(2, 9, 12, 6), normal(side, side, 1, 6, seed=1)
    shape = jax.eval_shape(lambda *x: grouped(*x, strides, padding), maps, kernel).shape
    weights = normal(*shape, seed=2)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(convolve, *given):
        outputs, back = jax.vjp(lambda *x: convolve(*x, strides, padding), *given)
        return outputs, *back(weights)

    ours = with_gradients(
        functools.partial(depthwise_conv, feature_group_count=6), maps, kernel
    )
    theirs = with_gradients(grouped, maps, kernel)
    for own, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)


def test_a_filter_for_each_pair_of_channels_runs_too():
    maps, kernel = normal(1, 6, 7, 8), normal(3, 3, 2, 4, seed=1)
    padding = ((1, 1), (1, 1))
    found = depthwise_conv(maps, kernel, (1, 1), padding, feature_group_count=4)
    expected = convolved(maps[0], kernel, 1, (1, 1))
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_a_depthwise_convolution_in_bfloat16_rounds_its_sum_once():
    maps = normal(1, 9, 9, 64).astype(jnp.bfloat16)
    kernel = normal(5, 5, 1, 64, seed=1).astype(jnp.bfloat16)
    padding = ((2, 2), (2, 2))
    found = depthwise_conv(maps, kernel, (1, 1), padding, feature_group_count=64)
    assert found.dtype == jnp.bfloat16
    wide = maps.astype(np.float32), kernel.astype(np.float32)
    exact = np.asarray(grouped(*wide, (1, 1), padding))
    error = np.abs(np.asarray(found, np.float32) - exact)
    assert (error <= np.abs(exact) * 2.0**-8 + 1e-5).all()  # half a unit in the last


def test_activations_are_their_formulas_and_leave_zeros():
    values = np.array([-8, -1, -0.5, 0, 0.5, 1, 6, 8], np.float32)
    formulas = {
        "relu": np.maximum(values, 0),
        "relu6": np.minimum(np.maximum(values, 0), 6),
        "silu": values / (1 + np.exp(-values)),
        "none": values,
    }
    for name, expected in formulas.items():
        np.testing.assert_allclose(activate(values, name), expected, rtol=1e-6)
        assert activate(np.zeros(1, np.float32), name) == 0
    with pytest.raises(ValueError, match="unknown activation 'tanh': use one of"):
        activate(values, "tanh")


# Every kind of row, paddings on one side, groups, and maps below zero.
MIXED = (
    Conv(8, kernel=3, stride=2, padding=(0, 1), activation="silu"),
    Branches(
        (
            (
                Conv(12, kernel=1, activation="none"),
                Conv(12, kernel=5, padding=2, activation="relu6", groups=12),
                Conv(8, kernel=1, activation="none"),
            ),
            (),
        ),
        "add",
        activation="silu",
    ),
    Cut("fine"),
    Conv(8, kernel=3, padding=1, groups=2),
    Cut("same"),
    LRN(),
    MaxPool(kernel=3, stride=2, padding=(0, 1)),
    Branches(
        (
            (Conv(4, kernel=1, activation="none"),),
            (Conv(4, kernel=1), Conv(8, kernel=3, padding=1, activation="none")),
        ),
        "concat",
    ),
    Cut("middle"),
    Conv(6, kernel=3, stride=2, padding=1, activation="none"),
    Conv(8, kernel=1, padding=1),
    Cut("coarse"),
)


@pytest.fixture
def mixed(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mixed", Backbone(MIXED))
    return "mixed"


def convolved(maps, kernel, stride, pads):
    """One map [rows, columns, channels]; a loop over groups."""
    maps = np.pad(maps.astype(np.float64), (pads, pads, (0, 0)))
    side, _, inside, filters = kernel.shape
    groups = maps.shape[-1] // inside
    views = np.lib.stride_tricks.sliding_window_view(maps, (side, side), (0, 1))
    views = views[::stride, ::stride]
    each = filters // groups
    parts = [
        np.einsum(
            "rwcyx,yxcf->rwf",
            views[:, :, g * inside : (g + 1) * inside],
            kernel[..., g * each : (g + 1) * each],
        )
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=-1)


def run_by_loops(table, maps, params, named):
    """The oracle of `run_table`: one map at its own size, NumPy only."""
    act = {
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "none": lambda x: x,
    }
    for layer in table:
        pads = getattr(layer, "padding", 0)
        pads = pads if isinstance(pads, tuple) else (pads, pads)
        if isinstance(layer, Conv):
            name = f"conv{sum(key.startswith('conv') for key in named) + 1}"
            own = params[name]
            maps = convolved(maps, own["kernel"], layer.stride, pads) + own["bias"]
            maps = act[layer.activation](maps)
            named[name] = maps
        elif isinstance(layer, MaxPool):
            padded = np.pad(maps, (pads, pads, (0, 0)), constant_values=-np.inf)
            side = (layer.kernel, layer.kernel)
            views = np.lib.stride_tricks.sliding_window_view(padded, side, (0, 1))
            maps = views[:: layer.stride, :: layer.stride].max((-2, -1))
        elif isinstance(layer, LRN):
            squares = np.pad(maps**2, ((0, 0), (0, 0), (2, 2)))
            sums = sum(squares[..., i : i + maps.shape[-1]] for i in range(5))
            maps = maps / (layer.k + layer.alpha * sums) ** layer.beta
        elif isinstance(layer, Branches):
            ends = [run_by_loops(own, maps, params, named) for own in layer.tables]
            joined = sum(ends) if layer.join == "add" else np.concatenate(ends, -1)
            maps = act[layer.activation](joined)
        else:
            named[layer.name] = maps
    return maps


@pytest.mark.slow
def test_every_row_of_a_table_runs_as_its_formula_and_in_buckets_too(mixed):
    model = create_model(mixed, (2, 1), 3, cuts=("coarse",), head="none")
    params = drawn_params(model)
    apply = jax.jit(lambda *given: model.apply({"params": params}, *given))
    sizes = [(40, 45), (33, 45), (21, 30), (12, 44)]
    bucket = np.full((4, 40, 45, 3), 9, np.float32)
    images = [normal(*size, 3, seed=n) for n, size in enumerate(sizes)]
    for place, image in zip(bucket, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    _, found = apply(bucket, np.array(sizes))
    for number, image in enumerate(images):
        expected = {}
        run_by_loops(MIXED, image, params, expected)
        assert set(expected) == set(found) - {"pyramid"}
        for name, own in expected.items():
            rows, columns = own.shape[:2]
            maps = found[name][number]
            np.testing.assert_allclose(
                maps[:rows, :columns], own, rtol=1e-4, atol=1e-4, err_msg=name
            )
            assert not np.any(maps[rows:]), name
            assert not np.any(maps[:, columns:]), name


def may_be_negative(table, negative, found):
    """Whether a table's last map may be; collects those before a pooling."""
    for layer in table:
        if isinstance(layer, MaxPool):
            found.append(negative)
        elif isinstance(layer, Conv):
            negative = not layer.activation.startswith("relu")
        elif isinstance(layer, Branches):
            ends = [may_be_negative(own, negative, found) for own in layer.tables]
            negative = any(ends) and not layer.activation.startswith("relu")
    return negative


@pytest.mark.parametrize("name", BACKBONES)
def test_no_trunk_takes_maxima_of_maps_below_zero(name):
    """In a larger bucket, the zeros beyond the valid size would win."""
    found = []
    may_be_negative(BACKBONES[name].layers, True, found)
    assert not any(found)


def test_a_join_that_there_is_not_is_refused():
    table = (Branches(((), ()), "multiply"),)
    with pytest.raises(ValueError, match="unknown join 'multiply': use one of"):
        run_table(table, jnp.ones((1, 2, 2, 1)), None, iter(()))


@pytest.mark.parametrize("with_sizes", [False, True])
def test_joined_maps_take_the_unit_with_the_closest_centre(with_sizes):
    grids = [Geometry(16, 7.5, 99, ()), Geometry(4, 1.5, 9, ()), Geometry(8, 6, 9, ())]
    shapes = [(3, 4), (11, 15), (5, 7)]
    maps = [normal(2, *shape, 2, seed=n) for n, shape in enumerate(shapes)]
    sizes = [None] * 3
    if with_sizes:
        sizes = [
            np.array([shape, np.maximum(1, np.array(shape) - cut)])
            for shape, cut in zip(shapes, (1, 6, 3), strict=True)
        ]
    found = np.asarray(join_maps(maps, sizes, grids))
    assert found.shape == (2, 11, 15, 6)
    for image, row, column in np.ndindex(2, 11, 15):
        valid = [s[image] for s in sizes] if with_sizes else shapes
        if row >= valid[1][0] or column >= valid[1][1]:
            assert not found[image, row, column].any()
            continue
        for number, grid in enumerate(grids):
            places = []
            for position, count in zip((row, column), valid[number], strict=True):
                center = grids[1].center + grids[1].stride * position
                centers = grid.center + grid.stride * np.arange(count)
                distances = np.abs(centers - center)
                assert (distances == distances.min()).sum() == 1  # no ties here
                places.append(distances.argmin())
            np.testing.assert_array_equal(
                found[image, row, column, 2 * number : 2 * number + 2],
                maps[number][image][tuple(places)],
            )


def test_a_joined_map_is_of_the_finest_grid_and_the_deepest_field(mixed):
    cuts = ("coarse", "fine", "middle")
    joined = create_model(mixed, (1,), 3, cuts=cuts, head="none").geometry
    each = {cut: table_geometry(cut_table(MIXED, cut)) for cut in cuts}
    assert joined[:2] == each["fine"][:2]
    assert joined.receptive_field == each["coarse"].receptive_field
    assert joined.map_size(50) == each["fine"].map_size(50)
    smallest = max(geometry.min_image_size for geometry in each.values())
    assert joined.min_image_size == smallest


def test_joined_cuts_in_a_bucket_score_as_at_their_own_size(mixed):
    model = create_model(
        mixed, (2, 1), 3, cuts=("middle", "fine", "coarse"), reducer="mean"
    )
    model = model.clone(head="linear")
    params = drawn_params(model)
    apply = jax.jit(functools.partial(model.apply, {"params": params}))
    image = normal(27, 38, 3)
    alone, _ = apply(image[None])
    bucket = np.full((1, 40, 45, 3), 9, np.float32)
    bucket[0, :27, :38] = image
    found, _ = apply(bucket, np.array([[27, 38]]))
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [
        ("all", []),
        ("conv1", []),
        ("conv3", ["conv1"]),  # those beside it in its branches take part
        ("fine", ["conv1", "conv2", "conv3", "conv4"]),
        ("conv5", ["conv1", "conv2", "conv3", "conv4"]),
        ("head", [f"conv{n}" for n in range(1, 11)]),
    ],
)
def test_no_gradient_flows_into_frozen_rows(mixed, trainable, frozen):
    model = create_model(mixed, (1,), 3, head="linear", trainable=trainable)
    params, images = drawn_params(model), jnp.asarray(normal(2, 33, 40, 3))

    @jax.jit
    def gradients(params):
        return jax.grad(
            lambda p: jnp.square(model.apply({"params": p}, images)[0]).sum()
        )(params)

    without = {
        name
        for name, layer in gradients(params).items()
        if not any(np.any(part) for part in layer.values())
    }
    assert sorted(without) == sorted(frozen)
    assert set(frozen) <= set(frozen_convs(model, trainable))


@pytest.mark.parametrize("name", ["mixed", *BACKBONES])
def test_a_cut_ends_a_table_behind_all_that_is_before_it(mixed, name):
    table = BACKBONES[name].layers
    assert cut_table(table, "") == table
    for cut in cut_names(table):
        until = cut_table(table, cut)
        assert until[-1] == Cut(cut)
        assert until == table[: len(until)]
        assert Cut(cut) not in until[:-1]
        model = create_model(name, (1,), 3, cuts=(cut,), head="none")
        assert model.table == until
        assert model.geometry == table_geometry(until)


def test_networks_in_bfloat16_stay_close_to_those_in_float32(mixed):
    scores = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = create_model(mixed, (2, 1), 3, head="linear", dtype=dtype)
        params = drawn_params(model)
        images = normal(2, 33, 40, 3)
        logits, maps = jax.jit(model.apply)({"params": params}, images)
        assert logits.dtype == jnp.float32
        assert {own.dtype for own in maps.values()} == {jnp.dtype(dtype)}
        scores.append(logits)
    np.testing.assert_allclose(*scores, atol=0.03 * np.abs(scores[0]).max())


def test_a_convolution_is_numbered_where_it_runs():
    """Main branches come before their shortcuts, as in the tables."""
    filters = [conv.filters for conv in convs_of(trunks.RESNET50.layers)]
    assert filters[:8] == [64, 64, 64, 256, 256, 64, 64, 256]
    assert len(filters) == 53
