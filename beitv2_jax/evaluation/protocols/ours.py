"""The probe protocol: a linear classifier and nearest neighbours on frozen features.

Every choice (learning rate, layer) is made on a held-out part of the training split, and the evaluation split is used
once, by the final choice. The released script takes the best value over blocks and epochs on the validation set itself;
this protocol is stricter.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings, Result, Rows, held_out
from beitv2_jax.evaluation.knn import knn_accuracies
from beitv2_jax.evaluation.saved import Saved, SavedParts
from beitv2_jax.evaluation.standardization import standardization
from beitv2_jax.rng import step_key


def evaluate(train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, parts: SavedParts) -> Result:
    """Return accuracies on `test` of every kind of features, by the layer and the rate that held-out images choose."""
    accuracies, chosen = {}, {}
    for name, array in train.arrays.items():
        linear, nearest = [], []
        for place in range(array.shape[1]):
            layer = train.layers[place] if train.layers else 0  # raw pixels come after no block
            of_layer = (_at_layer(features, name, place) for features in (train, test))
            arguments = (name, *of_layer, settings, on_move)
            of_rates = parts(f"{name}/linear_{layer}", functools.partial(linear_accuracies, *arguments))
            linear += [(*hits, layer, rate) for hits, rate in zip(of_rates, settings.learning_rates, strict=True)]
            hits = parts(f"{name}/knn_{layer}", functools.partial(neighbor_accuracies, *arguments))
            nearest.append((*hits, layer))
        # the highest on the held-out images, of equal ones the first
        _, accuracies[f"{name}/linear"], linear_layer, rate = max(linear, key=lambda row: row[0])
        _, accuracies[f"{name}/knn"], knn_layer = max(nearest, key=lambda row: row[0])
        chosen |= {f"{name}/linear_layer": linear_layer, f"{name}/linear_rate": rate, f"{name}/knn_layer": knn_layer}
    return Result(accuracies, chosen)


def _at_layer(features: Features, name: str, place: int) -> Features:
    return dataclasses.replace(features, arrays={name: features.arrays[name][:, place : place + 1]})


def linear_accuracies(
    name: str, train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, saved: Saved
) -> list[list[float]]:
    """Return the accuracies of the linear classifier of each rate, on the held-out images and on those of `test`."""
    features = train.last(name)
    fit_rows, held_rows = held_out(len(features), settings.validation_fraction, settings.seed)
    standard = standardization(features, fit_rows, on_move)
    state, step, batch_of = linear_training(fit_rows, features.shape[-1], train.num_classes, settings)

    def reader(of: np.ndarray) -> heads.Read:
        return lambda rows: standard(of[rows])

    params, _ = heads.train(
        step,
        state,
        reader(features),
        train.labels,
        batch_of,
        num_steps=settings.num_steps,
        on_move=on_move,
        saved=saved,
    )
    predict, all_rows = functools.partial(_classes, params), np.arange(len(test.labels))
    held = heads.count_hits(predict, reader(features), train.labels, held_rows, on_move) / len(held_rows)
    found = heads.count_hits(predict, reader(test.last(name)), test.labels, all_rows, on_move) / len(all_rows)
    return np.stack([held, found], axis=1).tolist()


def linear_training(
    rows: Int[np.ndarray, "n"], width: int, num_classes: int, settings: ProbeSettings
) -> tuple[tuple[dict[str, Array], optax.OptState], Callable, heads.BatchOf]:
    """Return the first state of one linear classifier for each rate, the step of all, and the batches of `rows`.

    AdamW, weights from N(0, 0.01^2), cosine to zero without warm-up (source: the released linear evaluation), batches
    drawn uniformly with replacement. All classifiers begin with the same weights and see the same batches.
    """
    start_key, batch_key = jax.random.split(step_key(settings.seed, "linear_probe"))
    rates = tuple(settings.learning_rates)
    kernel = 0.01 * jax.random.normal(start_key, (width, num_classes))
    params = {
        "kernel": jnp.broadcast_to(kernel, (len(rates), *kernel.shape)),
        "bias": jnp.zeros((len(rates), num_classes)),
    }
    optimizer, step = _adamw_step(rates, settings.weight_decay, settings.num_steps)
    batch_size = min(settings.batch_size, len(rows))

    def batch_of(number: int) -> Int[np.ndarray, "b"]:
        return rows[np.asarray(_drawn(batch_key, number, batch_size, len(rows)))]

    return (params, optimizer.init(params)), step, batch_of


@functools.cache  # so that the step is compiled once for all layers
def _adamw_step(
    rates: tuple[float, ...], weight_decay: float, num_steps: int
) -> tuple[optax.GradientTransformation, Callable]:
    optimizer = optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, num_steps)),
        heads.scale_by_head(-np.float32(rates)),
    )

    def loss(params, inputs, labels):
        return heads.sum_of_cross_entropies(heads.linear_logits(params, inputs), labels)

    return optimizer, heads.gradient_step(loss, optimizer)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _drawn(key: jax.Array, number: int, batch_size: int, num_rows: int) -> Int[Array, "b"]:
    return jax.random.randint(jax.random.fold_in(key, number), (batch_size,), 0, num_rows)


@jax.jit
def _classes(params: dict[str, Array], inputs: Float[Array, "b d"]) -> Int[Array, "r b"]:
    return heads.linear_logits(params, inputs).argmax(axis=-1)


def neighbor_accuracies(
    name: str, train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, saved: Saved
) -> list[float]:
    """Return the accuracies by nearest neighbours, on the held-out images and on those of `test`."""
    del saved
    features = train.last(name)
    fit_rows, held_rows = map(np.sort, held_out(len(features), settings.validation_fraction, settings.seed))
    standard = standardization(features, fit_rows, on_move)
    accuracies = []
    for of, labels, rows in (
        (features, train.labels, held_rows),
        (test.last(name), test.labels, np.arange(len(test.labels))),
    ):
        found = knn_accuracies(
            Rows(features, fit_rows, standard),
            train.labels[fit_rows],
            Rows(of, rows, standard),
            labels[rows],
            num_classes=train.num_classes,
            neighbors=(settings.knn_neighbors,),
            temperature=settings.knn_temperature,
            on_move=on_move,
        )
        accuracies += found.values()
    return accuracies
