"""Corrupt checkpoints are quarantined and named, and the one before is used; without a good one the run is refused."""

import logging
import re
import shutil

import chex
import jax
import numpy as np
import pytest
import training_toy as toy

from beitv2_jax.errors import UserError
from beitv2_jax.training import sharding, state
from beitv2_jax.training.checkpoint import Checkpointer
from beitv2_jax.training.optim import for_task


def make(mesh, create):
    task = toy.make_task()
    optimizer, _ = for_task(task, toy.config().optim, 3, 19)
    made = (state.create if create else state.abstract)(task, optimizer, mesh, seed=5)
    if create:
        # large enough to lie in a file of its own, where Orbax keeps no checksum of it
        noise = np.random.default_rng(0).normal(size=(311, 313)).astype(np.float32)
        return made.replace(model_state={"rows": jax.device_put(noise, sharding.replicated(mesh))})
    rows = jax.ShapeDtypeStruct((311, 313), np.float32, sharding=sharding.replicated(mesh))
    return made.replace(model_state={"rows": rows})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Save one state as the steps 8 and 11, the position telling which."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    saved = make(sharding.make_mesh(), True)
    checkpointer = Checkpointer(directory)
    for step in (8, 11):
        checkpointer.save(step, saved, {"next_batch": step})
    checkpointer.close()
    return directory, jax.device_get(saved)


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "checkpoints")


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[:-7])


CORRUPT = {
    "flipped": (flip, "holds other bytes than were written"),
    "truncated": (truncate, r"has \d+ bytes of \d+"),
    "no marker": (lambda folder: (folder / "checksums.json").unlink(), "checksums.json is missing"),
    "no metadata": (lambda folder: (folder / "train" / "_METADATA").unlink(), "train/_METADATA is missing"),
    "half deleted": (lambda folder: shutil.rmtree(folder / "params"), r"params/.* is missing"),
    "empty": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], "checksums.json is missing"),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_the_one_before_a_corrupt_checkpoint_is_used(written, copied, caplog, how):
    corrupt, text = CORRUPT[how]
    corrupt(copied / "11")
    with caplog.at_level(logging.ERROR):
        checkpointer = Checkpointer(copied)
    assert checkpointer.latest_step() == 8
    assert [record.args[0] for record in caplog.records] == [11]
    assert caplog.records[0].args[2] == copied / "11.corrupt"
    assert re.search(text, caplog.text)
    restored, position = checkpointer.restore(make(sharding.make_mesh(), False))
    chex.assert_trees_all_equal(jax.device_get(restored), written[1])
    assert position == {"next_batch": 8}
    # the run comes by the same step again, and keeps what was quarantined
    checkpointer.save(11, restored, {"next_batch": 11})
    checkpointer.close()
    assert sorted(path.name for path in copied.iterdir()) == ["11", "11.corrupt", "8"]
    corrupt(copied / "11")
    Checkpointer(copied).close()
    assert sorted(path.name for path in copied.iterdir()) == ["11.corrupt", "11.corrupt+", "8"]


def test_without_a_whole_checkpoint_nothing_is_changed(copied):
    for step in ("8", "11"):
        flip(copied / step)
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"Every checkpoint in .* is corrupt \(11: .*; 8: .*\)"):
        Checkpointer(copied)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_orbax_itself_does_not_see_a_flipped_byte(written, copied, monkeypatch):
    """The reason for the checksums: when this fails, they can go."""
    flip(copied / "11")
    monkeypatch.setattr("beitv2_jax.training.checkpoint.find_damage", lambda folder: None)
    checkpointer = Checkpointer(copied)
    restored, _ = checkpointer.restore(make(sharding.make_mesh(), False))
    checkpointer.close()
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(jax.device_get(restored), written[1])


def test_a_whole_checkpoint_stays_whatever_is_wrong_beside_its_items(written, copied):
    flip(copied / "8")
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        (copied / "11" / name).unlink()
    checkpointer = Checkpointer(copied)
    restored, position = checkpointer.restore(make(sharding.make_mesh(), False))
    checkpointer.close()
    chex.assert_trees_all_equal(jax.device_get(restored), written[1])
    assert position == {"next_batch": 11}
    assert sorted(path.name for path in copied.iterdir()) == ["11", "8"]
