"""Reading runs: the newest complete checkpoint, as NumPy arrays for any devices, without optimizer state."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from beitv2_jax.convert.runs import check_stage, read_run, weights_hash
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.checksums import write_checksums

CONFIG = {"stage": "vqkd", "optim": {"betas": [0.9, 0.99]}}


def state(step):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    kernel = jax.device_put(jnp.arange(48.0).reshape(16, 3) + step, NamedSharding(mesh, P("fsdp")))
    return {"layer": {"kernel": kernel, "bias": jnp.full(3, step)}}, {"quantizer": {"codebook": jnp.eye(5) * step}}


def write_run(workdir, steps, with_codebook=True):
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    for step in steps:
        params, codebook = state(step)
        items = {"params": params, "train": {"step": jnp.array(step), "opt_state": (jnp.ones(7),)}}
        items |= {"model_state": codebook} if with_codebook else {}
        manager.save(step, args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()}))
    manager.wait_until_finished()
    manager.close()
    for step in steps:
        write_checksums(workdir / "checkpoints" / str(step))
    return workdir


def test_the_newest_step_is_read_as_numpy(tmp_path):
    workdir = write_run(tmp_path / "tokenizer", steps=[7, 13])
    (workdir / "checkpoints" / "19.orbax-checkpoint-tmp").mkdir()  # an unfinished save
    run = read_run(str(workdir))
    params, codebook = state(13)
    assert (run.step, run.name, run.config) == (13, "tokenizer@13", CONFIG)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves((run.params, run.model_state)))
    chex.assert_trees_all_equal(run.params, jax.tree.map(np.asarray, params))
    chex.assert_trees_all_equal(run.model_state, jax.tree.map(np.asarray, codebook))


def test_the_folder_of_a_checkpoint_stands_for_its_run(tmp_path):
    workdir = write_run(tmp_path / "tokenizer", steps=[7, 13])
    chosen = str(workdir / "checkpoints" / "7")
    check_stage(chosen, ("vqkd",), "")
    run = read_run(chosen)
    assert (run.step, run.name, run.config) == (7, "tokenizer@7", CONFIG)
    chex.assert_trees_all_equal(run.params, jax.tree.map(np.asarray, state(7)[0]))
    with pytest.raises(UserError, match="checkpoints/9 does not exist"):
        check_stage(str(workdir / "checkpoints" / "9"), ("vqkd",), "")


def test_a_run_without_codebook_has_an_empty_one(tmp_path):
    run = read_run(str(write_run(tmp_path / "mim", steps=[3], with_codebook=False)))
    assert run.model_state == {}
    chex.assert_shape(run.params["layer"]["kernel"], (16, 3))


@pytest.mark.parametrize("item", ["params", "model_state", "train"])
def test_a_corrupt_newest_checkpoint_is_refused_and_not_changed(tmp_path, item):
    workdir = write_run(tmp_path / "tokenizer", steps=[7, 13])
    folder = workdir / "checkpoints" / "13"
    damaged = max((path for path in (folder / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    if item == "train":  # of no use here
        assert read_run(str(workdir)).step == 13
        return
    with pytest.raises(UserError, match=f"step 13 in {workdir} is corrupt: {item}/.* holds other bytes") as caught:
        read_run(str(workdir))
    assert str(workdir) in caught.value.happened and str(folder) in caught.value.instead
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    folder.rename(workdir / "away")
    assert read_run(str(workdir)).step == 7


def test_averaged_weights_are_read_where_they_are_asked_for(tmp_path):
    workdir = write_run(tmp_path / "averaging", steps=[7])
    with pytest.raises(UserError, match="has no averaged weights") as caught:
        read_run(str(workdir), average=True)
    assert "optim.weight_average" in caught.value.meant
    average = {"layer": {"kernel": jnp.full((16, 3), 0.25), "bias": jnp.full(3, 0.5)}}
    shutil.rmtree(workdir / "checkpoints" / "7")
    params, model_state = state(7)
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        items = {"params": params, "model_state": model_state, "averaged_params": average}
        manager.save(7, args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()}))
    write_checksums(workdir / "checkpoints" / "7")
    assert read_run(str(workdir)).params["layer"]["bias"].tolist() == [7.0] * 3
    assert read_run(str(workdir), average=True).params["layer"]["bias"].tolist() == [0.5] * 3


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="absent does not exist"):
        read_run(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no complete checkpoint"):
        read_run(str(tmp_path / "empty"))
    (tmp_path / "empty" / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="no complete checkpoint"):
        read_run(str(tmp_path / "empty"))


def test_hash_depends_on_names_values_shapes_and_not_on_order():
    tree = {"a": np.arange(6.0), "b": {"c": np.ones(2)}}
    same = {"b": {"c": jnp.ones(2)}, "a": jnp.arange(6.0)}
    as_32 = jax.tree.map(np.float32, tree)
    assert weights_hash(as_32) == weights_hash(same)
    assert len(weights_hash(tree)) == 16
    others = [
        {"a": np.arange(6.0), "b": {"d": np.ones(2)}},
        {"a": np.arange(6.0), "b": {"c": np.ones(2) + 1e-12}},
        {"a": np.arange(6.0).reshape(2, 3), "b": {"c": np.ones(2)}},
        as_32,
    ]
    assert len({weights_hash(other) for other in [tree, *others]}) == 5


def test_the_hash_of_a_run_includes_the_codebook(tmp_path):
    with_codebook = read_run(str(write_run(tmp_path / "a", steps=[2])))
    without = read_run(str(write_run(tmp_path / "b", steps=[2], with_codebook=False)))
    assert with_codebook.weights_hash != without.weights_hash
