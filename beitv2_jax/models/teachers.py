"""Frozen networks whose patch features the tokenizer learns to reconstruct.

A teacher takes the views as they come (uint8 pixels) and normalises them itself. Its weights are passed in with every
call, so that the training room can place them on devices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.layers import LayerNorm
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.typing import ByteImages, Images, PyTree, TeacherFeatures, Tokens


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network as a function from pixels to patch features.

    `weights_hash` identifies the weights that belong to it; `normalization` names its input range (`preprocess`);
    `tokens(params, images)` gives all its tokens, [CLS] first, for normalised images.
    """

    name: str
    image_size: int
    grid: tuple[int, int]
    width: int
    weights_hash: str
    normalization: str
    tokens: Callable[[PyTree, Images], Tokens]

    def features(self, params: PyTree, images: ByteImages) -> TeacherFeatures:
        """Return the patch features of pixels 0..255, not normalised; [CLS] is dropped and no gradient passes.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        tokens = self.tokens(params, normalize(images, *NORMALIZATIONS[self.normalization]))
        return jax.lax.stop_gradient(tokens[:, 1:].astype(jnp.float32))


class NormalisedViT(nn.Module):
    """A transformer and its final norm over every token."""

    vit: dict

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        backbone = VisionTransformer(**self.vit, name="backbone")
        return LayerNorm(backbone.norm_eps, name="norm")(backbone(images).tokens)


def vit_teacher(*, name: str, weights_hash: str, normalization: str, arguments: dict) -> Teacher:
    """Build a teacher from a transformer and its final norm; `arguments` are those of `VisionTransformer`.

    Its params are {'backbone': ..., 'norm': ...}.

    Source: the DINO teacher of the released code, which reads the normalised tokens of the last block.
    """
    model = NormalisedViT(arguments)
    return Teacher(
        name=name,
        weights_hash=weights_hash,
        normalization=normalization,
        tokens=lambda params, images: model.apply({"params": params}, images),
        **_sizes(arguments),
    )


def classifier_teacher(*, name: str, weights_hash: str, normalization: str, arguments: dict) -> Teacher:
    """Build a teacher from a classifier of ours: the tokens in front of its head, normalised.

    `arguments` are those of `Classifier`.
    """
    model = Classifier(**arguments)
    return Teacher(
        name=name,
        weights_hash=weights_hash,
        normalization=normalization,
        tokens=lambda params, images: model.apply({"params": params}, images, method=Classifier.features),
        **_sizes(arguments),
    )


def _sizes(arguments: dict) -> dict:
    side = arguments["image_size"] // arguments["patch_size"]
    return {"image_size": arguments["image_size"], "grid": (side, side), "width": arguments["width"]}


KINDS = {"vit": vit_teacher, "classifier": classifier_teacher}
"""Builder of each kind of teacher; all take the same keyword arguments."""
