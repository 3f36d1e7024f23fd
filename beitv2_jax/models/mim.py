"""The masked image model: a transformer that predicts the code ids of hidden patches, twice.

The main branch reads the last block. The patch-aggregation branch reads [CLS] of the last block and the patches of an
earlier one, so that [CLS] has to carry what the early patches lack.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from beitv2_jax.models.backbone import Backbone, Compute, split_arguments
from beitv2_jax.models.layers import LayerNorm, Linear, apply_block, drop_path_rates
from beitv2_jax.models.ops.custom_vjp import gather_patches
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import Images, Mask

Patches = Float[Array, "b n d"]


class MIMOutput(NamedTuple):
    """Logits over the codebook for `m` patches of each image; the second is None without patch aggregation."""

    logits: Float[Array, "b m k"]
    aggregation_logits: Float[Array, "b m k"] | None


def gather_masked(values: Num[Array, "b n *rest"], mask: Mask, num_masked: int) -> Num[Array, "b m *rest"]:
    """Return the entries of the hidden patches in row-major order.

    Every row of `mask` must hold exactly `num_masked` True; a traced mask cannot be checked here.
    """
    positions = jnp.argsort(~mask, axis=1, stable=True)[:, :num_masked]
    return gather_patches(values, mask, positions)


class MaskedImageModel(nn.Module):
    """Predict code ids of hidden patches with the main head and, if `patch_aggregation`, the aggregation head.

    The aggregation head reads the patches after block `early_layer` (from 1); `head_depth` blocks follow, which share
    the backbone's relative-position table, then the final norm and output layer: those of the main head if
    `shared_head`, its own otherwise.

    Raises:
        ValueError: `early_layer` is outside 1..depth or `head_depth` is below 1.

    Source: BEiT v2 sections 2.2 and 2.3; stochastic depth of the head and its initialisation, that of the framework,
    follow the released code.
    """

    backbone: Backbone
    codebook_size: int
    patch_aggregation: bool = True
    early_layer: int = 9
    head_depth: int = 2
    shared_head: bool = True
    compute: Compute = Compute()

    def __post_init__(self):
        depth = self.backbone.depth
        if self.patch_aggregation and not 1 <= self.early_layer <= depth:
            raise ValueError(f"early_layer {self.early_layer} is not one of the {depth} blocks (counted from 1)")
        if self.patch_aggregation and self.head_depth < 1:
            raise ValueError(f"head_depth {self.head_depth} leaves the aggregation head without a block")
        super().__post_init__()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], compute: Compute = Compute()) -> "MaskedImageModel":
        """Build the model from flat arguments (`split_arguments`)."""
        defaults = {"position": "relative_shared", "layer_scale_init": 0.1, "param_init": "clipped"}
        backbone, heads = split_arguments({**arguments, "mask_token": True}, **defaults)
        return cls(backbone, compute=compute, **heads)

    def setup(self):
        # the constructor's field owns the plain name, so the submodule is named here for the parameter tree
        self.vit = VisionTransformer(self.backbone, self.compute, name="backbone")
        self.norm = LayerNorm(self.backbone.norm_eps)
        self.lm_head = self._output_layer()
        if self.patch_aggregation:
            head_end = self.early_layer + self.head_depth
            rates = drop_path_rates(self.backbone.drop_path_rate, max(self.backbone.depth, head_end))
            self.aggregation = [
                self.vit.block(index, rates[index], param_init="torch") for index in range(self.early_layer, head_end)
            ]
            if not self.shared_head:
                self.aggregation_norm = LayerNorm(self.backbone.norm_eps)
                self.aggregation_lm_head = self._output_layer()

    def __call__(self, images: Images, mask: Mask, *, num_masked: int, train: bool = False) -> MIMOutput:
        """Return the logits of the hidden patches in row-major order; `num_masked` is the exact count per image."""
        return self._logits(*self._masked_branches(images, mask, num_masked, train=train))

    def masked_features(
        self, images: Images, mask: Mask, *, num_masked: int, train: bool = False
    ) -> dict[str, Patches]:
        """Return by branch ('final', 'aggregation') the input of the output layer that gives the logits of a call."""
        patches, aggregated = self._masked_branches(images, mask, num_masked, train=train)
        features = {"final": self.norm(patches)}
        if aggregated is not None:
            features["aggregation"] = (self.norm if self.shared_head else self.aggregation_norm)(aggregated)
        return features

    def output_layer_of(self, branch: str) -> str:
        """Return the name of the parameters of a branch's output layer."""
        return "lm_head" if branch == "final" or self.shared_head else "aggregation_lm_head"

    def logits_everywhere(self, images: Images, mask: Mask | None = None) -> MIMOutput:
        """Return the logits of every patch, hidden or not."""
        patches, aggregated = self._branches(images, mask, train=False)
        return self._logits(patches, aggregated)

    def _branches(self, images: Images, mask: Mask | None, *, train: bool) -> tuple[Patches, Patches | None]:
        output = self.vit(images, mask, train=train)
        if not self.patch_aggregation:
            return output.tokens[:, 1:], None
        early = output.hidden[self.early_layer - 1]
        aggregated = jnp.concatenate([output.tokens[:, :1], early[:, 1:]], axis=1)
        for block in self.aggregation:
            aggregated = apply_block(block, aggregated, output.bias, train=train, remat=self.compute.remat)
        return output.tokens[:, 1:], aggregated[:, 1:]

    def _masked_branches(
        self, images: Images, mask: Mask, num_masked: int, *, train: bool
    ) -> tuple[Patches, Patches | None]:
        patches, aggregated = self._branches(images, mask, train=train)
        if aggregated is not None:
            aggregated = gather_masked(aggregated, mask, num_masked)
        return gather_masked(patches, mask, num_masked), aggregated

    def _logits(self, patches: Patches, aggregated: Patches | None) -> MIMOutput:
        logits = self.lm_head(self.norm(patches))
        if aggregated is None:
            return MIMOutput(logits, None)
        if self.shared_head:
            return MIMOutput(logits, self.lm_head(self.norm(aggregated)))
        return MIMOutput(logits, self.aggregation_lm_head(self.aggregation_norm(aggregated)))

    @nn.nowrap
    def _output_layer(self) -> Linear:
        init = self.backbone.param_init
        return Linear(self.codebook_size, param_init=init, compute=self.compute, out_dtype=jnp.float32)
