"""Positions learned on one grid of patches, resized for another: what happens when weights meet another image size.

Done once, in float64, when weights are loaded; the models are built at their final size.
"""

import math

import numpy as np

from beitv2_jax.errors import UserError

_CLS_ROWS = 3
_RATIO_RANGE = (1.01, 1.5)
_RATIO_PRECISION = 1e-6
_SPLINE_DEGREE = 3
_CUBIC = -0.75


def resize_relative_table(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return a relative-position table 'r nh' for the square `grid` of patches; the same table if it has that size.

    A table has a row for each offset (gh, gw) between two patches, (2·side − 1)² in all, and three for [CLS], which
    stay. Each head's offsets are taken to lie at 0, ±1, ±(1 + q), ±(1 + q + q²), ... along both axes, with q such that
    the outermost comes to lie at the outermost offset of the new grid; a bicubic spline through them is read at the
    integers, and beyond the outermost at its border. Source: the released fine-tuning loader.

    Raises:
        UserError: the rows form no square, or the grid is not square, or too small a table for a cubic spline.
    """
    offsets = math.isqrt(max(0, len(table) - _CLS_ROWS))
    if table.ndim != 2 or offsets**2 + _CLS_ROWS != len(table) or offsets % 2 == 0:
        raise UserError(
            f"A relative-position table of shape {table.shape} belongs to no square grid of patches.",
            "it is not a table of offsets with three rows for [CLS] at its end.",
            "(2 * side - 1)^2 + 3 rows and a column for each head.",
        )
    target = 2 * grid[0] - 1
    if grid[0] != grid[1]:
        raise UserError(
            f"Relative-position tables cannot be resized to the grid {grid[0]} x {grid[1]}.",
            "the method is defined for square images only.",
            "a square image size.",
        )
    if target == offsets:
        return table
    if offsets <= _SPLINE_DEGREE:
        raise UserError(
            f"A relative-position table for {offsets // 2 + 1} patches per side is too small to be resized.",
            "a cubic spline needs at least four offsets in a row.",
            "weights of a grid of at least 3 x 3 patches.",
        )
    # most runs resize nothing, and scipy takes as long to import as jax
    from scipy.interpolate import RectBivariateSpline

    known = _spread(offsets // 2, target // 2)
    wanted = np.clip(np.arange(target) - target // 2, known[0], known[-1])
    heads = table[:-_CLS_ROWS].astype(np.float64).reshape(offsets, offsets, -1)
    resized = [
        RectBivariateSpline(known, known, heads[:, :, head], kx=_SPLINE_DEGREE, ky=_SPLINE_DEGREE, s=0)(wanted, wanted)
        for head in range(heads.shape[-1])
    ]
    rows = np.stack(resized, axis=-1).reshape(target**2, -1)
    return np.concatenate([rows.astype(table.dtype), table[-_CLS_ROWS:]])


def _spread(count: int, reach: int) -> np.ndarray:
    """Return 2·count + 1 coordinates around 0 whose steps grow by a ratio that puts the last at `reach`."""
    low, high = _RATIO_RANGE
    while high - low > _RATIO_PRECISION:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    # the last midpoint, as released, not the midpoint of what is left of the interval
    distances = np.cumsum(ratio ** np.arange(count))
    return np.concatenate([-distances[::-1], [0.0], distances])


def resize_position_embedding(
    embedding: np.ndarray, grid: tuple[int, int], *, num_prefix: int = 1, offset: float = 0.0
) -> np.ndarray:
    """Return a position embedding '1 p+n d' for another `grid` of patches; the same one if it has that size.

    The first `num_prefix` positions ([CLS], registers) stay. The patches, on a square grid of side s, are interpolated
    bicubically (a = −0.75, without antialiasing, edge values repeated): target index i is read at
    (i + ½) · s / (g + `offset`) − ½. Source: PyTorch's bicubic interpolation; the released loader has offset 0, the
    models that interpolate while they run have 0.1, by which they guard against rounding.

    Raises:
        UserError: the patches form no square.
    """
    prefix, patches = np.split(embedding, [num_prefix], axis=1)
    side = math.isqrt(patches.shape[1])
    if embedding.ndim != 3 or side == 0 or side**2 != patches.shape[1]:
        raise UserError(
            f"A position embedding of shape {embedding.shape} with {num_prefix} prefix positions has no square grid.",
            "the number of positions before the patches is another one.",
            "an embedding of shape (1, prefix + side^2, width).",
        )
    if tuple(grid) == (side, side):
        return embedding
    rows, columns = (_cubic_weights(side, size, offset) for size in grid)
    square = patches.astype(np.float64).reshape(side, side, -1)
    resized = np.einsum("ih,jw,hwd->ijd", rows, columns, square, optimize=True)
    resized = resized.reshape(1, grid[0] * grid[1], -1).astype(embedding.dtype)
    return np.concatenate([prefix, resized], axis=1)


def _cubic_weights(source: int, target: int, offset: float) -> np.ndarray:
    """Return the weights 'target source' of cubic convolution along one axis."""
    # positions rounded as PyTorch rounds them, the rest in float64
    scale = np.float32(source / (target + offset))
    position = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = np.floor(position).astype(int)
    weights = np.zeros((target, source))
    for tap in (-1, 0, 1, 2):
        neighbour = np.clip(first + tap, 0, source - 1)
        np.add.at(weights, (np.arange(target), neighbour), _cubic(np.abs(position - first - tap)))
    return weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    near = (_CUBIC + 2) * distance**3 - (_CUBIC + 3) * distance**2 + 1
    far = _CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
