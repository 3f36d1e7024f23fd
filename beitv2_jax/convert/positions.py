"""Resize position embeddings and relative position tables that were trained on another grid of patches.

This is done once, in float64, when weights are loaded; the models are built at their final image size.
"""

import math
from collections.abc import Mapping

import jax
import numpy as np

from beitv2_jax.errors import UserError

_CLS_ROWS = 3
_RATIO_RANGE = (1.01, 1.5)
_RATIO_PRECISION = 1e-6
_SPLINE_DEGREE = 3
_CUBIC = -0.75
_OFFSET = 0.1
_ANTIALIASED = {"antialias": "cubic", "bilinear": "linear"}
"""Method -> that of jax, whose kernels are those that PyTorch uses for antialiasing."""


def grid_of_table(rows: int) -> int | None:
    """Return the grid size g of a relative position table with (2 g - 1)^2 + 3 rows, None if no g fits."""
    offsets = math.isqrt(max(0, rows - _CLS_ROWS))
    return (offsets + 1) // 2 if offsets**2 + _CLS_ROWS == rows and offsets % 2 else None


def resize_positions(
    params: Mapping[str, np.ndarray], grid: tuple[int, int], *, num_prefix: int = 1, method: str = "bicubic"
) -> dict[str, np.ndarray]:
    """Return flat parameters ('backbone/pos_embed': array) with all positions resized to `grid`."""
    resized = dict(params)
    for path, array in params.items():
        if path.endswith("rel_pos_bias/table"):
            resized[path] = resize_relative_table(array, grid)
        elif path.rpartition("/")[2] == "pos_embed":
            resized[path] = resize_position_embedding(array, grid, num_prefix=num_prefix, method=method)
    return resized


def resize_relative_table(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return a relative position table 'r nh' for the square `grid` of patches; the same table if it has that size.

    A table has one row for each offset (gh, gw) between two patches, (2·side − 1)² in all, and three rows for [CLS],
    which are copied. The offsets of each head are placed at 0, ±1, ±(1 + q), ±(1 + q + q²), ... along both axes, where
    q is chosen so that the outermost one falls on the outermost offset of the new grid. A bicubic spline through them
    is evaluated at the integers; beyond the outermost offset the border value is used.

    Raises:
        UserError: the rows form no square, the grid is not square, or the table is too small for a cubic spline.

    Source: the released fine-tuning loader.
    """
    side = grid_of_table(len(table))
    if table.ndim != 2 or side is None:
        raise UserError(
            f"A relative position table of shape {table.shape} does not belong to a square grid of patches.",
            "The weights may be damaged, or come from a model with rectangular images.",
            "Use weights whose table has (2 * side - 1)^2 + 3 rows and one column for each head.",
        )
    if grid[0] != grid[1]:
        raise UserError(
            f"Relative position tables cannot be resized to a grid of {grid[0]} x {grid[1]} patches.",
            "The published method is defined for square images only.",
            "Use a square image size.",
        )
    if grid[0] == side:
        return table
    offsets, target = 2 * side - 1, 2 * grid[0] - 1
    if offsets <= _SPLINE_DEGREE:
        raise UserError(
            f"A relative position table for {side} patches per side is too small to be resized.",
            "A cubic spline needs at least four offsets in a row.",
            "Use weights that were trained with at least 3 x 3 patches.",
        )
    # imported here: most runs resize nothing, and importing scipy takes as long as importing jax
    from scipy.interpolate import RectBivariateSpline

    known = _spline_coordinates(side - 1, grid[0] - 1)
    wanted = np.clip(np.arange(target) - target // 2, known[0], known[-1])
    heads = table[:-_CLS_ROWS].astype(np.float64).reshape(offsets, offsets, -1)
    resized = [
        RectBivariateSpline(known, known, heads[:, :, head], kx=_SPLINE_DEGREE, ky=_SPLINE_DEGREE, s=0)(wanted, wanted)
        for head in range(heads.shape[-1])
    ]
    rows = np.stack(resized, axis=-1).reshape(target**2, -1)
    return np.concatenate([rows.astype(table.dtype), table[-_CLS_ROWS:]])


def _spline_coordinates(count: int, outermost: int) -> np.ndarray:
    """Return 2·count + 1 coordinates around 0 whose steps grow by the ratio that places the last at `outermost`."""
    low, high = _RATIO_RANGE
    while high - low > _RATIO_PRECISION:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > outermost:
            high = ratio
        else:
            low = ratio
    # like the released code, use the last midpoint, not the midpoint of the final interval
    distances = np.cumsum(ratio ** np.arange(count))
    return np.concatenate([-distances[::-1], [0.0], distances])


def resize_position_embedding(
    embedding: np.ndarray, grid: tuple[int, int], *, num_prefix: int = 1, method: str = "bicubic"
) -> np.ndarray:
    """Return a position embedding '1 p+n d' for another `grid` of patches; the same one if it has that size.

    The first `num_prefix` positions ([CLS], registers) are copied. The patches, on a square grid of side s, are
    interpolated by one of `choices.POSITION_RESIZES`:
        'bicubic': PyTorch's bicubic interpolation (a = −0.75, no antialiasing, edge values repeated), as in the
            released loader of BEiT. Target index i is read at (i + ½) · s / g − ½.
        'offset': the same with (i + ½) · s / (g + 0.1) − ½, as in the code of DINO and CLIP, which add 0.1 to guard
            against rounding.
        'antialias': cubic interpolation with antialiasing (a = −0.5), as in timm and OpenCLIP.
        'bilinear': linear interpolation along both axes with antialiasing, as in TIPS.

    Raises:
        UserError: the patches form no square.
    """
    prefix, patches = np.split(embedding, [num_prefix], axis=1)
    side = math.isqrt(patches.shape[1])
    if embedding.ndim != 3 or side == 0 or side**2 != patches.shape[1]:
        raise UserError(
            f"A position embedding of shape {embedding.shape} with {num_prefix} prefix positions has no square grid.",
            "The model may have another number of prefix tokens, or rectangular images.",
            "Use an embedding of shape (1, prefix + side^2, width).",
        )
    if tuple(grid) == (side, side):
        return embedding
    if method in _ANTIALIASED:
        square = patches.reshape(side, side, -1)
        resized = np.asarray(jax.image.resize(square, (*grid, square.shape[-1]), _ANTIALIASED[method]))
    else:
        rows, columns = (_cubic_weights(side, size, _OFFSET if method == "offset" else 0.0) for size in grid)
        square = patches.astype(np.float64).reshape(side, side, -1)
        resized = np.einsum("ih,jw,hwd->ijd", rows, columns, square, optimize=True)
    resized = resized.reshape(1, grid[0] * grid[1], -1).astype(embedding.dtype)
    return np.concatenate([prefix, resized], axis=1)


def _cubic_weights(source: int, target: int, offset: float) -> np.ndarray:
    """Return the weights 'target source' of cubic convolution along one axis."""
    # coordinates are rounded to float32 as in PyTorch, the rest is float64
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
