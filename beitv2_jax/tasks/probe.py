"""Probe: frozen features of a trained backbone, of the same backbone at random weights, and raw pixels.

How they are evaluated is `beitv2_jax.evaluation.protocols`; what each protocol reads of a network is said here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from beitv2_jax import config as config_lib
from beitv2_jax.config.checks import check_probed_layers
from beitv2_jax.convert.weights import Weights, backbone_of
from beitv2_jax.data.sources import Source
from beitv2_jax.data.sources.label_sets import is_multi_label
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.layers import LayerNorm
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.tasks import common, inputs
from beitv2_jax.tasks.frozen import FeatureSet, random_params, read_weights
from beitv2_jax.typing import PyTree

PIXEL_SIDE = 32
"""Raw pixels are averaged to at most this many pixels a side before they are probed."""


FEATURES = ("cls", "cls_normed", "mean", "mean_normed", "patches", "patches_normed")
"""Names of features: [CLS], the mean patch token and all patch tokens, as they are after a block, or after the last
layer norm of the weights too. Patch tokens are float16, the others float32."""


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a protocol reads of a network, and how long its heads train as published.

    Attributes:
        names: of `FEATURES`.
        layers: after which blocks: 'last', 'all', or 'chosen' by `probe.layers`.
        duration: value of `probe.duration`.
        batch_size: value of `probe.batch_size`.
    """

    names: tuple[str, ...]
    layers: str
    duration: str
    batch_size: int


READS = {
    "ours": Reads(("cls", "mean"), "chosen", "100 epochs", 1024),
    "dinov3": Reads(("cls", "cls_normed", "mean_normed"), "last", "12500 steps", 1024),
    "capi": Reads(("cls_normed", "mean_normed", "patches_normed"), "last", "12500 steps", 1024),
    "ep": Reads(("cls", "cls_normed", "patches"), "last", "90 epochs", 4096),
    "beit": Reads(("cls", "mean"), "all", "100 epochs", 1024),
}
"""Value of `probe.protocol` -> what it reads; how it evaluates is in `beitv2_jax.evaluation.protocols`."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the probe stage compares, on which splits, by linear classifiers of `num_steps` steps."""

    sources: tuple[Source, Source]
    feature_sets: tuple[FeatureSet, ...]
    num_steps: int


def build(config) -> Probe:
    """Build the probe of the weights `config.backbone.run`, and with the protocol 'ours' of random weights and pixels.

    Raises:
        UserError: the data set has no labels, or several an image, or the weights are missing, or their backbone lacks
            what is to be probed or cannot see images of this size.
    """
    weights = read_weights(config)
    backbone, reads = backbone_of(weights), READS[config.probe.protocol]
    check_probed_layers(config.probe.layers, backbone.depth)
    layers = {
        "chosen": tuple(config.probe.layers),
        "last": (backbone.depth,),
        "all": tuple(range(1, backbone.depth + 1)),
    }[reads.layers]
    names, frozen = reads.names, _frozen(weights, weights.variables["params"])
    if config.probe.protocol == "ours" and not backbone.class_token:
        names = ("mean",)
    _refuse_missing(config, names, backbone, "norm" in frozen)
    sources = inputs.open_labelled_sources(config)
    if is_multi_label(sources[0]):
        raise UserError(
            f"The images of {sources[0].name} may have several classes, and a probe needs one class for each image.",
            "Did you mean the stage finetune, which learns several?",
            "Write --config.data.source=SOURCE of a data set with one class an image, or run configs/finetune.py.",
        )
    num_steps = config_lib.steps(
        config.probe.duration,
        batch_size=config.probe.batch_size,
        num_examples=len(sources[0]),
        batch_key="probe.batch_size",
    )
    model = VisionTransformer(backbone, Compute(dtype=config.efficiency.dtype))
    apply = functools.partial(token_features, model, weights.normalization or "half", names, layers)
    feature_sets = [FeatureSet("pretrained", apply, frozen, layers)]
    if config.probe.protocol == "ours":
        feature_sets += [
            FeatureSet("random", apply, _frozen(weights, random_params(weights, config.seed)), layers),
            FeatureSet("pixels", raw_pixels, {}),
        ]
    return Probe(sources, tuple(feature_sets), num_steps)


def _frozen(weights: Weights, params: PyTree) -> dict[str, PyTree]:
    """Return the parameters of the transformer and, where the weights have one, of the norm of its tokens."""
    own, norms = ("encoder", ("encoder_norm",)) if weights.kind == "vqkd" else ("backbone", ("norm", "fc_norm"))
    norm = next((params[name] for name in norms if name in params), None)
    return {"backbone": params[own], **({} if norm is None else {"norm": norm})}


def _refuse_missing(config, names: tuple[str, ...], backbone: Backbone, has_norm: bool) -> None:
    """Raise UserError if the weights lack the token or the norm that a protocol reads."""
    lacks_norm = not has_norm and any(name.endswith("_normed") for name in names)
    lacks_token = not backbone.class_token and any(name.startswith("cls") for name in names)
    if lacks_norm or lacks_token:
        lacking = "[CLS]" if lacks_token else "a last layer norm"
        raise UserError(
            f"The protocol {config.probe.protocol} needs {lacking}, and the weights {config.backbone.run} have none.",
            "Did you mean the protocol that takes what the weights have?",
            "Write --config.probe.protocol=ours.",
        )


def token_features(
    model: VisionTransformer, normalization: str, names: tuple[str, ...], layers: tuple[int, ...], frozen, batch: dict
) -> dict[str, Array]:
    """Return the features `names` (of `FEATURES`) after each of `layers` (from 1).

    The last norm is applied after whichever block, as the published protocols do.
    """
    images = common.normalized(batch["images"], normalization)
    output = model.apply({"params": frozen["backbone"]}, images)
    norm, first = LayerNorm(model.backbone.norm_eps), model.backbone.num_prefix_tokens
    limit = float(jnp.finfo(jnp.float16).max)
    kinds = {
        "cls": lambda tokens: tokens[:, 0],
        "mean": lambda tokens: tokens[:, first:].mean(axis=1),
        "patches": lambda tokens: tokens[:, first:].clip(-limit, limit).astype(jnp.float16),
    }

    def features(name: str, layer: int) -> Array:
        tokens = output.hidden[layer - 1].astype(jnp.float32)
        if name.endswith("_normed"):
            tokens = norm.apply({"params": frozen["norm"]}, tokens)
        return kinds[name.removesuffix("_normed")](tokens)

    return {name: jnp.stack([features(name, layer) for layer in layers], axis=1) for name in names}


def raw_pixels(frozen, batch: dict) -> dict[str, Array]:
    """Return the image itself, averaged to `PIXEL_SIDE` pixels a side where it is larger, as one flat feature."""
    images = batch["images"].astype(jnp.float32) / 255.0
    side = min(PIXEL_SIDE, images.shape[1])
    small = jax.image.resize(images, (images.shape[0], side, side, 3), method="linear", antialias=True)
    return {"pixels": small.reshape(images.shape[0], 1, -1)}
