"""The heads of the protocol `capi`: classifiers of 10 rates x 3 weight decays, chosen on a tenth of the training split.

Source: Darcet et al. 2025 and the numbers that their published evaluation states: AdamW with betas 0.9 and 0.95,
12,500 steps of 1024 examples (128 on each of eight devices), linear warm-up from 0 over a tenth of the steps, cosine
to 0, no decay of biases, weights from N(0, 0.02), rates for 256 examples and in proportion to the batch. The
classifiers are trained on nine tenths of the training split; the one with most hits on the last tenth is evaluated as
it is, without being fitted again on all of it.

Two differences are ours. The published program trains on random crops and flips, and these heads on features of centre
crops, which can be stored. It draws every classifier's first weights anew, and here those of one kind begin alike.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.evaluation.attentive import MOST_HEAD_WIDTH, largest_divisor, multihead_pool
from beitv2_jax.evaluation.streaming import count_hits, shuffled_batches
from beitv2_jax.rng import host_rng, step_key
from beitv2_jax.typing import PyTree

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
WEIGHT_DECAYS = (5e-4, 1e-3, 5e-2)
GRID = tuple(itertools.product(RATES, WEIGHT_DECAYS))
HELD_OUT = 0.1
_KINDS = 4
# the published loss is the mean over all classifiers of all kinds, which divides each one's gradient
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8 * _KINDS * len(GRID))


def schedule(num_steps: int) -> Float[np.ndarray, "n"]:
    """Return the fraction of the rate for every step: 0 to 1 over the first tenth, then half a cosine to 0.

    Both parts include their ends, so the first and the last step have rate 0 and the peak comes twice.
    """
    warmup = num_steps // 10
    cosine = (1 + np.cos(np.linspace(0, np.pi, num_steps - warmup))) / 2
    return np.concatenate([np.linspace(0, 1, warmup), cosine]).astype(np.float32)


def initial_heads(key: jax.Array, width: int, num_classes: int, count: int, *, attentive: bool) -> dict[str, Array]:
    """Draw the first weights of `count` classifiers, all of them the same."""
    keys = jax.random.split(key, 4)
    params = {"kernel": 0.02 * jax.random.normal(keys[0], (width, num_classes)), "bias": jnp.zeros(num_classes)}
    if attentive:
        head_width = largest_divisor(width, MOST_HEAD_WIDTH)
        heads = (width // head_width, head_width)
        params["query"] = 0.02 * jax.random.normal(keys[1], heads)
        params["keys"] = 0.02 * jax.random.normal(keys[2], (width, *heads))
        params["values"] = 0.02 * jax.random.normal(keys[3], (width, *heads))
        params["value_bias"] = jnp.zeros(heads)
    return jax.tree.map(lambda param: jnp.repeat(param[None], count, axis=0), params)


def logits(params: dict[str, Array], features: Float[Array, "b ..."]) -> Float[Array, "b k"]:
    """Return what one classifier says of features 'b d', or of tokens 'b n d', which it pools first."""
    features = features.astype(jnp.float32)
    if "query" in params:
        pool = {name: params[name] for name in ("query", "keys", "values", "value_bias")}
        features = multihead_pool(features, **pool)
    return features @ params["kernel"] + params["bias"]


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(
    params: dict[str, Array],
    momenta: PyTree,
    features: Float[Array, "b ..."],
    labels: Int[Array, "b"],
    rates: Float[Array, "r"],
    weight_decays: Float[Array, "r"],
) -> tuple[dict[str, Array], PyTree]:
    """Take one step of AdamW with every classifier, side by side on the same batch."""

    def step(params, momenta, rate, weight_decay):
        def cross_entropy(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, features), labels).mean()

        updates, momenta = _ADAM.update(jax.grad(cross_entropy)(params), momenta)
        decays = {name: 0.0 if "bias" in name else weight_decay for name in params}
        moved = {name: param - rate * (updates[name] + decays[name] * param) for name, param in params.items()}
        return moved, momenta

    return jax.vmap(step)(params, momenta, rates, weight_decays)


@jax.jit
def predict(params: dict[str, Array], features: Float[Array, "b ..."]) -> Int[Array, "r b"]:
    """Return the most likely classes by every classifier."""
    return jax.vmap(lambda params: jnp.argmax(logits(params, features), axis=-1))(params)


def fit_and_choose(
    train: np.ndarray,
    train_labels: Int[np.ndarray, "n"],
    test: np.ndarray,
    test_labels: Int[np.ndarray, "m"],
    *,
    num_classes: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    grid: tuple[tuple[float, float], ...] = GRID,
) -> dict[str, float]:
    """Train the classifiers of the grid and return the accuracy of the one that the held-out tenth chooses.

    Args:
        train, test: features 'n d' or tokens 'n l d', in memory or mapped from a file; a batch of them is read at once.
        grid: rates for 256 examples, with weight decays.

    Returns:
        `accuracy` on the evaluation split and `held_out`, both in [0, 1], and `rate` and `weight_decay` of the choice.
    """
    order = host_rng(seed, "capi_held_out").permutation(len(train))
    fit_rows, held_rows = np.split(order, [min(round((1 - HELD_OUT) * len(order)), len(order) - 1)])
    batch_size = min(batch_size, len(fit_rows))
    rates, weight_decays = np.array(grid, np.float32).T
    attentive = train.ndim == 3
    params = initial_heads(step_key(seed, "capi"), train.shape[-1], num_classes, len(grid), attentive=attentive)
    momenta = jax.vmap(_ADAM.init)(params)
    batches = shuffled_batches(fit_rows, batch_size, seed, "capi")
    for fraction, rows in zip(schedule(num_steps), batches, strict=False):
        params, momenta = train_step(
            params, momenta, train[rows], train_labels[rows], fraction * rates * batch_size / 256, weight_decays
        )
    held_out = count_hits(predict, params, train, train_labels, np.sort(held_rows), batch_size) / len(held_rows)
    chosen = int(np.argmax(held_out))
    params = jax.tree.map(lambda param: param[chosen : chosen + 1], params)
    hits = count_hits(predict, params, test, test_labels, np.arange(len(test)), batch_size)
    rate, weight_decay = grid[chosen]
    return {
        "accuracy": float(hits[0] / len(test)),
        "held_out": float(held_out[chosen]),
        "rate": rate,
        "weight_decay": weight_decay,
    }
