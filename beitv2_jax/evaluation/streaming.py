"""Batches of rows of features that may lie on a disk, for heads that are trained on them."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from beitv2_jax.rng import host_rng
from beitv2_jax.typing import PyTree


def shuffled_batches(
    rows: Int[np.ndarray, "n"], batch_size: int, seed: int, stream: str
) -> Iterator[Int[np.ndarray, "b"]]:
    """Yield batches of `rows` without end: one random order after another, each without its incomplete batch.

    A batch is sorted, which reads a file forwards and does not change a mean over the batch.
    """
    epoch = 0
    while True:
        order = rows[host_rng(seed, stream, epoch).permutation(len(rows))]
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield np.sort(order[start : start + batch_size])
        epoch += 1


def count_hits(
    predict: Callable[[PyTree, np.ndarray], jax.Array],
    params: PyTree,
    features: Sequence,
    labels: Int[np.ndarray, "n"],
    rows: Int[np.ndarray, "m"],
    batch_size: int,
) -> Int[np.ndarray, "..."]:
    """Return in how many of `rows` the class 'heads... b' that `predict(params, features)` gives is the label.

    All batches have one size: the last is filled with rows that do not count.
    """
    hits: np.ndarray | int = 0
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        filled = np.pad(chunk, (0, min(batch_size, len(rows)) - len(chunk)), mode="edge")
        classes = np.asarray(predict(params, np.asarray(features[filled])))[..., : len(chunk)]
        hits = hits + (classes == labels[chunk]).sum(axis=-1)
    return np.asarray(hits)
