"""The protocol `ep`: nearest neighbours and a linear layer on [CLS], and efficient probing of the patch tokens.

Source: Psomas et al. 2026, and the settings that their published training program and logs state. All features are
those after the last block, before the last layer norm. Both heads have a batch norm without scale and shift before the
linear layer, and train for 90 epochs with LARS: momentum 0.9, trust coefficient 0.001, no weight decay, a rate of 0.1
for 256 examples and in proportion to the batch of 4096, 10 epochs of linear warm-up from 0, cosine to 0. Efficient
probing has 32 learned queries. Neighbours are all of the training split, which nothing is held out of.

Three differences are ours. The published program trains on random crops and flips, and these heads on features of
centre crops, which can be stored. It takes the statistics of the batch norm on each device over its 256 examples, and
here they are those of the whole batch, so that the number of devices changes nothing. Its table has the best epoch on
the evaluation split, and of neighbours the best number and temperature; here the figure of a head is that of its last
epoch, with the best one beside it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.attentive import MOST_QUERIES, efficient_pool, largest_divisor
from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings, Result
from beitv2_jax.evaluation.knn import class_token_accuracies
from beitv2_jax.evaluation.saved import Saved, SavedParts
from beitv2_jax.rng import host_rng, step_key
from beitv2_jax.typing import PyTree, Scalar

BASE_RATE = 0.1
"""Highest rate for 256 examples."""
WARMUP = 1 / 9
"""Part of the epochs: 10 of 90."""
NEIGHBORS, TEMPERATURE = (5, 10, 15, 20, 50, 100, 200), 0.07
"""The numbers that the published program tries, and of its temperatures (0.07, 0.1, 0.2) the best one for BEiT v2."""
HEADS = {"cls/linear": "cls", "patches/efficient": "patches"}
"""Head -> features that it reads."""
_NORM_EPS = 1e-6
_NORM_MOMENTUM = 0.1
"""Weight of a batch in the running statistics, the default of torch."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A classifier while it is trained.

    Attributes:
        params: `kernel` 'd k' and `bias` 'k'; of efficient probing also `queries` 'q d' and `values` 'd d'.
        mean, variance: running statistics 'd' of the batch norm.
        optimizer: state of the optimizer.
    """

    params: dict[str, Array]
    mean: Float[Array, "d"]
    variance: Float[Array, "d"]
    optimizer: PyTree


jax.tree_util.register_dataclass(Head)


def learning_rate(step: int | Array, *, peak: float, num_steps: int) -> Scalar:
    """Return the rate of a step (from 0): peak * s / w for s < w, then peak / 2 * (1 + cos(pi * (s - w) / (n - w))).

    `w` is a ninth of the `n` steps.
    """
    warmup = WARMUP * num_steps
    cosine = (1 + jnp.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
    return peak * jnp.where(step < warmup, step / warmup, cosine)


def lars(peak: float, num_steps: int) -> optax.GradientTransformation:
    """Build LARS with the rate of `learning_rate`.

        m = 0.9 m + g * (0.001 |p| / |g| for a matrix, 1 for a vector or where |p| or |g| is 0);   p = p - rate * m

    `optax.lars` multiplies by the rate before the momentum, which is another update wherever the rate changes.

    Source: You et al. 2017, Large Batch Training of Convolutional Networks; vectors and rate as in the linear probing
    of MAE, on which the published program is built.
    """
    return optax.chain(
        optax.masked(
            optax.scale_by_trust_ratio(trust_coefficient=0.001),
            lambda params: jax.tree.map(lambda param: param.ndim > 1, params),
        ),
        optax.trace(decay=0.9),
        optax.scale_by_learning_rate(functools.partial(learning_rate, peak=peak, num_steps=num_steps)),
    )


@functools.partial(jax.jit, static_argnames=("width", "num_classes", "pooled"))
def initial_params(key: jax.Array, width: int, num_classes: int, *, pooled: bool) -> dict[str, Array]:
    """Draw layers uniform in +-1/sqrt(width), as torch does by default, and queries from N(0, 0.02^2).

    There are 32 queries, or where the width is not divisible by 32, the largest number below that divides it.
    """
    keys = jax.random.split(key, 4)
    draw = functools.partial(jax.random.uniform, minval=-1 / math.sqrt(width), maxval=1 / math.sqrt(width))
    params = {"kernel": draw(keys[0], (width, num_classes)), "bias": draw(keys[1], (num_classes,))}
    if pooled:
        params["queries"] = 0.02 * jax.random.normal(keys[2], (largest_divisor(width, MOST_QUERIES), width))
        params["values"] = draw(keys[3], (width, width))
    return params


def initial_head(params: dict[str, Array], optimizer: optax.GradientTransformation) -> Head:
    """Return a head before its first step; its running mean is 0 and its running variance 1."""
    width = params["kernel"].shape[0]
    return Head(params, jnp.zeros(width), jnp.ones(width), optimizer.init(params))


def _pooled(params: dict[str, Array], inputs: Float[Array, "b ..."]) -> Float[Array, "b d"]:
    inputs = inputs.astype(jnp.float32)
    return efficient_pool(inputs, params["queries"], params["values"]) if "queries" in params else inputs


def _logits(
    params: dict[str, Array], pooled: Float[Array, "b d"], mean: Float[Array, "d"], variance: Float[Array, "d"]
) -> Float[Array, "b k"]:
    return (pooled - mean) * jax.lax.rsqrt(variance + _NORM_EPS) @ params["kernel"] + params["bias"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    optimizer: optax.GradientTransformation, head: Head, inputs: Float[Array, "b ..."], labels: Int[Array, "b"]
) -> tuple[Head, Scalar]:
    """Take one step on features 'b d' or tokens 'b n d'; return the head and the mean cross entropy before it.

    The batch is normalised by its own mean and variance. The running statistics move by a tenth towards them, towards
    the variance with b - 1 in its denominator.
    """

    def cross_entropy(params):
        pooled = _pooled(params, inputs)
        statistics = pooled.mean(axis=0), pooled.var(axis=0)
        logits = _logits(params, pooled, *statistics)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), statistics

    (loss, (mean, variance)), gradients = jax.value_and_grad(cross_entropy, has_aux=True)(head.params)
    unbiased = variance * len(inputs) / max(len(inputs) - 1, 1)
    updates, state = optimizer.update(gradients, head.optimizer, head.params)
    moved = Head(
        params=optax.apply_updates(head.params, updates),
        mean=(1 - _NORM_MOMENTUM) * head.mean + _NORM_MOMENTUM * mean,
        variance=(1 - _NORM_MOMENTUM) * head.variance + _NORM_MOMENTUM * unbiased,
        optimizer=state,
    )
    return moved, loss


@jax.jit
def predict(head: Head, inputs: Float[Array, "b ..."]) -> Int[Array, "b"]:
    """Return the most likely classes, by the running statistics of the batch norm."""
    return jnp.argmax(_logits(head.params, _pooled(head.params, inputs), head.mean, head.variance), axis=-1)


def evaluate(train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, parts: SavedParts) -> Result:
    """Return the accuracies of neighbours, before the last norm and after it, and of both heads.

    Of a head there are the accuracy after the last epoch, and `NAME_best_on_validation`, that of the best epoch.
    """
    accuracies = parts("knn", lambda _: class_token_accuracies(train, test, NEIGHBORS, TEMPERATURE, on_move))
    chosen = {}
    for head, name in HEADS.items():
        of_epochs = parts(head, functools.partial(fit, name, train, test, settings, on_move))
        best = int(np.argmax(of_epochs))
        accuracies |= {head: of_epochs[-1], f"{head}_best_on_validation": of_epochs[best]}
        chosen[f"{head}_best_epoch"] = best + 1
    return Result(accuracies, chosen)


def fit(
    name: str,
    train: Features,
    test: Features,
    settings: ProbeSettings,
    on_move: OnMove,
    saved: Saved,
    base_rate: float = BASE_RATE,
) -> list[float]:
    """Train one head on the features `name` of the whole training split; return its accuracy after every epoch.

    An epoch is a random order of all examples without its incomplete batch; the last one may be shorter.
    """
    features, of_test, seed, num_steps = train.last(name), test.last(name), settings.seed, settings.num_steps
    batch_size = min(settings.batch_size, len(features))
    rows, steps = np.arange(len(features)), len(features) // batch_size
    optimizer = lars(base_rate * batch_size / 256, num_steps)
    key = step_key(seed, f"ep_{name}")
    params = initial_params(key, features.shape[-1], train.num_classes, pooled=features.ndim == 3)
    num_epochs = -(-num_steps // steps)
    done, (head, accuracies) = saved.restored((initial_head(params, optimizer), np.zeros(num_epochs)))
    for epoch in range(done, num_epochs):
        head = heads.train(
            functools.partial(train_step, optimizer),
            head,
            features.__getitem__,
            train.labels,
            heads.shuffled(rows, batch_size, int(host_rng(seed, f"ep_{name}", epoch).integers(2**31))),
            num_steps=min(steps, num_steps - epoch * steps),
            on_move=on_move,
            saved=Saved(),
        )
        of_head = functools.partial(predict, head)
        hits = heads.count_hits(of_head, of_test.__getitem__, test.labels, np.arange(len(of_test)), on_move)
        accuracies[epoch] = hits / len(of_test)
        saved.offer(epoch + 1, num_epochs, (head, accuracies))
    return accuracies.tolist()
