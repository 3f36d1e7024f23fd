"""The segmentation model: a transformer, four feature maps made of its blocks, a pyramid head and an auxiliary head.

Fine-tuned on label maps after pre-training. Images larger than the network was built for are cut into windows
(`slide`). Batch norm statistics are sums over the batch that jit sees, so any number of devices computes the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.layers import uniform_init
from beitv2_jax.models.vit import VisionTransformer, backbone_arguments
from beitv2_jax.typing import Images

FeatureMap = Float[Array, "b h w c"]
Logits = Float[Array, "b h w classes"]
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


class BatchNorm(nn.Module):
    """Normalise channels over the whole batch when training, by running statistics otherwise; float32.

        running = (1 - momentum) * running + momentum * batch statistic

    The batch is normalised by its plain variance; the running one takes n / (n - 1) times that, n values a channel.

    Source: PyTorch's batch norm. Flax's own keeps the plain variance and means the complement by momentum.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool) -> FeatureMap:
        features = features.astype(jnp.float32)
        channels = features.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable(BATCH_STATS, "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable(BATCH_STATS, "var", jnp.ones, channels, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            axes = tuple(range(features.ndim - 1))
            mean = features.mean(axes)
            var = jnp.mean((features - mean) ** 2, axes)
            if not self.is_initializing():
                count = features.size // features.shape[-1]
                unbiased = var * count / max(count - 1, 1)
                running_mean.value = (1.0 - self.momentum) * running_mean.value + self.momentum * mean
                running_var.value = (1.0 - self.momentum) * running_var.value + self.momentum * unbiased
        return (features - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias


class ConvNormRelu(nn.Module):
    """Convolve (odd kernel, same size, no bias), normalise, rectify."""

    features: int
    kernel_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool) -> FeatureMap:
        convolution = nn.Conv(
            self.features,
            (self.kernel_size,) * 2,
            padding=self.kernel_size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )
        return nn.relu(BatchNorm(name="norm")(convolution(features), train=train))


class Upsample(nn.Module):
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
    def __call__(self, features: FeatureMap, *, train: bool) -> FeatureMap:
        features = Upsample(self.features, self.dtype, name="up_0")(features)
        features = nn.gelu(BatchNorm(name="norm")(features, train=train), approximate=False)
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
    def __call__(self, features: tuple[FeatureMap, ...], *, train: bool) -> Logits:
        def convolve(kernel_size, name):
            return ConvNormRelu(self.channels, kernel_size, self.dtype, name=name)

        *fine, coarsest = features
        levels = [convolve(1, f"lateral_{index}")(level, train=train) for index, level in enumerate(fine)]
        pooled = [
            resize(convolve(1, f"pool_{index}")(pool_to(coarsest, bins), train=train), coarsest.shape[1:3])
            for index, bins in enumerate(self.pool_bins)
        ]
        context = jnp.concatenate([coarsest.astype(jnp.float32), *pooled], axis=-1)
        levels.append(convolve(3, "bottleneck")(context, train=train))
        for index in reversed(range(len(fine))):
            levels[index] += resize(levels[index + 1], levels[index].shape[1:3])
        outputs = [convolve(3, f"smooth_{index}")(level, train=train) for index, level in enumerate(levels[:-1])]
        outputs.append(levels[-1])
        outputs = [resize(level, outputs[0].shape[1:3]) for level in outputs]
        fused = convolve(3, "fusion")(jnp.concatenate(outputs, axis=-1), train=train)
        return _classify(self, fused, train=train)


class ConvHead(nn.Module):
    """Classify the cells of one feature map after one 3x3 convolution: the auxiliary head."""

    channels: int
    num_classes: int
    dropout_rate: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: FeatureMap, *, train: bool) -> Logits:
        features = ConvNormRelu(self.channels, 3, self.dtype, name="conv_0")(features, train=train)
        return _classify(self, features, train=train)


