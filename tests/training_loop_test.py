"""The loop: exact resume, one compilation, figures, evaluation, the first batch, and the stop at bad steps."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import training_toy as toy

from beitv2_jax import rng
from beitv2_jax.errors import UserError
from beitv2_jax.training import loop, optim
from beitv2_jax.training.writer import read_metrics

TIMING = ("images_per_second", "data_wait_share")
TESTS = Path(__file__).parent


def train_elsewhere(workdir, **task):
    """Run the toy in a fresh process and return its exit status; negative is the signal that killed it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    command = [sys.executable, str(TESTS / "training_toy.py"), str(workdir), json.dumps({"task": task})]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300).returncode


def outcome(workdir):
    """Return what a run leaves: the newest checkpoint as read by Orbax alone, the next ids, figures without timing."""
    manager = ocp.CheckpointManager(Path(workdir) / "checkpoints")
    step = manager.latest_step()
    items = {name: ocp.args.StandardRestore() for name in ("params", "codebook", "train")}
    found = manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
    manager.close()
    iterator = toy.batches(8, seed=3)
    iterator.set_state(found["data"])
    figures = [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(workdir)]
    return step, {name: jax.device_get(found[name]) for name in items}, next(iterator)["example_ids"], figures


def assert_same_outcome(found, expected):
    assert found[0] == expected[0]
    chex.assert_trees_all_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    assert found[3] == expected[3]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Train without a break; keep the workdir, the returned figures and how often the loss was traced."""
    workdir, traces = tmp_path_factory.mktemp("unbroken"), []
    returned = loop.train(toy.make_task(on_trace=lambda: traces.append(None)), toy.config(), workdir)
    return workdir, returned, traces


def test_step_is_compiled_once(unbroken):
    _, _, traces = unbroken
    assert len(traces) == 1


def test_figures_of_a_run(unbroken):
    workdir, returned, _ = unbroken
    lines = read_metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 20))
    config = toy.config()
    rates = optim.learning_rate(
        np.arange(19), peak_lr=config.optim.peak_lr, min_lr=config.optim.min_lr, warmup_steps=3, num_steps=19
    )
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)
    iterator = toy.batches(8, seed=3)
    assert [line["ids"] for line in lines] == [next(iterator)["example_ids"].sum() for _ in range(19)]
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [7, 14, 19]
    assert {line["eval/examples"] for line in lines if "eval/examples" in line} == {13.0}
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait_share"] <= 1 for line in lines)
    assert lines[-1].items() - returned.items() <= {("step", 19), ("images_per_second", lines[-1]["images_per_second"])}
    assert returned["steps"] == 19 and returned["seconds"] > 0 and returned["images_per_second"] > 0
    step, trees, next_ids, _ = outcome(workdir)
    assert step == trees["train"]["step"] == 19
    np.testing.assert_array_equal(next_ids, next(iterator)["example_ids"])


def test_the_first_batch_starts_the_codebook_and_is_trained_on(tmp_path):
    loop.train(
        toy.make_task(evaluation=False), toy.config(**{"run.duration": "1 steps", "optim.warmup": "0 steps"}), tmp_path
    )
    _, trees, _, lines = outcome(tmp_path)
    first = next(toy.batches(8, seed=3))
    started = first["images"][:5] + np.asarray(jax.random.uniform(rng.step_key(3, "start_codebook")))
    expected = 0.9 * started + 0.1 * first["images"][:5]
    np.testing.assert_allclose(trees["codebook"]["quantizer"]["codebook"], expected, rtol=1e-6, atol=1e-6)
    assert lines[0]["ids"] == first["example_ids"].sum()


def test_finished_run_returns_its_figures_without_training(unbroken):
    workdir, returned, _ = unbroken
    before = outcome(workdir)
    again = loop.train(toy.make_task(stop_at=0), toy.config(), workdir)
    assert again["steps"] == 19 and again["loss"] == returned["loss"]
    assert again["eval/accuracy"] == returned["eval/accuracy"]
    assert_same_outcome(outcome(workdir), before)


def test_run_continued_in_a_fresh_process_equals_the_unbroken_one(unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        loop.train(toy.make_task(stop_at=13), toy.config(), tmp_path)
    assert outcome(tmp_path)[0] == 10
    assert train_elsewhere(tmp_path) == 0
    assert_same_outcome(outcome(tmp_path), outcome(unbroken[0]))


def test_run_killed_at_a_random_step_and_continued_equals_the_unbroken_one(unbroken, tmp_path):
    killed_at = random.SystemRandom().randrange(1, 19)
    assert train_elsewhere(tmp_path, stop_at=killed_at, kill=True) == -9
    loop.train(toy.make_task(), toy.config(), tmp_path)
    try:
        assert_same_outcome(outcome(tmp_path), outcome(unbroken[0]))
    except AssertionError as error:
        raise AssertionError(f"killed when batch {killed_at} was drawn") from error


def test_too_many_bad_steps_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(tmp_path):
    task = toy.make_task(nan_steps=(2, 6, 7, 8))
    with pytest.raises(UserError, match="3 steps in a row, up to step 9") as caught:
        loop.train(task, toy.config(), tmp_path)
    assert "peak_lr" in caught.value.instead
    step, trees, _, lines = outcome(tmp_path)
    assert step == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 2, 3]
    assert lines[2]["loss"] is None
