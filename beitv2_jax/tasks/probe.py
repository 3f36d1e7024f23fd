"""Probe: what frozen features know about labels, by a linear classifier and by nearest neighbours.

Compared are the pre-trained backbone, the same backbone at random weights, and raw pixels. Features are computed once
and cached; every choice (learning rate, layer) is made on a held-out share of the training split, and the evaluation
split is touched once, by the final choice. The released script takes the best value over blocks and epochs on the
validation set itself; ours is the stricter protocol.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import read_run
from beitv2_jax.data.sources import Source
from beitv2_jax.errors import UserError
from beitv2_jax.models import preprocess
from beitv2_jax.rng import step_key
from beitv2_jax.tasks import inputs, mim, objectives
from beitv2_jax.typing import PyTree, Scalar

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
    """What the probe stage compares, on which splits."""

    sources: tuple[Source, Source]
    feature_sets: tuple[FeatureSet, ...]


def build(config) -> Probe:
    """Build the probe of the mim run `config.backbone.run` against random weights and raw pixels.

    Raises:
        UserError: the data set has no labels, or the run is missing, of another stage or of another image size.
    """
    sources = inputs.open_sources(config)
    if sources[0].num_classes < 2:
        raise UserError(
            f"{sources[0].name} has {sources[0].num_classes} classes: there is nothing to probe.",
            "a data set without labels was given.",
            "--config.data.source=folder:PATH with one folder per class, or a labelled tfds: data set.",
        )
    run = read_run(config.backbone.run)
    trained = config_lib.from_json(run.config)
    if trained.stage != "mim" or trained.views.image_size != config.views.image_size:
        raise UserError(
            f"{config.backbone.run} holds a '{trained.stage}' run at {trained.views.image_size} pixels; the probe "
            f"needs a 'mim' run at {config.views.image_size}.",
            "the path or the image size belongs to another run.",
            "--config.backbone.run=DIR of a mim run, --config.views.image_size= that of the run.",
        )
    model = mim.make_model(trained, dtype=config.efficiency.dtype)
    apply = functools.partial(token_features, model, trained.normalization, tuple(config.probe.layers))
    image = jnp.zeros((1, config.views.image_size, config.views.image_size, 3))
    num_patches = (trained.views.image_size // trained.model.patch_size) ** 2
    mask = jnp.arange(num_patches)[None] < trained.masking.num_masked
    initialise = jax.jit(
        lambda key: objectives.init_variables(
            model, key, image, mask, num_masked=trained.masking.num_masked, train=False
        )
    )
    random = initialise(step_key(config.seed, "probe"))["params"]
    return Probe(
        sources=sources,
        feature_sets=(
            FeatureSet("pretrained", apply, run.params),
            FeatureSet("random", apply, jax.tree.map(np.asarray, random)),
            FeatureSet("pixels", raw_pixels, {}),
        ),
    )


def token_features(model, normalization: str, layers: tuple[int, ...], params, batch: dict) -> dict[str, Array]:
    """Return [CLS] and the mean patch token after each of `layers` (-1 the last block), un-normalised, unmasked."""
    images = preprocess.normalize(batch["images"], *preprocess.NORMALIZATIONS[normalization])
    output = model.apply({"params": params}, images, method=lambda module, images: module.backbone(images))
    tokens = jnp.stack([output.hidden[layer] for layer in layers], axis=1).astype(jnp.float32)
    return {"cls": tokens[:, :, 0], "mean": tokens[:, :, 1:].mean(axis=2)}


def raw_pixels(frozen, batch: dict) -> dict[str, Array]:
    """Return the image itself, averaged to `PIXEL_SIDE` pixels a side where it is larger, as one flat feature."""
    images = batch["images"].astype(jnp.float32) / 255.0
    side = min(PIXEL_SIDE, images.shape[1])
    small = jax.image.resize(images, (images.shape[0], side, side, 3), method="linear", antialias=True)
    return {"pixels": small.reshape(images.shape[0], 1, -1)}


def standardize(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shift and scale every feature to zero mean and unit variance over `train`; constant features become 0."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    scale = np.where(deviation > 1e-6, 1.0 / np.maximum(deviation, 1e-6), 0.0)
    return tuple(((array - mean) * scale).astype(np.float32) for array in (train, *others))


@functools.partial(jax.jit, static_argnames=("num_classes", "num_steps", "batch_size"))
def fit_linear(
    features: Float[Array, "b d"],
    labels: Int[Array, "b"],
    learning_rates: Float[Array, "r"],
    weight_decay: Scalar,
    key,
    *,
    num_classes: int,
    num_steps: int,
    batch_size: int,
) -> tuple[Float[Array, "r d k"], Float[Array, "r k"]]:
    """Fit one linear classifier per learning rate, side by side, and return their kernels and biases.

    AdamW, weights from N(0, 0.01), cosine to zero without warm-up (source: the released linear evaluation), batches
    drawn uniformly with replacement, every rate seeing the same ones.
    """
    start_key, batch_key = jax.random.split(key)
    kernel = 0.01 * jax.random.normal(start_key, (features.shape[1], num_classes))

    def fit(learning_rate):
        optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=weight_decay)
        params = (kernel, jnp.zeros(num_classes))

        def cross_entropy(params, rows):
            logits = features[rows] @ params[0] + params[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        def step(carry, index):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(batch_key, index), (batch_size,), 0, features.shape[0])
            updates, state = optimizer.update(jax.grad(cross_entropy)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(num_steps))
        return params

    return jax.vmap(fit)(learning_rates)


@functools.partial(jax.jit, static_argnames=("num_classes", "neighbors", "chunk_size"))
def knn_predict(
    bank: Float[Array, "b d"],
    bank_labels: Int[Array, "b"],
    queries: Float[Array, "q d"],
    *,
    num_classes: int,
    neighbors: int,
    temperature: float,
    chunk_size: int = 256,
) -> Int[Array, "q"]:
    """Vote over the `neighbors` most similar rows of `bank`, each with weight exp(cosine / temperature).

    Source: the weighted kNN of Wu et al. 2018 as used for DINO (20 neighbours, temperature 0.07).
    """
    bank = bank / jnp.maximum(jnp.linalg.norm(bank, axis=-1, keepdims=True), 1e-12)
    queries = queries / jnp.maximum(jnp.linalg.norm(queries, axis=-1, keepdims=True), 1e-12)

    def predict(query):
        similarity, rows = jax.lax.top_k(bank @ query, neighbors)
        votes = jnp.zeros(num_classes).at[bank_labels[rows]].add(jnp.exp(similarity / temperature))
        return jnp.argmax(votes)

    return jax.lax.map(predict, queries, batch_size=chunk_size)


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Numbers of the probe's own section of the config (durations already in steps)."""

    num_steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    weight_decay: float
    knn_neighbors: int
    knn_temperature: float
    validation_share: float
    seed: int


