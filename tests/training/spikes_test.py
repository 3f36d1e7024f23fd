"""The spike guard: what counts as a spike, that it is left out and counted, and what does not change without one."""

import logging

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy

from beitv2_jax.errors import UserError
from beitv2_jax.training import loop, spikes
from beitv2_jax.training.writer import read_metrics
from tests.training.loop_test import assert_same_outcome, outcome

LENGTH = {"run.duration": "70 steps", "run.eval_every": "0 steps", "run.checkpoint_every": "30 steps"}


def train(workdir, factor, **task):
    config = toy.config(**LENGTH, **{"optim.spike_factor": factor})
    return loop.train(toy.make_task(evaluation=False, **task), config, workdir)


def test_the_running_mean_is_that_of_the_steps_so_far_then_an_exponential_one():
    losses, norms = np.random.default_rng(0).uniform(0.5, 2.0, (2, 120)).astype(np.float32)
    guard, means = spikes.none_yet(), []
    for loss, norm in zip(losses, norms, strict=True):
        guard = spikes.noted(guard, loss, norm)
        means.append((float(guard.loss), float(guard.grad_norm)))
    for values, column in ((losses, 0), (norms, 1)):
        np.testing.assert_allclose(means[49][column], values[:50].mean(), rtol=1e-6)
        expected = values[:50].astype(np.float64).mean()
        for value in values[50:]:
            expected = 0.98 * expected + 0.02 * value
        np.testing.assert_allclose(means[-1][column], expected, rtol=1e-5)
    assert int(guard.taken) == 120 and int(guard.left_out) == 0


@pytest.mark.parametrize(
    ("taken", "loss", "grad_norm", "expected"),
    [(50, 8.9, 5.9, False), (50, 9.1, 1.0, True), (50, 1.0, 6.1, True), (49, 100.0, 100.0, False)],
)
def test_a_spike_is_above_the_mean_by_the_factor_once_there_is_a_mean(taken, loss, grad_norm, expected):
    guard = spikes.Spikes(jnp.float32(3), jnp.float32(2), jnp.int32(taken), jnp.int32(0))
    assert bool(spikes.is_spike(guard, loss, grad_norm, 3.0)) is expected


@pytest.fixture(scope="module")
def guarded_and_log(tmp_path_factory):
    """Return the workdir of a run with a spike at step 62 and one, too early to be judged, at step 12; and its log."""
    workdir, records = tmp_path_factory.mktemp("guarded"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        train(workdir, 5.0, spike_steps=(11, 61))
    finally:
        logging.getLogger().removeHandler(handler)
    return workdir, records


@pytest.fixture
def guarded(guarded_and_log):
    return guarded_and_log[0]


@pytest.mark.long
def test_without_spikes_nothing_changes(tmp_path):
    train(tmp_path / "off", 0.0)
    train(tmp_path / "on", 1e6)
    off, on = outcome(tmp_path / "off"), outcome(tmp_path / "on")
    assert all(line.pop("spiked_steps") == 0 for line in on[3])
    assert_same_outcome(on, off)


def test_a_spike_changes_nothing_and_is_told_with_its_examples(guarded_and_log):
    workdir, records = guarded_and_log
    _, trees, _, lines = outcome(workdir)
    assert [line["spiked_steps"] for line in lines] == [0] * 61 + [1] * 9
    assert {line["nonfinite_steps"] for line in lines} == {0}
    assert lines[61]["loss"] > 5 * lines[60]["loss"]
    assert trees["train"]["spikes"]["taken"] == 69 and trees["train"]["spikes"]["left_out"] == 1
    (logged,) = [record.args for record in records if "changed nothing" in record.msg]
    iterator = toy.batches(8, seed=3)
    ids = [next(iterator)["example_ids"] for _ in range(62)][-1]
    assert logged[0] == 62 and logged[-1] == " ".join(map(str, ids))


def test_a_run_continued_judges_as_the_unbroken_one(guarded, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5.0, spike_steps=(11, 61), stop_at=41)
    assert outcome(tmp_path)[0] == 30
    train(tmp_path, 5.0, spike_steps=(11, 61))
    assert_same_outcome(outcome(tmp_path), outcome(guarded))


@pytest.mark.long
def test_a_guard_can_be_put_on_in_the_middle_of_a_run(guarded, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 0.0, spike_steps=(11, 61), stop_at=41)
    train(tmp_path, 5.0, spike_steps=(11, 61))
    found, expected = outcome(tmp_path), outcome(guarded)
    chex.assert_trees_all_equal(found[1], expected[1])


def test_too_many_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"3 steps in a row, up to step 58, .* a spike"):
        train(tmp_path, 5.0, spike_steps=tuple(range(55, 70)))
    assert read_metrics(tmp_path)[-1]["spiked_steps"] == 2
