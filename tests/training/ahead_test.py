"""The loop keeps ahead of the devices: what it copies to the host and when, and what lies ready when a step ends."""

import threading

import jax
import numpy as np
import pytest
import training_toy as toy

from beitv2_jax.training import loop, metric_log, sharding

STEPS = 12
PATIENCE = 5.0
"""Seconds after which a step that nothing follows is given up, so that a loop that waits for it fails the test."""


class Figure:
    """A number on a device that is there when its step has ended; tells of each copy to the host."""

    def __init__(self, value, ended, on_copy):
        self._value, self._ended, self._on_copy = value, ended, on_copy

    def block_until_ready(self):
        assert self._ended.wait(PATIENCE), "nothing was given to the device while it was at work"
        return self

    def __array__(self, dtype=None, copy=None):
        self._on_copy()
        return np.asarray(self.block_until_ready()._value, dtype)


class Device:
    """A device on which every step lasts until the next one is given to it, with a batch that is placed already."""

    def __init__(self):
        self.batches, self.copies, self._ended = [], [], []

    def __call__(self, state, frozen, batch):
        if self._ended:
            self._ended[-1].set()
        step, ended = len(self._ended) + 1, threading.Event()
        self._ended.append(ended)
        self.batches.append(batch)
        if step == STEPS:
            ended.set()
        metrics = {"loss": 0.5, "grad_norm": 1.0, "nonfinite_steps": 0, "unreadable": 0}

        def copied():
            self.copies.append((step, len(self._ended)))

        return state, {name: Figure(value, ended, copied) for name, value in metrics.items()}


def test_the_state_is_made_while_the_first_batch_comes_and_the_step_is_compiled(tmp_path, monkeypatch):
    compiling, create, compile_step = threading.Event(), loop.state_lib.create, loop.compile_step

    def created(*arguments, **options):
        assert compiling.wait(PATIENCE), "the step was not compiled before there was a state"
        return create(*arguments, **options)

    def compiled(*arguments):
        compiling.set()
        return compile_step(*arguments)

    monkeypatch.setattr(loop.state_lib, "create", created)
    monkeypatch.setattr(loop, "compile_step", compiled)
    rhythm = {"run.duration": "1 steps", "optim.warmup": "0 steps"}
    assert loop.train(toy.make_task(evaluation=False), toy.config(**rhythm), tmp_path)["steps"] == 1


@pytest.mark.parametrize(("log_every", "most_unread", "period"), [(5, 1000, 5), (0, 4, 4)])
def test_no_step_is_waited_for_and_metrics_are_copied_once_a_logging_interval(
    tmp_path, monkeypatch, log_every, most_unread, period
):
    device = Device()
    monkeypatch.setattr(metric_log, "MOST_UNREAD", most_unread)
    monkeypatch.setattr(loop, "compile_step", lambda *arguments: device)
    read = []
    array = type(jax.numpy.zeros(()))
    held = array._value
    monkeypatch.setattr(array, "_value", property(lambda self: (read.append(len(device.batches)), held.fget(self))[1]))
    rhythm = {"run.duration": f"{STEPS} steps", "run.log_every": f"{log_every} steps"}
    quiet = {"run.checkpoint_every": "0 steps", "run.eval_every": "0 steps"}
    loop.train(toy.make_task(evaluation=False), toy.config(**rhythm, **quiet), tmp_path)
    assert len(device.batches) == STEPS
    # with a period of 5, steps 1 to 5 are read when step 6 runs, and so on; the last ones at the end
    expected = {(step, min(-(-step // period) * period + 1, STEPS)) for step in range(1, STEPS + 1)}
    assert set(device.copies) == expected
    assert not [count for count in read if 0 < count < STEPS]  # of the state
    mesh = sharding.make_mesh()
    placed = jax.tree.leaves(device.batches)
    assert all(isinstance(rows, jax.Array) and rows.sharding == sharding.batch_sharding(mesh) for rows in placed)
    ids = [np.asarray(batch["example_ids"]) for batch in device.batches]
    iterator = toy.batches(8, seed=3)
    np.testing.assert_array_equal(ids, [next(iterator)["example_ids"] for _ in range(STEPS)])
    iterator.close()
