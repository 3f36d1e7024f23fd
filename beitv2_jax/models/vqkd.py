"""The tokenizer: a transformer encoder, the quantizer, and a small decoder that imitates a teacher's features.

Trained by the vqkd stage against teacher features; afterwards only `encode` is used, by the tokenize and mim stages.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.fsq import FiniteScalarQuantizer
from beitv2_jax.models.layers import LayerNorm, Linear
from beitv2_jax.models.quantizer import CodebookStatistics, Quantizer, QuantizerOptions, QuantizerOutput
from beitv2_jax.models.simvq import SimVQ
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import CodeIds, Codes, Images, TeacherFeatures

QUANTIZERS = {"ema": Quantizer, "fsq": FiniteScalarQuantizer, "simvq": SimVQ}
"""Name in `choices.QUANTIZERS` -> its module."""


class VQKDOutput(NamedTuple):
    """The output of the tokenizer for a batch, with the intermediates by name.

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
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, inputs: Float[Array, "b n d"]) -> Float[Array, "b n o"]:
        hidden = jnp.tanh(Linear(inputs.shape[-1], compute=self.compute, name="fc1")(inputs))
        return Linear(self.features, compute=self.compute, name="fc2")(hidden)


class VQKD(nn.Module):
    """Encode images to code ids and decode the codes to teacher features.

    Both transformers have absolute positions and a [CLS] token that takes part in attention and is then dropped; the
    decoder reads the codes as a `grid` image of 1x1 patches. `compute.dtype` is that of the transformers and of
    the decoder's task layer; from the projections to the codes everything is float32 in full precision.

    Source: paper section 2.1 and the released tokenizer.
    """

    encoder: Backbone
    decoder: Backbone
    quantizer: QuantizerOptions
    teacher_width: int
    compute: Compute = Compute()

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], compute: Compute = Compute()) -> "VQKD":
        """Build the model from flat arguments.

        `arguments["encoder"]` and `arguments["decoder"]` hold fields of `Backbone`, without `image_size` and, for the
        decoder, without `patch_size`; `arguments` itself those of `QuantizerOptions`.
        """
        options = dict(arguments)
        image_size, encoder, decoder, teacher_width = (
            options.pop(name) for name in ("image_size", "encoder", "decoder", "teacher_width")
        )
        grid = image_size // encoder["patch_size"]
        return cls(
            encoder=Backbone(**{**encoder, "image_size": image_size}),
            decoder=Backbone(**{**decoder, "image_size": grid, "patch_size": 1}),
            quantizer=QuantizerOptions(**{**options, "fsq_levels": tuple(options.get("fsq_levels", ()))}),
            teacher_width=teacher_width,
            compute=compute,
        )

    def setup(self):
        # the constructor's fields own the plain names, so submodules are named here for the parameter tree
        self.encoder_vit = VisionTransformer(self.encoder, self.compute, name="encoder")
        self.decoder_vit = VisionTransformer(self.decoder, self.compute, name="decoder")
        self.encoder_norm = LayerNorm()
        self.decoder_norm = LayerNorm()
        self.encode_task = TaskLayer(self.quantizer.code_dim)
        self.decode_task = TaskLayer(self.teacher_width, self.compute)
        quantizer = QUANTIZERS[self.quantizer.quantizer]
        self.lookup = quantizer(self.quantizer, self.compute.nearest_code, name="quantizer")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of code ids per image."""
        return self.encoder.grid

    def __call__(self, images: Images, weight: Float[Array, "b"] | None = None, *, train: bool) -> VQKDOutput:
        """Reconstruct teacher features of `images` in [-1, 1]; `weight` as `Quantizer` says."""
        encoder_features, projections = self._project(images, train=train)
        quantized: QuantizerOutput = self.lookup(projections, weight)
        decoder_features = self._decoder_features(quantized.codes, train=train)
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
        return self.lookup.code_ids(self.project(images))

    def codes_of(self, code_ids: Int[Array, "..."]) -> Float[Array, "... c"]:
        """Return the codes of these ids."""
        return self.lookup.codes_of(code_ids)

    def decode(self, codes: Codes) -> TeacherFeatures:
        """Return the teacher features that are reconstructed from codes, patches row-major, not normalised."""
        return self.decode_task(self._decoder_features(codes, train=False)).astype(jnp.float32)

    def project(self, images: Images) -> Codes:
        """Return the quantizer's input, not normalised, for `images` in [-1, 1]: the samples of the k-means start."""
        return self._project(images, train=False)[1]

    def _decoder_features(self, codes: Codes, *, train: bool) -> Float[Array, "b n d"]:
        code_image = codes.reshape(-1, *self.grid, self.quantizer.code_dim)
        return self.decoder_norm(self.decoder_vit(code_image, train=train).tokens[:, 1:])

    def _project(self, images: Images, *, train: bool) -> tuple[Float[Array, "b n d"], Codes]:
        features = self.encoder_norm(self.encoder_vit(images, train=train).tokens[:, 1:])
        # the released code forces this layer to float32; full precision keeps accelerators from TF32 and bfloat16
        with jax.default_matmul_precision("highest"):
            return features, self.encode_task(features)