def probe_features(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    settings: ProbeSettings,
) -> dict[str, float]:
    """Probe features 'examples layers width' and return accuracies (in [0, 1]) with the layer each choice took.

    The last `validation_share` of a seeded permutation of the training rows chooses layer and learning rate.
    """
    order = np.random.default_rng(settings.seed).permutation(len(train))
    num_validation = max(1, int(len(order) * settings.validation_share))
    fit_rows, held_rows = order[:-num_validation], order[-num_validation:]
    linear, nearest = [], []
    for layer in range(train.shape[1]):
        fit, held, evaluation = standardize(train[fit_rows, layer], train[held_rows, layer], test[:, layer])
        fit_labels, held_labels = jnp.asarray(train_labels[fit_rows]), train_labels[held_rows]
        kernels, biases = fit_linear(
            jnp.asarray(fit),
            fit_labels,
            jnp.asarray(settings.learning_rates, jnp.float32),
            settings.weight_decay,
            step_key(settings.seed, "linear_probe"),
            num_classes=num_classes,
            num_steps=settings.num_steps,
            batch_size=min(settings.batch_size, len(fit_rows)),
        )
        kernels, biases = np.asarray(kernels), np.asarray(biases)
        for kernel, bias, rate in zip(kernels, biases, settings.learning_rates, strict=True):
            hits = [
                np.mean(np.argmax(x @ kernel + bias, -1) == y)
                for x, y in ((held, held_labels), (evaluation, test_labels))
            ]
            linear.append((*hits, layer, rate))
        vote = functools.partial(
            knn_predict,
            jnp.asarray(fit),
            fit_labels,
            num_classes=num_classes,
            neighbors=min(settings.knn_neighbors, len(fit_rows)),
            temperature=settings.knn_temperature,
        )
        hits = [
            np.mean(np.asarray(vote(jnp.asarray(x))) == y) for x, y in ((held, held_labels), (evaluation, test_labels))
        ]
        nearest.append((*hits, layer))
    best_linear, best_nearest = max(linear, key=lambda row: row[0]), max(nearest, key=lambda row: row[0])
    return {
        "linear": float(best_linear[1]),
        "linear_layer": best_linear[2],
        "linear_rate": best_linear[3],
        "knn": float(best_nearest[1]),
        "knn_layer": best_nearest[2],
    }
