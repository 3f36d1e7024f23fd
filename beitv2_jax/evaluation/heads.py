"""Heads on frozen features that are read from the disk batch by batch; all heads of a sweep train at once.

No more than a few batches are in memory. A head is one entry on the first axis of its parameters.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings
from beitv2_jax.evaluation.saved import Saved
from beitv2_jax.rng import host_rng, step_key
from beitv2_jax.typing import PyTree, Scalar

Read = Callable[[Int[np.ndarray, "b"]], PyTree]
"""Row numbers -> the inputs of the heads for these rows."""

BatchOf = Callable[[int], Int[np.ndarray, "b"]]
"""Number of a step (from 0) -> the rows of its batch."""

EVAL_ROWS = 1024
"""Rows that are classified at once."""


def side_by_side(names: Sequence[str], features: Features) -> Read:
    """Return what reads the features `names` after the last layer, joined along their width."""
    arrays = [features.last(name) for name in names]
    return lambda rows: np.concatenate([array[rows] for array in arrays], axis=-1)


def shuffled(rows: Int[np.ndarray, "m"], batch_size: int, seed: int) -> BatchOf:
    """Return the batches in which every row comes once in a random order, then once more in another, ...

    A batch may end one order and begin the next.
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> Int[np.ndarray, "m"]:
        return host_rng(seed, "probe_order", epoch).permutation(len(rows))

    def batch_of(step: int) -> Int[np.ndarray, "b"]:
        epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(rows))
        chosen = [order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return rows[np.concatenate(chosen)]

    return batch_of


def train(
    step: Callable[[PyTree, PyTree, Int[Array, "b"]], tuple[PyTree, Scalar]],
    state: PyTree,
    read: Read,
    labels: Int[np.ndarray, "n"],
    batch_of: BatchOf,
    *,
    num_steps: int,
    on_move: OnMove,
    saved: Saved,
) -> PyTree:
    """Return `state` after `num_steps` times `state, loss = step(state, read(batch), labels[batch])`.

    Args:
        step: compiled function; it may donate its state.
        state: parameters, optimizer state and what else the heads have.
        read: gives the inputs of rows.
        labels: of all rows.
        batch_of: gives the rows of each batch, in any order; they are read in that of the disk.
        num_steps: number of batches.
        on_move: called before every batch.
        saved: what was done before, and where the state is written now and then.
    """
    done, state = saved.restored(state)
    former = None
    for number in range(done, num_steps):
        on_move("fitting")
        batch = np.sort(batch_of(number))
        state, loss = step(state, read(batch), jnp.asarray(labels[batch]))
        if former is not None:
            former.block_until_ready()  # so that no more than two batches wait for the device
        former = loss
        saved.offer(number + 1, num_steps, state)
    return state


def count_hits(
    predict: Callable[[PyTree], Int[Array, "*heads b"]],
    read: Read,
    labels: Int[np.ndarray, "n"],
    rows: Int[np.ndarray, "m"],
    on_move: OnMove,
) -> Int[np.ndarray, "*heads"]:
    """Return how many of `rows` each head classifies as their labels say.

    Args:
        predict: inputs -> classes, the heads on the axes before that of the rows.
        read: gives the inputs of rows.
        labels: of all rows.
        rows: those to evaluate.
        on_move: called before every part.
    """
    hits: Any = 0
    for start in range(0, len(rows), EVAL_ROWS):
        on_move("evaluating")
        part = np.sort(rows[start : start + EVAL_ROWS])
        hits = hits + np.sum(np.asarray(predict(read(part))) == labels[part], axis=-1)
    return np.asarray(hits)


def initial_linear_heads(seed: int, num_heads: int, width: int, num_classes: int) -> dict[str, Array]:
    """Return kernels from N(0, 0.01²) and biases of zero."""
    draws = jax.random.normal(step_key(seed, "probe_heads"), (num_heads, width, num_classes))
    return {"kernel": 0.01 * draws, "bias": jnp.zeros((num_heads, num_classes))}


def linear_logits(
    heads: dict[str, Array], inputs: Float[Array, "b d"] | Float[Array, "h b d"]
) -> Float[Array, "h b k"]:
    """Return the logits of linear heads, of the same inputs or each of its own."""
    return jnp.matmul(inputs, heads["kernel"]) + heads["bias"][:, None]


def sum_of_cross_entropies(logits: Float[Array, "h b k"], labels: Int[Array, "b"]) -> Scalar:
    """Return the sum over heads of the mean cross entropy: its gradient is, for each head, that of its own loss."""
    labels = jnp.broadcast_to(labels, logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(axis=-1).sum()


def by_head(factors: Float[np.ndarray, "h"], array: Float[Array, "h ..."]) -> Float[Array, "h ..."]:
    """Return `array` times the factor of each head."""
    return jnp.asarray(factors).reshape(-1, *(1,) * (array.ndim - 1)) * array


def scale_by_head(factors: Float[np.ndarray, "h"]) -> optax.GradientTransformation:
    """Return the transformation that multiplies the updates of each head by its factor, such as minus its rate."""

    def update(updates, params):
        del params
        return jax.tree.map(functools.partial(by_head, factors), updates)

    return optax.stateless(update)


def gradient_step(
    loss: Callable[[PyTree, PyTree, Int[Array, "b"]], Scalar], optimizer: optax.GradientTransformation
) -> Callable:
    """Return a compiled `step` for `train` whose state is (parameters, state of the optimizer)."""

    def step(state, inputs, labels):
        params, optimizer_state = state
        value, gradients = jax.value_and_grad(loss)(params, inputs, labels)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), value

    return jax.jit(step, donate_argnums=0)


def linear_accuracies(
    train_data: Features,
    test_data: Features,
    reader: Callable[[Features], Read],
    optimizer: optax.GradientTransformation,
    num_heads: int,
    settings: ProbeSettings,
    on_move: OnMove,
    saved: Saved,
) -> Float[np.ndarray, "h"]:
    """Train linear heads on every row of `train_data` and return the fraction of `test_data` that each has right.

    Args:
        train_data: features to train on.
        test_data: features to evaluate.
        reader: gives the `Read` of features, whose inputs are 'b d' for all heads or 'h b d'.
        optimizer: of the parameters of `initial_linear_heads`.
        num_heads: number of heads.
        settings: steps, batch size and seed.
        on_move: called before every batch.
        saved: as in `train`.
    """
    read, rows = reader(train_data), np.arange(len(train_data.labels))
    width = read(rows[:1]).shape[-1]
    params = initial_linear_heads(settings.seed, num_heads, width, train_data.num_classes)
    loss = lambda params, inputs, labels: sum_of_cross_entropies(linear_logits(params, inputs), labels)  # noqa: E731
    params, _ = train(
        gradient_step(loss, optimizer),
        (params, optimizer.init(params)),
        read,
        train_data.labels,
        shuffled(rows, settings.batch_size, settings.seed),
        num_steps=settings.num_steps,
        on_move=on_move,
        saved=saved,
    )
    classify = jax.jit(lambda params, inputs: linear_logits(params, inputs).argmax(axis=-1))
    predict, rows = functools.partial(classify, params), np.arange(len(test_data.labels))
    return count_hits(predict, reader(test_data), test_data.labels, rows, on_move) / len(rows)
