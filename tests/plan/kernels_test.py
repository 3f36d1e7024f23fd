"""The Pallas kernels compiled for a TPU that is not here, with what they state of their work."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from beitv2_jax.models.ops import attention, nearest_code
from beitv2_jax.planning import planner, topologies
from beitv2_jax.planning.program import flops_by_type, read_program

BATCH, LENGTH, WIDTH, NUM_HEADS = 8, 197, 768, 12
TOKENS, CODES, CODE_DIM = 1000, 8192, 32


@pytest.fixture(scope="module")
def shape():
    """Return what makes the shape of an array on a v5e chip."""
    planner.start_compilers()
    place = SingleDeviceSharding(topologies.devices(topologies.parse("v5e:1"))[0])
    return lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def compiled(function, *shapes):
    """Return how often the program calls kernels, its products by type, and its arrays."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return text.count('custom_call_target="tpu_custom_call"'), flops_by_type(read_program(text)), text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_attention_forward_and_backward(shape, dtype):
    def both(qkv, bias, cotangent):
        outputs, pull = jax.vjp(
            lambda qkv, bias: attention.attend(qkv, bias, NUM_HEADS, implementation="pallas"), qkv, bias
        )
        return outputs, pull(cotangent)

    rows = shape((BATCH, LENGTH, WIDTH), dtype)
    bias = shape((NUM_HEADS, LENGTH, LENGTH))
    calls, flops, text = compiled(both, shape((BATCH, LENGTH, 3 * WIDTH), dtype), bias, rows)
    assert calls == 2 and flops == {"kernels": (2 + 5) * 2 * BATCH * LENGTH**2 * WIDTH}
    assert f"[{BATCH},{NUM_HEADS},{LENGTH},{LENGTH}]" not in text


def test_nearest_code(shape):
    calls, flops, text = compiled(
        lambda *arrays: nearest_code.nearest_rows(*arrays, implementation="pallas"),
        shape((TOKENS, CODE_DIM)),
        shape((CODES, CODE_DIM)),
        shape((CODES,)),
    )
    assert calls == 1 and flops == {"kernels": 2 * 1024 * CODES * CODE_DIM}
    assert f",{CODES}]" not in text
