"""Standardisation of frozen features: the mean of every feature becomes 0 and its variance 1."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Num

PIECE_ROWS = 2**13
"""Rows that are read at once."""


class Standardization(NamedTuple):
    """What makes the mean of every feature 0 and its variance 1: (x - shift) * factor; constant features become 0."""

    shift: Float[Array, "d"]
    factor: Float[Array, "d"]

    def __call__(self, features: Num[Array, "*b d"]) -> Float[Array, "*b d"]:
        return (features.astype(np.float32) - self.shift) * self.factor


def standardization(
    features: Num[np.ndarray, "n *m d"], rows: Int[np.ndarray, "r"], on_move: Callable[[str], None]
) -> Standardization:
    """Return the standardization of some rows of `features`, over their middle axes too, summed in float64.

    They are read piece by piece, and `on_move` is called before each.
    """
    rows = np.sort(rows)

    def pieces() -> Iterator[Float[np.ndarray, "p d"]]:
        for start in range(0, len(rows), PIECE_ROWS):
            on_move("standardising")
            yield features[rows[start : start + PIECE_ROWS]].reshape(-1, features.shape[-1]).astype(np.float64)

    count = len(rows) * int(np.prod(features.shape[1:-1]))
    mean = sum(piece.sum(axis=0) for piece in pieces()) / count
    variance = sum(((piece - mean) ** 2).sum(axis=0) for piece in pieces()) / count
    factor = np.where(variance > 1e-12, 1.0 / np.sqrt(np.maximum(variance, 1e-12)), 0.0)
    return Standardization(mean.astype(np.float32), factor.astype(np.float32))
