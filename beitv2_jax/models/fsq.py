"""Finite scalar quantization: each dimension of a projection is rounded to one of a few levels.

A code is one level for every dimension, so the codebook is a grid, which nothing has to learn and nothing moves. An
option for comparison with the published quantizer, whose interface it has.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beitv2_jax.models.quantizer import CodebookStatistics, QuantizerOptions, QuantizerOutput, hit_counts, passed_codes
from beitv2_jax.typing import CodeIds


def bounded(projections: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Return 2 sigmoid(1.6 x) - 1, in (-1, 1), in float32: nearly uniform for normal x.

    **Source** iFSQ (Lin et al. 2026, arXiv 2601.17124), in place of the tanh of FSQ.
    """
    return 2.0 * jax.nn.sigmoid(1.6 * projections.astype(jnp.float32)) - 1.0


class FiniteScalarQuantizer(nn.Module):
    """Replace each dimension of a projection by the nearest of its levels.

    Level j of L has the value 2 j / (L - 1) - 1, and j = round((L - 1) (b + 1) / 2) with b = `bounded` x. The id of a
    code is j_1 + L_1 (j_2 + L_2 (j_3 + ...)). The gradient passes the rounding as it is. There is no commitment loss,
    and `unit` in the output is b.

    State (collection 'codebook'): the counts of hits. `nearest_code` has no meaning here: there is no lookup.

    **Source** Mentzer et al. 2023 (arXiv 2309.15505), which shifts an even number of levels by half a step so that 0 is
    one of them; here levels lie evenly around 0.
    """

    options: QuantizerOptions
    nearest_code: str = ""

    @nn.compact
    def __call__(self, projections: Float[Array, "b n c"], weight: Float[Array, "b"] | None = None) -> QuantizerOutput:
        """Round projections; `weight` as `Quantizer` says."""
        hit_counts(self, self.options.codebook_size)
        weight = jnp.ones(projections.shape[0]) if weight is None else weight
        values, code_ids = bounded(projections), self.code_ids(projections)
        counts = jnp.zeros(self.options.codebook_size).at[code_ids].add(weight[:, None])
        return QuantizerOutput(
            codes=passed_codes(values, self.codes_of(code_ids), "straight_through"),
            code_ids=code_ids,
            commitment=jnp.zeros(projections.shape[0]),
            unit=values,
            statistics=CodebookStatistics(None, counts),
        )

    def code_ids(self, projections: Float[Array, "b n c"]) -> CodeIds:
        """Return the ids of the nearest levels."""
        levels = jnp.round((self._levels - 1) * (bounded(projections) + 1.0) / 2.0).astype(jnp.int32)
        return jnp.sum(levels * self._strides, axis=-1)

    def codes_of(self, code_ids: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Return the codes of these ids."""
        levels = code_ids[..., None] // self._strides % self._levels
        return 2.0 * levels.astype(jnp.float32) / (self._levels - 1) - 1.0

    @property
    def _levels(self) -> np.ndarray:
        return np.array(self.options.fsq_levels, np.int32)

    @property
    def _strides(self) -> np.ndarray:
        return np.cumprod([1, *self.options.fsq_levels[:-1]], dtype=np.int32)
