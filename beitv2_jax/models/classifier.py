"""The image classifier: a transformer, pooling, a norm and a linear head.

It is what fine-tuning trains, and the form of teachers of our own.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.layers import LayerNorm, Linear
from beitv2_jax.models.vit import VisionTransformer, backbone_arguments
from beitv2_jax.typing import Images, Tokens


class Classifier(nn.Module):
    """Return class logits, float32.

    `pooling` 'mean' averages the patch tokens, [CLS] excluded, then normalises (`fc_norm`); 'cls' normalises and takes
    [CLS] (`norm`). The head starts multiplied by `head_init_scale`.

    Raises:
        ValueError: unknown `pooling`.

    Source: released fine-tuning model.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    position: str = "relative"
    layer_scale_init: float | None = 0.1
    drop_path_rate: float = 0.0
    pooling: str = "mean"
    head_init_scale: float = 0.001
    qkv_bias: str = "qv"
    norm_eps: float = 1e-6
    stem: str = "linear"
    dtype: Any = "float32"
    remat: str = "none"
    scan_blocks: bool = False
    gradient_dtype: Any = "float32"
    attention: str = "plain"

    def __post_init__(self):
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"unknown pooling {self.pooling!r}: choose 'mean' or 'cls'")
        super().__post_init__()

    def setup(self):
        self.backbone = VisionTransformer(**backbone_arguments(self))
        if self.pooling == "mean":
            self.fc_norm = LayerNorm(self.norm_eps)
        else:
            self.norm = LayerNorm(self.norm_eps)
        self.head = Linear(
            self.num_classes,
            init_scale=self.head_init_scale,
            dtype=jnp.dtype(self.dtype),
            out_dtype=jnp.float32,
            gradient_dtype=jnp.dtype(self.gradient_dtype),
        )

    def __call__(self, images: Images, *, train: bool = False) -> Float[Array, "b classes"]:
        tokens = self.backbone(images, train=train).tokens
        if self.pooling == "mean":
            return self.head(self.fc_norm(tokens[:, 1:].mean(axis=1)))
        return self.head(self.norm(tokens[:, 0]))

    def features(self, images: Images) -> Tokens:
        """Return all tokens, [CLS] first, each normalised by the norm in front of the head."""
        tokens = self.backbone(images).tokens
        return self.fc_norm(tokens) if self.pooling == "mean" else self.norm(tokens)
