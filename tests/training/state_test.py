"""Creation of the state, and the law of steps that are not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy

from beitv2_jax import rng
from beitv2_jax.training import optim, sharding, state
from beitv2_jax.training.step import make_train_step


@pytest.fixture(scope="module")
def setup():
    task = toy.make_task(nan_steps=(1, 2))
    optimizer = optim.make_optimizer(
        schedule=lambda step: 0.02, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, no_decay=task.no_decay, clip_norm=0.1
    )
    return task, optimizer, sharding.make_mesh(2, 2, 2)


def test_abstract_state_is_that_of_create(setup):
    task, optimizer, mesh = setup
    created = state.create(task, optimizer, mesh, seed=5, keep_average=True)
    abstract = state.abstract(task, optimizer, mesh, seed=5, keep_average=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(created, abstract)
    jax.tree.map(lambda a, b: chex.assert_equal(a.sharding, b.sharding), created, abstract)
    chex.assert_trees_all_equal(created.averaged_params, created.params)
    other = state.create(task, optimizer, mesh, seed=6)
    assert other.averaged_params is None
    assert np.abs(other.params["fc1"]["kernel"] - created.params["fc1"]["kernel"]).max() > 1e-3


def test_step_that_is_not_finite_changes_nothing_but_the_step(setup):
    task, optimizer, _ = setup
    mesh = sharding.make_mesh(1)
    step = make_train_step(task, optimizer, schedule=lambda step: 0.02, seed=5, average_decay=0.75)
    step = jax.jit(step)
    states = [state.create(task, optimizer, mesh, seed=5, keep_average=True)]
    frozen = sharding.place_weights(task.frozen, mesh)
    batches, counts = toy.batches(8, seed=3), []
    for _ in range(4):
        moved, metrics = step(states[-1], frozen, sharding.place_batch(next(batches), mesh))
        states.append(moved)
        counts.append(int(metrics["nonfinite_steps"]))
        assert metrics["learning_rate"] == np.float32(0.02)
    assert counts == [0, 1, 2, 2]
    assert [int(moved.step) for moved in states] == [0, 1, 2, 3, 4]
    for skipped in (2, 3):
        chex.assert_trees_all_equal(states[skipped].replace(step=0), states[1].replace(step=0))
    for before, after in ((0, 1), (3, 4)):
        changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), states[before], states[after])
        assert not changed.spikes.left_out
        changed = changed.replace(spikes=None)
        assert all(jax.tree.leaves(changed)), changed
    kernel = [moved.params["fc1"]["kernel"] for moved in states]
    averages = [moved.averaged_params["fc1"]["kernel"] for moved in states]
    np.testing.assert_allclose(averages[4], 0.75 * averages[3] + 0.25 * kernel[4], rtol=1e-6, atol=1e-7)


def test_gradient_norm_is_that_before_clipping(setup):
    task, optimizer, _ = setup
    mesh = sharding.make_mesh(1)
    step = jax.jit(make_train_step(task, optimizer, schedule=lambda step: 0.02, seed=5, average_decay=0.0))
    start = state.create(task, optimizer, mesh, seed=5)
    batch = next(toy.batches(8, seed=3))
    _, metrics = step(start, task.frozen, sharding.place_batch(batch, mesh))
    key = rng.step_key(5, "train", 0)
    value = jax.jit(lambda params: task.loss(params, start.model_state, task.frozen, batch, key, 0)[0] / 8)
    grads = jax.jit(jax.grad(value))(start.params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(grads)))
    assert norm > 0.5  # clip_norm is 0.1
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
