"""The codebook: nearest unit code, its moving average, and its k-means start.

Sits between encoder and decoder of the tokenizer. Everything here is float32 for any dtype of the model. A lookup
returns statistics, plain sums over the rows that jit sees; those of a whole batch, summed over its micro-batches, move
the codebook once, so the update is the same for any number of devices and of micro-batches.

`Quantizer` is the published one. The others (`models.fsq`, `models.simvq`) have its interface: the three methods, and
the counts of hits in their state (`hit_counts`).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from beitv2_jax.models.ops.nearest_code import cluster_sums, nearest_rows
from beitv2_jax.models.ops.per_device import on_own_rows
from beitv2_jax.typing import Codebook, CodeIds, Codes, PyTree, Scalar

MIN_NORM = 1e-12
DEAD_FRACTION = 0.01
"""Fraction of the uniform share of the tokens under which a code is dead. Source: UniTok's measure of unused codes."""
USAGE_DECAY = 0.99
"""Of the moving average of each code's share, by which `revived` finds dead codes."""
STEPS_UNTIL_DEAD = math.ceil(math.log(DEAD_FRACTION) / math.log(USAGE_DECAY))
"""The first step of a run after which a code can be dead: that of one without any hit, whose average starts at 1."""
TRAINING_COUNTERS = ("idle_steps", "usage_average")
"""State that only a training run keeps: weights that are read from it are without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerOptions:
    """The options of a quantizer, passed as one object.

    Attributes:
        codebook_size: number of codes.
        code_dim: dimensions of a code.
        ema_decay: of the moving averages of the codes (`moved_codebook`) and of their hits, in [0, 1].
        commitment_weight: factor of the commitment loss.
        quantizer: which one, a name in `models.vqkd.QUANTIZERS`.
        quantizer_gradient: what the codes pass on to the projections (`passed_codes`).
        fsq_levels: of 'fsq' alone, the number of levels of each dimension.

    Raises:
        ValueError: the levels are not those of `codebook_size` codes of `code_dim` dimensions.
    """

    codebook_size: int
    code_dim: int
    ema_decay: float = 0.99
    commitment_weight: float = 1.0
    quantizer: str = "ema"
    quantizer_gradient: str = "straight_through"
    fsq_levels: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = math.prod(self.fsq_levels), len(self.fsq_levels)
        if self.quantizer == "fsq" and sizes != (self.codebook_size, self.code_dim):
            raise ValueError(
                f"fsq_levels {self.fsq_levels} do not make {self.codebook_size} codes of {self.code_dim} dimensions"
            )


class CodebookStatistics(NamedTuple):
    """What moves the codebook: the sum of the unit vectors nearest to each code, and how many they are.

    `sums` is None for a quantizer whose codes do not follow a moving average.
    """

    sums: Float[Array, "k c"] | None
    counts: Float[Array, "k"]


class QuantizerOutput(NamedTuple):
    """What one lookup gives.

    `codes` carry the gradient of `passed_codes`, `commitment` is the loss of each row, `unit` what was quantized.
    """

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


def passed_codes(unit: Codes, nearest: Codes, gradient: str) -> Codes:
    """Return the codes e in `nearest`, with a gradient to the unit vectors z that they replace, and none to themselves.

    'straight_through' passes a cotangent g on as it is. 'rotation' passes R^T g = g - 2 r (r.g) + 2 z (e.g), where
    R = I - 2 r r^T + 2 e z^T with r = (z + e) / |z + e| is the rotation that takes z to e, held constant. Where e = -z,
    r is 0 and R the reflection I - 2 z z^T, which takes z to e as well.

    **Source** the rotation trick (Fifty et al. 2024, arXiv 2410.06424) for vectors of length 1.
    """
    nearest, passed = jax.lax.stop_gradient(nearest), unit
    if gradient == "rotation":
        between, constant = jax.lax.stop_gradient((l2_normalise(unit + nearest), unit))
        passed = unit - 2.0 * between * _dot(between, unit) + 2.0 * nearest * _dot(constant, unit)
    return passed + jax.lax.stop_gradient(nearest - passed)


def _dot(one: Float[Array, "... c"], other: Float[Array, "... c"]) -> Float[Array, "... 1"]:
    return jnp.sum(one * other, axis=-1, keepdims=True)


def hit_counts(module: nn.Module, codebook_size: int) -> None:
    """Create the counts that the state of every quantizer has (`updated_state`, `roll_window`)."""
    for name in ("cluster_counts", "window_counts", "last_window_counts"):
        module.variable("codebook", name, jnp.zeros, (codebook_size,), jnp.float32)


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
        hit_counts(self, options.codebook_size)
        weight = jnp.ones(projections.shape[0]) if weight is None else weight
        unit = l2_normalise(projections)
        samples = jax.lax.stop_gradient(unit).reshape(-1, options.code_dim)
        flat_ids = nearest_code(samples, codebook, implementation=self.nearest_code)
        code_ids = flat_ids.reshape(unit.shape[:-1])
        nearest = jax.lax.stop_gradient(codebook[code_ids])
        sample_weight = jnp.repeat(weight, unit.shape[1])
        return QuantizerOutput(
            codes=passed_codes(unit, nearest, options.quantizer_gradient),
            code_ids=code_ids,
            commitment=options.commitment_weight * jnp.mean((nearest - unit) ** 2, axis=(1, 2)),
            unit=unit,
            statistics=CodebookStatistics(*cluster_sums(samples, flat_ids, sample_weight, options.codebook_size)),
        )

    def code_ids(self, projections: Float[Array, "b n c"]) -> CodeIds:
        """Return the ids of a lookup alone."""
        samples = l2_normalise(projections).reshape(-1, self.options.code_dim)
        codebook = self.get_variable("codebook", "codebook")
        return nearest_code(samples, codebook, implementation=self.nearest_code).reshape(projections.shape[:-1])

    def codes_of(self, code_ids: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Return the codes of these ids."""
        return self.get_variable("codebook", "codebook")[code_ids]

    def _initial_codebook(self) -> Codebook:
        shape = (self.options.codebook_size, self.options.code_dim)
        return l2_normalise(jax.random.normal(self.make_rng("params"), shape, jnp.float32))


