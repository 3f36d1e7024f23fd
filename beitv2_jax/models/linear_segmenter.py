"""A linear layer that gives every patch of frozen features a class, after batch norm."""

from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.upernet import BatchNorm, FeatureMap, Logits


class LinearSegmenter(nn.Module):
    """Return logits of every cell of a feature map, float32: batch norm, dropout of whole channels, a linear layer.

    Source: DINOv3's linear segmentation; kernels start from N(0, 0.01^2), biases from 0.
    """

    num_classes: int
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool, weight: Float[Array, "b"] | None = None) -> Logits:
        features = BatchNorm(name="norm")(features, train=train, weight=weight)
        features = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2))(features, deterministic=not train)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="head")(features)
