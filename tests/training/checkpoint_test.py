"""Checkpoints: exact, onto any mesh, with the iterator where the state is, and only of the same structure."""

import errno
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy

from beitv2_jax.errors import UserError
from beitv2_jax.training import optim, sharding, state
from beitv2_jax.training.checkpoint import Checkpointer


def make(mesh, *, clip_norm=1.0, keep_average=True, create=True):
    task = toy.make_task()
    optimizer = optim.make_optimizer(
        schedule=lambda step: 0.1,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.1,
        no_decay=task.no_decay,
        clip_norm=clip_norm,
    )
    return (state.create if create else state.abstract)(task, optimizer, mesh, seed=5, keep_average=keep_average)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Save steps 1 to 5 of a state that is overwritten, and of an iterator that moves on, right after each save."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpointer = Checkpointer(directory, keep_every=2)
    change = jax.jit(
        lambda tree, step: jax.tree.map(lambda leaf: (leaf + step).astype(leaf.dtype), tree), donate_argnums=0
    )
    current, iterator = make(sharding.make_mesh(2, 2, 2)), toy.batches(8, seed=3)
    for step in range(1, 6):
        current = change(current, step)
        next(iterator)
        checkpointer.save(step, current, iterator.get_state())
        expected = jax.device_get(current)
        current = change(current, 100)
        upcoming = next(iterator)["example_ids"]
        iterator.set_state({"next_batch": step})
    next(iterator)
    checkpointer.close()
    return directory, expected, upcoming


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 1)])
def test_restores_exactly_onto_any_mesh(written, sizes):
    directory, expected, upcoming = written
    mesh = sharding.make_mesh(*sizes)
    checkpointer, iterator = Checkpointer(directory), toy.batches(8, seed=3)
    abstract = make(mesh, create=False)
    assert checkpointer.latest_step() == 5
    restored, position = checkpointer.restore(abstract)
    iterator.set_state(position)
    chex.assert_trees_all_equal(jax.device_get(restored), expected)
    jax.tree.map(lambda leaf, wanted: chex.assert_equal(leaf.sharding, wanted.sharding), restored, abstract)
    np.testing.assert_array_equal(next(iterator)["example_ids"], upcoming)
    checkpointer.close()


def test_position_serves_another_number_of_processes(written):
    directory, _, upcoming = written
    halves = [toy.batches(8, seed=3, process_index=index, process_count=2) for index in (0, 1)]
    checkpointer = Checkpointer(directory)
    for iterator in halves:
        _, position = checkpointer.restore(make(sharding.make_mesh(), create=False))
        assert position == {"next_batch": 5}
        iterator.set_state(position)
    checkpointer.close()
    np.testing.assert_array_equal(np.concatenate([next(half)["example_ids"] for half in halves]), upcoming)


def test_last_two_and_the_kept_ones_remain(written):
    directory, _, _ = written
    assert sorted(int(path.name) for path in directory.iterdir()) == [2, 4, 5]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.replace(params={**s.params, "fc1": {}}), "has params/fc1/bias float32\\[20\\], this run has no"),
        (lambda s: s.replace(params={**s.params, "new": s.step}), "has no params/new, this run has params/new int32"),
        (
            lambda s: s.replace(
                model_state={"quantizer": {**s.model_state["quantizer"], "codebook": jnp.zeros((9, 4))}}
            ),
            "model_state/quantizer/codebook float32\\[5, 12\\], this run has .* float32\\[9, 4\\]",
        ),
        (lambda s: s.replace(averaged_params=None), "has averaged_params/fc1/bias .* this run has no"),
        (lambda s: s.replace(opt_state=s.opt_state[1:]), "train/opt_state"),
    ],
)
def test_checkpoint_of_another_structure_is_refused(written, change, text):
    directory, _, _ = written
    checkpointer = Checkpointer(directory)
    with pytest.raises(UserError, match=text):
        checkpointer.restore(change(make(sharding.make_mesh(), create=False)))
    checkpointer.close()


def test_a_save_that_failed_leaves_nothing_though_others_of_its_items_are_still_being_written(tmp_path, monkeypatch):
    run = threading.Thread.run

    def run_as_in_trouble(thread):
        if thread.name == "array_type_handler":
            time.sleep(0.7)
        run(thread)
        if thread.name == "serialize_shardings":
            raise OSError(errno.EFBIG, "File too large")

    checkpointer, current = Checkpointer(tmp_path / "checkpoints"), make(sharding.make_mesh(1, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "run", run_as_in_trouble)
        with pytest.raises(UserError, match=r"step 1 could not be written to .*: File too large"):
            checkpointer.save(1, current, {"next_batch": 1}, last=True)
        time.sleep(1)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    checkpointer.save(2, current, {"next_batch": 2}, last=True)
    assert checkpointer.latest_step() == 2
    checkpointer.close()


def test_a_save_that_cannot_be_read_back_does_not_count(tmp_path):
    """In such a folder Orbax loses the arrays that it wrote, and says nothing."""
    folder = tmp_path / "run[1]" / "checkpoints"
    checkpointer, current = Checkpointer(folder), make(sharding.make_mesh(1, 1, 1))
    with pytest.raises(UserError, match=r"step 1 could not be written .*cannot be read back"):
        checkpointer.save(1, current, {"next_batch": 1}, last=True)
    assert checkpointer.latest_step() is None and list(folder.iterdir()) == []
    checkpointer.close()


def test_state_without_codebook_and_averages(tmp_path):
    mesh = sharding.make_mesh()
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    assert checkpointer.latest_step() is None
    saved = make(mesh, keep_average=False).replace(model_state={})
    checkpointer.save(7, saved, {"next_batch": 7})
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    restored, _ = checkpointer.restore(make(mesh, keep_average=False, create=False).replace(model_state={}))
    chex.assert_trees_all_equal(restored, saved)
    assert not (tmp_path / "checkpoints" / "7" / "model_state").exists()
    checkpointer.close()
