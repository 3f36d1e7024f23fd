"""The protocol `capi`: linear and attentive classifiers of 10 rates x 3 weight decays, chosen on a held-out tenth.

Source: Darcet et al. 2025, and the numbers that their published evaluation states. Features are those after the last
layer norm: [CLS], the mean patch token, both side by side, and all patch tokens for the attentive classifiers. AdamW
with betas 0.9 and 0.95, 12,500 steps of 1024 examples (128 on each of eight devices), linear warm-up from 0 over a
tenth of the steps, cosine to 0, no decay of biases, weights from N(0, 0.02^2), rates for 256 examples and in proportion
to the batch. The classifiers are trained on nine tenths of the training split; of each kind the one with most hits on
the last tenth is evaluated as it is, without being fitted again on all of it.

One difference is ours: the published program trains on random crops and flips, and these classifiers on features of
centre crops, which can be stored.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.attentive import MOST_HEAD_WIDTH, largest_divisor, multihead_pool
from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings, Result, held_out
from beitv2_jax.evaluation.saved import Saved, SavedParts
from beitv2_jax.rng import step_key

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
"""Highest rates for 256 examples."""
WEIGHT_DECAYS = (5e-4, 1e-3, 5e-2)
GRID = tuple(itertools.product(RATES, WEIGHT_DECAYS))
KINDS = {
    "cls_normed/linear": ("cls_normed",),
    "mean_normed/linear": ("mean_normed",),
    "cls_and_mean_normed/linear": ("cls_normed", "mean_normed"),
    "patches_normed/attentive": ("patches_normed",),
}
"""Kind of classifier -> features that it reads, side by side."""
HELD_OUT = 0.1
_POOL = ("query", "keys", "values", "value_bias")


def schedule(num_steps: int) -> Float[np.ndarray, "n"]:
    """Return the fraction of the rate for every step: 0 to 1 over the first tenth, then half a cosine to 0.

    Both parts include their ends, so the first and the last step have rate 0 and the peak comes twice.
    """
    warmup = num_steps // 10
    cosine = (1 + np.cos(np.linspace(0, np.pi, num_steps - warmup))) / 2
    return np.concatenate([np.linspace(0, 1, warmup), cosine]).astype(np.float32)


def adamw(rates: Float[np.ndarray, "h"], weight_decays: Float[np.ndarray, "h"], num_steps: int):
    """Build AdamW of stacked classifiers, each with its own rate and decay; a parameter called bias does not decay.

    The published loss is the mean over all classifiers of all kinds, which makes every gradient smaller by their
    number; that changes nothing but the meaning of the epsilon 1e-8, which is therefore larger by this number.
    """

    def decayed(updates, params):
        return {
            name: update if "bias" in name else update + heads.by_head(weight_decays, params[name])
            for name, update in updates.items()
        }

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8 * len(KINDS) * len(GRID)),
        optax.stateless(decayed),
        optax.scale_by_schedule(lambda step: jnp.asarray(schedule(num_steps))[step]),
        heads.scale_by_head(-rates),
    )


@functools.partial(jax.jit, static_argnames=("num_heads", "width", "num_classes", "attentive"))
def initial_heads(key: jax.Array, num_heads: int, width: int, num_classes: int, *, attentive: bool) -> dict[str, Array]:
    """Draw weights from N(0, 0.02^2), and biases of zero.

    An attentive classifier has heads of width 64, or where the width is not divisible by 64, of the largest width below
    that divides it.
    """
    keys = jax.random.split(key, 4)
    draw = lambda number, *shape: 0.02 * jax.random.normal(keys[number], (num_heads, *shape))  # noqa: E731
    params = {"kernel": draw(0, width, num_classes), "bias": jnp.zeros((num_heads, num_classes))}
    if attentive:
        head_width = largest_divisor(width, MOST_HEAD_WIDTH)
        shape = (width // head_width, head_width)
        params |= {"query": draw(1, *shape), "keys": draw(2, width, *shape), "values": draw(3, width, *shape)}
        params["value_bias"] = jnp.zeros((num_heads, *shape))
    return params


def logits(params: dict[str, Array], inputs: Float[Array, "b ..."]) -> Float[Array, "h b k"]:
    """Return what every classifier says of features 'b d', or of tokens 'b n d', which it pools first."""
    inputs = inputs.astype(jnp.float32)
    if "query" in params:
        inputs = jax.vmap(functools.partial(multihead_pool, inputs))(*(params[name] for name in _POOL))
    return heads.linear_logits(params, inputs)


@jax.jit
def predict(params: dict[str, Array], inputs: Float[Array, "b ..."]) -> Int[Array, "h b"]:
    """Return the most likely classes by every classifier."""
    return jnp.argmax(logits(params, inputs), axis=-1)


def evaluate(train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, parts: SavedParts) -> Result:
    """Train the classifiers of every kind and evaluate the one that the held-out tenth chooses."""
    accuracies, chosen = {}, {}
    for kind, names in KINDS.items():
        found = parts(kind, functools.partial(fit_and_choose, names, train, test, settings, on_move))
        accuracies[kind] = found.pop("accuracy")
        chosen |= {f"{kind}_{name}": value for name, value in found.items()}
    return Result(accuracies, chosen)


def fit_and_choose(
    names: tuple[str, ...],
    train: Features,
    test: Features,
    settings: ProbeSettings,
    on_move: OnMove,
    saved: Saved,
    grid: tuple[tuple[float, float], ...] = GRID,
) -> dict[str, float]:
    """Train classifiers of the features `names` side by side, one for each rate (for 256 examples) and decay of `grid`.

    Returns:
        `accuracy` of the chosen one on the evaluation split and `held_out`, both in [0, 1], its `rate` and its
        `weight_decay`.
    """
    reading = functools.partial(heads.side_by_side, names)
    fit_rows, held_rows = held_out(len(train.labels), HELD_OUT, settings.seed)
    batch_size = min(settings.batch_size, len(fit_rows))
    rates, weight_decays = np.array(grid, np.float32).T
    example = reading(train)(np.arange(1))
    key = step_key(settings.seed, f"capi_{'_'.join(names)}")
    params = initial_heads(key, len(grid), example.shape[-1], train.num_classes, attentive=example.ndim == 3)
    optimizer = adamw(rates * batch_size / 256, weight_decays, settings.num_steps)

    def loss(params, inputs, labels):
        return heads.sum_of_cross_entropies(logits(params, inputs), labels)

    params, _ = heads.train(
        heads.gradient_step(loss, optimizer),
        (params, optimizer.init(params)),
        reading(train),
        train.labels,
        heads.shuffled(fit_rows, batch_size, settings.seed),
        num_steps=settings.num_steps,
        on_move=on_move,
        saved=saved,
    )
    held = heads.count_hits(functools.partial(predict, params), reading(train), train.labels, held_rows, on_move)
    best = int(np.argmax(held))
    of_best = functools.partial(predict, jax.tree.map(lambda param: param[best : best + 1], params))
    hits = heads.count_hits(of_best, reading(test), test.labels, np.arange(len(test.labels)), on_move)
    rate, weight_decay = grid[best]
    return {
        "accuracy": float(hits[0] / len(test.labels)),
        "held_out": float(held[best] / len(held_rows)),
        "rate": rate,
        "weight_decay": weight_decay,
    }
