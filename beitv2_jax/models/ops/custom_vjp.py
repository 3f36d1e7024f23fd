"""Custom VJPs that save fewer residuals, and read less memory, than the gradients that autodiff derives.

The effect of each was read from the compiled program (docs/performance.md). Forward-mode differentiation is not
provided.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, Num

from beitv2_jax.models.ops.per_device import on_own_rows
from beitv2_jax.typing import Mask, Tokens

PRODUCT = "product"
"""Name by which the remat policy 'dots' finds the outputs of linear maps."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(inputs, kernel, out_dtype, gradient_dtype):
    return jnp.matmul(inputs, kernel.astype(inputs.dtype), preferred_element_type=out_dtype)


def _product_forward(inputs, kernel, out_dtype, gradient_dtype):
    return _product(inputs, kernel, out_dtype, gradient_dtype), (inputs, kernel)


def _product_backward(out_dtype, gradient_dtype, residuals, outputs):
    inputs, kernel = residuals
    outputs = outputs.astype(inputs.dtype)  # float32 would make both products float32 ones
    to_inputs = jnp.matmul(outputs, kernel.astype(inputs.dtype).T, preferred_element_type=inputs.dtype)
    # as matrices: for a sum over two axes the CPU compiler transposes everything that leads to the inputs
    inputs, outputs = (array.reshape(-1, array.shape[-1]) for array in (inputs, outputs))
    to_kernel = jnp.matmul(inputs.T, outputs, preferred_element_type=gradient_dtype)
    return to_inputs, to_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def product(
    inputs: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dtype: Any, out_dtype: Any, gradient_dtype: Any
) -> Float[Array, "*batch o"]:
    """Return x W, computed in `dtype` and returned in `out_dtype`; dW is accumulated in `gradient_dtype`.

    The product that gives dW sums over the batch, so its dtype is also the one in which devices sum their partial
    gradients: where a kernel is only cast, the compiler does the all-reduce before the cast back, in the compute dtype.
    """
    dtype, out_dtype, gradient_dtype = map(jnp.dtype, (dtype, out_dtype, gradient_dtype))
    return checkpoint_name(_product(inputs.astype(dtype), kernel, out_dtype, gradient_dtype), PRODUCT)


@jax.custom_vjp
def add_bias(outputs: Float[Array, "*batch o"], bias: Float[Array, "o"]) -> Float[Array, "*batch o"]:
    """Return y + b in the dtype of y; db, a sum over the batch, is accumulated in float32."""
    return outputs + bias.astype(outputs.dtype)


def _add_bias_backward(bias, outputs):
    return outputs, jnp.sum(outputs, tuple(range(outputs.ndim - 1)), dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(lambda outputs, bias: (add_bias(outputs, bias), bias), _add_bias_backward)


@jax.custom_vjp
def add_position(tokens: Tokens, positions: Float[Array, "1 l d"]) -> Tokens:
    """Return tokens + positions; the gradient of the positions is a sum over the batch alone."""
    return tokens + positions


def _add_position_backward(_, outputs):
    return outputs, on_own_rows(_sum_of_rows, (outputs,), summed=True)


def _sum_of_rows(rows):
    # without the constraint the GPU compiler makes the batch the innermost axis of the whole residual stream
    return jnp.sum(with_layout_constraint(rows, Layout((0, 1, 2))), axis=0, keepdims=True)


add_position.defvjp(lambda tokens, positions: (add_position(tokens, positions), None), _add_position_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    inputs: Float[Array, "*batch d"], scale: Float[Array, "d"], bias: Float[Array, "d"], epsilon: float
) -> Float[Array, "*batch d"]:
    """Return (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, with a two-pass variance."""
    return _layer_norm_forward(inputs, scale, bias, epsilon)[0]


def _layer_norm_forward(inputs, scale, bias, epsilon):
    mean = jnp.mean(inputs, axis=-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.mean((inputs - mean) ** 2, axis=-1, keepdims=True) + epsilon)
    return (inputs - mean) * inverse_std * scale + bias, (inputs, mean, inverse_std, scale)


def _layer_norm_backward(epsilon, residuals, outputs):
    inputs, mean, inverse_std, scale = residuals
    # the barrier keeps the compiler from recomputing them, so that both sums over the batch read the inputs once
    mean, inverse_std = jax.lax.optimization_barrier((mean, inverse_std))
    unit, scaled = (inputs - mean) * inverse_std, outputs * scale
    # both sums over the width read memory once; in the gradient of autodiff the second one depends on the first
    along_mean = jnp.mean(scaled, axis=-1, keepdims=True)
    along_unit = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    batch = tuple(range(inputs.ndim - 1))
    return (
        inverse_std * (scaled - along_mean - unit * along_unit),
        jnp.sum(outputs * unit, batch),
        jnp.sum(outputs, batch),
    )


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(inputs: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return x Φ(x), computed in float32; only x is saved for the backward pass."""
    x = inputs.astype(jnp.float32)
    return (x * _normal_cdf(x)).astype(inputs.dtype)


def _gelu_backward(inputs, outputs):
    x = inputs.astype(jnp.float32)
    density = jnp.exp(-0.5 * x**2) * (2.0 * np.pi) ** -0.5
    return (((_normal_cdf(x) + x * density) * outputs.astype(jnp.float32)).astype(inputs.dtype),)


def _normal_cdf(x):
    return 0.5 * (1.0 + jax.lax.erf(x * 2.0**-0.5))


gelu.defvjp(lambda inputs: (gelu(inputs), inputs), _gelu_backward)


@jax.custom_vjp
def gather_patches(
    values: Num[Array, "b n *rest"], mask: Mask, positions: Int[Array, "b m"]
) -> Num[Array, "b m *rest"]:
    """Return the entries at `positions`, which are where `mask` is True, in order."""
    return jnp.take_along_axis(values, _like(values, positions), axis=1)


def _gather_patches_backward(residuals, outputs):
    mask, positions = residuals
    # the gradient of a patch is read from where the patch went: one gather instead of a scatter into zeros
    places = jnp.clip(jnp.cumsum(mask, axis=1) - 1, 0, positions.shape[1] - 1)
    returned = jnp.take_along_axis(outputs, _like(outputs, places), axis=1)
    return jnp.where(_like(outputs, mask), returned, 0), None, None


gather_patches.defvjp(
    lambda values, mask, positions: (gather_patches(values, mask, positions), (mask, positions)),
    _gather_patches_backward,
)


def _like(values, positions):
    return positions.reshape(positions.shape + (1,) * (values.ndim - 2))
