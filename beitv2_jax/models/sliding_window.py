"""Merge the logits of sliding windows into predictions at the size of the label maps.

Merging is linear until the arg-max: window logits are enlarged to the window's pixels, averaged where windows overlap,
and the whole is resampled to the label map. For one row of the label map that is a row of weights over the rows of
cells of each window, and the same for a column, so a tile of the result is a sum of matrix products over the windows:
nothing of the size of the image ever exists with all classes, and images of all sizes go through one program.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.segmentation.windows import TILE
from beitv2_jax.typing import Images

Batch = dict[str, Array]


class Segmented(NamedTuple):
    """Predicted classes of every pixel (anything beyond the image), and counts `b true predicted` of labelled ones."""

    label_maps: UInt8[Array, "b H W"]
    confusion: Int[Array, "b k k"]


def segment(
    logits_of: Callable[[Images, Int[Array, "b 2"]], Float[Array, "b h w k"]],
    batch: Batch,
    mirrored: Sequence[bool],
) -> Segmented:
    """Classify every pixel of the images whose windows `batch` holds.

    With one view the class is the arg-max of the merged logits, with several that of the mean of their probabilities.

    Args:
        logits_of: maps windows 'b S S 3' and the rows and columns in use of each to logits of cells, whose number
            divides the window's side.
        batch: as `data.segmentation.transforms.WindowTransform` makes it; rows of weight 0 are not counted.
        mirrored: which of the views are mirrored.

    Source: mmsegmentation's slide inference and its `aug_test`.
    """
    crop = batch["windows"].shape[3]
    views = [_view_logits(logits_of, batch, index) for index in range(len(mirrored))]
    labels = jnp.where(batch["weight"][:, None, None] > 0, batch["label_maps"], IGNORED)
    num_classes = views[0].shape[-1]
    tiles = jnp.max(-(-batch["sizes"] // TILE), axis=0)

    def merged(place: tuple[Array, Array]) -> Float[Array, "b T T k"]:
        places = tuple(start + jnp.arange(TILE) for start in place)
        answers = [
            merged_logits(cells, _view(batch, index), batch["sizes"], places, crop, mirror)
            for index, (cells, mirror) in enumerate(zip(views, mirrored, strict=True))
        ]
        return answers[0] if len(answers) == 1 else sum(jax.nn.softmax(answer) for answer in answers)

    def tile(number: Array, found: Segmented) -> Segmented:
        place = (number // tiles[1] * TILE, number % tiles[1] * TILE)
        predicted = jnp.argmax(merged(place), axis=-1).astype(jnp.uint8)
        true = jax.lax.dynamic_slice(labels, (0, *place), predicted.shape)
        one_hot = [jax.nn.one_hot(ids.reshape(len(ids), -1), num_classes) for ids in (true, predicted)]
        # products of ones and zeros, sums below 2^24: exact in any precision
        counts = jnp.einsum("bpk,bpl->bkl", *one_hot).astype(jnp.int32)
        return Segmented(
            jax.lax.dynamic_update_slice(found.label_maps, predicted, (0, *place)), found.confusion + counts
        )

    nothing = Segmented(
        jnp.zeros_like(batch["label_maps"]), jnp.zeros((len(labels), num_classes, num_classes), jnp.int32)
    )
    return jax.lax.fori_loop(0, tiles[0] * tiles[1], tile, nothing)


def _view(batch: Batch, index: int) -> Batch:
    return {name: batch[name][:, index] for name in ("corners", "num_windows", "view_sizes")}


def _view_logits(logits_of, batch: Batch, index: int) -> Float[Array, "b w h w k"]:
    """Return the logits of all windows of one view; as many are computed as the row with most windows has."""
    windows, view = batch["windows"][:, index], _view(batch, index)
    sizes = jnp.minimum(view["view_sizes"], windows.shape[2])
    cells = jax.eval_shape(logits_of, windows[:, 0], sizes)
    logits = jnp.zeros((*windows.shape[:2], *cells.shape[1:]), cells.dtype)

    def compute(number: Array, logits: Array) -> Array:
        of_window = logits_of(jax.lax.dynamic_index_in_dim(windows, number, 1, keepdims=False), sizes)
        return jax.lax.dynamic_update_index_in_dim(logits, of_window, number, 1)

    return jax.lax.fori_loop(0, jnp.max(view["num_windows"]), compute, logits)


def merged_logits(
    cells: Float[Array, "b w h w k"],
    view: Batch,
    sizes: Int[Array, "b 2"],
    places: tuple[Int[Array, "h"], Int[Array, "w"]],
    crop: int,
    mirrored: bool,
) -> Float[Array, "b h w k"]:
    """Return the merged logits of one view, at these rows and columns of the label maps.

    Args:
        cells: logits of the cells of each window.
        view: `corners`, `num_windows` and `view_sizes` of that view.
        sizes: rows and columns of each label map.
        crop: side of the windows in pixels.
    """
    exists = jnp.arange(cells.shape[1]) < view["num_windows"][:, None]
    weights = []
    for axis in (0, 1):
        positions = jnp.broadcast_to(places[axis], (len(cells), len(places[axis])))
        if axis == 1 and mirrored:
            positions = sizes[:, axis, None] - 1 - positions
        # the windows that start at the other side's beginning have every start on this side once
        once = exists & (view["corners"][:, :, 1 - axis] == 0)
        weights.append(
            jax.vmap(axis_weights, (0, 0, 0, 0, 0, None, None))(
                positions,
                sizes[:, axis],
                view["view_sizes"][:, axis],
                view["corners"][:, :, axis],
                once,
                crop,
                cells.shape[2 + axis],
            )
        )
    rows, columns = weights
    rows = jnp.where(exists[:, :, None, None], rows, 0.0)

    def add(number: Array, total: Array) -> Array:
        row, cell, column = (
            jax.lax.dynamic_index_in_dim(part, number, 1, keepdims=False) for part in (rows, cells, columns)
        )
        return total + jnp.einsum("bhi,bijk,bwj->bhwk", row, cell, column, precision=jax.lax.Precision.HIGHEST)

    total = jnp.zeros((len(cells), len(places[0]), len(places[1]), cells.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, jnp.max(view["num_windows"]), add, total)


def axis_weights(
    positions: Int[Array, "T"],
    length: Int[Array, ""],
    view_length: Int[Array, ""],
    corners: Int[Array, "w"],
    once: Bool[Array, "w"],
    crop: int,
    num_cells: int,
) -> Float[Array, "w T c"]:
    """Return what each of `num_cells` cells along each window's side contributes to pixels `positions` of a side.

    The side has `length` pixels in the label map and `view_length` in the view, where windows of `crop` pixels start at
    `corners`; `once` marks windows that have every start once. Both steps interpolate linearly between pixel centres
    and repeat the edge; overlapping windows count equally.
    """
    source = jnp.clip((positions + 0.5) * view_length / length - 0.5, 0.0, view_length - 1.0)
    low = jnp.floor(source).astype(jnp.int32)
    share = source - low
    total = 0.0
    for pixel, weight in ((low, 1.0 - share), (jnp.minimum(low + 1, view_length - 1), share)):
        inside = (corners[:, None] <= pixel) & (pixel < corners[:, None] + crop)
        covering = jnp.sum(inside & once[:, None], axis=0)
        place = jnp.clip((pixel - corners[:, None] + 0.5) * num_cells / crop - 0.5, 0.0, num_cells - 1.0)
        hat = jnp.maximum(0.0, 1.0 - jnp.abs(place[:, :, None] - jnp.arange(num_cells)))
        total += jnp.where(inside, weight / jnp.maximum(covering, 1), 0.0)[:, :, None] * hat
    return total
