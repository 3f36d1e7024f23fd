"""Gradients that are written out, against float64 by hand: linear maps, norm, GELU, positions, gathered patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_jax.models.mim import gather_masked
from beitv2_jax.models.ops import custom_vjp
from beitv2_jax.training import sharding

BATCH, LENGTH, WIDTH = 5, 7, 12


def tokens(seed=0, shape=(BATCH, LENGTH, WIDTH)):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("gradient_dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_linear_map_leave_it_in_the_dtype_asked_for(out_dtype, gradient_dtype):
    rng = np.random.default_rng(3)
    sizes = (2, 3, 5), (5, 7), (2, 3, 7), (7,)
    # numbers that bfloat16 holds, so that only gradients are rounded
    inputs, kernel, probe, bias = (
        jnp.asarray(rng.normal(size=size)).astype(jnp.bfloat16).astype(jnp.float32) for size in sizes
    )

    def value(inputs, kernel, bias):
        outputs = custom_vjp.product(inputs, kernel, jnp.bfloat16, out_dtype, gradient_dtype)
        return jnp.sum(custom_vjp.add_bias(outputs, bias) * probe)

    to_inputs, to_kernel, to_bias = jax.grad(value, argnums=(0, 1, 2))(inputs, kernel, bias)
    assert to_inputs.dtype == to_kernel.dtype == to_bias.dtype == jnp.float32
    exact = np.einsum("bli,blo->io", inputs, probe)
    rounded = np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32)
    assert np.abs(exact - rounded).max() > 1e-3
    np.testing.assert_allclose(to_kernel, exact if gradient_dtype == jnp.float32 else rounded, rtol=1e-6)
    np.testing.assert_allclose(to_bias, np.sum(probe, (0, 1)), rtol=1e-6)
    np.testing.assert_allclose(to_inputs, np.einsum("blo,io->bli", probe, kernel), rtol=0.01, atol=0.03)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_gradients_of_layer_norm_are_those_of_arithmetic_in_float64(offset):
    """By hand: y = u γ + β, u = (x − mean) / s; with g = γ ∂y, ∂x = (g − mean(g) − u mean(g u)) / s."""
    x, cotangent = offset + np.asarray(tokens(), np.float32), np.asarray(tokens(1))
    scale, bias = 1 + tokens(2, (WIDTH,)), tokens(3, (WIDTH,))
    run = jax.jit(lambda *a: jax.vjp(lambda *a: custom_vjp.layer_norm(*a, 1e-3), *a)[1](cotangent))
    to_x, to_scale, to_bias = run(x, scale, bias)
    x, scale = x.astype(np.float64), np.asarray(scale, np.float64)
    std = np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    unit, g = (x - x.mean(-1, keepdims=True)) / std, cotangent * scale
    expected = (g - g.mean(-1, keepdims=True) - unit * (g * unit).mean(-1, keepdims=True)) / std
    tolerance = 1e-6 * (1 + offset)
    np.testing.assert_allclose(to_x, expected, atol=5 * tolerance)
    np.testing.assert_allclose(to_scale, (cotangent * unit).sum((0, 1)), atol=50 * tolerance)
    np.testing.assert_allclose(to_bias, cotangent.sum((0, 1)), atol=1e-5)


def test_gelu_and_its_gradient_are_those_of_the_normal_distribution():
    x = np.linspace(-13, 13, 1001, dtype=np.float32)  # its density is nothing beyond 13
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)):
        rounded = jnp.asarray(x, dtype)
        outputs, pull = jax.vjp(custom_vjp.gelu, rounded)
        (gradient,) = pull(jnp.ones_like(rounded))
        assert outputs.dtype == gradient.dtype == dtype
        exact = np.asarray(rounded, np.float64)
        np.testing.assert_allclose(
            np.asarray(outputs, np.float64), exact * scipy.stats.norm.cdf(exact), rtol=tolerance, atol=1e-6
        )
        expected = scipy.stats.norm.cdf(exact) + exact * scipy.stats.norm.pdf(exact)
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("batch", [8, 7])  # 7 images cannot be divided over the devices
def test_positions_get_the_sum_over_the_batch_on_any_mesh(batch):
    cotangent, positions = np.asarray(tokens(1, (batch, LENGTH, WIDTH))), tokens(2, (1, LENGTH, WIDTH))
    images = tokens(0, (batch, LENGTH, WIDTH))

    def run(images, positions):
        outputs, pull = jax.vjp(custom_vjp.add_position, images, positions)
        return outputs, *pull(cotangent)

    with sharding.activation_rules(sharding.make_mesh(2, 2, 2)):
        outputs, to_images, to_positions = jax.jit(run)(images, positions)
    np.testing.assert_array_equal(outputs, np.asarray(images) + np.asarray(positions))
    np.testing.assert_array_equal(to_images, cotangent)
    np.testing.assert_allclose(to_positions, cotangent.astype(np.float64).sum(0, keepdims=True), atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), num_masked=st.integers(1, 11))
def test_gradients_of_gathered_patches_return_to_where_they_were(seed, num_masked):
    rng = np.random.default_rng(seed)
    mask = np.stack([rng.permutation(11) < num_masked for _ in range(3)])
    values, cotangent = np.ones((3, 11, 2), np.float32), np.arange(3.0 * num_masked * 2, dtype=np.float32) + 1
    _, pull = jax.vjp(lambda values: gather_masked(values, mask, num_masked), values)
    expected = np.zeros_like(values)
    expected[mask] = cotangent.reshape(-1, 2)
    np.testing.assert_array_equal(pull(jnp.asarray(cotangent.reshape(3, num_masked, 2)))[0], expected)
