"""The vision transformer inside the tokenizer, the masked image model, the classifier and the teachers."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.layers import (
    ACTIVATIONS,
    Block,
    LayerNorm,
    Module,
    RelativePositionBias,
    apply_block,
    constrain,
    drop_path_rates,
    normal_init,
    uniform_init,
)
from beitv2_jax.models.ops.custom_vjp import add_bias, add_position, product
from beitv2_jax.typing import AttentionBias, Images, Mask, Tokens


class ViTOutput(NamedTuple):
    """`tokens` after the last block, `hidden` after every block (neither normalised), the shared attention `bias`."""

    tokens: Tokens
    hidden: tuple[Tokens, ...]
    bias: AttentionBias | None


class PatchEmbed(Module):
    """Map non-overlapping square patches to tokens, row-major.

    Equals a convolution with kernel = stride = `patch_size`; written as one matrix product, which is faster. Only the
    initialisation 'clipped' also draws this kernel and starts the bias at zero; the other released initialisations
    leave convolutions at U(±1/√fan_in).
    """

    backbone: Backbone
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "b n d"]:
        batch, height, width, channels = images.shape
        backbone, size, dtype = self.backbone, self.backbone.patch_size, self.compute.dtype
        fan_in = size * size * channels
        is_drawn = backbone.param_init == "clipped"
        kernel_init = normal_init(backbone.param_init) if is_drawn else uniform_init(fan_in)
        kernel = self.param("kernel", kernel_init, (size, size, channels, backbone.width))
        patches = images.astype(dtype).reshape(batch, height // size, size, width // size, size, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, fan_in)
        tokens = product(patches, kernel.reshape(fan_in, backbone.width), dtype, dtype, self.compute.gradient_dtype)
        if backbone.patch_bias:
            bias_init = nn.initializers.zeros if is_drawn else uniform_init(fan_in)
            tokens = add_bias(tokens, self.param("bias", bias_init, (backbone.width,)))
        return tokens


class ConvStem(nn.Module):
    """Map square patches to tokens by a small convolutional network that sees one patch at a time.

    3x3 convolutions of stride 2 with GELU between them halve the patch until one token is left; the channels double up
    to `width`, and a linear map follows. No convolution crosses a patch border, so no hidden patch influences a visible
    token.

    Differs from the released model, which embeds patches by one linear map: small networks trained from random weights
    need far fewer steps with it. Source: Xiao et al. 2021, Early Convolutions Help Transformers See Better (there the
    convolutions cross patch borders).
    """

    patch_size: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "b n d"]:
        batch, height, width, channels = images.shape
        size = self.patch_size
        features = images.astype(self.dtype).reshape(batch, height // size, size, width // size, size, channels)
        features = features.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, channels)
        num_halvings = size.bit_length() - 1
        for index in range(num_halvings):
            out = max(self.width >> (num_halvings - 1 - index), 1)
            features = nn.Conv(out, (3, 3), strides=2, dtype=self.dtype, name=f"conv_{index}")(features)
            features = ACTIVATIONS["gelu"](features)
        tokens = nn.Dense(self.width, dtype=self.dtype, name="proj")(features.reshape(-1, self.width))
        return tokens.reshape(batch, -1, self.width)


class VisionTransformer(Module):
    """Turn images (float, already normalised) into tokens: [CLS], registers, then patches row-major.

    Raises:
        ValueError: images of another size than `backbone.image_size`.

    Source: BEiT v2 section 2 and the released models.
    """

    backbone: Backbone
    compute: Compute = Compute()

    @nn.nowrap
    def block(self, index: int, drop_path_rate: float, *, param_init: str = "", name: str | None = None) -> Block:
        """Return block `index` (from 0) of this network, as the parent's submodule `name`."""
        return Block(self.backbone, self.compute, index + 1, drop_path_rate, param_init, name=name)

    @nn.compact
    def __call__(self, images: Images, mask: Mask | None = None, *, train: bool = False) -> ViTOutput:
        backbone = self.backbone
        tokens = constrain(self._embed(images, mask))
        bias = None
        if backbone.position == "relative_shared":
            bias = RelativePositionBias(backbone.grid, backbone.num_heads, name="rel_pos_bias")()
        hidden = []
        for index, rate in enumerate(drop_path_rates(backbone.drop_path_rate, backbone.depth)):
            block = self.block(index, rate, name=f"blocks_{index}")
            tokens = apply_block(block, tokens, bias, train=train, remat=self.compute.remat)
            hidden.append(tokens)
        return ViTOutput(tokens, tuple(hidden), bias)

    def _embed(self, images: Images, mask: Mask | None) -> Tokens:
        backbone, size = self.backbone, self.backbone.image_size
        if images.ndim != 4 or images.shape[1:3] != (size, size):
            raise ValueError(
                f"images of shape {images.shape} do not fit a network built for (batch, {size}, {size}, channels)"
            )
        if backbone.stem == "conv":
            embed = ConvStem(backbone.patch_size, backbone.width, jnp.dtype(self.compute.dtype), name="patch_embed")
        else:
            embed = PatchEmbed(backbone, self.compute, name="patch_embed")
        patches = embed(images).astype(jnp.float32)
        draw = normal_init(backbone.param_init)
        if backbone.mask_token:
            mask_token = self.param("mask_token", draw, (1, 1, backbone.width))
        if mask is not None:
            # a selection, not a product with zero: no value and no gradient of a hidden patch passes
            patches = jnp.where(mask[:, :, None], mask_token, patches)
        tokens = patches
        if backbone.class_token:
            tokens = jnp.concatenate([self._special_tokens("cls_token", 1, patches.shape[0]), tokens], axis=1)
        if backbone.position == "absolute":
            tokens = add_position(tokens, self.param("pos_embed", draw, (1, tokens.shape[1], backbone.width)))
        if backbone.num_registers:
            registers = self._special_tokens("register_tokens", backbone.num_registers, patches.shape[0])
            first = int(backbone.class_token)
            tokens = jnp.concatenate([tokens[:, :first], registers, tokens[:, first:]], axis=1)
        if backbone.pre_norm:
            tokens = LayerNorm(backbone.norm_eps, name="pre_norm")(tokens)
        return tokens

    def _special_tokens(self, name: str, count: int, batch: int) -> Tokens:
        tokens = self.param(name, normal_init(self.backbone.param_init), (1, count, self.backbone.width))
        return jnp.broadcast_to(tokens, (batch, count, self.backbone.width))
