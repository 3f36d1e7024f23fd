"""The probe protocol: a linear classifier and nearest neighbours on frozen features.

Every choice (learning rate, layer) is made on a held-out part of the training split, and the evaluation split is used
once, by the final choice. The released script takes the best value over blocks and epochs on the validation set itself;
this protocol is stricter.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from beitv2_jax.evaluation.knn import knn_predict
from beitv2_jax.evaluation.linear import fit_linear, standardize
from beitv2_jax.rng import step_key


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """Numbers of the probe's own section of the config (durations already in steps)."""

    num_steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    weight_decay: float
    knn_neighbors: int
    knn_temperature: float
    validation_fraction: float
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

    The last `validation_fraction` of a seeded permutation of the training rows chooses layer and learning rate.
    """
    order = np.random.default_rng(settings.seed).permutation(len(train))
    num_validation = max(1, int(len(order) * settings.validation_fraction))
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
