"""The spike guard: skip steps whose loss or gradient norm is far above the average of the steps before.

Its averages are part of the state, so that a resumed run skips the same steps; it is evaluated inside the step.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DECAY = 0.98
LEARNING_STEPS = 50
"""Steps before the first judgement; about as many make up the running means."""


@flax.struct.dataclass
class Spikes:
    """Hold the running means of loss and gradient norm, of how many steps they are, and how many were left out."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    taken: Int[Array, ""]
    left_out: Int[Array, ""]


def none_yet() -> Spikes:
    """Return the state of the guard at step 0."""
    # one array each: a step takes the memory of its state, and none can be given to it twice
    return Spikes(*(jnp.zeros((), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32, jnp.int32)))


def is_spike(spikes: Spikes, loss: Float[Array, ""], grad_norm: Float[Array, ""], factor: float) -> Bool[Array, ""]:
    """Return whether loss or gradient norm is above `factor` times its running mean; meant for losses above 0."""
    learnt = spikes.taken >= LEARNING_STEPS
    return learnt & ((loss > factor * spikes.loss) | (grad_norm > factor * spikes.grad_norm))


def noted(spikes: Spikes, loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Spikes:
    """Return the guard after a step that was taken: `mean += (value - mean) * rate`, the plain mean at first."""
    rate = jnp.maximum(1.0 - DECAY, 1.0 / (spikes.taken + 1))
    return spikes.replace(
        loss=spikes.loss + rate * (loss - spikes.loss),
        grad_norm=spikes.grad_norm + rate * (grad_norm - spikes.grad_norm),
        taken=spikes.taken + 1,
    )
