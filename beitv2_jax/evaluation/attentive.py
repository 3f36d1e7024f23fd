"""Attentive pooling of patch tokens: learned queries that weigh the tokens of an image into one feature.

Both pools are linear in the tokens once the weights are known, so the weighted sum is taken before the projection of
the values, and the keys' projection is applied to the query: the results are those of the published order of the
products, without an array of the size of all keys and values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST_QUERIES = 32
"""Learned queries of efficient probing."""
MOST_HEAD_WIDTH = 64
"""Width of a head of the attentive pool of `capi`."""


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def efficient_pool(
    tokens: Float[Array, "b n d"], queries: Float[Array, "q d"], values: Float[Array, "d d"]
) -> Float[Array, "b d"]:
    """Pool the tokens by every query, each into its own part of the width.

        a_j = softmax over n of (x_n . query_j / sqrt(d));   part j of y = sum over n of a_jn (x_n values)[part j]

    with d / q numbers in a part: the tokens are their own keys, and there is no projection after the pool.

    Source: Psomas et al. 2026, Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency.
    """
    width, count = values.shape[0], queries.shape[0]
    weights = jax.nn.softmax(jnp.einsum("bnd,qd->bqn", tokens, queries) / jnp.sqrt(width), axis=-1)
    pooled = jnp.einsum("bqn,bnd->bqd", weights, tokens)
    parts = jnp.einsum("bqd,dqp->bqp", pooled, values.reshape(width, count, width // count))
    return parts.reshape(tokens.shape[0], width)


def multihead_pool(
    tokens: Float[Array, "b n d"],
    query: Float[Array, "nh hd"],
    keys: Float[Array, "d nh hd"],
    values: Float[Array, "d nh hd"],
    value_bias: Float[Array, "nh hd"],
) -> Float[Array, "b d"]:
    """Pool the tokens by one learned query in multi-head attention.

        a_h = softmax over n of ((x_n keys_h) . query_h / sqrt(hd));   y_h = sum over n of a_hn (x_n values_h) + bias_h

    The query is not projected, nor is the result. A bias of the keys would add the same number to the scores of all
    tokens, which the softmax takes out again, so there is none.

    Source: Darcet et al. 2025, Cluster and Predict Latent Patches for Improved Masked Image Modeling.
    """
    heads, head_width = query.shape
    projected = jnp.einsum("dhe,he->hd", keys, query) / jnp.sqrt(head_width)
    weights = jax.nn.softmax(jnp.einsum("bnd,hd->bhn", tokens, projected), axis=-1)
    pooled = jnp.einsum("bhn,bnd->bhd", weights, tokens)
    output = jnp.einsum("bhd,dhe->bhe", pooled, values) + value_bias
    return output.reshape(tokens.shape[0], heads * head_width)
