"""The image classifier: a transformer, pooling, a norm and a linear head.

Fine-tuning trains it, and it can serve as a teacher.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.choices import POOLING
from beitv2_jax.models.backbone import Backbone, Compute, split_arguments
from beitv2_jax.models.layers import LayerNorm, Linear
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import Images, Tokens


class Classifier(nn.Module):
    """Return class logits, float32.

    `pooling` 'mean' averages the patch tokens, [CLS] excluded, then normalises (`fc_norm`); 'cls' normalises and takes
    [CLS] (`norm`). The head starts multiplied by `head_init_scale`.

    Raises:
        ValueError: unknown `pooling`.

    Source: released fine-tuning model.
    """

    backbone: Backbone
    num_classes: int
    pooling: str = "mean"
    head_init_scale: float = 0.001
    compute: Compute = Compute()

    def __post_init__(self):
        if self.pooling not in POOLING:
            raise ValueError(f"unknown pooling {self.pooling!r}: choose {' or '.join(map(repr, POOLING))}")
        super().__post_init__()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], compute: Compute = Compute()) -> "Classifier":
        """Build the model from flat arguments (`split_arguments`)."""
        backbone, head = split_arguments(arguments, position="relative", layer_scale_init=0.1)
        return cls(backbone, compute=compute, **head)

    def setup(self):
        self.vit = VisionTransformer(self.backbone, self.compute, name="backbone")
        if self.pooling == "mean":
            self.fc_norm = LayerNorm(self.backbone.norm_eps)
        else:
            self.norm = LayerNorm(self.backbone.norm_eps)
        self.head = Linear(
            self.num_classes, init_scale=self.head_init_scale, compute=self.compute, out_dtype=jnp.float32
        )

    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "b classes"]:
        tokens = self.vit(images, train=train).tokens
        if self.pooling == "mean":
            return self.head(self.fc_norm(tokens[:, 1:].mean(axis=1)))
        return self.head(self.norm(tokens[:, 0]))

    def features(self, images: Images) -> Tokens:
        """Return all tokens, [CLS] first, each normalised by the norm before the head."""
        tokens = self.vit(images).tokens
        return self.fc_norm(tokens) if self.pooling == "mean" else self.norm(tokens)
