"""Weighted k-nearest-neighbour classification of frozen features."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from beitv2_jax.evaluation.features import Features, OnMove, Rows

BANK_ROWS = 2**15
"""Rows of a bank on the disk that are compared at once."""
QUERY_ROWS = 1024
"""Queries that are compared at once."""


def knn_accuracies(
    bank: Num[np.ndarray, "n d"] | Rows,
    bank_labels: Int[np.ndarray, "n"],
    queries: Num[np.ndarray, "q d"] | Rows,
    query_labels: Int[np.ndarray, "q"],
    *,
    num_classes: int,
    neighbors: Sequence[int],
    temperature: float,
    on_move: OnMove,
) -> dict[int, float]:
    """Return {number of neighbours: fraction of the queries that are classified as their labels say}.

    The neighbours vote for their labels, each with weight exp(cosine / temperature). The bank is read piece by piece. A
    number of neighbours beyond its rows stands for all of them.

    Source: the weighted kNN of Wu et al. 2018 as used for DINO (20 neighbours, temperature 0.07).
    """
    counts = sorted({min(count, len(bank)) for count in neighbors})
    starts = range(0, len(queries), QUERY_ROWS)
    units = [unit(queries[start : start + QUERY_ROWS]) for start in starts]
    found = [(jnp.zeros((len(part), 0)), jnp.zeros((len(part), 0), jnp.int32)) for part in units]
    for first in range(0, len(bank), BANK_ROWS):
        piece = unit(bank[first : first + BANK_ROWS])
        labels = jnp.asarray(bank_labels[first : first + BANK_ROWS], jnp.int32)
        for number, part in enumerate(units):
            on_move("comparing with neighbours")
            found[number] = _nearest(part, piece, labels, *found[number], neighbors=counts[-1])
        jax.block_until_ready(found)
    hits = dict.fromkeys(counts, 0)
    for start, nearest in zip(starts, found, strict=True):
        on_move("comparing with neighbours")
        for count in counts:
            predicted = _vote(*nearest, count, num_classes, temperature)
            hits[count] += int(np.sum(np.asarray(predicted) == query_labels[start : start + QUERY_ROWS]))
    return {count: hits[count] / len(queries) for count in counts}


def class_token_accuracies(
    train: Features, test: Features, neighbors: Sequence[int], temperature: float, on_move: OnMove
) -> dict[str, float]:
    """Return `knn_accuracies` of [CLS] before the last norm and after it, as {'cls/knn_10': ..., ...}."""
    accuracies = {}
    for name in ("cls", "cls_normed"):
        found = knn_accuracies(
            train.last(name),
            train.labels,
            test.last(name),
            test.labels,
            num_classes=train.num_classes,
            neighbors=neighbors,
            temperature=temperature,
            on_move=on_move,
        )
        accuracies |= {f"{name}/knn_{count}": value for count, value in found.items()}
    return accuracies


def unit(rows: Num[Array | np.ndarray, "n d"]) -> Float[Array, "n d"]:
    """Return the rows as float32 of length 1; those of zeros stay."""
    rows = jnp.asarray(rows, jnp.float32)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames="neighbors")
def _nearest(queries, bank, labels, similarities, of_labels, *, neighbors: int):
    """Return similarity and label of the `neighbors` nearest of `bank` and of those found before, nearest first."""
    products = jnp.concatenate([similarities, queries @ bank.T], axis=1)
    labels = jnp.concatenate([of_labels, jnp.broadcast_to(labels, (len(queries), len(labels)))], axis=1)
    nearest, places = jax.lax.top_k(products, min(neighbors, products.shape[1]))
    return nearest, jnp.take_along_axis(labels, places, axis=1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _vote(similarities, labels, count: int, num_classes: int, temperature):
    weights = jnp.exp((similarities[:, :count] - similarities[:, :1]) / temperature)
    votes = jnp.zeros((len(labels), num_classes))
    return votes.at[jnp.arange(len(labels))[:, None], labels[:, :count]].add(weights).argmax(axis=1)
