"""Dense evaluation: the patch features of a frozen backbone, of its architecture at random weights, and raw pixels.

How pixels are classified by them is `beitv2_jax.evaluation.dense`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from beitv2_jax.config.checks import check_layer
from beitv2_jax.convert.weights import backbone_of
from beitv2_jax.data import pipeline
from beitv2_jax.data.segmentation.transforms import SquareTransform
from beitv2_jax.data.sources import Source
from beitv2_jax.data.transform import EvalRow
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.tasks import common, inputs, segment
from beitv2_jax.tasks.api import Batch
from beitv2_jax.tasks.frozen import FeatureSet, random_params, read_weights
from beitv2_jax.typing import Images, PyTree


@dataclasses.dataclass(frozen=True)
class FrozenBackbone:
    """A backbone that is read and never trained.

    Attributes:
        model: its blocks up to the one whose tokens are taken.
        params: of the weights.
        normalization: of its input.
        random_params: returns parameters of the same network before any training, drawn from a seed.
    """

    model: VisionTransformer
    params: PyTree
    normalization: str
    random_params: Callable[[int], PyTree]

    def patch_tokens(self, params: PyTree, images: Images) -> Array:
        """Return the patch tokens 'b n d' of normalised images, each with mean 0 and variance 1, in float32.

        What later gives every feature mean 0 and variance 1 makes this the same as the last norm of the network, whose
        scale and shift it removes.
        """
        tokens = self.model.apply({"params": params}, images).tokens[:, self.model.backbone.num_prefix_tokens :]
        tokens = tokens.astype(jnp.float32)
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.model.backbone.norm_eps)


def read_frozen(config) -> FrozenBackbone:
    """Read the weights `config.backbone.run` for images of `views.image_size`.

    Raises:
        UserError: there are no readable weights, they have no block `backbone.layer`, or the images no whole patches.
    """
    weights = read_weights(config)
    backbone = backbone_of(weights)
    check_layer(config.backbone.layer, backbone.depth)
    name = "encoder" if weights.kind == "vqkd" else "backbone"
    read_blocks = dataclasses.replace(backbone, depth=config.backbone.layer)
    model = VisionTransformer(read_blocks, Compute(dtype=config.efficiency.dtype))
    return FrozenBackbone(
        model,
        weights.variables["params"][name],
        weights.normalization or "half",
        lambda seed: random_params(weights, seed)[name],
    )


@dataclasses.dataclass(frozen=True)
class Dense:
    """What the dense evaluation compares, on which splits; patches are `patch_size` pixels wide."""

    sources: tuple[Source, Source]
    feature_sets: tuple[FeatureSet, ...]
    patch_size: int


def build(config) -> Dense:
    """Build the dense evaluation of the weights `config.backbone.run` against random weights and raw pixels.

    Raises:
        UserError: as `read_frozen` and `segment.open_sources`.
    """
    frozen = read_frozen(config)
    size = frozen.model.backbone.patch_size
    of_network = functools.partial(network_features, frozen)
    return Dense(
        sources=segment.open_sources(config),
        feature_sets=(
            FeatureSet("pretrained", of_network, frozen.params),
            FeatureSet("random", of_network, frozen.random_params(config.seed)),
            FeatureSet("pixels", functools.partial(pixel_features, size), {}),
        ),
        patch_size=size,
    )


def network_features(backbone: FrozenBackbone, params: PyTree, batch: Batch) -> dict[str, Array]:
    """Return the patch tokens of a batch of images."""
    images = common.normalized(batch["images"], backbone.normalization)
    return {"features": backbone.patch_tokens(params, images).astype(jnp.float16)}


def pixel_features(patch_size: int, frozen, batch: Batch) -> dict[str, Array]:
    """Return the pixels of each patch, from 0 to 1."""
    batch_size, side, _, channels = batch["images"].shape
    cells = side // patch_size
    tiles = batch["images"].reshape(batch_size, cells, patch_size, cells, patch_size, channels).swapaxes(2, 3)
    return {"features": (tiles.reshape(batch_size, cells * cells, -1) / 255.0).astype(jnp.float16)}


def batches(source: Source, config, process_index: int, process_count: int) -> pipeline.Batches:
    """Return every example of `source` once, as a square image and its label map."""
    transform = SquareTransform(ids=segment.label_ids(config), image_size=config.views.image_size)
    return pipeline.finite_batches(
        EvalRow(source, transform),
        len(source),
        batch_size=config.run.batch_size,
        process_index=process_index,
        process_count=process_count,
        **inputs.reading(config),
    )