def _classify(head: PyramidHead | ConvHead, features: FeatureMap, *, train: bool) -> Logits:
    """Drop whole channels (stream `dropout`), then map every pixel to class logits in float32."""
    features = nn.Dropout(head.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(features)
    draw = nn.initializers.normal(0.01)
    return nn.Dense(head.num_classes, kernel_init=draw, name="classes")(features)


class Segmenter(nn.Module):
    """Return class logits of every pixel region for `images` (normalised, `image_size` pixels square).

    `out_layers` are the four blocks (counted from 1) whose patch tokens, not normalised, become the feature maps: the
    first is quadrupled in both sides, the second doubled, the third kept, the fourth halved by its maximum. The
    auxiliary head reads the third. `channels` and `aux_channels` are the widths of the heads. `dtype` is that of the
    transformer and the convolutions; batch norm and logits are float32. With `train`, make `batch_stats` mutable.

    Raises:
        ValueError: `out_layers` does not name four of the blocks.

    Source: released segmentation model, UPerNet of mmsegmentation 0.11 on BEiT v2.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    out_layers: tuple[int, ...]
    channels: int
    aux_channels: int = 256
    position: str = "relative"
    layer_scale_init: float | None = 0.1
    drop_path_rate: float = 0.0
    dropout_rate: float = 0.1
    qkv_bias: str = "qv"
    norm_eps: float = 1e-6
    dtype: Any = "float32"
    remat: bool = False

    def __post_init__(self):
        if len(self.out_layers) != 4 or not all(1 <= layer <= self.depth for layer in self.out_layers):
            raise ValueError(f"out_layers {self.out_layers} must name four of the {self.depth} blocks, counted from 1")
        super().__post_init__()

    def setup(self):
        dtype = jnp.dtype(self.dtype)
        self.backbone = VisionTransformer(**backbone_arguments(self))
        self.fpn1 = FineLevel(self.width, dtype)
        self.fpn2 = Upsample(self.width, dtype)
        self.decode_head = PyramidHead(self.channels, self.num_classes, dropout_rate=self.dropout_rate, dtype=dtype)
        self.auxiliary_head = ConvHead(self.aux_channels, self.num_classes, self.dropout_rate, dtype)

    def __call__(self, images: Images, *, train: bool = False) -> SegmenterOutput:
        hidden = self.backbone(images, train=train).hidden
        maps = [hidden[layer - 1][:, 1:].reshape(len(images), *self.backbone.grid, -1) for layer in self.out_layers]
        features = (
            self.fpn1(maps[0], train=train),
            self.fpn2(maps[1]),
            maps[2],
            nn.max_pool(maps[3], (2, 2), strides=(2, 2)),
        )
        return SegmenterOutput(
            self.decode_head(features, train=train), self.auxiliary_head(features[2], train=train), features
        )


def slide(logits_of: Callable[[Images], Logits], images: Images, crop: int, stride: int) -> Logits:
    """Return logits for images of any size from square windows: the mean over the windows that see a pixel.

    `logits_of` maps `w crop crop 3` to `w crop crop classes`; it is called once with all windows of all images. Windows
    start every `stride` pixels; the last of a row or column is moved inside.

    Raises:
        ValueError: images smaller than a window.

    Source: mmsegmentation's slide inference; the released test uses crop 512 and stride 341.
    """
    batch, height, width, _ = images.shape
    if min(height, width) < crop:
        raise ValueError(f"images of {height}x{width} pixels are smaller than a window of {crop}: enlarge them first")
    corners = [(y, x) for y in _starts(height, crop, stride) for x in _starts(width, crop, stride)]
    windows = jnp.concatenate([images[:, y : y + crop, x : x + crop] for y, x in corners])
    logits = logits_of(windows).reshape(len(corners), batch, crop, crop, -1)
    total = jnp.zeros((batch, height, width, logits.shape[-1]), logits.dtype)
    count = np.zeros((height, width, 1), np.float32)
    for (y, x), window in zip(corners, logits, strict=True):
        total = total.at[:, y : y + crop, x : x + crop].add(window)
        count[y : y + crop, x : x + crop] += 1
    return total / count


def _starts(length: int, crop: int, stride: int) -> list[int]:
    steps = -(-(length - crop) // stride)
    return [min(step * stride, length - crop) for step in range(steps + 1)]
