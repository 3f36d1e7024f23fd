"""The protocol of DINOv3: nearest neighbours, a sweep of linear heads by SGD, and logistic regression.

All read the tokens after the last norm; nearest neighbours are also reported for [CLS] before it.

Differs from the published evaluation, which crops and flips the images of the linear heads at random, in that features
are those of centre crops.

Source: the evaluation scripts of Siméoni et al. 2025, DINOv3 (arXiv 2508.10104).
"""

import functools

import numpy as np
import optax
from jaxtyping import Float

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings, Result, held_out
from beitv2_jax.evaluation.knn import class_token_accuracies
from beitv2_jax.evaluation.logistic import LogisticRegression
from beitv2_jax.evaluation.saved import Saved, SavedParts

NEIGHBORS = (10, 20, 100, 200)
TEMPERATURE = 0.07
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates for a batch of 256; they are scaled with the batch."""
MOMENTUM = 0.9
INVERSE_STRENGTHS = 10 ** np.linspace(-6, 5, 45)
"""The grid of C."""
HELD_OUT = 0.1
"""Fraction of the training images on which C is chosen."""
MAX_STEPS, TOLERANCE = 1000, 1e-12
"""Of L-BFGS."""


def evaluate(train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, parts: SavedParts) -> Result:
    """Return the accuracies of all three.

    - kNN: the whole training split is the bank, votes weigh exp(cosine / 0.07), for k = 10, 20, 100 and 200.
    - SGD: heads on [CLS] beside the mean patch, one for each rate; momentum 0.9, no decay, cosine to zero. The best one
      on `test` is reported, as published: that choice is not held out.
    - Logistic regression on [CLS]: C is chosen on a tenth of the training images, then all of them are fitted.
    """
    accuracies = parts("knn", lambda _: class_token_accuracies(train, test, NEIGHBORS, TEMPERATURE, on_move))
    of_rates = parts("sgd", lambda saved: sgd_accuracies(train, test, settings, on_move, saved).tolist())
    of_regression = parts("logistic", lambda saved: logistic(train, test, settings, on_move, saved))
    best = int(np.argmax(of_rates))
    accuracies |= {"cls_mean_normed/sgd": of_rates[best], "cls_normed/logistic": of_regression["accuracy"]}
    return Result(
        accuracies, {"cls_mean_normed/sgd_rate": RATES[best], "cls_normed/logistic_c": of_regression["strength"]}
    )


def sgd_accuracies(
    train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, saved: Saved
) -> Float[np.ndarray, "r"]:
    """Return the accuracy on `test` of the head of each of `RATES`."""
    reader = functools.partial(heads.side_by_side, ("cls_normed", "mean_normed"))
    rates = np.float32(RATES) * settings.batch_size / 256
    optimizer = optax.chain(
        optax.trace(MOMENTUM),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, settings.num_steps)),
        heads.scale_by_head(-rates),
    )
    return heads.linear_accuracies(train, test, reader, optimizer, len(rates), settings, on_move, saved)


def logistic(
    train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, saved: Saved
) -> dict[str, float]:
    """Return the `accuracy` on `test`, and the C that was chosen as `strength`."""
    features, labels = train.last("cls_normed"), train.labels
    fit_rows, held_rows = held_out(len(labels), HELD_OUT, settings.seed)
    options = {"max_steps": MAX_STEPS, "tolerance": TOLERANCE, "on_move": on_move}
    regression = LogisticRegression(features, labels, fit_rows, **options)
    held, held_labels = features[held_rows], labels[held_rows]
    on_held, count = np.zeros(len(INVERSE_STRENGTHS)), len(INVERSE_STRENGTHS)
    done, (on_held, regression.start) = saved.restored((on_held, regression.start))
    for number in range(done, count):
        on_held[number] = regression.accuracy(regression.fit(INVERSE_STRENGTHS[number]), held, held_labels)
        saved.offer(number + 1, count, (on_held, regression.start))
    best = float(INVERSE_STRENGTHS[int(np.argmax(on_held))])
    regression = LogisticRegression(features, labels, np.arange(len(labels)), **options)
    accuracy = regression.accuracy(regression.fit(best), test.last("cls_normed"), test.labels)
    return {"accuracy": accuracy, "strength": best}
