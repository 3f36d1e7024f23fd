"""The heads of the protocol `ep`: a linear layer on [CLS], and one on patch tokens pooled by learned queries.

Source: Psomas et al. 2026 and the settings that their published training program and logs state: 90 epochs, LARS with
momentum 0.9 and trust coefficient 0.001, no weight decay, rate 0.1 for 256 examples and in proportion to the batch of
4096, 10 epochs of linear warm-up from 0, cosine to 0, batch norm without scale and shift before the linear layer.

Three differences are ours. The published program trains on random crops and flips, and these heads on features of
centre crops, which can be stored. It takes the batch norm's statistics on each device over its 256 examples, and here
they are those of the whole batch, so that the number of devices changes nothing. Its table has the best epoch on the
evaluation split, and here the last epoch is the figure and the best one stands beside it.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.evaluation.attentive import MOST_QUERIES, efficient_pool, largest_divisor
from beitv2_jax.evaluation.streaming import count_hits, shuffled_batches
from beitv2_jax.rng import step_key
from beitv2_jax.typing import PyTree

LARS = optax.chain(
    optax.masked(
        optax.scale_by_trust_ratio(trust_coefficient=0.001),
        lambda params: jax.tree.map(lambda param: param.ndim > 1, params),
    ),
    optax.trace(decay=0.9),
)
"""LARS before the rate: g is multiplied by .001 |p| / |g| unless p is a vector, and m = .9 m + g is the update.

`optax.lars` multiplies by the rate before the momentum, which differs as soon as the rate changes. Source: You et al.
2017; vectors are left out and the rate is applied last as in the linear probing of MAE, on which `ep` is built.
"""
BASE_RATE = 0.1
_NORM_EPS = 1e-6
_NORM_MOMENTUM = 0.1
"""Weight of a batch in the running statistics, the default of torch."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A classifier while it is trained.

    Attributes:
        params: `kernel` 'd k' and `bias` 'k'; with tokens also `queries` 'q d' and `values` 'd d'.
        mean, variance: running statistics 'd' of the batch norm.
        momentum: state of the optimizer.
    """

    params: dict[str, Array]
    mean: Float[Array, "d"]
    variance: Float[Array, "d"]
    momentum: PyTree


jax.tree_util.register_dataclass(Head)


def learning_rate(epoch: float, *, peak: float, warmup_epochs: float, num_epochs: float) -> float:
    """Return the rate after a number of epochs, whole or not.

    peak * epoch / warmup in the warm-up, then peak / 2 * (1 + cos(pi * (epoch - warmup) / (num - warmup))).
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak / 2 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (num_epochs - warmup_epochs)))


def initial_head(key: jax.Array, width: int, num_classes: int, *, pooled: bool) -> Head:
    """Draw a head: layers uniform in +-1/sqrt(width), as torch does by default, and queries from N(0, 0.02)."""
    keys = jax.random.split(key, 4)
    bound = 1 / math.sqrt(width)
    params = {
        "kernel": jax.random.uniform(keys[0], (width, num_classes), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(keys[1], (num_classes,), minval=-bound, maxval=bound),
    }
    if pooled:
        params["queries"] = 0.02 * jax.random.normal(keys[2], (largest_divisor(width, MOST_QUERIES), width))
        params["values"] = jax.random.uniform(keys[3], (width, width), minval=-bound, maxval=bound)
    return Head(params, jnp.zeros(width), jnp.ones(width), LARS.init(params))


def _pooled(params: dict[str, Array], features: Float[Array, "b ..."]) -> Float[Array, "b d"]:
    features = features.astype(jnp.float32)
    return efficient_pool(features, params["queries"], params["values"]) if "queries" in params else features


def batch_norm(
    features: Float[Array, "b d"], mean: Float[Array, "d"], variance: Float[Array, "d"]
) -> Float[Array, "b d"]:
    """Return (features - mean) / sqrt(variance + 1e-6)."""
    return (features - mean) * jax.lax.rsqrt(variance + _NORM_EPS)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(head: Head, features: Float[Array, "b ..."], labels: Int[Array, "b"], rate: float) -> Head:
    """Take one step on the mean cross entropy of a batch of features 'b d' or tokens 'b n d'.

    The batch is normalised by its own mean and variance. The running statistics move by a tenth towards them, towards
    the variance with b - 1 in the denominator.
    """

    def cross_entropy(params):
        pooled = _pooled(params, features)
        mean, variance = pooled.mean(axis=0), pooled.var(axis=0)
        logits = batch_norm(pooled, mean, variance) @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (mean, variance)

    gradients, (mean, variance) = jax.grad(cross_entropy, has_aux=True)(head.params)
    unbiased = variance * features.shape[0] / max(features.shape[0] - 1, 1)
    updates, momentum = LARS.update(gradients, head.momentum, head.params)
    return Head(
        params=jax.tree.map(lambda param, update: param - rate * update, head.params, updates),
        mean=(1 - _NORM_MOMENTUM) * head.mean + _NORM_MOMENTUM * mean,
        variance=(1 - _NORM_MOMENTUM) * head.variance + _NORM_MOMENTUM * unbiased,
        momentum=momentum,
    )


@jax.jit
def predict(head: Head, features: Float[Array, "b ..."]) -> Int[Array, "b"]:
    """Return the most likely classes; the batch norm uses the running statistics."""
    normed = batch_norm(_pooled(head.params, features), head.mean, head.variance)
    return jnp.argmax(normed @ head.params["kernel"] + head.params["bias"], axis=-1)


def fit(
    train: np.ndarray,
    train_labels: Int[np.ndarray, "n"],
    test: np.ndarray,
    test_labels: Int[np.ndarray, "m"],
    *,
    num_classes: int,
    num_epochs: int,
    batch_size: int,
    seed: int,
    base_rate: float = BASE_RATE,
) -> dict[str, float]:
    """Train one head on the whole training split and return its accuracies on the evaluation split.

    Args:
        train, test: features 'n d', or tokens 'n l d' that efficient probing pools, in memory or mapped from a file;
            a batch of them is read at once.
        num_epochs: of whole batches; a ninth of them is the warm-up.
        base_rate: highest rate for 256 examples; that of a batch is in proportion.

    Returns:
        `accuracy` after the last epoch, and `best_on_validation`, that of the best epoch, both in [0, 1], with
        `best_epoch` (from 1).
    """
    pooled = train.ndim == 3
    stream = "ep_tokens" if pooled else "ep_linear"
    head = initial_head(step_key(seed, stream), train.shape[-1], num_classes, pooled=pooled)
    batch_size = min(batch_size, len(train))
    steps = len(train) // batch_size
    batches = shuffled_batches(np.arange(len(train)), batch_size, seed, stream)
    rate = functools.partial(
        learning_rate, peak=base_rate * batch_size / 256, warmup_epochs=num_epochs / 9, num_epochs=num_epochs
    )
    accuracies = []
    for epoch in range(num_epochs):
        for step, rows in enumerate(itertools.islice(batches, steps)):
            head = train_step(head, train[rows], train_labels[rows], rate(epoch + step / steps))
        hits = count_hits(predict, head, test, test_labels, np.arange(len(test)), batch_size)
        accuracies.append(float(hits / len(test)))
    best = int(np.argmax(accuracies))
    return {"accuracy": accuracies[-1], "best_on_validation": accuracies[best], "best_epoch": best + 1}
