"""The vision transformer under the tokenizer, the masked image model, the classifier and the teachers."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.layers import (
    ACTIVATIONS,
    Block,
    LayerNorm,
    RelativePositionBias,
    apply_block,
    constrain,
    drop_path_rates,
    normal_init,
    scan_blocks,
    uniform_init,
)
from beitv2_jax.models.ops.custom_vjp import placed, product, shifted
from beitv2_jax.typing import AttentionBias, Images, Mask, Tokens

POSITIONS = ("absolute", "relative_shared", "relative", "none")
STEMS = ("linear", "conv")


class ViTOutput(NamedTuple):
    """`tokens` after the last block and `hidden` after every block, none of them normalised; the shared `bias`."""

    tokens: Tokens
    hidden: tuple[Tokens, ...]
    bias: AttentionBias | None


class PatchEmbed(nn.Module):
    """Map non-overlapping square patches to tokens, row-major.

    Equals a convolution with kernel = stride = `patch_size`; written as one matrix product, which is faster. Only
    `param_init` 'clipped' draws the kernel from that scheme and starts the bias at zero: the other released
    initialisations pass convolutions over, which leaves U(±1/√fan_in) for both.
    """

    patch_size: int
    width: int
    use_bias: bool = True
    param_init: str = "normal"
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "b n d"]:
        batch, height, width, channels = images.shape
        size = self.patch_size
        fan_in = size * size * channels
        untouched = self.param_init != "clipped"
        kernel_init = uniform_init(fan_in) if untouched else normal_init(self.param_init)
        kernel = self.param("kernel", kernel_init, (size, size, channels, self.width))
        patches = images.astype(self.dtype).reshape(batch, height // size, size, width // size, size, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, fan_in)
        kernel = kernel.reshape(fan_in, self.width)
        tokens = product(patches, kernel, self.dtype, self.dtype, self.gradient_dtype)
        if self.use_bias:
            bias_init = uniform_init(fan_in) if untouched else nn.initializers.zeros
            tokens = shifted(tokens, self.param("bias", bias_init, (self.width,)))
        return tokens


class ConvStem(nn.Module):
    """Map square patches to tokens by a small convolutional network that sees one patch at a time.

    3x3 convolutions of stride 2 with GELU between halve the patch until one token is left; its channels double up to
    `width`, which a last linear map leaves. As no convolution crosses a patch border, nothing of a hidden patch reaches
    a visible token.

    Differs from the released model, whose patches are embedded by one linear map: from random weights small networks
    learn in far fewer steps so. Source: Xiao et al. 2021, Early Convolutions Help Transformers See Better, there
    across patch borders.
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


