"""The codebook: nearest unit code, its moving average, and its k-means start.

Sits between encoder and decoder of the tokenizer. Everything here is float32 for any dtype of the model. A lookup
returns statistics, plain sums over the rows that jit sees; those of a whole batch, summed over its micro-batches, move
the codebook once, so the update is the same for any number of devices and of micro-batches.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from beitv2_jax.models.ops.nearest_code import cluster_sums, nearest_rows
from beitv2_jax.typing import Codebook, CodeIds, Codes, PyTree, Scalar

MIN_NORM = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """The options of a quantizer, passed as one object.

    Attributes:
        codebook_size: number of codes.
        code_dim: dimensions of a code.
        ema_decay: of the moving average that the codes follow, in [0, 1] (`moved_codebook`).
        commitment_weight: factor of the commitment loss.
    """

    codebook_size: int
    code_dim: int
    ema_decay: float = 0.99
    commitment_weight: float = 1.0


class CodebookStatistics(NamedTuple):
    """What moves the codebook: the sum of the unit vectors nearest to each code, and how many they are."""

    sums: Float[Array, "k c"]
    counts: Float[Array, "k"]


class QuantizerOutput(NamedTuple):
    """What one lookup gives: `codes` carry the straight-through gradient, `commitment` is the loss of each row."""

    codes: Codes
    code_ids: CodeIds
    commitment: Float[Array, "b"]
    unit: Codes
    statistics: CodebookStatistics


def l2_normalise(vectors: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Scale to unit length in float32: v / max(‖v‖, 1e-12).

    A zero vector stays zero and has a finite gradient, which `jnp.linalg.norm` would not give.
    """
    vectors = vectors.astype(jnp.float32)
    squared = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(squared, MIN_NORM**2))


def nearest_code(unit: Float[Array, "m c"], codebook: Codebook, *, implementation: str = "scan") -> Int[Array, "m"]:
    """Return argmin_k ‖e_k‖² − 2⟨z, e_k⟩, the id of the nearest code; the lowest id wins a tie.

    ‖z‖² is the same for every code and left out. ‖e‖² is kept although rows are unit vectors, because k-means can
    leave an all-zero row, which is nearer than a unit code of cosine below 1/2. `implementation` as `nearest_rows`.

    **Source** the released lookup, which takes the inner products in float16 under autocast; ours are float32.
    """
    return nearest_rows(unit, codebook, jnp.sum(codebook**2, axis=-1), implementation=implementation)


def moved_codebook(codebook: Codebook, statistics: CodebookStatistics, options: QuantizerOptions) -> Codebook:
    """Return l2norm(ema_decay·e_k + (1 − ema_decay)·l2norm(s_k / n_k)) where n_k > 0, and e_k elsewhere.

    The sums s_k and counts n_k are those of one whole batch; a code without hits stays where it is.

    **Source** the released quantizer: a blend of directions that does not weigh by counts, unlike the moving average
    of VQ-VAE, and no revival of unused codes.
    """
    sums, counts = statistics
    means = l2_normalise(sums / jnp.maximum(counts, 1.0)[:, None])
    moved = l2_normalise(options.ema_decay * codebook + (1.0 - options.ema_decay) * means)
    return jnp.where(counts[:, None] > 0, moved, codebook)


class Quantizer(nn.Module):
    """Replace every projection by its nearest unit code; nothing moves here (`updated_state`).

    State (collection 'codebook', all float32, no gradient): `codebook` unit rows, at first l2norm(N(0, 1));
    `cluster_counts`, the moving average of hits per code; `window_counts` and `last_window_counts`, the hits of the
    running and of the last finished window (`roll_window`).

    `options.commitment_weight` multiplies mean((sg(e) − z)²) over the `n c` elements of a row, which is 1/code_dim of
    the squared distance per patch. `nearest_code` is the implementation of the lookup (`models.ops.nearest_code`);
    all give the same ids.

    **Source** paper section 2.1; the released quantizer, its order of operations included.
    """

    options: QuantizerOptions
    nearest_code: str = "scan"

    @nn.compact
    def __call__(self, projections: Float[Array, "b n c"], weight: Float[Array, "b"] | None = None) -> QuantizerOutput:
        """Look up codes with the codebook as it is.

        `weight` is 1 for the rows that count in the statistics and 0 for unreadable images; None counts all.
        """
        options = self.options
        codebook = self.variable("codebook", "codebook", self._initial_codebook).value
        for name in ("cluster_counts", "window_counts", "last_window_counts"):
            self.variable("codebook", name, jnp.zeros, (options.codebook_size,), jnp.float32)
        weight = jnp.ones(projections.shape[0]) if weight is None else weight
        unit = l2_normalise(projections)
        samples = jax.lax.stop_gradient(unit).reshape(-1, options.code_dim)
        flat_ids = nearest_code(samples, codebook, implementation=self.nearest_code)
        code_ids = flat_ids.reshape(unit.shape[:-1])
        nearest = jax.lax.stop_gradient(codebook[code_ids])
        sample_weight = jnp.repeat(weight, unit.shape[1])
        return QuantizerOutput(
            codes=unit + jax.lax.stop_gradient(nearest - unit),
            code_ids=code_ids,
            commitment=options.commitment_weight * jnp.mean((nearest - unit) ** 2, axis=(1, 2)),
            unit=unit,
            statistics=CodebookStatistics(*cluster_sums(samples, flat_ids, sample_weight, options.codebook_size)),
        )

    def _initial_codebook(self) -> Codebook:
        shape = (self.options.codebook_size, self.options.code_dim)
        return l2_normalise(jax.random.normal(self.make_rng("params"), shape, jnp.float32))


