"""Frozen networks whose patch features the tokenizer learns to reconstruct.

A teacher takes the views as they come (uint8 pixels), brings them to its own input size and range, and returns one
feature per patch of the tokenizer. Its weights are passed in with every call, so that the training room can place them
on devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.layers import LayerNorm, Linear
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, resize
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import ByteImages, Images, PyTree, TeacherFeatures, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen network as a function from pixels to patch features.

    Attributes:
        name: of the weights, for logs and stores.
        weights_hash: identifies the weights that belong to it.
        choices: how it is used (normalization, output, ...), for the card of a feature store.
        normalization: name of its input range (`preprocess`).
        image_size: pixels of the views it is given.
        input_size: pixels of the images its network sees; views of another size are resized.
        network_grid: rows and columns of its network's patches.
        grid: rows and columns of the features it returns; those of another network grid are resampled.
        width: numbers in a feature.
        num_prefix_tokens: tokens in front of the patches.
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
    """A transformer and its final norm over every token, and a linear map of them all if `projection_dim` is not 0.

    `vit` holds the arguments of `VisionTransformer`.
    """

    vit: dict
    projection_dim: int = 0

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        backbone = VisionTransformer(**self.vit, name="backbone")
        tokens = LayerNorm(backbone.norm_eps, name="norm")(backbone(images).tokens)
        if not self.projection_dim:
            return tokens
        dtype = jnp.dtype(backbone.dtype)
        return Linear(self.projection_dim, False, dtype=dtype, out_dtype=jnp.float32, name="projection")(tokens)


def vit_tokens(arguments: dict, projection_dim: int = 0) -> Callable[[PyTree, Images], Tokens]:
    """Return (params, images) -> normalised tokens of a transformer; params are those of `NormalisedViT`.

    Source: the released teachers. DINO's features are the normalised tokens of the last block; CLIP's go through the
    projection that was trained for [CLS].
    """
    model = NormalisedViT(arguments, projection_dim)
    return lambda params, images: model.apply({"params": params}, images)


def classifier_tokens(arguments: dict) -> Callable[[PyTree, Images], Tokens]:
    """Return (params, images) -> normalised tokens in front of the head of a `Classifier` with these arguments."""
    model = Classifier(**arguments)
    return lambda params, images: model.apply({"params": params}, images, method=Classifier.features)


def clip_teacher(
    size: Mapping[str, int], width: int, *, image_size: int, grid: tuple[int, int], dtype: str
) -> tuple[Teacher, NormalisedViT]:
    """Return a teacher built as CLIP's published image networks are, without weights, and its network.

    Args:
        size: row of `sizes.SIZES`; CLIP ViT-B/16 is "base" with features of 512 numbers.
        width: of its features.
        image_size: pixels of the views.
        grid: rows and columns of patches, as many as the tokenizer has.
    """
    input_size = grid[0] * size["patch_size"]
    arguments = {
        **size,
        "image_size": input_size,
        "position": "absolute",
        "qkv_bias": "full",
        "pre_norm": True,
        "patch_bias": False,
        "norm_eps": 1e-5,
        "activation": "quick_gelu",
        "dtype": dtype,
    }
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
        tokens=vit_tokens(arguments, width),
    )
    return teacher, NormalisedViT(arguments, width)
