"""Block-wise masks over the patch grid: which patches the student of masked image modelling does not see."""

import math

import numpy as np
from jaxtyping import Bool


def block_mask(
    rng: np.random.Generator,
    grid: tuple[int, int],
    num_masked: int,
    *,
    min_patches: int = 16,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
) -> Bool[np.ndarray, "gh gw"]:
    """Draw a mask of exactly `num_masked` patches made of rectangles, True = hidden.

    Rectangles are added while fewer than `num_masked` patches are hidden. With m = min(patches still to hide,
    `max_patches`), each has

        area ~ U(min_patches, m),  ln a ~ U(ln min_aspect, -ln min_aspect),
        height = round(sqrt(area a)),  width = round(sqrt(area / a)),

    a uniform place, and is accepted if it is smaller than the grid in both directions and hides between 1 and m
    new patches. After ten refusals in a row the rest is drawn patch by patch. Hence the count is always exact.
    `max_patches` None or 0 means `num_masked`. `rng` is consumed; the caller derives it from
    (seed, "mask", example id, epoch).

    Raises:
      ValueError: `num_masked` is negative or larger than the grid.
    Source: the released BEiT v2 mask generator; the released one draws rectangles and filling from two generators.
    """
    rows, columns = grid
    if not 0 <= num_masked <= rows * columns:
        raise ValueError(f"num_masked must lie in 0..{rows * columns} for a grid of {rows}x{columns}, got {num_masked}")
    mask = np.zeros(grid, bool)
    count = 0
    while count < num_masked:
        limit = min(num_masked - count, max_patches or num_masked)
        added = _add_rectangle(rng, mask, min_patches, limit, math.log(min_aspect))
        if not added:
            break
        count += added
    if count < num_masked:
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, num_masked - count, replace=False)] = True
    return mask


def _add_rectangle(
    rng: np.random.Generator, mask: Bool[np.ndarray, "gh gw"], min_patches: int, limit: int, log_min_aspect: float
) -> int:
    """Hide one rectangle in place; return the number of newly hidden patches, 0 after ten refusals."""
    rows, columns = mask.shape
    # all ten attempts in one call: scalar draws would cost more than the rest of this function
    for size, shape, place_y, place_x in rng.random((10, 4)).tolist():
        # limit < min_patches simply reverses the bounds, as Python's random.uniform does
        area = min_patches + (limit - min_patches) * size
        aspect = math.exp(log_min_aspect * (1 - 2 * shape))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = int(place_y * (rows - height + 1)), int(place_x * (columns - width + 1))
        rectangle = mask[top : top + height, left : left + width]
        new = height * width - int(np.count_nonzero(rectangle))
        if 0 < new <= limit:
            rectangle[...] = True
            return new
    return 0