def updated_state(
    codebook_state: PyTree, statistics: CodebookStatistics, options: QuantizerOptions, *, move: bool = True
) -> PyTree:
    """Return the quantizer's state after a batch with these statistics.

    Without `move`, or where the statistics have no sums, only its counts change.
    """
    counts, decay = statistics.counts, options.ema_decay
    if move and statistics.sums is not None:
        moved = moved_codebook(codebook_state["codebook"], statistics, options)
        codebook_state = {**codebook_state, "codebook": moved}
    return {
        **codebook_state,
        "cluster_counts": decay * codebook_state["cluster_counts"] + (1.0 - decay) * counts,
        "window_counts": codebook_state["window_counts"] + counts,
    }


def roll_window(codebook_state: PyTree, steps: Int[Array, ""] | int, window_steps: int) -> PyTree:
    """Start a new usage window when `steps`, those that have finished, are a multiple of `window_steps`.

    Call it after every `updated_state`; then `last_window_counts` holds the hits of exactly the last `window_steps`
    steps whenever a window finishes, and until the next one does. `codebook_state` is the quantizer's own dict.
    """
    rolls: Bool[Array, ""] = jnp.asarray(steps) % window_steps == 0
    running, last = codebook_state["window_counts"], codebook_state["last_window_counts"]
    return {
        **codebook_state,
        "window_counts": jnp.where(rolls, jnp.zeros_like(running), running),
        "last_window_counts": jnp.where(rolls, running, last),
    }


