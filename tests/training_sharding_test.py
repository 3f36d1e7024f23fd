"""The mesh, the partition table, the activation rules, and that no mesh changes what a step computes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from beitv2_jax.errors import UserError
from beitv2_jax.training import loop, optim, sharding, state

MESHES = {"1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}


def test_mesh_takes_what_is_left():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(data=3).size == 3


@pytest.mark.parametrize(("sizes", "text"), [((16, 1, 1), "8 device"), ((-1, 3, 1), "8 device"), ((-1, -1, 1), "mean")])
def test_impossible_mesh_is_refused(sizes, text):
    with pytest.raises(UserError, match=text):
        sharding.make_mesh(*sizes)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("blocks_0/attn/qkv/kernel", (6, 10), P("fsdp", "tensor")),
        ("1/mu/blocks_0/mlp/fc1/kernel", (6, 10), P("fsdp", "tensor")),
        ("backbone/blocks_3/attn/proj/kernel", (6, 10), P("tensor", "fsdp")),
        ("blocks_3/mlp/fc2/kernel", (6, 10), P("tensor", "fsdp")),
        ("aggregation_lm_head/kernel", (6, 10), P("fsdp", "tensor")),
        ("head/kernel", (6, 10), P("fsdp", "tensor")),
        ("blocks_0/attn/qkv/kernel", (7, 10), P(None, "tensor")),
        ("blocks_0/attn/qkv/kernel", (6, 11), P("fsdp", None)),
        ("blocks_0/attn/qkv/bias", (10,), P()),
        ("blocks_0/attn/rel_pos_bias/table", (6, 10), P()),
        ("patch_embed/kernel", (6, 10), P()),
        ("noproj/kernel", (6, 10), None),
        ("qkv/kernel_norm", (6, 10), None),
        ("subhead/kernel", (6, 10), None),
    ],
)
def test_partition_table(path, shape, spec):
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
    assert sharding.param_shardings(tree, mesh)[path].spec == (spec or P())
    assert sharding.unmatched(tree) == ([path] if spec is None else [])


def test_batch_that_cannot_be_divided_is_refused():
    mesh = sharding.make_mesh(2, 2, 2)
    placed = sharding.place_batch({"images": np.arange(24.0, dtype=np.float32).reshape(8, 3)}, mesh)["images"]
    assert placed.sharding.shard_shape(placed.shape) == (2, 3)
    np.testing.assert_array_equal(placed, np.arange(24.0).reshape(8, 3))
    with pytest.raises(UserError, match="batch of 6 rows cannot be divided over 4"):
        sharding.place_batch({"images": np.zeros((6, 3))}, mesh)


def test_activation_rules_take_effect_inside_jit_and_only_there():
    mesh = sharding.make_mesh(2, 2, 2)
    kernel = jax.device_put(jnp.ones((5, 14)), jax.NamedSharding(mesh, P(None, "tensor")))
    tokens = jax.device_put(jnp.ones((8, 3, 5)), sharding.replicated(mesh))

    def constrained(tokens, kernel):
        return nn.with_logical_constraint(tokens @ kernel, ("batch", "length", "width"))

    with sharding.activation_rules(mesh):
        inside = jax.jit(constrained)(tokens, kernel)
    outside = jax.jit(constrained)(tokens, kernel)
    assert inside.sharding.shard_shape(inside.shape) == (2, 3, 14)
    assert outside.sharding.shard_shape(outside.shape) == (8, 3, 7)


def run_steps(mesh_sizes, num_steps=6):
    """Return the state after some steps on a mesh, compiled as the loop compiles it.

    Adam divides by sqrt(v) + eps: with a small eps it would magnify the rounding of gradients near zero.
    """
    mesh = sharding.make_mesh(*mesh_sizes)
    task = toy.make_task()
    optimizer = optim.make_optimizer(
        schedule=lambda step: 0.02, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.1, no_decay=task.no_decay, clip_norm=1.0
    )
    train_state = state.create(task, optimizer, mesh, seed=5, keep_ema=True)
    step = loop.make_train_step(task, optimizer, schedule=lambda step: 0.02, seed=5, ema_decay=0.5)
    frozen = sharding.place_weights(task.frozen, mesh)
    batches = toy.batches(8, seed=3)
    compiled = None
    for _ in range(num_steps):
        batch = sharding.place_batch(next(batches), mesh)
        compiled = compiled or loop.compile_step(step, train_state, frozen, batch, mesh)
        train_state, _ = compiled(train_state, frozen, batch)
    return train_state


@pytest.fixture(scope="module")
def states():
    return {name: run_steps(sizes) for name, sizes in MESHES.items()}


@pytest.mark.parametrize("name", ["8x1x1", "2x4x1", "2x2x2"])
def test_every_mesh_computes_the_same(states, name):
    chex.assert_trees_all_close(jax.device_get(states[name]), jax.device_get(states["1"]), rtol=1e-6, atol=1e-6)


def test_two_runs_on_eight_devices_are_equal_to_the_bit(states):
    chex.assert_trees_all_equal(jax.device_get(run_steps(MESHES["2x2x2"])), jax.device_get(states["2x2x2"]))


def test_state_lies_where_the_table_says(states):
    found = states["2x2x2"]
    moments = found.opt_state[1]
    for tree in (found.params, found.ema_params, moments.mu, moments.nu):
        assert tree["fc1"]["kernel"].sharding.spec == P("fsdp", "tensor")
        assert tree["fc2"]["kernel"].sharding.spec == P("tensor", "fsdp")
        assert tree["odd"]["kernel"].sharding.is_fully_replicated
    assert found.codebook["quantizer"]["codebook"].sharding.is_fully_replicated
