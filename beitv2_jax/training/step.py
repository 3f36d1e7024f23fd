"""One optimizer step as a pure function: gradients of a task's loss, the update, and a step that is not finite undone.

The loop compiles and runs it, planning compiles it for chips that are not here, benchmarks time it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from beitv2_jax import rng
from beitv2_jax.tasks.api import Batch, Task
from beitv2_jax.training import sharding, spikes
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.state import TrainState
from beitv2_jax.typing import PyTree

TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    schedule: Callable,
    seed: int,
    average_decay: float,
    accumulation_steps: int = 1,
    spike_factor: float = 0.0,
) -> TrainStep:
    """Return the pure function `(state, frozen, batch) -> (state, metrics)` of one optimizer step.

    A step whose loss or gradient norm is not finite changes nothing but `step`; `nonfinite_steps` counts them.
    With `spike_factor` the same holds for one whose loss or gradient norm is more than that many times the running mean
    of the steps before; `spiked_steps` counts those.
    `grad_norm` is taken before clipping. The averaged weights are
    `average_decay * average + (1 - average_decay) * params`.

    With `accumulation_steps` above 1 the batch is cut into that many micro-batches, and all their sums (gradients,
    loss, weights, metrics, codebook statistics) are added in float32 before anything is divided or updated. So the step
    equals that of the whole batch up to rounding, except for random draws, which are independent in each micro-batch.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = rng.step_key(seed, "train", state.step)
        loss, grads, metrics, statistics = _whole_batch(task, state, frozen, batch, key, accumulation_steps)
        model_state, more_metrics = task.finish(state.model_state, statistics, state.step)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        averaged_params = state.averaged_params
        if averaged_params is not None:
            averaged_params = optax.incremental_update(params, averaged_params, 1.0 - average_decay)
        noted = spikes.noted(state.spikes, loss, grad_norm)
        moved = TrainState(state.step, params, opt_state, model_state, averaged_params, noted)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spiked = finite & spikes.is_spike(state.spikes, loss, grad_norm, spike_factor) if spike_factor else False
        moved = jax.tree.map(lambda new, old: jnp.where(finite & ~jnp.asarray(spiked), new, old), moved, state)
        left_out = state.spikes.left_out + spiked
        moved = moved.replace(step=state.step + 1, spikes=moved.spikes.replace(left_out=left_out))
        return moved, {
            **metrics,
            **more_metrics,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "nonfinite_steps": state_lib.nonfinite_steps(moved),
            **({"spiked_steps": left_out} if spike_factor else {}),
            "unreadable": jnp.sum(batch["weight"] == 0),
        }

    return train_step


def lower_step(
    train_step: TrainStep, state: TrainState, frozen: PyTree, batch: Batch, mesh: Mesh
) -> jax.stages.Lowered:
    """Return the step as it goes to the compiler, for arrays or for shapes with shardings."""
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh))
    with sharding.activation_rules(mesh):
        return jax.jit(train_step, out_shardings=shardings, donate_argnames="state").lower(state, frozen, batch)


def micro_batches(batch: Batch, count: int) -> Batch:
    """Return `a b/a ...` of every leaf `b ...`: micro-batch i has rows i, i + a, ... with a = `count`.

    Each device's share of the batch is a run of rows, of which every micro-batch takes as many: no row changes devices.
    """

    def cut(rows: jax.Array) -> jax.Array:
        cut = jnp.moveaxis(rows.reshape(rows.shape[0] // count, count, *rows.shape[1:]), 1, 0)
        return nn.with_logical_constraint(cut, (None, "batch", *(None,) * (rows.ndim - 1)))

    return jax.tree.map(cut, batch)


def _whole_batch(
    task: Task, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, accumulation_steps: int
) -> tuple[jax.Array, PyTree, dict[str, jax.Array], PyTree]:
    """Return loss, gradients and metrics, each divided by what the batch weighs, and the statistics."""

    def sums_of(batch: Batch, key: jax.Array):
        (loss, parts), grads = jax.value_and_grad(task.loss, has_aux=True)(
            state.params, state.model_state, frozen, batch, key, state.step
        )
        return loss, grads, parts

    if accumulation_steps == 1:
        sums = sums_of(batch, key)
    else:
        xs = micro_batches(batch, accumulation_steps), jax.random.split(key, accumulation_steps)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(sums_of, *jax.tree.map(lambda x: x[0], xs)))

        def add(sums, x):
            *totals, parts = sums
            *more, more_parts = sums_of(*x)
            statistics = task.merge(parts.statistics, more_parts.statistics)
            totals, added = jax.tree.map(
                jnp.add, (totals, parts._replace(statistics=None)), (more, more_parts._replace(statistics=None))
            )
            return (*totals, added._replace(statistics=statistics)), None

        sums, _ = jax.lax.scan(add, zeros, xs)
    loss, grads, parts = sums
    weight = jnp.maximum(parts.weight, 1.0)
    loss, grads, metrics = jax.tree.map(lambda total: total / weight, (loss, grads, parts.metrics))
    return loss, grads, metrics, parts.statistics
