"""Cross entropy of a linear output layer without saving float32 logits for the backward pass.

With 8192 codes, the float32 logits of all masked patches, their softmax and its gradient are the largest arrays of the
masked image model's step. 'rounded' saves only the gradient of the logits, in the compute dtype; 'tiled' saves nothing
and computes the logits of a tile of classes at a time, in the forward and again in the backward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("reference", "rounded", "tiled")
TILE = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_cross_entropy(logits: Float[Array, "b m k"], labels: Int[Array, "b m"], dtype: Any) -> Float[Array, "b m"]:
    """Return -log softmax(logits)[label] in nats, in float32.

    softmax(logits) - one-hot(label) is saved in `dtype`, the dtype of the products that read it in the backward pass.
    """
    return _rounded_forward(logits, labels, dtype)[0]


def _rounded_forward(logits, labels, dtype):
    log_probabilities = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    return losses, (jnp.exp(log_probabilities) - is_label).astype(dtype)


def _rounded_backward(dtype, of_logits, of_losses):
    return of_losses[..., None] * of_logits, None


rounded_cross_entropy.defvjp(_rounded_forward, _rounded_backward)


def head_cross_entropy(
    features: Float[Array, "b m d"],
    kernel: Float[Array, "d k"],
    bias: Float[Array, "k"],
    labels: Int[Array, "b m"],
    *,
    dtype: Any,
    gradient_dtype: Any = jnp.float32,
    tile: int = TILE,
) -> tuple[Float[Array, "b m"], Bool[Array, "b m"]]:
    """Return -log softmax(x W + bias)[label] in nats, and whether the label has the largest logit, as argmax.

    Products are computed in `dtype` and return float32, as in `layers.Linear`; dW is accumulated in `gradient_dtype`.
    Only the inputs and one number per patch are saved: the backward pass recomputes the logits of a tile.
    """
    tile = min(tile, kernel.shape[1])
    missing = -kernel.shape[1] % tile
    kernel = jnp.pad(kernel, ((0, 0), (0, missing)))
    bias = jnp.pad(bias, (0, missing), constant_values=-jnp.inf)
    gradient_dtype = jnp.promote_types(dtype, gradient_dtype)
    return _cross_entropy(features.astype(dtype), kernel, bias, labels, tile, gradient_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(features, kernel, bias, labels, tile, gradient_dtype):
    return _forward(features, kernel, bias, labels, tile, gradient_dtype)[0]


def _forward(features, kernel, bias, labels, tile, gradient_dtype):
    def one_tile(carry, first_id):
        largest, total, picked, best_id = carry
        logits, is_label = _tile_logits(features, kernel, bias, labels, first_id, tile)[1:]
        here = jnp.max(logits, axis=-1)
        best_id = jnp.where(here > largest, first_id + jnp.argmax(logits, axis=-1).astype(jnp.int32), best_id)
        now_largest = jnp.maximum(largest, here)
        total = total * jnp.exp(largest - now_largest) + jnp.exp(logits - now_largest[..., None]).sum(axis=-1)
        return (now_largest, total, picked + jnp.where(is_label, logits, 0.0).sum(axis=-1), best_id), None

    zeros = jnp.zeros(labels.shape)
    start = (zeros - jnp.inf, zeros, zeros, jnp.zeros(labels.shape, jnp.int32))
    largest, total, picked, best_id = jax.lax.scan(one_tile, start, _first_ids(bias, tile))[0]
    log_total = largest + jnp.log(total)
    return (log_total - picked, best_id == labels), (features, kernel, bias, labels, log_total)


def _backward(tile, gradient_dtype, residuals, cotangents):
    features, kernel, bias, labels, log_total = residuals
    of_loss = cotangents[0][..., None]

    def one_tile(of_features, first_id):
        weights, logits, is_label = _tile_logits(features, kernel, bias, labels, first_id, tile)
        of_logits = of_loss * (jnp.exp(logits - log_total[..., None]) - is_label)
        rounded = of_logits.astype(features.dtype)
        of_features += jnp.matmul(rounded, weights.T, preferred_element_type=jnp.float32)
        of_weights = jnp.einsum("bmd,bmk->dk", features, rounded, preferred_element_type=gradient_dtype)
        return of_features, (of_weights.astype(kernel.dtype), of_logits.sum(axis=(0, 1)))

    start = jnp.zeros(features.shape, jnp.float32)
    of_features, (of_kernel, of_bias) = jax.lax.scan(one_tile, start, _first_ids(bias, tile))
    of_kernel = of_kernel.transpose(1, 0, 2).reshape(kernel.shape)
    return of_features.astype(features.dtype), of_kernel, of_bias.reshape(-1), None


_cross_entropy.defvjp(_forward, _backward)


def _first_ids(bias, tile: int) -> Int[Array, "tiles"]:
    return jnp.arange(0, len(bias), tile, dtype=jnp.int32)


def _tile_logits(features, kernel, bias, labels, first_id, tile: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the weights of a tile of classes, its logits, and where a class is the label."""
    weights = jax.lax.dynamic_slice_in_dim(kernel, first_id, tile, axis=1).astype(features.dtype)
    logits = jnp.matmul(features, weights, preferred_element_type=jnp.float32)
    logits = logits + jax.lax.dynamic_slice_in_dim(bias, first_id, tile)
    return weights, logits, labels[..., None] == first_id + jnp.arange(tile)