def with_training_counters(codebook_state: PyTree, *, revive: bool) -> PyTree:
    """Return the state with what a run keeps of each code.

    `idle_steps`: steps since the last hit, or since the code was placed; with `revive` also `usage_average`, the u_k of
    `revived`, 1 at first.
    """
    zeros = jnp.zeros_like(codebook_state["cluster_counts"])
    averages = {"usage_average": zeros + 1.0} if revive else {}
    return {**codebook_state, "idle_steps": zeros, **averages}


def counted(codebook_state: PyTree, counts: Float[Array, "k"]) -> PyTree:
    """Return the state with those of its `TRAINING_COUNTERS` that it has after a batch with these counts."""
    state = dict(codebook_state)
    if "idle_steps" in state:
        state["idle_steps"] = jnp.where(counts > 0, 0.0, state["idle_steps"] + 1.0)
    if "usage_average" in state:
        total = jnp.sum(counts)
        shares = len(counts) * counts / jnp.maximum(total, 1.0)
        average = USAGE_DECAY * state["usage_average"] + (1.0 - USAGE_DECAY) * shares
        state["usage_average"] = jnp.where(total > 0, average, state["usage_average"])
    return state


def placed(codebook_state: PyTree, codebook: Codebook) -> PyTree:
    """Return the state with all codes in new places; what was counted of the old ones is forgotten."""
    state = {**codebook_state, "codebook": codebook}
    return with_training_counters(state, revive="usage_average" in state) if "idle_steps" in state else state


class Candidates(NamedTuple):
    """Tokens of the batch that dead codes may take the place of, best first; a score of 0 marks an empty row."""

    scores: Float[Array, "r"]
    vectors: Float[Array, "r c"]


def most_revived(codebook_size: int) -> int:
    """Return how many codes may be revived in one step: a hundredth of the codebook, rounded up."""
    return math.ceil(codebook_size / 100)


def drawn_candidates(
    unit: Codes, codes: Codes, weight: Float[Array, "b"], example_ids: Int[Array, "b"], key: Array, count: int
) -> Candidates:
    """Draw `count` tokens without replacement, token i with weight 1 - <z_i, e_a(i)>, its distance from its code.

    The best `count` of log(1 - <z_i, e_a(i)>) + Gumbel noise. Here stands the exponential of that score, distance
    divided by exponential noise: it has the same order, and 0 for what cannot be drawn. The noise of a token is a
    function of `key`, the id of its image and its place there, so that the draw does not depend on how the batch lies
    on devices or is cut into micro-batches. Images of `weight` 0 are never drawn.

    **Source** the Gumbel-top-k draw (Kool et al. 2019, arXiv 1903.06059).
    """
    unit, codes = jax.lax.stop_gradient((unit, codes))
    num_patches, code_dim = unit.shape[1:]
    keys = jax.vmap(lambda example_id: jax.random.fold_in(key, example_id))(example_ids)
    noise = jax.vmap(lambda key: jax.random.exponential(key, (num_patches,)))(keys)
    distance = jnp.maximum(1.0 - jnp.sum(unit * codes, axis=-1), 0.0)
    has_direction = jnp.sum(unit**2, axis=-1) > 0.5
    scores = jnp.where(has_direction & (weight > 0)[:, None], distance, 0.0) / jnp.maximum(noise, MIN_NORM)
    best = functools.partial(_best, count=count)
    return best(*on_own_rows(best, (scores.reshape(-1), unit.reshape(-1, code_dim))))


def merged_candidates(one: Candidates, other: Candidates) -> Candidates:
    """Return the best of two sets of candidates, as many as each holds: the draw from the tokens of both."""
    return _best(*(jnp.concatenate(parts) for parts in zip(one, other, strict=True)), count=len(one.scores))


def _best(scores: Float[Array, "m"], vectors: Float[Array, "m c"], *, count: int) -> Candidates:
    missing = max(0, count - len(scores))
    scores, rows = jax.lax.top_k(jnp.pad(scores, (0, missing)), count)
    return Candidates(scores, jnp.pad(vectors, ((0, missing), (0, 0)))[rows])


