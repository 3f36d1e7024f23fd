"""Frozen networks whose patch features the tokenizer learns to reconstruct.

A teacher takes the views (uint8 pixels), resizes and normalises them for its network, and returns one feature per patch
of the tokenizer. Its weights are passed in with every call, so that the training step can place them
on devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.layers import LayerNorm, Linear
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, patches_of, resize
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import ByteImages, Images, PyTree, TeacherFeatures, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen network as a function from pixels to patch features.

    Attributes:
        name: of the weights, for logs and target caches.
        weights_hash: hash of its weights.
        choices: how it is used (normalization, output, ...), for the manifest of a target cache.
        normalization: name of its input range (`preprocess`).
        image_size: pixels of the views it is given.
        input_size: pixels of the images its network sees; views of another size are resized.
        network_grid: rows and columns of its network's patches.
        grid: rows and columns of the features it returns; those of another network grid are resampled.
        width: of a feature.
        num_prefix_tokens: tokens before the patches.
        tokens: (params, normalised images) -> all its tokens.
    """

    name: str
    weights_hash: str
    choices: dict[str, Any]
    normalization: str
    image_size: int
    input_size: int
    network_grid: tuple[int, int]
    grid: tuple[int, int]
    width: int
    num_prefix_tokens: int
    tokens: Callable[[PyTree, Images], Tokens]

    def features(self, params: PyTree, images: ByteImages) -> TeacherFeatures:
        """Return the patch features of pixels 0..255, not normalised, float32; no gradient passes.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of shape {images.shape} do not fit a teacher built for "
                f"(batch, {self.image_size}, {self.image_size}, channels)"
            )
        images = resize(images, self.input_size)
        tokens = self.tokens(params, normalize(images, *NORMALIZATIONS[self.normalization]))
        features = tokens[:, self.num_prefix_tokens :].astype(jnp.float32)
        return jax.lax.stop_gradient(_resample(features, self.network_grid, self.grid))


def _resample(
    features: TeacherFeatures, source: tuple[int, int], target: tuple[int, int]
) -> Float[Array, "b n_target t"]:
    """Return features on another grid: cubic interpolation, antialiased where the grid shrinks."""
    if source == target:
        return features
    batch, _, width = features.shape
    maps = jax.image.resize(features.reshape(batch, *source, width), (batch, *target, width), "cubic")
    return maps.reshape(batch, -1, width)


class NormalisedViT(nn.Module):
    """A transformer with its final norm over every token, and a linear map of them all unless `projection_dim` is 0."""

    backbone: Backbone
    projection_dim: int = 0
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        tokens = VisionTransformer(self.backbone, self.compute, name="backbone")(images).tokens
        tokens = LayerNorm(self.backbone.norm_eps, name="norm")(tokens)
        if not self.projection_dim:
            return tokens
        linear = Linear(self.projection_dim, False, compute=self.compute, out_dtype=jnp.float32, name="projection")
        return linear(tokens)


def vit_tokens(model: NormalisedViT) -> Callable[[PyTree, Images], Tokens]:
    """Return (params, images) -> normalised tokens of a transformer.

    Source: the released teachers. DINO's features are the normalised tokens of the last block; CLIP's go through the
    projection that was trained for [CLS].
    """
    return lambda params, images: model.apply({"params": params}, images)


def classifier_tokens(model: Classifier) -> Callable[[PyTree, Images], Tokens]:
    """Return (params, images) -> the normalised tokens that the head of a classifier reads."""
    return lambda params, images: model.apply({"params": params}, images, method=Classifier.features)


def pixel_teacher(name: str, *, image_size: int, grid: tuple[int, int]) -> Teacher:
    """Return a teacher without a network: the features of a patch are its pixels in [0, 1]."""
    rows, columns = grid
    options = dict.fromkeys(("normalization", "output", "activation", "position_resize"), "")
    return Teacher(
        name=name,
        weights_hash=name,
        choices={**options, "num_heads": 0, "grid_match": "resize_input", "input_size": image_size},
        normalization="unit",
        image_size=image_size,
        input_size=image_size,
        network_grid=grid,
        grid=grid,
        width=3 * (image_size // rows) * (image_size // columns),
        num_prefix_tokens=0,
        tokens=lambda params, images: patches_of(images, grid),
    )


def clip_teacher(
    size: Mapping[str, int], width: int, *, image_size: int, grid: tuple[int, int], dtype: str
) -> tuple[Teacher, NormalisedViT]:
    """Return a teacher built as CLIP's published image networks are, without weights, and its network.

    Args:
        size: row of `sizes.SIZES`; CLIP ViT-B/16 is "base" with features of width 512.
        width: of its features.
        image_size: side of the views, in pixels.
        grid: rows and columns of patches, equal to those of the tokenizer.
        dtype: of the matrix products.
    """
    input_size = grid[0] * size["patch_size"]
    backbone = Backbone(
        **size,
        image_size=input_size,
        qkv_bias="full",
        pre_norm=True,
        patch_bias=False,
        norm_eps=1e-5,
        activation="quick_gelu",
    )
    network = NormalisedViT(backbone, width, Compute(dtype=dtype))
    teacher = Teacher(
        name=f"CLIP ViT/{size['patch_size']}",
        weights_hash="",
        choices={},
        normalization="clip",
        image_size=image_size,
        input_size=input_size,
        network_grid=grid,
        grid=grid,
        width=width,
        num_prefix_tokens=1,
        tokens=vit_tokens(network),
    )
    return teacher, network
