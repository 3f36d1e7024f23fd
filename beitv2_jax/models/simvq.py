"""SimVQ: all codes are learned together, as one linear map of random vectors that stay as they are.

A code that is not hit moves with the others, so none is left behind. An option for comparison with the published
quantizer, whose interface it has.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from beitv2_jax.models.ops.nearest_code import HIGHEST
from beitv2_jax.models.quantizer import (
    CodebookStatistics,
    QuantizerOptions,
    QuantizerOutput,
    hit_counts,
    l2_normalise,
    nearest_code,
    passed_codes,
)
from beitv2_jax.typing import Codebook, CodeIds

PROJECTION_WEIGHT = 0.25
"""Factor of the part of the loss that moves the projections."""


class SimVQ(nn.Module):
    """Replace every projection by its nearest unit code e_k = l2norm(W c_k), of which only W is learned.

    The c_k ~ N(0, 1/c), c the dimensions of a code, are drawn once. With z the unit projections, the loss is
    commitment_weight (mean((sg(z) - e)^2) + 0.25 mean((z - sg(e))^2)), over the `n c` elements of a row as in
    `Quantizer`. W starts as the identity and gets no other gradient than that of this loss.

    Params: `basis`, the transpose of W. State (collection 'codebook'): `coefficients`, the c_k, and the counts of hits.

    **Source** Zhu et al. 2024 (arXiv 2411.02038); the codes have unit length here, as those of `Quantizer`.
    """

    options: QuantizerOptions
    nearest_code: str = "scan"

    @nn.compact
    def __call__(self, projections: Float[Array, "b n c"], weight: Float[Array, "b"] | None = None) -> QuantizerOutput:
        """Look up codes; `weight` as `Quantizer` says."""
        options = self.options
        self.variable("codebook", "coefficients", self._drawn)
        self.param("basis", lambda key: jnp.eye(options.code_dim))
        hit_counts(self, options.codebook_size)
        weight = jnp.ones(projections.shape[0]) if weight is None else weight
        unit, code_ids = l2_normalise(projections), self.code_ids(projections)
        codes = self.codes_of(code_ids)
        to_codes = (codes - jax.lax.stop_gradient(unit)) ** 2
        to_projections = (jax.lax.stop_gradient(codes) - unit) ** 2
        counts = jnp.zeros(options.codebook_size).at[code_ids].add(weight[:, None])
        return QuantizerOutput(
            codes=passed_codes(unit, codes, options.quantizer_gradient),
            code_ids=code_ids,
            commitment=options.commitment_weight * jnp.mean(to_codes + PROJECTION_WEIGHT * to_projections, axis=(1, 2)),
            unit=unit,
            statistics=CodebookStatistics(None, counts),
        )

    def code_ids(self, projections: Float[Array, "b n c"]) -> CodeIds:
        """Return the ids of a lookup alone."""
        samples, codebook = jax.lax.stop_gradient((l2_normalise(projections), self._codebook()))
        samples = samples.reshape(-1, self.options.code_dim)
        return nearest_code(samples, codebook, implementation=self.nearest_code).reshape(projections.shape[:-1])

    def codes_of(self, code_ids: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Return the codes of these ids."""
        return self._codebook()[code_ids]

    def _codebook(self) -> Codebook:
        coefficients, basis = self.get_variable("codebook", "coefficients"), self.get_variable("params", "basis")
        return l2_normalise(jnp.matmul(coefficients, basis, precision=HIGHEST))

    def _drawn(self) -> Codebook:
        shape = (self.options.codebook_size, self.options.code_dim)
        return jax.random.normal(self.make_rng("params"), shape, jnp.float32) / jnp.sqrt(self.options.code_dim)