def revived(codebook_state: PyTree, candidates: Candidates, active: Bool[Array, ""] | bool = True) -> PyTree:
    """Return the state in which dead codes, rarest first, have taken the place of the candidates, best first.

    With n_k hits among the N tokens of the global batch, u_k <- 0.99 u_k + 0.01 K n_k / N; a code is dead where
    u_k < 1/100, and starts again with u_k = 1. At most as many codes move as there are candidates, and none unless
    `active`.

    **Source** restarts of unused codes as in Jukebox (arXiv 2005.00341), with thresholds and the draw as written here.
    """
    codebook, average = codebook_state["codebook"], codebook_state["usage_average"]
    rarest = jnp.argsort(average, stable=True)[: len(candidates.scores)]
    moves = active & (average[rarest] < DEAD_FRACTION) & (candidates.scores > 0)
    new_rows = jnp.where(moves[:, None], candidates.vectors, codebook[rarest])
    idle_steps = codebook_state["idle_steps"]
    return {
        **codebook_state,
        "codebook": codebook.at[rarest].set(new_rows),
        "usage_average": average.at[rarest].set(jnp.where(moves, 1.0, average[rarest])),
        "idle_steps": idle_steps.at[rarest].set(jnp.where(moves, 0.0, idle_steps[rarest])),
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


def dead_codes(counts: Float[Array, "k"]) -> Bool[Array, "k"]:
    """Return which codes have less than `DEAD_FRACTION` of the uniform share of the tokens counted."""
    return counts < DEAD_FRACTION * jnp.sum(counts) / len(counts)


def codebook_health(counts: Float[Array, "k"]) -> dict[str, Scalar]:
    """Return what the hits of each code say of a codebook.

    `codebook_usage`, the fraction of codes hit at least once; `codebook_perplexity` and its logarithm, the
    `codebook_entropy` in nats; `codebook_top_share`, the fraction of tokens on the most used 1 % of the codes, rounded
    up; `codebook_dead`, how many codes have less than 1/100 of the uniform share; `codebook_tokens`, how many tokens
    all that is of.
    """
    perplexity, tokens = codebook_perplexity(counts), jnp.sum(counts)
    most_used, _ = jax.lax.top_k(counts, math.ceil(len(counts) / 100))
    return {
        "codebook_usage": codebook_usage(counts),
        "codebook_perplexity": perplexity,
        "codebook_entropy": jnp.log(perplexity),
        "codebook_top_share": jnp.sum(most_used) / jnp.maximum(tokens, 1.0),
        "codebook_dead": jnp.sum(dead_codes(counts)),
        "codebook_tokens": tokens,
    }


def quantization_distance(unit: Codes, codes: Codes) -> Float[Array, "b"]:
    """Return the mean over patches of |z - e|^2, of what was quantized and its codes; of unit vectors 2 - 2 cos."""
    return jax.lax.stop_gradient(jnp.mean(jnp.sum((codes - unit) ** 2, axis=-1), axis=1))


LOW_USAGE, LOW_PERPLEXITY = 0.5, 0.25
"""Fractions of a codebook below which usage and perplexity are worth a warning."""


def collapse_of(health: Mapping[str, float], codebook_size: int) -> str:
    """Return a sentence on a codebook of which few codes are in use, by its `codebook_health`; '' for any other.

    Usage and perplexity are compared with `LOW_USAGE` and `LOW_PERPLEXITY` of what a uniform codebook shows in as many
    tokens M: 1 - exp(-M / K) of its codes.
    """
    usage, perplexity, tokens = (health[f"codebook_{name}"] for name in ("usage", "perplexity", "tokens"))
    uniform = 1.0 - math.exp(-tokens / codebook_size)
    if usage >= LOW_USAGE * uniform and perplexity >= LOW_PERPLEXITY * uniform * codebook_size:
        return ""
    return (
        f"{usage:.0%} of the {codebook_size} codes are in use over {tokens:,.0f} tokens, with a perplexity of "
        f"{perplexity:.1f}, and the most used 1 % of the codes take {health['codebook_top_share']:.0%} of the tokens."
    )
