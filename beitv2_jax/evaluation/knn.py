"""Weighted k-nearest-neighbour classification of frozen features."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames=("num_classes", "neighbors", "chunk_size"))
def knn_predict(
    bank: Float[Array, "b d"],
    bank_labels: Int[Array, "b"],
    queries: Float[Array, "q d"],
    *,
    num_classes: int,
    neighbors: int,
    temperature: float,
    chunk_size: int = 256,
) -> Int[Array, "q"]:
    """Vote over the `neighbors` most similar rows of `bank`, each with weight exp(cosine / temperature).

    Source: the weighted kNN of Wu et al. 2018 as used for DINO (20 neighbours, temperature 0.07).
    """
    bank = bank / jnp.maximum(jnp.linalg.norm(bank, axis=-1, keepdims=True), 1e-12)
    queries = queries / jnp.maximum(jnp.linalg.norm(queries, axis=-1, keepdims=True), 1e-12)

    def predict(query):
        similarity, rows = jax.lax.top_k(bank @ query, neighbors)
        votes = jnp.zeros(num_classes).at[bank_labels[rows]].add(jnp.exp(similarity / temperature))
        return jnp.argmax(votes)

    return jax.lax.map(predict, queries, batch_size=chunk_size)
