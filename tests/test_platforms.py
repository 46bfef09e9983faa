"""The same programs for a GPU and a TPU: lowered here, where neither is needed."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

import sppnet_jax as sn
from sppnet_jax.pyramid.span_max import span_max

PLATFORMS = [["cuda"], ["tpu"], ["cpu"]]
CPU_ONLY = ("reduce_window", "xi16>")  # stops for fusion; half floats as integers


def lowered(function, platforms, *shapes):
    return export.export(jax.jit(function), platforms=platforms)(*shapes).mlir_module()


@pytest.mark.parametrize("platforms", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_windows_and_their_gradient_lower_without_what_only_a_cpu_needs(
    platforms, dtype
):
    def pooled(features, windows):
        return sn.window_pyramid_pool(features, windows, (6, 3, 2, 1))

    def both(features, windows):
        bins, back = jax.vjp(lambda x: pooled(x, windows), features)
        return bins, back(bins)

    program = lowered(
        both,
        platforms,
        jax.ShapeDtypeStruct((43, 58, 32), dtype),
        jax.ShapeDtypeStruct((200, 4), jnp.int32),
    )
    on_cpu = platforms == ["cpu"]
    assert (CPU_ONLY[0] in program) == on_cpu
    assert (CPU_ONLY[1] in program) == (on_cpu and dtype == jnp.bfloat16)


@pytest.mark.parametrize("platforms", PLATFORMS)
def test_the_gradient_of_bfloat16_windows_adds_up_in_float32(platforms):
    def back(features, windows, gradient):
        pool = lambda x: sn.window_pyramid_pool(x, windows, (6, 3, 2, 1))  # noqa: E731
        return jax.vjp(pool, features)[1](gradient)

    program = lowered(
        back,
        platforms,
        jax.ShapeDtypeStruct((43, 58, 32), jnp.bfloat16),
        jax.ShapeDtypeStruct((200, 4), jnp.int32),
        jax.ShapeDtypeStruct((200, 50, 32), jnp.bfloat16),
    )
    added = re.findall(r"stablehlo\.add .* : tensor<(\S*)bf16>", program)
    assert not added
    assert re.search(r"stablehlo\.add .* : tensor<\S*f32>", program)


@pytest.mark.parametrize("platforms", PLATFORMS[:2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_network_s_gradient_lowers_to_plain_operations(platforms, dtype):
    model = sn.create_model("zf5", width=1 / 2, num_classes=5, dtype=dtype)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)

    def gradient(params, images):
        return jax.grad(lambda params: model.apply(params, images)[0].sum())(params)

    program = lowered(gradient, platforms, params, images)
    # No loop over images, which the CPU's gradient of the first convolution has.
    for absent in ("while", "scatter", "select_and_scatter", "callback", "custom_call"):
        assert f"stablehlo.{absent}" not in program


@pytest.mark.parametrize("platforms", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_maxima_are_reduce_windows_but_on_a_cpu_and_their_gradient_lowers(
    platforms, dtype
):
    halves, overlapping = ((0, 2), (2, 4)), ((0, 3), (2, 5), (4, 7))

    def both(maps):
        pooled, back = jax.vjp(lambda x: span_max(x, halves, overlapping), maps)
        return pooled, back(pooled)

    program = lowered(both, platforms, jax.ShapeDtypeStruct((2, 7, 7, 16), dtype))
    windows = re.findall(r"window_dimensions = array<i64: ([\d, ]*)>", program)
    # A CPU's is of single cells: it stops fusion.
    on_cpu = platforms == ["cpu"]
    assert windows == (["1, 1, 1, 2, 1"] if on_cpu else ["1, 2, 3, 1"])
    assert "stablehlo.maximum" in program
    assert "select_and_scatter" not in program
