"""Linear classifiers on frozen features: one per learning rate, fitted side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.typing import Scalar


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