def updated_state(
    codebook_state: PyTree, statistics: CodebookStatistics, options: QuantizerOptions, *, move: bool = True
) -> PyTree:
    """Return the quantizer's state after a batch with these statistics; without `move` only its counts change."""
    codebook, counts, decay = codebook_state["codebook"], statistics.counts, options.ema_decay
    return {
        **codebook_state,
        "codebook": moved_codebook(codebook, statistics, options) if move else codebook,
        "cluster_counts": decay * codebook_state["cluster_counts"] + (1.0 - decay) * counts,
        "window_counts": codebook_state["window_counts"] + counts,
    }


def roll_window(codebook_state: PyTree, step: Int[Array, ""] | int, window_steps: int) -> PyTree:
    """Start a new usage window when `step` is a multiple of `window_steps`, else return the state as it is.

    Call it before `updated_state` of `step` (counted from 0); then `last_window_counts` holds the hits of exactly
    `window_steps` steps from the first roll after step 0 on. `codebook_state` is the quantizer's own dict.
    """
    rolls: Bool[Array, ""] = jnp.asarray(step) % window_steps == 0
    running, last = codebook_state["window_counts"], codebook_state["last_window_counts"]
    return {
        **codebook_state,
        "window_counts": jnp.where(rolls, jnp.zeros_like(running), running),
        "last_window_counts": jnp.where(rolls, running, last),
    }


@functools.partial(jax.jit, static_argnames=("num_clusters", "num_iters", "nearest_code"))
def kmeans(
    samples: Float[Array, "m c"],
    key: Array,
    num_clusters: int,
    num_iters: int = 10,
    weight: Float[Array, "m"] | None = None,
    nearest_code: str = "scan",
) -> tuple[Float[Array, "k c"], Float[Array, "k"]]:
    """Cluster the directions of `samples` by cosine; return unit means and the counts of the last assignment.

    The initial means are distinct random samples, or samples drawn with replacement when there are fewer than
    `num_clusters`. `key` owns the draw. Samples of `weight` 0 take no part.

    **Source** the released start, which each process runs on its own images, so that their codebooks start differently;
    this one sees the global batch and gives one codebook.
    """
    unit = l2_normalise(samples)
    num_samples = unit.shape[0]
    weight = jnp.ones(num_samples) if weight is None else weight
    num_counted = jnp.sum(weight > 0)

    def counted_first(rows):
        return rows[jnp.argsort(weight[rows] <= 0, stable=True)]

    draws = jax.random.randint(key, (num_clusters,), 0, jnp.maximum(num_counted, 1))
    chosen = counted_first(jnp.arange(num_samples))[draws]
    if num_samples >= num_clusters:
        distinct = counted_first(jax.random.permutation(key, num_samples))[:num_clusters]
        chosen = jnp.where(num_counted >= num_clusters, distinct, chosen)
    return kmeans_from(unit, unit[chosen], num_iters, weight, nearest_code)


@functools.partial(jax.jit, static_argnames=("num_iters", "nearest_code"))
def kmeans_from(
    unit: Float[Array, "m c"],
    initial_means: Float[Array, "k c"],
    num_iters: int,
    weight: Float[Array, "m"] | None = None,
    nearest_code: str = "scan",
) -> tuple[Float[Array, "k c"], Float[Array, "k"]]:
    """Run `num_iters` rounds of spherical k-means on unit (or zero) rows from given means.

    Each round assigns by the largest cosine and replaces a mean by l2norm(s_k / n_k); an empty cluster keeps its
    mean. s_k and n_k are sums over the samples, each times its `weight`. The counts returned are those of the last
    round's assignment, made before its update.
    """
    num_clusters = initial_means.shape[0]
    weight = jnp.ones(unit.shape[0]) if weight is None else weight

    def one_round(_, carry):
        means, _ = carry
        ids = nearest_rows(unit, means, jnp.zeros(num_clusters), implementation=nearest_code)
        sums, counts = cluster_sums(unit, ids, weight, num_clusters)
        moved = l2_normalise(sums / jnp.maximum(counts, 1.0)[:, None])
        return jnp.where(counts[:, None] > 0, moved, means), counts

    start = (initial_means.astype(jnp.float32), jnp.zeros((num_clusters,), jnp.float32))
    return jax.lax.fori_loop(0, num_iters, one_round, start)


def codebook_usage(counts: Float[Array, "k"]) -> Scalar:
    """Return the fraction of codes hit at least once, in [0, 1]."""
    return jnp.mean((counts > 0).astype(jnp.float32))


def codebook_perplexity(counts: Float[Array, "k"]) -> Scalar:
    """Return exp(−Σ p_k ln p_k) with p_k = n_k / Σ n: from 1 (one code, or no hits) to k (all alike)."""
    shares = counts / jnp.maximum(jnp.sum(counts), 1.0)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))
