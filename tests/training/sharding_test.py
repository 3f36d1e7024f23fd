"""The mesh, the partition table and the activation rules; `equality_meshes_test.py` has whole runs on many meshes."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from paths import ROOT

from beitv2_jax.errors import UserError
from beitv2_jax.training import optim, sharding, state


def test_mesh_takes_what_is_left():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(data=3).size == 3


@pytest.mark.parametrize(
    ("sizes", "text"), [((16, 1, 1), "8 device"), ((-1, 3, 1), "8 device"), ((-1, -1, 1), "is not valid")]
)
def test_impossible_mesh_is_refused(sizes, text):
    with pytest.raises(UserError, match=text) as caught:
        sharding.make_mesh(*sizes)
    advised = {axis: int(size) for axis, size in re.findall(r"--config.mesh.(\w+)=(-?\d+)", caught.value.instead)}
    assert sharding.make_mesh(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)) | advised).size == 8


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
        ("decode_head/fusion/conv/kernel", (3, 3, 6, 10), P(None, None, "fsdp")),
        ("1/nu/fpn1/up_0/kernel", (2, 2, 6, 10), P(None, None, "fsdp")),
        ("auxiliary_head/classes/kernel", (6, 10), P()),
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


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda path: path.stem)
def test_no_model_file_names_an_axis_of_the_mesh(path):
    constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not constants & set(sharding.AXES)


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


def test_state_lies_where_the_table_says():
    task = toy.make_task()
    optimizer = optim.make_optimizer(
        schedule=lambda step: 0.02, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, no_decay=task.no_decay, clip_norm=1.0
    )
    found = state.create(task, optimizer, sharding.make_mesh(2, 2, 2), seed=5, keep_average=True)
    moments = found.opt_state[1]
    for tree in (found.params, found.averaged_params, moments.mu, moments.nu):
        assert tree["fc1"]["kernel"].sharding.spec == P("fsdp", "tensor")
        assert tree["fc2"]["kernel"].sharding.spec == P("tensor", "fsdp")
        assert tree["odd"]["kernel"].sharding.is_fully_replicated
    assert found.model_state["quantizer"]["codebook"].sharding.is_fully_replicated
