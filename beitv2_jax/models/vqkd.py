"""The tokenizer: a transformer encoder, the quantizer, and a small decoder that imitates a teacher's features.

Trained by the vqkd stage against teacher features; afterwards only `encode` is used, by the tokenize and mim stages.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.layers import LayerNorm, Linear
from beitv2_jax.models.quantizer import CodebookStatistics, Quantizer, QuantizerOutput
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import CodeIds, Codes, Images, TeacherFeatures


class VQKDOutput(NamedTuple):
    """What the tokenizer says about a batch, with the intermediates by name.

    `reconstruction` of the teacher features, not normalised; `codes`, `commitment`, `unit` and `statistics` as
    `QuantizerOutput`; `projections` are the quantizer's input; both features are patch features after the final norm.
    """

    reconstruction: TeacherFeatures
    code_ids: CodeIds
    commitment: Float[Array, "b"]
    codes: Codes
    unit: Codes
    statistics: CodebookStatistics
    projections: Codes
    encoder_features: Float[Array, "b n d"]
    decoder_features: Float[Array, "b n d"]


class TaskLayer(nn.Module):
    """Map features to another width: fc2(tanh(fc1 x)), with fc1 as wide as its input."""

    features: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "b n d"]) -> Float[Array, "b n o"]:
        linear = functools.partial(Linear, dtype=self.dtype, gradient_dtype=self.gradient_dtype)
        hidden = jnp.tanh(linear(inputs.shape[-1], name="fc1")(inputs))
        return linear(self.features, name="fc2")(hidden)


class VQKD(nn.Module):
    """Encode images to code ids and decode the codes to teacher features.

    `encoder` holds patch_size, width, depth, num_heads, mlp_dim; `decoder` the same without patch_size. Both
    transformers have absolute positions and a [CLS] token that takes part in attention and is then dropped; the
    decoder reads the codes as a `grid` image of 1x1 patches. `ema_decay` is that of `updated_state`. `attention`
    and `nearest_code` are forms of computing (`models.ops.attention`, `models.ops.nearest_code`). `dtype` is that of
    the transformers and of the decoder's task layer; from the projections to the codes everything is float32 in full
    precision.

    Raises:
        ValueError: images whose size is not `image_size`, or an `image_size` no multiple of the patch size.

    Source: paper section 2.1 and the released tokenizer.
    """

    image_size: int
    encoder: dict[str, int]
    decoder: dict[str, int]
    codebook_size: int
    code_dim: int
    teacher_width: int
    ema_decay: float = 0.99
    commitment_weight: float = 1.0
    dtype: Any = "float32"
    remat: str = "none"
    scan_blocks: bool = False
    gradient_dtype: Any = "float32"
    attention: str = "plain"
    nearest_code: str = "scan"

    def setup(self):
        # the constructor's dicts own the plain names, so submodules are named here for the parameter tree
        transformer = functools.partial(
            VisionTransformer,
            dtype=self.dtype,
            remat=self.remat,
            scan_blocks=self.scan_blocks,
            gradient_dtype=self.gradient_dtype,
            attention=self.attention,
        )
        self.encoder_vit = transformer(image_size=self.image_size, name="encoder", **self.encoder)
        self.decoder_vit = transformer(image_size=self.grid[0], patch_size=1, name="decoder", **self.decoder)
        self.encoder_norm = LayerNorm()
        self.decoder_norm = LayerNorm()
        self.encode_task = TaskLayer(self.code_dim)
        self.decode_task = TaskLayer(self.teacher_width, jnp.dtype(self.dtype), jnp.dtype(self.gradient_dtype))
        self.quantizer = Quantizer(self.codebook_size, self.code_dim, self.commitment_weight, self.nearest_code)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of code ids per image."""
        side = self.image_size // self.encoder["patch_size"]
        return side, side

    def __call__(self, images: Images, weight: Float[Array, "b"] | None = None, *, train: bool) -> VQKDOutput:
        """Reconstruct teacher features of `images` in [-1, 1]; `weight` as `Quantizer` says."""
        encoder_features, projections = self._project(images, train=train)
        quantized: QuantizerOutput = self.quantizer(projections, weight)
        code_image = quantized.codes.reshape(-1, *self.grid, self.code_dim)
        tokens = self.decoder_vit(code_image, train=train).tokens
        decoder_features = self.decoder_norm(tokens[:, 1:])
        return VQKDOutput(
            reconstruction=self.decode_task(decoder_features).astype(jnp.float32),
            code_ids=quantized.code_ids,
            commitment=quantized.commitment,
            codes=quantized.codes,
            unit=quantized.unit,
            statistics=quantized.statistics,
            projections=projections,
            encoder_features=encoder_features,
            decoder_features=decoder_features,
        )

    def encode(self, images: Images) -> CodeIds:
        """Return the code ids of `images` in [-1, 1], patches row-major."""
        return self.quantizer(self.project(images)).code_ids

    def project(self, images: Images) -> Codes:
        """Return the quantizer's input, not normalised, for `images` in [-1, 1]: the samples of the k-means start."""
        return self._project(images, train=False)[1]

    def _project(self, images: Images, *, train: bool) -> tuple[Float[Array, "b n d"], Codes]:
        features = self.encoder_norm(self.encoder_vit(images, train=train).tokens[:, 1:])
        # the released code forces this layer to float32; full precision keeps accelerators from TF32 and bfloat16
        with jax.default_matmul_precision("highest"):
            return features, self.encode_task(features)
