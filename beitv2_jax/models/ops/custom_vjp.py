"""What layers compute, with gradients of our own: they keep, read and add up less than those derived by rule.

What each saves was read from the compiled program (docs/performance.md). Forward-mode differentiation is not provided.
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
"""Name under which remat finds what a linear map gives."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(inputs, kernel, out_dtype, gradient_dtype):
    return jnp.matmul(inputs, kernel.astype(inputs.dtype), preferred_element_type=out_dtype)


def _product_forward(inputs, kernel, out_dtype, gradient_dtype):
    return _product(inputs, kernel, out_dtype, gradient_dtype), (inputs, kernel)


def _product_backward(out_dtype, gradient_dtype, kept, outputs):
    inputs, kernel = kept
    outputs = outputs.astype(inputs.dtype)  # float32 would make both products float32 ones
    to_inputs = jnp.matmul(outputs, kernel.astype(inputs.dtype).T, preferred_element_type=inputs.dtype)
    # as matrices: of a sum over two axes a CPU's compiler makes a transpose of everything that leads to the inputs
    inputs, outputs = (array.reshape(-1, array.shape[-1]) for array in (inputs, outputs))
    to_kernel = jnp.matmul(inputs.T, outputs, preferred_element_type=gradient_dtype)
    return to_inputs, to_kernel.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def product(
    inputs: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dtype: Any, out_dtype: Any, gradient_dtype: Any
) -> Float[Array, "*batch o"]:
    """Return x W computed in `dtype`, given as `out_dtype`; the gradient of W leaves its product as `gradient_dtype`.

    That product sums over the batch, so its dtype is also the one in which devices add up their shares: where a kernel
    is only cast, the compiler puts this sum before the cast back, in the dtype of the computation.
    """
    dtype, out_dtype, gradient_dtype = map(jnp.dtype, (dtype, out_dtype, gradient_dtype))
    return checkpoint_name(_product(inputs.astype(dtype), kernel, out_dtype, gradient_dtype), PRODUCT)


@jax.custom_vjp
def shifted(outputs: Float[Array, "*batch o"], bias: Float[Array, "o"]) -> Float[Array, "*batch o"]:
    """Return y + b in the dtype of y; the gradient of b, a sum over the batch, is added up in float32."""
    return outputs + bias.astype(outputs.dtype)


def _shifted_backward(bias, outputs):
    return outputs, jnp.sum(outputs, tuple(range(outputs.ndim - 1)), dtype=jnp.float32).astype(bias.dtype)


shifted.defvjp(lambda outputs, bias: (shifted(outputs, bias), bias), _shifted_backward)


@jax.custom_vjp
def placed(tokens: Tokens, positions: Float[Array, "1 l d"]) -> Tokens:
    """Return tokens + positions; the gradient of the positions is a sum over the batch alone."""
    return tokens + positions


def _placed_backward(_, outputs):
    return outputs, on_own_rows(_sum_of_rows, (outputs,), summed=True)


def _sum_of_rows(rows):
    # left to itself a GPU's compiler puts the batch innermost for this sum, and so in all of the residual stream
    return jnp.sum(with_layout_constraint(rows, Layout((0, 1, 2))), axis=0, keepdims=True)


placed.defvjp(lambda tokens, positions: (placed(tokens, positions), None), _placed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalised(
    inputs: Float[Array, "*batch d"], scale: Float[Array, "d"], bias: Float[Array, "d"], epsilon: float
) -> Float[Array, "*batch d"]:
    """Return (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, with a two-pass variance."""
    return _normalised_forward(inputs, scale, bias, epsilon)[0]


def _normalised_forward(inputs, scale, bias, epsilon):
    mean = jnp.mean(inputs, axis=-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.mean((inputs - mean) ** 2, axis=-1, keepdims=True) + epsilon)
    return (inputs - mean) * inverse_std * scale + bias, (inputs, mean, inverse_std, scale)


def _normalised_backward(epsilon, kept, outputs):
    inputs, mean, inverse_std, scale = kept
    # not to be made again from the inputs: with them at hand the sums over the batch are one reading
    mean, inverse_std = jax.lax.optimization_barrier((mean, inverse_std))
    unit, scaled = (inputs - mean) * inverse_std, outputs * scale
    # both sums over the width in one reading; derived by rule, the second one would wait for the first
    along_mean = jnp.mean(scaled, axis=-1, keepdims=True)
    along_unit = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    batch = tuple(range(inputs.ndim - 1))
    return (
        inverse_std * (scaled - along_mean - unit * along_unit),
        jnp.sum(outputs * unit, batch),
        jnp.sum(outputs, batch),
    )


normalised.defvjp(_normalised_forward, _normalised_backward)


@jax.custom_vjp
def gelu(inputs: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Return x Φ(x), computed in float32. Of it only x is kept for the backward pass, and nothing made from x."""
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
def gathered(values: Num[Array, "b n *rest"], mask: Mask, positions: Int[Array, "b m"]) -> Num[Array, "b m *rest"]:
    """Return the entries at `positions`, which are where `mask` is True, in order."""
    return jnp.take_along_axis(values, _like(values, positions), axis=1)


def _gathered_backward(kept, outputs):
    mask, positions = kept
    # what a patch gave is looked up where it went, which is one reading: to scatter is to fill with zeros, then to add
    places = jnp.clip(jnp.cumsum(mask, axis=1) - 1, 0, positions.shape[1] - 1)
    returned = jnp.take_along_axis(outputs, _like(outputs, places), axis=1)
    return jnp.where(_like(outputs, mask), returned, 0), None, None


gathered.defvjp(
    lambda values, mask, positions: (gathered(values, mask, positions), (mask, positions)), _gathered_backward
)


def _like(values, positions):
    return positions.reshape(positions.shape + (1,) * (values.ndim - 2))
