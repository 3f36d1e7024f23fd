"""The probe protocol: a linear classifier and nearest neighbours on frozen features.

Every choice (learning rate, layer) is made on a held-out part of the training split, and the evaluation split is used
once, by the final choice. The released script takes the best value over blocks and epochs on the validation set itself;
this protocol is stricter.
"""

import functools

import jax.numpy as jnp
import numpy as np

from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings, Result, held_out
from beitv2_jax.evaluation.knn import knn_predict
from beitv2_jax.evaluation.linear import fit_linear, standardize
from beitv2_jax.rng import step_key


def evaluate(train: Features, test: Features, settings: ProbeSettings, on_move: OnMove) -> Result:
    """Probe every kind of features."""
    accuracies, chosen = {}, {}
    for name in train.arrays:
        on_move("fitting")
        found = probe_features(
            train.arrays[name], train.labels, test.arrays[name], test.labels, train.num_classes, settings
        )
        accuracies |= {f"{name}/{key}": found[key] for key in ("linear", "knn")}
        chosen |= {f"{name}/{key}": value for key, value in found.items() if key not in ("linear", "knn")}
    return Result(accuracies, chosen)


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
    fit_rows, held_rows = held_out(len(train), settings.validation_fraction, settings.seed)
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
