"""Probe: frozen features of a trained backbone, of the same backbone at random weights, and raw pixels.

How they are evaluated is `beitv2_jax.evaluation.probe`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array

from beitv2_jax import config as config_lib
from beitv2_jax.config.checks import check_probed_layers
from beitv2_jax.convert.arguments import initialised
from beitv2_jax.convert.weights import backbone_of, read_backbone
from beitv2_jax.data.sources import Source
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.rng import step_key
from beitv2_jax.tasks import common, inputs
from beitv2_jax.typing import PyTree

PIXEL_SIDE = 32
"""Raw pixels are averaged to at most this many pixels a side before they are probed."""


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """One kind of frozen features: `apply(frozen, batch)` returns {name: float32 'b layers width'}."""

    name: str
    apply: Callable[[PyTree, dict], dict]
    frozen: PyTree


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the probe stage compares, on which splits, by linear classifiers of `num_steps` steps."""

    sources: tuple[Source, Source]
    feature_sets: tuple[FeatureSet, ...]
    num_steps: int


def build(config) -> Probe:
    """Build the probe of the weights `config.backbone.run` against random weights and raw pixels.

    Raises:
        UserError: the data set has no labels, or the weights are missing, or their backbone lacks a block that is to be
            probed or cannot see images of this size.
    """
    weights = read_backbone(config.backbone.run, image_size=config.views.image_size)
    for text in weights.assumptions:
        logging.info("%s: %s", config.backbone.run, text)
    backbone = backbone_of(weights)
    check_probed_layers(config.probe.layers, backbone.depth)
    sources = inputs.open_labelled_sources(config)
    num_steps = config_lib.steps(
        config.probe.duration,
        batch_size=config.probe.batch_size,
        num_examples=len(sources[0]),
        batch_key="probe.batch_size",
    )
    model = VisionTransformer(backbone, Compute(dtype=config.efficiency.dtype))
    apply = functools.partial(token_features, model, weights.normalization or "half", tuple(config.probe.layers))
    name = "encoder" if weights.kind == "vqkd" else "backbone"
    initialise = jax.jit(functools.partial(initialised, weights.kind, weights.arguments))
    random = initialise(step_key(config.seed, "probe"))["params"][name]
    return Probe(
        sources=sources,
        feature_sets=(
            FeatureSet("pretrained", apply, weights.variables["params"][name]),
            FeatureSet("random", apply, jax.tree.map(np.asarray, random)),
            FeatureSet("pixels", raw_pixels, {}),
        ),
        num_steps=num_steps,
    )


def token_features(model, normalization: str, layers: tuple[int, ...], params, batch: dict) -> dict[str, Array]:
    """Return [CLS], where there is one, and the mean patch token after each of `layers` (from 1), not normalised."""
    images = common.normalized(batch["images"], normalization)
    output = model.apply({"params": params}, images)
    tokens = jnp.stack([output.hidden[layer - 1] for layer in layers], axis=1).astype(jnp.float32)
    features = {"mean": tokens[:, :, model.backbone.num_prefix_tokens :].mean(axis=2)}
    return {"cls": tokens[:, :, 0], **features} if model.backbone.class_token else features


def raw_pixels(frozen, batch: dict) -> dict[str, Array]:
    """Return the image itself, averaged to `PIXEL_SIDE` pixels a side where it is larger, as one flat feature."""
    images = batch["images"].astype(jnp.float32) / 255.0
    side = min(PIXEL_SIDE, images.shape[1])
    small = jax.image.resize(images, (images.shape[0], side, side, 3), method="linear", antialias=True)
    return {"pixels": small.reshape(images.shape[0], 1, -1)}
