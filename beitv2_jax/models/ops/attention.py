"""Implementations of softmax(q kᵀ / √hd + bias) v: the reference in XLA, cuDNN's, and a Pallas kernel for TPU.

All take the fused projection `b l 3d` and return `b l d`, the input of the output projection. The Pallas kernel is
experimental: it has been compiled for TPU and run interpreted, not on a chip. Called by `layers.Attention`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from beitv2_jax.choices import ATTENTION
from beitv2_jax.models.ops.per_device import on_own_rows
from beitv2_jax.typing import AttentionBias, Tokens

PADDING_LOGIT = -1e9
"""Logit of a padding key: its weight is exactly zero, in bfloat16 too."""
CUDNN_MULTIPLE = 8
"""Sequence lengths are padded to a multiple of this for cuDNN, which refuses odd lengths with a learned bias."""


def attend(
    qkv: Float[Array, "b l d3"],
    bias: AttentionBias | None,
    num_heads: int,
    *,
    implementation: str = "reference",
    length: int | None = None,
) -> Tokens:
    """Return the output of attention, `b l d` in the dtype of `qkv`.

    The width of `qkv` holds queries, keys and values one after another, each divided into heads. Tokens beyond `length`
    (with 'cudnn' only, see `pad_tokens`) are padding and masked out. Logits and softmax are float32, the weights are
    rounded to the dtype of `qkv`. `implementation`: 'reference'; 'cudnn' (16-bit types, a head width that is a multiple
    of 8 and at most 128; the bias is rounded too); 'pallas' (TPU; interpreted and slow elsewhere), which stores no
    array of `nh l l` per image and sums the gradient of `bias` over the batch in a fixed order.

    Raises:
        ValueError: unknown implementation, or a dtype or head width that it cannot take.
    """
    if implementation not in ATTENTION:
        raise ValueError(f"unknown attention {implementation!r}: choose one of {', '.join(ATTENTION)}")
    if implementation == "pallas":
        # imported here because pallas takes most of a second to load and is rarely asked for
        from beitv2_jax.models.ops import attention_pallas

        if bias is None:
            bias = jnp.zeros((num_heads, qkv.shape[1], qkv.shape[1]))
        return on_own_rows(attention_pallas.attend, (qkv,), (bias,))
    # three slices of the width, each reshaped alone: a TPU copies less than with one reshape to `3 nh hd`
    queries, keys, values = (part.reshape(*part.shape[:2], num_heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    if implementation == "reference":
        mixed = _reference(queries, keys, values, bias)
    else:
        mixed = _cudnn(queries, keys, values, bias, length or qkv.shape[1])
    return mixed.reshape(*mixed.shape[:2], -1)


def pad_tokens(tokens: Tokens, implementation: str) -> Tokens:
    """Zero-pad tokens to the multiple that the implementation requires; this is cheaper than padding q, k and v."""
    more = -tokens.shape[1] % CUDNN_MULTIPLE if implementation == "cudnn" else 0
    return jnp.pad(tokens, ((0, 0), (0, more), (0, 0))) if more else tokens


def attention_weights(qkv: Float[Array, "b l d3"], bias: AttentionBias | None, num_heads: int) -> Array:
    """Return softmax(q kᵀ / √hd + bias), float32 'b nh l l', to look at; `attend` computes its own."""
    queries, keys, _ = (part.reshape(*part.shape[:2], num_heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    return _weights(queries, keys, bias)


def _reference(queries, keys, values, bias) -> Float[Array, "b l nh hd"]:
    return jnp.einsum("bhqk,bkhd->bqhd", _weights(queries, keys, bias).astype(values.dtype), values)


def _weights(queries, keys, bias) -> Float[Array, "b nh q k"]:
    logits = _products(queries * queries.shape[-1] ** -0.5, keys)
    return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


@jax.custom_vjp
def _products(queries, keys) -> Float[Array, "b nh q k"]:
    """Return q kᵀ in float32; its gradient is rounded to the dtype of q before the products."""
    return jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)


def _products_backward(residuals, of_logits):
    queries, keys = residuals
    rounded = of_logits.astype(queries.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", rounded, keys), jnp.einsum("bhqk,bqhd->bkhd", rounded, queries)


_products.defvjp(lambda queries, keys: (_products(queries, keys), (queries, keys)), _products_backward)


def _cudnn(queries, keys, values, bias, length: int) -> Float[Array, "b l nh hd"]:
    """Call cuDNN on a padded number of tokens; padding keys are masked out.

    Source: the checks of `jax.nn.dot_product_attention` before it calls cuDNN.
    """
    given, head_dim = queries.shape[1], queries.shape[-1]
    if queries.dtype not in (jnp.bfloat16, jnp.float16) or head_dim % 8 or head_dim > 128:
        raise ValueError(
            f"cuDNN attention takes 16-bit types and head widths that are multiples of 8 up to 128, "
            f"not {queries.dtype} and {head_dim}: choose attention 'reference'"
        )
    queries, keys, values, bias = pad_inputs(queries, keys, values, bias, length)
    mixed = jax.nn.dot_product_attention(queries, keys, values, bias=bias, implementation="cudnn")
    return mixed[:, :given]


def pad_inputs(queries, keys, values, bias, length: int) -> tuple[jax.Array, ...]:
    """Pad all to a multiple of `CUDNN_MULTIPLE`; keys beyond `length` get `PADDING_LOGIT`.

    The bias, `nh length length` or None, gains a batch axis and the dtype of the queries.
    """
    given, num_heads = queries.shape[1:3]
    more = -given % CUDNN_MULTIPLE
    if bias is None:
        bias = jnp.zeros((num_heads, length, length))
    behind = given + more - length
    bias = jnp.pad(bias, ((0, 0), (0, behind), (0, 0)))
    bias = jnp.pad(bias, ((0, 0), (0, 0), (0, behind)), constant_values=PADDING_LOGIT)
    if more:
        queries, keys, values = (jnp.pad(part, ((0, 0), (0, more), (0, 0), (0, 0))) for part in (queries, keys, values))
    return queries, keys, values, bias[None].astype(queries.dtype)
