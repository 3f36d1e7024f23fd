"""Implementations of attention against the reference: outputs and all gradients, both dtypes, one and many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models.ops import attention, attention_pallas
from beitv2_jax.training import sharding

SHAPES = {  # batch, length, heads, head width
    "narrower than the lanes": (3, 7, 3, 4),
    "two heads fill the lanes": (9, 5, 4, 64),
    "eight heads fill five times the lanes": (1, 3, 8, 80),
}


def arrays(shape, dtype=jnp.float32):
    batch, length, num_heads, head_dim = shape
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = jax.random.normal(keys[0], (batch, length, 3 * num_heads * head_dim)).astype(dtype)
    bias = jax.random.normal(keys[1], (num_heads, length, length))
    return qkv, bias, jax.random.normal(keys[2], (batch, length, num_heads * head_dim)).astype(dtype)


def with_gradients(implementation, qkv, bias, cotangent):
    """Return the output and the gradients by qkv and bias, in float32."""

    @jax.jit
    def run(qkv, bias, cotangent):
        outputs, pull = jax.vjp(lambda *a: attention.attend(*a, len(bias), implementation=implementation), qkv, bias)
        return outputs, *pull(cotangent)

    return [np.asarray(array, np.float32) for array in run(qkv, bias, cotangent)]


def distances(found, expected):
    return [np.abs(have - want).max() / np.abs(want).max() for have, want in zip(found, expected, strict=True)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernel_equals_the_plain_form(shape):
    found, expected = (with_gradients(name, *arrays(shape)) for name in ("pallas", "reference"))
    assert max(distances(found, expected)) < 2e-6


def test_in_bfloat16_the_kernel_is_as_near_the_exact_result_as_the_plain_form():
    shape = SHAPES["two heads fill the lanes"]
    rounded = arrays(shape, jnp.bfloat16)
    exact = with_gradients("reference", *(array.astype(jnp.float32) for array in rounded))
    reference, kernel = (distances(with_gradients(name, *rounded), exact) for name in ("reference", "pallas"))
    assert max(kernel) < 8e-3 and max(reference) < 8e-3
    assert all(ours < 1.5 * theirs for ours, theirs in zip(kernel, reference, strict=True))
    output = attention.attend(*rounded[:2], shape[2], implementation="pallas")
    assert output.dtype == jnp.bfloat16


def test_without_a_bias_the_kernel_takes_none():
    qkv, _, _ = arrays(SHAPES["narrower than the lanes"])
    found, expected = (attention.attend(qkv, None, 3, implementation=name) for name in ("pallas", "reference"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_kernel_on_eight_devices_equals_one():
    qkv, bias, cotangent = arrays((8, 7, 3, 4))
    expected = with_gradients("pallas", qkv, bias, cotangent)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    qkv, cotangent = (jax.device_put(array, sharding.batch_sharding(mesh)) for array in (qkv, cotangent))

    @jax.jit
    def run(qkv, bias, cotangent):
        outputs, pull = jax.vjp(lambda *a: attention.attend(*a, 3, implementation="pallas"), qkv, bias)
        return outputs, *pull(cotangent)

    with sharding.activation_rules(mesh):
        found = run(qkv, bias, cotangent)
    assert max(distances([np.asarray(array) for array in found], expected)) < 1e-6
    assert found[0].sharding.shard_shape(found[0].shape) == (2, 7, 12)


def test_programs_take_several_images_but_no_more_than_fit():
    def images(*shape):
        return attention_pallas._Layout(*arrays(shape, jnp.bfloat16)[:2]).images

    assert images(16, 197, 2, 64) == 8 and images(10, 197, 2, 64) == 5 and images(16, 577, 2, 64) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_changes_nothing(dtype):
    """What cuDNN is given: a longer sequence whose last keys are masked out."""
    qkv, bias, cotangent = arrays((3, 13, 2, 8), dtype)

    def with_padding(qkv, bias):
        parts = (part.reshape(3, 13, 2, 8) for part in jnp.split(qkv, 3, axis=-1))
        queries, keys, values, bias = attention.pad_inputs(*parts, bias, 13)
        assert queries.shape == (3, 16, 2, 8) and bias.shape == (1, 2, 16, 16) and bias.dtype == dtype
        mixed = jax.nn.dot_product_attention(queries, keys, values, bias=bias, implementation="xla")
        return mixed[:, :13].reshape(3, 13, 16)

    outputs, pull = jax.vjp(with_padding, qkv, bias)
    found = [np.asarray(array, np.float32) for array in (outputs, *pull(cotangent))]
    exact = with_gradients("reference", *(array.astype(jnp.float32) for array in (qkv, bias, cotangent)))
    assert max(distances(found, exact)) < (1e-6 if dtype == jnp.float32 else 1.5e-2)
    assert all(np.isfinite(array).all() for array in found)


def test_what_a_form_cannot_take_is_refused():
    qkv, bias, _ = arrays((1, 2, 2, 4))
    with pytest.raises(ValueError, match="'flash'"):
        attention.attend(qkv, bias, 2, implementation="flash")
    for dtype, match in ((jnp.float32, "float32"), (jnp.bfloat16, "and 4")):
        with pytest.raises(ValueError, match=match):
            attention.attend(qkv.astype(dtype), bias, 2, implementation="cudnn")
