"""Masked models: a transformer that predicts what hidden patches are, twice: their code ids, or a vector of numbers.

The main branch reads the last block. The patch-aggregation branch reads [CLS] of the last block and the patches of an
earlier one, so that [CLS] has to carry what the early patches lack.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from beitv2_jax.models.backbone import Backbone, Compute, split_arguments
from beitv2_jax.models.layers import LayerNorm, Linear, apply_block, drop_path_rates
from beitv2_jax.models.ops.custom_vjp import gather_patches
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import Images, Mask

Patches = Float[Array, "b n d"]
Output = Float[Array, "b m k"]


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


class MaskedTransformer(nn.Module):
    """A transformer with hidden patches and, if `patch_aggregation`, the aggregation head; subclasses predict with it.

    The aggregation head reads the patches after block `early_layer` (from 1); `head_depth` blocks follow, which share
    the backbone's relative-position table, then the final norm and output layer: those of the main head if
    `shared_head`, its own otherwise.

    Raises:
        ValueError: `early_layer` is outside 1..depth or `head_depth` is below 1.

    Source: BEiT v2 sections 2.2 and 2.3; stochastic depth of the head and its initialisation, that of the framework,
    follow the released code.
    """

    backbone: Backbone
    patch_aggregation: bool = True
    early_layer: int = 9
    head_depth: int = 2
    shared_head: bool = True
    compute: Compute = Compute()

    output_layer: ClassVar[str]
    """Name of the parameters of the output layer."""

    def __post_init__(self):
        depth = self.backbone.depth
        if self.patch_aggregation and not 1 <= self.early_layer <= depth:
            raise ValueError(f"early_layer {self.early_layer} is not one of the {depth} blocks (counted from 1)")
        if self.patch_aggregation and self.head_depth < 1:
            raise ValueError(f"head_depth {self.head_depth} leaves the aggregation head without a block")
        super().__post_init__()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], compute: Compute = Compute()) -> Self:
        """Build the model from flat arguments (`split_arguments`)."""
        defaults = {"position": "relative_shared", "layer_scale_init": 0.1, "param_init": "clipped"}
        backbone, heads = split_arguments({**arguments, "mask_token": True}, **defaults)
        return cls(backbone, compute=compute, **heads)

    def setup(self):
        # the constructor's field owns the plain name, so the submodule is named here for the parameter tree
        self.vit = VisionTransformer(self.backbone, self.compute, name="backbone")
        self.norm = LayerNorm(self.backbone.norm_eps)
        self.output = self._output_layer(self.output_layer)
        if self.patch_aggregation:
            head_end = self.early_layer + self.head_depth
            rates = drop_path_rates(self.backbone.drop_path_rate, max(self.backbone.depth, head_end))
            self.aggregation = [
                self.vit.block(index, rates[index], param_init="torch") for index in range(self.early_layer, head_end)
            ]
            if not self.shared_head:
                self.aggregation_norm = LayerNorm(self.backbone.norm_eps)
                self.aggregation_output = self._output_layer(f"aggregation_{self.output_layer}")

    def masked_features(
        self, images: Images, mask: Mask, *, num_masked: int, train: bool = False
    ) -> dict[str, Patches]:
        """Return by branch ('final', 'aggregation') the input of the output layer for the hidden patches, row-major."""
        patches, aggregated = self._masked_branches(images, mask, num_masked, train=train)
        features = {"final": self.norm(patches)}
        if aggregated is not None:
            features["aggregation"] = (self.norm if self.shared_head else self.aggregation_norm)(aggregated)
        return features

    def output_layer_of(self, branch: str) -> str:
        """Return the name of the parameters of a branch's output layer."""
        own = branch == "aggregation" and not self.shared_head
        return f"aggregation_{self.output_layer}" if own else self.output_layer

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

    def _outputs(self, patches: Patches, aggregated: Patches | None) -> tuple[Output, Output | None]:
        final = self.output(self.norm(patches))
        if aggregated is None:
            return final, None
        if self.shared_head:
            return final, self.output(self.norm(aggregated))
        return final, self.aggregation_output(self.aggregation_norm(aggregated))

    @property
    def output_width(self) -> int:
        """How many numbers are predicted of a patch."""
        raise NotImplementedError

    @nn.nowrap
    def _output_layer(self, name: str) -> Linear:
        init = self.backbone.param_init
        return Linear(self.output_width, param_init=init, compute=self.compute, out_dtype=jnp.float32, name=name)


class MaskedImageModel(MaskedTransformer, kw_only=True):
    """Predict the code ids of hidden patches.

    Source: BEiT v2 section 2.2.
    """

    codebook_size: int

    output_layer: ClassVar[str] = "lm_head"

    def __call__(self, images: Images, mask: Mask, *, num_masked: int, train: bool = False) -> MIMOutput:
        """Return the logits of the hidden patches in row-major order; `num_masked` is the exact count per image."""
        return MIMOutput(*self._outputs(*self._masked_branches(images, mask, num_masked, train=train)))

    def logits_everywhere(self, images: Images, mask: Mask | None = None) -> MIMOutput:
        """Return the logits of every patch, hidden or not."""
        return MIMOutput(*self._outputs(*self._branches(images, mask, train=False)))

    @property
    def output_width(self) -> int:
        """How many codes there are."""
        return self.codebook_size


class MaskedRegressor(MaskedTransformer, kw_only=True):
    """Predict a vector of `target_width` numbers for every hidden patch; None: as many as a patch has pixel values."""

    target_width: int | None = None

    output_layer: ClassVar[str] = "regression_head"

    def __call__(self, images: Images, mask: Mask, *, num_masked: int, train: bool = False) -> dict[str, Output]:
        """Return by branch ('final', 'aggregation') the predictions for the hidden patches in row-major order."""
        final, aggregation = self._outputs(*self._masked_branches(images, mask, num_masked, train=train))
        return {"final": final} if aggregation is None else {"final": final, "aggregation": aggregation}

    @property
    def output_width(self) -> int:
        """How many numbers are predicted of a patch."""
        return self.target_width or 3 * self.backbone.patch_size**2
