"""The nearest row of a codebook for each token, and sums over the tokens of each row.

A matrix of all tokens and all codes would be the largest array of the tokenizer's step (0.8 GB for 128 images and 8192
codes). 'scan' goes over the codebook in tiles and carries only the best row so far. All implementations return the ids
of the reference argmin: float32 products in full precision, and the lowest id wins a tie. The Pallas kernel is
experimental: it has been compiled for TPU and GPU and run interpreted, not on a chip. Called by the quantizer and its
k-means.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from beitv2_jax.models.ops.per_device import on_own_rows
from beitv2_jax.typing import Codebook

IMPLEMENTATIONS = ("reference", "scan", "pallas")
SCAN_TILE = 256
SUM_TILE = 1024
HIGHEST = jax.lax.Precision.HIGHEST


def nearest_rows(
    unit: Float[Array, "m c"],
    codebook: Codebook,
    offsets: Float[Array, "k"],
    *,
    implementation: str = "scan",
) -> Int[Array, "m"]:
    """Return argmin_k offsets_k − 2⟨z, e_k⟩ for every row z of `unit`; the lowest id wins a tie.

    `implementation`: 'reference' stores the whole `m k` matrix, 'scan' a tile of it, 'pallas' (TPU and GPU; elsewhere
    interpreted, which is slow) nothing outside the chip's own memory.

    Raises:
        ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown nearest code {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "reference":
        products = jnp.matmul(unit, codebook.T, precision=HIGHEST)
        return jnp.argmin(offsets - 2.0 * products, axis=-1).astype(jnp.int32)
    if implementation == "scan":
        return _scanned(unit, codebook, offsets)
    # imported here because pallas takes most of a second to load and is rarely asked for
    from beitv2_jax.models.ops import nearest_code_pallas

    return on_own_rows(nearest_code_pallas.nearest_rows, (unit,), (codebook, offsets))


def cluster_sums(
    unit: Float[Array, "m c"], code_ids: Int[Array, "m"], weight: Float[Array, "m"], codebook_size: int
) -> tuple[Float[Array, "k c"], Float[Array, "k"]]:
    """Return Σ weight·z and Σ weight over the tokens of each code, in float32 and in an order that never changes.

    On CUDA, where a scattered sum takes its terms in the order in which threads come, a product with the one-hot ids of
    a tile of codes takes its place.
    """
    rows = jnp.concatenate([unit * weight[:, None], weight[:, None]], axis=1)
    sums = jax.lax.platform_dependent(
        rows,
        code_ids,
        cuda=lambda rows, ids: on_own_rows(
            functools.partial(one_hot_sums, codebook_size=codebook_size), (rows, ids), summed=True
        ),
        default=lambda rows, ids: jax.ops.segment_sum(rows, ids, num_segments=codebook_size),
    )
    return sums[:, :-1], sums[:, -1]


def one_hot_sums(
    rows: Float[Array, "m c"], code_ids: Int[Array, "m"], *, codebook_size: int, tile: int = SUM_TILE
) -> Float[Array, "k c"]:
    """Return the sum of the rows of each id, by products of one-hot ids, `tile` codes at a time."""

    def one_tile(first_id):
        hits = code_ids[:, None] == first_id + jnp.arange(tile)
        return jnp.matmul(hits.T.astype(rows.dtype), rows, precision=HIGHEST)

    tiles = jax.lax.map(one_tile, jnp.arange(0, codebook_size, tile, dtype=code_ids.dtype))
    return tiles.reshape(-1, rows.shape[1])[:codebook_size]


def _scanned(unit, codebook, offsets, tile: int = SCAN_TILE) -> Int[Array, "m"]:
    tile = min(tile, len(codebook))
    codebook, offsets = whole_tiles(codebook, offsets, tile)

    def one_tile(best, inputs):
        first_id, rows, row_offsets = inputs
        scores = row_offsets - 2.0 * jnp.matmul(unit, rows.T, precision=HIGHEST)
        return better(*best, scores, first_id, axis=1), None

    start = (jnp.full((len(unit), 1), jnp.inf), jnp.zeros((len(unit), 1), jnp.int32))
    first_ids = jnp.arange(0, len(offsets), tile, dtype=jnp.int32)
    tiles = (first_ids, codebook.reshape(-1, tile, codebook.shape[1]), offsets.reshape(-1, tile))
    return jax.lax.scan(one_tile, start, tiles)[0][1][:, 0]


def whole_tiles(codebook: Codebook, offsets: Float[Array, "k"], tile: int) -> tuple[jax.Array, jax.Array]:
    """Fill up to whole tiles with rows that are infinitely far away."""
    missing = -len(codebook) % tile
    return jnp.pad(codebook, ((0, missing), (0, 0))), jnp.pad(offsets, (0, missing), constant_values=jnp.inf)


def better(best_score, best_id, scores, first_id, axis: int) -> tuple[jax.Array, jax.Array]:
    """Return the better of the best so far and the best of a tile whose codes, from `first_id` on, lie along `axis`.

    Two minima in place of an argmin, which is several times slower: the least score, then the least id that has it. A
    later tile wins only if it is strictly nearer.
    """
    score = jnp.min(scores, axis=axis, keepdims=True)
    ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    here = first_id + jnp.min(jnp.where(scores == score, ids, scores.shape[axis]), axis=axis, keepdims=True)
    nearer = score < best_score
    return jnp.where(nearer, score, best_score), jnp.where(nearer, here, best_id)