class VisionTransformer(nn.Module):
    """Turn images (float, already normalised) into tokens: [CLS], registers, then patches row-major.

    `position`: 'absolute' adds a learned embedding; 'relative_shared' biases every attention from one table, 'relative'
    from a table per block. `mask_token` creates the token that replaces patch embeddings where the mask is True.
    `pre_norm` normalises the tokens before the first block, as CLIP does. `remat` ("none", "full", "dots") says what is
    computed again in the backward pass, `scan_blocks` that the blocks are compiled as one loop, `gradient_dtype` in
    what dtype devices add up the gradients of linear maps, `attention` how it is computed (`models.ops.attention`).
    `stem` embeds patches by one linear map ('linear', as released) or by a `ConvStem` ('conv'). `class_token` False
    leaves [CLS] out, as SigLIP does; `num_registers` learned tokens without position follow it, as in DINOv2.

    Raises:
        ValueError: `image_size` no multiple of `patch_size`, unknown `position` or `stem`, a `ConvStem` of a patch size
            that is no power of two, relative positions with other tokens than [CLS] and patches, or images of another
            size.

    Source: BEiT v2 section 2 and the released models.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    position: str = "absolute"
    layer_scale_init: float | None = None
    drop_path_rate: float = 0.0
    mask_token: bool = False
    qkv_bias: str = "qv"
    norm_eps: float = 1e-6
    param_init: str = "normal"
    pre_norm: bool = False
    patch_bias: bool = True
    activation: str = "gelu"
    stem: str = "linear"
    class_token: bool = True
    num_registers: int = 0
    dtype: Any = "float32"
    remat: str = "none"
    scan_blocks: bool = False
    gradient_dtype: Any = "float32"
    attention: str = "plain"

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.position not in POSITIONS:
            raise ValueError(f"unknown position {self.position!r}: choose one of {', '.join(POSITIONS)}")
        if self.stem not in STEMS:
            raise ValueError(f"unknown stem {self.stem!r}: choose one of {', '.join(STEMS)}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"the conv stem halves a patch down to one token: patch_size {self.patch_size} does not")
        if self.position.startswith("relative") and self.num_prefix_tokens != 1:
            raise ValueError(f"position {self.position!r} has offsets for [CLS] and patches only, not for registers")
        super().__post_init__()

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        return self.class_token + self.num_registers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid[0] * self.grid[1]

    @nn.nowrap
    def block(self, index: int, drop_path_rate: float, *, param_init: str = "", name: str | None = None) -> Block:
        """Return a block of this network's kind for place `index` (from 0), as the parent's submodule `name`."""
        return Block(
            self.num_heads,
            self.mlp_dim,
            self.norm_eps,
            self.layer_scale_init,
            drop_path_rate,
            self.qkv_bias,
            self.activation,
            self.grid if self.position == "relative" else None,
            index + 1,
            param_init or self.param_init,
            jnp.dtype(self.dtype),
            jnp.dtype(self.gradient_dtype),
            self.attention,
            name=name,
        )

    @nn.compact
    def __call__(self, images: Images, mask: Mask | None = None, *, train: bool = False) -> ViTOutput:
        tokens = constrain(self._embed(images, mask))
        bias = None
        if self.position == "relative_shared":
            bias = RelativePositionBias(self.grid, self.num_heads, name="rel_pos_bias")()
        rates = drop_path_rates(self.drop_path_rate, self.depth)
        blocks = [self.block(index, rate, name=f"blocks_{index}") for index, rate in enumerate(rates)]
        if self.scan_blocks and blocks and not self.is_initializing():
            hidden = tuple(scan_blocks(blocks, tokens, bias, train=train, remat=self.remat))
            return ViTOutput(hidden[-1], hidden, bias)
        hidden = []
        for block in blocks:
            tokens = apply_block(block, tokens, bias, train=train, remat=self.remat)
            hidden.append(tokens)
        return ViTOutput(tokens, tuple(hidden), bias)

    def _embed(self, images: Images, mask: Mask | None) -> Tokens:
        if images.ndim != 4 or images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of shape {images.shape} do not fit a network built for "
                f"(batch, {self.image_size}, {self.image_size}, channels)"
            )
        dtype = jnp.dtype(self.dtype)
        if self.stem == "conv":
            embed = ConvStem(self.patch_size, self.width, dtype, name="patch_embed")
        else:
            embed = PatchEmbed(
                self.patch_size,
                self.width,
                self.patch_bias,
                self.param_init,
                dtype,
                jnp.dtype(self.gradient_dtype),
                name="patch_embed",
            )
        patches = embed(images).astype(jnp.float32)
        draw = normal_init(self.param_init)
        if self.mask_token:
            mask_token = self.param("mask_token", draw, (1, 1, self.width))
        if mask is not None:
            # a selection, not a product with zero: nothing of a hidden patch passes, not even its gradient
            patches = jnp.where(mask[:, :, None], mask_token, patches)
        tokens = patches
        if self.class_token:
            tokens = jnp.concatenate([self._special_tokens("cls_token", 1, len(patches)), tokens], axis=1)
        if self.position == "absolute":
            tokens = placed(tokens, self.param("pos_embed", draw, (1, tokens.shape[1], self.width)))
        if self.num_registers:
            registers = self._special_tokens("register_tokens", self.num_registers, len(patches))
            tokens = jnp.concatenate([tokens[:, : self.class_token], registers, tokens[:, self.class_token :]], axis=1)
        if self.pre_norm:
            tokens = LayerNorm(self.norm_eps, name="pre_norm")(tokens)
        return tokens

    def _special_tokens(self, name: str, count: int, batch: int) -> Tokens:
        tokens = self.param(name, normal_init(self.param_init), (1, count, self.width))
        return jnp.broadcast_to(tokens, (batch, count, self.width))


def backbone_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the fields that a model shares with `VisionTransformer`, as keyword arguments for its backbone."""
    shared = VisionTransformer.__dataclass_fields__.keys() - {"parent", "name"}
    return {name: getattr(model, name) for name in model.__dataclass_fields__ if name in shared}
