"""Frozen features that stages evaluate, and the networks that give them: trained ones, and the same before training."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jaxtyping import Array

from beitv2_jax.convert.arguments import initialised
from beitv2_jax.convert.weights import Weights, read_backbone
from beitv2_jax.rng import step_key
from beitv2_jax.tasks.api import Batch
from beitv2_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """One kind of frozen features: `apply(frozen, batch)` returns named arrays of the images of a batch.

    With `layers`, the blocks on their second axis, those of the probe are 'b layers width' or 'b layers patches width'
    (pixels come after no block). Those of the dense evaluation are {'features': float16 'b n d'}.
    """

    name: str
    apply: Callable[[PyTree, Batch], dict[str, Array]]
    frozen: PyTree
    layers: tuple[int, ...] = ()


def read_weights(config) -> Weights:
    """Read the weights `config.backbone.run` for images of `views.image_size`, and log what was assumed.

    Raises:
        UserError: there are no readable weights, or the images have no whole patches.
    """
    weights = read_backbone(config.backbone.run, image_size=config.views.image_size)
    for text in weights.assumptions:
        logging.info("%s: %s", config.backbone.run, text)
    return weights


def random_params(weights: Weights, seed: int) -> PyTree:
    """Return parameters of the same network before any training, drawn from a seed."""
    initialise = jax.jit(functools.partial(initialised, weights.kind, weights.arguments))
    return jax.tree.map(np.asarray, initialise(step_key(seed, "probe"))["params"])
