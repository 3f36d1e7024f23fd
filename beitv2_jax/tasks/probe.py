"""Probe: frozen features of the pre-trained backbone, of the same backbone at random weights, and raw pixels.

How they are evaluated is `beitv2_jax.evaluation.probe`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from beitv2_jax import config as config_lib
from beitv2_jax.config.checks import check_probed_layers
from beitv2_jax.convert.runs import check_stage, read_run
from beitv2_jax.data.sources import Source
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.rng import step_key
from beitv2_jax.tasks import common, inputs, mim
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
    """Build the probe of the mim run `config.backbone.run` against random weights and raw pixels.

    Raises:
        UserError: the data set has no labels, or the run is missing, of another stage or of another image size, or its
            backbone lacks a block that is to be probed.
    """
    check_stage(config.backbone.run, ("mim",), "config.backbone.run")
    run = read_run(config.backbone.run)
    trained = config_lib.from_json(run.config)
    if trained.views.image_size != config.views.image_size:
        raise UserError(
            f"{config.backbone.run} was trained at {trained.views.image_size} pixels, the probe uses "
            f"{config.views.image_size}.",
            "Did you mean the same image size for both?",
            f"Write --config.views.image_size={trained.views.image_size}.",
        )
    check_probed_layers(config.probe.layers, trained.model.depth)
    sources = inputs.open_labelled_sources(config)
    num_steps = config_lib.steps(
        config.probe.duration,
        batch_size=config.probe.batch_size,
        num_examples=len(sources[0]),
        batch_key="probe.batch_size",
    )
    model = mim.make_model(trained, Compute(dtype=config.efficiency.dtype))
    apply = functools.partial(token_features, model, trained.normalization, tuple(config.probe.layers))
    image = jnp.zeros((1, config.views.image_size, config.views.image_size, 3))
    num_patches = (trained.views.image_size // trained.model.patch_size) ** 2
    mask = jnp.arange(num_patches)[None] < trained.masking.num_masked
    initialise = jax.jit(
        lambda key: common.init_variables(model, key, image, mask, num_masked=trained.masking.num_masked, train=False)
    )
    random = initialise(step_key(config.seed, "probe"))["params"]
    return Probe(
        sources=sources,
        feature_sets=(
            FeatureSet("pretrained", apply, run.params),
            FeatureSet("random", apply, jax.tree.map(np.asarray, random)),
            FeatureSet("pixels", raw_pixels, {}),
        ),
        num_steps=num_steps,
    )


def token_features(model, normalization: str, layers: tuple[int, ...], params, batch: dict) -> dict[str, Array]:
    """Return [CLS] and the mean patch token after each of `layers` (from 1), not normalised, with nothing masked."""
    images = common.normalized(batch["images"], normalization)
    output = model.apply({"params": params}, images, method=lambda module, images: module.vit(images))
    tokens = jnp.stack([output.hidden[layer - 1] for layer in layers], axis=1).astype(jnp.float32)
    return {"cls": tokens[:, :, 0], "mean": tokens[:, :, 1:].mean(axis=2)}


def raw_pixels(frozen, batch: dict) -> dict[str, Array]:
    """Return the image itself, averaged to `PIXEL_SIDE` pixels a side where it is larger, as one flat feature."""
    images = batch["images"].astype(jnp.float32) / 255.0
    side = min(PIXEL_SIDE, images.shape[1])
    small = jax.image.resize(images, (images.shape[0], side, side, 3), method="linear", antialias=True)
    return {"pixels": small.reshape(images.shape[0], 1, -1)}
