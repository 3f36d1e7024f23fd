"""Attention with a learned bias as Pallas kernels for TPU: forward, and a backward that sums the bias gradient.

Chosen by `models.ops.attention`. A program sees all tokens of a few images and of as many heads as fill the lanes, so
no softmax is split and nothing but the inputs is saved for the backward pass, which takes the images one after another
and accumulates the gradient of the bias on the chip. Elsewhere than on a TPU the kernels are interpreted.

Experimental: compiled for TPU v5e and run interpreted, but never run on a chip, so it is not a default.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from beitv2_jax.typing import AttentionBias, Tokens

LANES = 128
MOST_IMAGES = 8
"""Of one program, whose start costs as much as a few images."""
BLOCK_BYTES = 7 * 2**20
"""For a program's rows: seven arrays in the backward pass, each held twice while the next ones come."""


@jax.custom_vjp
def attend(qkv: Float[Array, "b l d3"], bias: AttentionBias) -> Tokens:
    """Return softmax(q kᵀ / √hd + bias) v of every head, side by side; the number of heads is that of `bias`."""
    return _on_platform(_forward, qkv, bias)


def _attend_forward(qkv, bias):
    return attend(qkv, bias), (qkv, bias)


def _attend_backward(residuals, cotangent):
    *parts, bias_gradient = _on_platform(_backward, *residuals, cotangent)
    return jnp.concatenate(parts, axis=-1), bias_gradient.astype(residuals[1].dtype)


attend.defvjp(_attend_forward, _attend_backward)


def _on_platform(call, *arrays):
    return jax.lax.platform_dependent(*arrays, tpu=call, default=functools.partial(call, interpret=True))


def _forward(qkv, bias, *, interpret: bool = False) -> Tokens:
    layout = _Layout(qkv, bias)

    def kernel(queries_ref, keys_ref, values_ref, bias_ref, mixed_ref):
        def one_image(image, _):
            mixed = []
            for head, lanes in enumerate(layout.heads):
                queries, keys, values = (ref[image, :, lanes] for ref in (queries_ref, keys_ref, values_ref))
                weights = _weights(queries * layout.scale, keys, bias_ref[head])
                mixed.append(_dot(weights.astype(values.dtype), values, 1, 0))
            mixed_ref[image] = jnp.concatenate(mixed, axis=-1).astype(mixed_ref.dtype)
            return 0

        jax.lax.fori_loop(0, layout.images, one_image, 0)

    return pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[*layout.part_specs, layout.bias_spec],
        out_specs=layout.rows_spec,
        out_shape=layout.rows_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=layout.cost(products=2, arrays=4),
        name="attention",
        interpret=interpret,
    )(*layout.parts, bias.astype(jnp.float32))


def _backward(qkv, bias, cotangent, *, interpret: bool = False) -> tuple[jax.Array, ...]:
    layout = _Layout(qkv, bias)

    def kernel(queries_ref, keys_ref, values_ref, bias_ref, cotangent_ref, *gradient_refs):
        *part_refs, bias_gradient_ref = gradient_refs

        @pl.when(pl.program_id(1) == 0)
        def _():
            bias_gradient_ref[...] = jnp.zeros_like(bias_gradient_ref)

        def one_image(image, _):
            gradients = []
            for head, lanes in enumerate(layout.heads):
                queries, keys, values = (ref[image, :, lanes] for ref in (queries_ref, keys_ref, values_ref))
                cotangent, dtype = cotangent_ref[image, :, lanes], values.dtype
                queries = queries * layout.scale
                weights = _weights(queries, keys, bias_ref[head])
                of_weights = _dot(cotangent, values, 1, 1)
                of_logits = weights * (of_weights - jnp.sum(of_weights * weights, axis=-1, keepdims=True))
                bias_gradient_ref[head] += of_logits
                rounded = of_logits.astype(dtype)
                of_queries = _dot(rounded, keys, 1, 0) * layout.scale
                of_keys, of_values = _dot(rounded, queries, 0, 0), _dot(weights.astype(dtype), cotangent, 0, 0)
                gradients.append((of_queries, of_keys, of_values))
            for ref, heads in zip(part_refs, zip(*gradients, strict=True), strict=True):
                ref[image] = jnp.concatenate(heads, axis=-1).astype(ref.dtype)
            return 0

        jax.lax.fori_loop(0, layout.images, one_image, 0)

    return pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[*layout.part_specs, layout.bias_spec, layout.rows_spec],
        out_specs=[*[layout.rows_spec] * 3, layout.bias_spec],
        out_shape=[*[layout.rows_shape] * 3, jax.ShapeDtypeStruct(bias.shape, jnp.float32)],
        # the bias gradient is a sum over the second axis of the grid, which therefore runs in order
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=layout.cost(products=5, arrays=7),
        name="attention_backward",
        interpret=interpret,
    )(*layout.parts, bias.astype(jnp.float32), cotangent)


class _Layout:
    """Which part of the arrays a program reads: of the columns, whole lanes of whole heads if the width allows."""

    def __init__(self, qkv, bias):
        batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        head_dim = width // len(bias)
        group = math.lcm(head_dim, LANES)
        if width % group:
            group, self.parts, firsts = width, jnp.split(qkv, 3, axis=-1), (0, 0, 0)
        else:
            self.parts, firsts = (qkv,) * 3, (0, width // group, 2 * width // group)
        self.scale = head_dim**-0.5
        self.heads = [slice(first, first + head_dim) for first in range(0, group, head_dim)]
        most = min(MOST_IMAGES, BLOCK_BYTES // (14 * length * group * qkv.dtype.itemsize))
        self.images = max(n for n in range(1, max(most, 1) + 1) if batch % n == 0)
        self.grid = (width // group, batch // self.images)
        block = (self.images, length, group)
        self.part_specs = [
            pl.BlockSpec(block, lambda columns, rows, first=first: (rows, 0, first + columns)) for first in firsts
        ]
        self.rows_spec = pl.BlockSpec(block, lambda columns, rows: (rows, 0, columns))
        self.rows_shape = jax.ShapeDtypeStruct((batch, length, width), qkv.dtype)
        self.bias_spec = pl.BlockSpec((len(self.heads), length, length), lambda columns, rows: (columns, 0, 0))
        self.bias_size = bias.size

    def cost(self, *, products: int, arrays: int) -> pl.CostEstimate:
        """Return what the compiler cannot see: `products` of each head, and `arrays` of rows read or written."""
        batch, length, width = self.rows_shape.shape
        return pl.CostEstimate(
            flops=products * 2 * batch * length**2 * width,
            transcendentals=batch * self.bias_size,
            bytes_accessed=arrays * self.rows_shape.size * self.rows_shape.dtype.itemsize + 4 * self.bias_size,
        )


def _weights(queries, keys, bias) -> Float[Array, "l l"]:
    logits = _dot(queries, keys, 1, 1) + bias
    raised = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return raised / jnp.sum(raised, axis=-1, keepdims=True)


def _dot(left, right, left_axis: int, right_axis: int) -> Float[Array, "x y"]:
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
