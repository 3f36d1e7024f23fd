"""The segmentation model: a transformer, four feature maps made of its blocks, a pyramid head and an auxiliary head.

Fine-tuned on label maps after pre-training. Images larger than the network was built for are cut into windows
(`models.sliding_window`). Batch norm statistics are sums over the batch that jit sees, so any number of devices
computes the same.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.backbone import Backbone, Compute, split_arguments
from beitv2_jax.models.layers import Module, uniform_init
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import Images, PyTree

FeatureMap = Float[Array, "b h w c"]
Logits = Float[Array, "b h w classes"]
Weight = Float[Array, "b"]
BATCH_STATS = "batch_stats"


class SegmenterOutput(NamedTuple):
    """`logits` at a quarter of the image size, `auxiliary_logits` on the patch grid, the four `features` below them."""

    logits: Logits
    auxiliary_logits: Logits
    features: tuple[FeatureMap, ...]


def resize(features: FeatureMap, size: tuple[int, int]) -> FeatureMap:
    """Resample bilinearly to `size` (rows, columns); pixels are squares, edges repeat, shrinking does not smooth.

    Source: PyTorch's interpolation with align_corners off.
    """
    batch, *_, channels = features.shape
    return jax.image.resize(features, (batch, *size, channels), "bilinear", antialias=False)


def pool_to(features: FeatureMap, bins: int) -> FeatureMap:
    """Average over `bins` x `bins` cells; cell i covers rows floor(i h / bins) to ceil((i + 1) h / bins).

    Source: PyTorch's adaptive average pooling; cells overlap where `bins` does not divide the size.
    """
    rows, columns = (jnp.asarray(_cells(length, bins)) for length in features.shape[1:3])
    return jnp.einsum("bhwc,ih,jw->bijc", features, rows, columns, precision=jax.lax.Precision.HIGHEST)


def _cells(length: int, bins: int) -> Float[np.ndarray, "bins length"]:
    weights = np.zeros((bins, length), np.float32)
    for index in range(bins):
        start, stop = index * length // bins, -(-(index + 1) * length // bins)
        weights[index, start:stop] = 1.0 / (stop - start)
    return weights


class BatchNorm(Module):
    """Normalise channels over the whole batch when training, by running statistics otherwise; float32.

    When training, `batch_stats` becomes the mean of the batch and n / (n - 1) times its variance, n values a channel;
    `moved_statistics` moves the running ones towards them. Rows whose `weight` is 0 have no part in any of it.

    Source: PyTorch's batch norm. Flax's own keeps the plain variance and means the complement by momentum.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool, weight: Weight | None = None) -> FeatureMap:
        features = features.astype(jnp.float32)
        channels = features.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        kept_mean = self.variable(BATCH_STATS, "mean", jnp.zeros, channels, jnp.float32)
        kept_var = self.variable(BATCH_STATS, "var", jnp.ones, channels, jnp.float32)
        mean, var = kept_mean.value, kept_var.value
        if train:
            rows = jnp.ones(len(features)) if weight is None else (weight > 0).astype(jnp.float32)
            counted = rows[:, None, None, None]
            count = jnp.maximum(rows.sum() * (features[0].size // channels[0]), 1.0)
            mean = jnp.sum(counted * features, (0, 1, 2)) / count
            var = jnp.sum(counted * (features - mean) ** 2, (0, 1, 2)) / count
            if not self.is_initializing():
                kept_mean.value = mean
                kept_var.value = var * count / jnp.maximum(count - 1.0, 1.0)
        return (features - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias


def moved_statistics(running: PyTree, of_batch: PyTree, momentum: float = 0.1) -> PyTree:
    """Return (1 - momentum) * running + momentum * of_batch for a tree of `batch_stats`."""
    return jax.tree.map(lambda old, new: (1.0 - momentum) * old + momentum * new, running, of_batch)


class ConvNormRelu(nn.Module):
    """Convolve (odd kernel, same size, no bias), normalise, rectify."""

    features: int
    kernel_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool, weight: Weight | None = None) -> FeatureMap:
        convolution = nn.Conv(
            self.features,
            (self.kernel_size,) * 2,
            padding=self.kernel_size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )
        return nn.relu(BatchNorm(name="norm")(convolution(features), train=train, weight=weight))


class Upsample(Module):
    """Double both sides by a learned 2x2 patch per pixel: a transposed convolution of kernel and stride 2."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: FeatureMap) -> FeatureMap:
        batch, height, width, channels = features.shape
        draw = uniform_init(4 * self.features)
        kernel = self.param("kernel", draw, (2, 2, channels, self.features)).astype(self.dtype)
        bias = self.param("bias", draw, (self.features,)).astype(self.dtype)
        patches = jnp.einsum("bhwi,yxio->bhywxo", features.astype(self.dtype), kernel)
        return patches.reshape(batch, 2 * height, 2 * width, self.features) + bias


class FineLevel(nn.Module):
    """Quadruple both sides of a feature map: upsample, normalise, GELU, upsample."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool, weight: Weight | None = None) -> FeatureMap:
        features = Upsample(self.features, self.dtype, name="up_0")(features)
        features = nn.gelu(BatchNorm(name="norm")(features, train=train, weight=weight), approximate=False)
        return Upsample(self.features, self.dtype, name="up_1")(features)


class PyramidHead(nn.Module):
    """Classify pixels from four feature maps, finest first: pyramid pooling of the coarsest, then top-down sums.

    Source: Xiao et al. 2018, Unified Perceptual Parsing for Scene Understanding, as in mmsegmentation 0.11.
    """

    channels: int
    num_classes: int
    pool_bins: tuple[int, ...] = (1, 2, 3, 6)
    dropout_rate: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: tuple[FeatureMap, ...], *, train: bool, weight: Weight | None = None) -> Logits:
        def convolve(kernel_size, name):
            module = ConvNormRelu(self.channels, kernel_size, self.dtype, name=name)
            return functools.partial(module, train=train, weight=weight)

        *fine, coarsest = features
        levels = [convolve(1, f"lateral_{index}")(level) for index, level in enumerate(fine)]
        pooled = [
            resize(convolve(1, f"pool_{index}")(pool_to(coarsest, bins)), coarsest.shape[1:3])
            for index, bins in enumerate(self.pool_bins)
        ]
        context = jnp.concatenate([coarsest.astype(jnp.float32), *pooled], axis=-1)
        levels.append(convolve(3, "bottleneck")(context))
        for index in reversed(range(len(fine))):
            levels[index] += resize(levels[index + 1], levels[index].shape[1:3])
        outputs = [convolve(3, f"smooth_{index}")(level) for index, level in enumerate(levels[:-1])]
        outputs.append(levels[-1])
        outputs = [resize(level, outputs[0].shape[1:3]) for level in outputs]
        fused = convolve(3, "fusion")(jnp.concatenate(outputs, axis=-1))
        return _classify(self, fused, train=train)


class ConvHead(nn.Module):
    """Classify the cells of one feature map after one 3x3 convolution: the auxiliary head."""

    channels: int
    num_classes: int
    dropout_rate: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool, weight: Weight | None = None) -> Logits:
        convolution = ConvNormRelu(self.channels, 3, self.dtype, name="conv_0")
        features = convolution(features, train=train, weight=weight)
        return _classify(self, features, train=train)


