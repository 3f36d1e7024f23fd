"""What a network is (`Backbone`) and how it computes (`Compute`), passed whole to every module that needs them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from beitv2_jax.choices import POSITIONS, STEMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """The sizes and the architecture of a vision transformer.

    Attributes:
        image_size: side of the square input, in pixels.
        patch_size: side of a patch, in pixels.
        width: features of a token.
        depth: number of blocks.
        num_heads: attention heads of each block.
        mlp_dim: width of the hidden layer of each MLP.
        position: 'absolute' adds a learned embedding; 'relative_shared' biases every attention from one table,
            'relative' from a table per block.
        layer_scale_init: initial value of LayerScale; None or 0 leaves it out.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        mask_token: create the token that replaces patch embeddings where the mask is True.
        qkv_bias: 'qv' (queries and values), 'full' or 'none'.
        norm_eps: epsilon of every layer norm.
        param_init: initialisation of kernels and tokens (`layers.normal_init`).
        pre_norm: normalise the tokens before the first block, as CLIP does.
        patch_bias: give the patch embedding a bias.
        activation: of the MLPs (`layers.ACTIVATIONS`, or 'swiglu').
        stem: how a patch is embedded, 'linear' (as released) or 'conv' (`vit.ConvStem`).
        class_token: prepend [CLS]; SigLIP has none.
        num_registers: learned tokens without position between [CLS] and the patches, as in DINOv2.
        rotary: turn the queries and keys of patches by their positions (`layers.rotary_angles`), as DINOv3 does.

    Raises:
        ValueError: `image_size` is not a multiple of `patch_size`, `position` or `stem` is unknown, a conv stem has a
            patch size that is not a power of two, or positions are relative with other tokens than [CLS] and patches.
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
    rotary: bool = False

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.position not in POSITIONS:
            raise ValueError(f"unknown position {self.position!r}: choose one of {', '.join(POSITIONS)}")
        if self.stem not in STEMS:
            raise ValueError(f"unknown stem {self.stem!r}: choose one of {', '.join(STEMS)}")
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise ValueError(f"the conv stem needs a patch_size that is a power of two, not {self.patch_size}")
        if self.position.startswith("relative") and self.num_prefix_tokens != 1:
            raise ValueError(f"position {self.position!r} has offsets for [CLS] and patches only, not for registers")

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches."""
        return self.class_token + self.num_registers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_patches(self) -> int:
        """Number of patches of one image."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a network computes; none of it changes what is computed beyond rounding.

    Attributes:
        dtype: of the matrix products; parameters, residual stream, norms and softmax are float32.
        gradient_dtype: in which devices add up the gradients of kernels.
        remat: what a block saves for the backward pass (`layers.REMAT`), 'none' for everything.
        attention: implementation of attention (`ops.attention`).
        nearest_code: implementation of the codebook lookup (`ops.nearest_code`).
        cross_entropy: implementation of the output layer's loss (`ops.cross_entropy`).
    """

    dtype: str = "float32"
    gradient_dtype: str = "float32"
    remat: str = "none"
    attention: str = "reference"
    nearest_code: str = "scan"
    cross_entropy: str = "reference"


def split_arguments(arguments: Mapping[str, Any], **defaults) -> tuple[Backbone, dict[str, Any]]:
    """Split flat arguments of a model into its `Backbone` and the arguments of its heads.

    Flat arguments are how configs and converted weights describe a model; `defaults` are the model's own values of
    backbone fields that `arguments` leaves out.
    """
    names = {field.name for field in dataclasses.fields(Backbone)}
    backbone = {**defaults, **{name: value for name, value in arguments.items() if name in names}}
    return Backbone(**backbone), {name: value for name, value in arguments.items() if name not in names}
