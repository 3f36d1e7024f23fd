"""Classify pixels by the frozen features of their patches: nearest neighbours and logistic regression.

Arithmetic on arrays alone. Neighbours are found in parts of the bank, one after the other, so that a bank of any size
passes through a device; which parts does not matter.

Source: the dense evaluation of CAPI (arXiv 2502.08769), eval_segmentation.py @98b4fa1 of facebookresearch/capi.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.evaluation.knn import unit
from beitv2_jax.evaluation.standardization import Standardization

_ROWS_AT_ONCE = 8192


def to_patches(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """Return 'b n p' or 'b n p c', the pixels of each patch row-major, of arrays 'b S S' or 'b S S c'."""
    batch, side, _, *channels = pixels.shape
    cells = side // patch_size
    tiles = pixels.reshape(batch, cells, patch_size, cells, patch_size, *channels).swapaxes(2, 3)
    return tiles.reshape(batch, cells * cells, patch_size * patch_size, *channels)


def from_patches(patches: UInt8[np.ndarray, "b n p"]) -> UInt8[np.ndarray, "b S S"]:
    """Return the label maps of which these are the patches, as `to_patches` cuts them."""
    batch, cells, size = len(patches), *(int(np.sqrt(count)) for count in patches.shape[1:])
    tiles = patches.reshape(batch, cells, cells, size, size).swapaxes(2, 3)
    return tiles.reshape(batch, cells * size, cells * size)


def majority(labels: UInt8[np.ndarray, "q p"]) -> UInt8[np.ndarray, "q"]:
    """Return the most frequent label of each row, the lowest one of several."""
    rows = np.arange(len(labels))[:, None] * 256
    counts = np.bincount((rows + labels).reshape(-1), minlength=256 * len(labels))
    return counts.reshape(-1, 256).argmax(axis=1).astype(np.uint8)


class Neighbors(NamedTuple):
    """The nearest rows of a bank to each query, the nearest first, and what they are ranked by."""

    scores: Float[np.ndarray, "q k"]
    rows: Int[np.ndarray, "q k"]


def nearest_in_part(
    queries: Float[Array, "q d"],
    part: Float[Array, "m d"],
    counted: Bool[Array, "m"],
    *,
    num_neighbors: int,
    cosine: bool,
) -> Neighbors:
    """Return the nearest rows of a part of the bank, by their cosine or by their Euclidean distance.

        cosine: q . b / (|q| |b|);      else: q . b - |b|^2 / 2,  which falls as |q - b| grows

    Rows that are not `counted` come last.
    """
    if cosine:
        queries, part = unit(queries), unit(part)
    scores = jnp.einsum("qd,md->qm", queries, part, precision=jax.lax.Precision.HIGHEST)
    scores = scores if cosine else scores - 0.5 * jnp.sum(part**2, axis=-1)
    return Neighbors(*jax.lax.top_k(jnp.where(counted, scores, -jnp.inf), min(num_neighbors, len(part))))


def merged(found: Neighbors | None, of_part: Neighbors, first_row: int, num_neighbors: int) -> Neighbors:
    """Return the nearest rows of the parts so far, with those of the part that begins at `first_row`."""
    of_part = of_part._replace(rows=of_part.rows + first_row)
    both = [of_part] if found is None else [found, of_part]
    scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*both, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_neighbors]
    return Neighbors(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


@jax.jit
def vote(labels: UInt8[Array, "q k p"]) -> UInt8[Array, "q p"]:
    """Return the most frequent of the neighbours' labels of each pixel of a patch, the lowest one of several.

    `IGNORED` is a label like the others: where it wins, the pixel is given no class.
    """

    def at(place: Array, best: Array) -> Array:
        label = labels[:, place]
        count = jnp.sum(labels == label[:, None], axis=1, dtype=jnp.int32)
        return jnp.maximum(best, 256 * count + (255 - label.astype(jnp.int32)))

    best = jax.lax.fori_loop(0, labels.shape[1], at, jnp.zeros((len(labels), labels.shape[2]), jnp.int32))
    return (255 - best % 256).astype(jnp.uint8)


def logistic_loss(
    params: tuple[Array, Array],
    features: Float[Array, "c r d"],
    labels: Int[Array, "c r"],
    counted: Float[Array, "c r"],
    standard: Standardization,
    strength: Float[Array, ""],
) -> Float[Array, ""]:
    """Return the mean cross entropy of softmax(x W + b) in nats, plus |W|^2 / (2 C N) over N rows, C the `strength`."""
    kernel, bias = params

    @jax.checkpoint
    def add(total: Array, rows: tuple[Array, Array, Array]) -> tuple[Array, None]:
        of_rows, true, weight = rows
        logits = jnp.matmul(standard(of_rows), kernel, precision=jax.lax.Precision.HIGHEST) + bias
        return total + jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(logits, true)), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (features, labels, counted))
    return (total + 0.5 * jnp.sum(kernel**2) / strength) / counted.sum()


@functools.partial(jax.jit, static_argnames=("num_classes", "max_iterations"))
def _minimize(features, labels, counted, standard, strength, *, num_classes, max_iterations, tolerance):
    def loss(params):
        return logistic_loss(params, features, labels, counted, standard, strength)

    optimizer, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state, number, _ = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        largest = jnp.max(jnp.array([jnp.max(jnp.abs(part)) for part in grad]))
        return optax.apply_updates(params, updates), state, number + 1, largest

    def goes_on(carry):
        *_, number, largest = carry
        return (number < max_iterations) & (largest > tolerance)

    start = (jnp.zeros((features.shape[-1], num_classes)), jnp.zeros(num_classes))
    params, *_ = jax.lax.while_loop(goes_on, step, (start, optimizer.init(start), 0, jnp.float32(jnp.inf)))
    return params


def fit_logistic(
    features: Float[np.ndarray, "b d"],
    labels: UInt8[np.ndarray, "b"],
    standard: Standardization,
    *,
    num_classes: int,
    strength: float,
    max_iterations: int,
    tolerance: float = 1e-5,
) -> tuple[Float[Array, "d k"], Float[Array, "k"]]:
    """Return kernel and bias of a multinomial logistic regression on standardised features, by L-BFGS from zero.

    It ends when no entry of the gradient of `logistic_loss` is above `tolerance`.

    Args:
        strength: C, the inverse of the L2 penalty of the kernel; the bias has none.
    """
    parts = -(-len(labels) // _ROWS_AT_ONCE)
    padded = np.zeros((parts * _ROWS_AT_ONCE, features.shape[1]), features.dtype)
    padded[: len(features)] = features
    true, counted = np.zeros(len(padded), np.int32), np.zeros(len(padded), np.float32)
    true[: len(labels)], counted[: len(labels)] = labels, 1
    arrays = (array.reshape(parts, _ROWS_AT_ONCE, *array.shape[1:]) for array in (padded, true, counted))
    return _minimize(
        *arrays,
        standard,
        jnp.float32(strength),
        num_classes=num_classes,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )


def pixel_confusion(
    true: UInt8[np.ndarray, "..."], predicted: UInt8[np.ndarray, "..."], num_classes: int
) -> Int[np.ndarray, "k k_and_none"]:
    """Return how many pixels of each true class (rows) were given which one (columns), the last column for none.

    Pixels without a true class do not count.
    """
    known = true != IGNORED
    columns = np.minimum(predicted[known], num_classes).astype(np.int64)
    places = true[known].astype(np.int64) * (num_classes + 1) + columns
    return np.bincount(places, minlength=num_classes * (num_classes + 1)).reshape(num_classes, num_classes + 1)