def _classify(head: PyramidHead | ConvHead, features: FeatureMap, *, train: bool) -> Logits:
    """Drop whole channels (stream `dropout`), then map every pixel to class logits in float32."""
    features = nn.Dropout(head.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(features)
    draw = nn.initializers.normal(0.01)
    return nn.Dense(head.num_classes, kernel_init=draw, name="classes")(features)


class Segmenter(nn.Module):
    """Return class logits of every pixel region for normalised, square `images`.

    `out_layers` are the four blocks (counted from 1) whose patch tokens, not normalised, become the feature maps: the
    first is quadrupled in both sides, the second doubled, the third kept, the fourth halved by its maximum. The
    auxiliary head reads the third. `channels` and `aux_channels` are the widths of the heads. `dtype` is that of the
    transformer and the convolutions; batch norm and logits are float32. With `train`, make `batch_stats` mutable; rows
    whose `weight` is 0 then have no part in the batch statistics.

    Raises:
        ValueError: `out_layers` does not name four of the blocks.

    Source: released segmentation model, UPerNet of mmsegmentation 0.11 on BEiT v2.
    """

    backbone: Backbone
    num_classes: int
    out_layers: tuple[int, ...]
    channels: int
    aux_channels: int = 256
    dropout_rate: float = 0.1
    compute: Compute = Compute()

    def __post_init__(self):
        depth = self.backbone.depth
        if len(self.out_layers) != 4 or not all(1 <= layer <= depth for layer in self.out_layers):
            raise ValueError(f"out_layers {self.out_layers} must name four of the {depth} blocks, counted from 1")
        super().__post_init__()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], compute: Compute = Compute()) -> "Segmenter":
        """Build the model from flat arguments (`split_arguments`)."""
        backbone, heads = split_arguments(arguments, position="relative", layer_scale_init=0.1)
        return cls(backbone, compute=compute, **heads)

    def setup(self):
        width, dtype = self.backbone.width, jnp.dtype(self.compute.dtype)
        self.vit = VisionTransformer(self.backbone, self.compute, name="backbone")
        self.fpn1 = FineLevel(width, dtype)
        self.fpn2 = Upsample(width, dtype)
        self.decode_head = PyramidHead(self.channels, self.num_classes, dropout_rate=self.dropout_rate, dtype=dtype)
        self.auxiliary_head = ConvHead(self.aux_channels, self.num_classes, self.dropout_rate, dtype)

    def __call__(self, images: Images, *, train: bool = False, weight: Weight | None = None) -> SegmenterOutput:
        hidden = self.vit(images, train=train).hidden
        maps = [hidden[layer - 1][:, 1:].reshape(images.shape[0], *self.backbone.grid, -1) for layer in self.out_layers]
        features = (
            self.fpn1(maps[0], train=train, weight=weight),
            self.fpn2(maps[1]),
            maps[2],
            nn.max_pool(maps[3], window_shape=(2, 2), strides=(2, 2)),
        )
        return SegmenterOutput(
            self.decode_head(features, train=train, weight=weight),
            self.auxiliary_head(features[2], train=train, weight=weight),
            features,
        )
