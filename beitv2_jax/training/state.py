"""The training state: one frozen struct, initialised inside jit straight into its shardings."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from beitv2_jax import rng
from beitv2_jax.tasks.api import Task
from beitv2_jax.training import sharding
from beitv2_jax.training import spikes as spikes_lib
from beitv2_jax.typing import PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    `step` counts finished steps. `model_state` is changed by no optimizer: the codebook, or the statistics of batch
    norm. `averaged_params` is None unless weights are averaged.

    `spikes` is kept with the guard off as well, so that it can be put on in the middle of a run.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    averaged_params: PyTree | None = None
    spikes: spikes_lib.Spikes = dataclasses.field(default_factory=spikes_lib.none_yet)


def create(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, *, keep_average: bool = False
) -> TrainState:
    """Return the state at step 0: `task.initial` where it has a value, fresh draws elsewhere.

    No array is ever whole on one device unless its sharding says so.
    """
    init = _init_function(task, optimizer, seed, keep_average)
    shardings = sharding.param_shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=shardings)()
    params, model_state = task.initial.get("params", {}), task.initial.get("model_state", {})
    return state.replace(
        params=_replaced(state.params, params),
        model_state=_replaced(state.model_state, model_state),
        averaged_params=_replaced(state.averaged_params, params) if keep_average else None,
    )


def abstract(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, *, keep_average: bool = False
) -> TrainState:
    """Return shapes, dtypes and shardings of the state that `create` would return, computing nothing."""
    shapes = jax.eval_shape(_init_function(task, optimizer, seed, keep_average))
    return sharding.placed_shapes(shapes, sharding.param_shardings(shapes, mesh))


def nonfinite_steps(state: TrainState) -> Int[Array, ""]:
    """Return how many steps changed nothing as they were not finite: Adam counts only steps that were taken."""
    return state.step - optax.tree.get(state.opt_state, "count") - state.spikes.left_out


def _replaced(tree: PyTree, given: PyTree) -> PyTree:
    """Return `tree` with the leaves that `given` has, placed as those they replace."""
    if isinstance(given, Mapping):
        return {**tree, **{key: _replaced(tree[key], inner) for key, inner in given.items()}}
    given = np.asarray(given, tree.dtype)
    return jax.make_array_from_callback(tree.shape, tree.sharding, lambda index: given[index])


def _init_function(task, optimizer, seed, keep_average) -> Callable[[], TrainState]:
    def init() -> TrainState:
        variables = task.init(rng.step_key(seed, "init"))
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            model_state=variables["model_state"],
            averaged_params=params if keep_average else None,
        )

    return init
