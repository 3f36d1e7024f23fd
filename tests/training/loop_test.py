"""The loop: exact resume, one compilation, metrics, evaluation, the first batch, and the stop at bad steps."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import training_toy as toy
from paths import HELPERS, ROOT
from xla_flags import xla_flags

from beitv2_jax import rng
from beitv2_jax.errors import Preempted, UserError
from beitv2_jax.training import loop, optim
from beitv2_jax.training.writer import read_metrics

TIMING = ("images_per_second", "data_wait_share")


def start_elsewhere(workdir, options, **environment):
    """Start the toy in a fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | environment
    command = [sys.executable, str(HELPERS / "training_toy.py"), str(workdir), json.dumps(options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_elsewhere(workdir, **task):
    """Run the toy in a fresh process and return its exit status; negative is the signal that killed it."""
    process = start_elsewhere(workdir, {"task": task})
    process.communicate(timeout=300)
    return process.returncode


def outcome(workdir):
    """Return what a run leaves: the newest checkpoint as read by Orbax alone, the next ids, metrics without timing."""
    manager = ocp.CheckpointManager(Path(workdir) / "checkpoints")
    step = manager.latest_step()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # where the devices that saved are not there
    items = {
        name: ocp.args.StandardRestore(fallback_sharding=here)
        for name in ("params", "model_state", "averaged_params", "train")
    }
    found = manager.restore(step, args=ocp.args.Composite(**items, data=ocp.args.JsonRestore()))
    manager.close()
    iterator = toy.batches(8, seed=3)
    iterator.set_state(found["data"])
    metrics = [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(workdir)]
    return step, {name: jax.device_get(found[name]) for name in items}, next(iterator)["example_ids"], metrics


def assert_same_outcome(found, expected):
    assert found[0] == expected[0]
    chex.assert_trees_all_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
    assert found[3] == expected[3]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Train without a break; keep the workdir, the returned metrics and how often the loss was traced."""
    workdir, traces = tmp_path_factory.mktemp("unbroken"), []
    returned = loop.train(toy.make_task(on_trace=lambda: traces.append(None)), toy.config(), workdir)
    return workdir, returned, traces


def test_step_is_compiled_once(unbroken):
    _, _, traces = unbroken
    assert len(traces) == 1


def test_metrics_of_a_run(unbroken):
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
    np.testing.assert_allclose(trees["model_state"]["quantizer"]["codebook"], expected, rtol=1e-6, atol=1e-6)
    assert lines[0]["ids"] == first["example_ids"].sum()


@pytest.mark.parametrize("stopped_after", [None, 3])
def test_the_codebook_starts_from_more_batches_and_once_more_later(tmp_path, stopped_after):
    """Stopped where it starts again, the run goes on as the unbroken one; training sees every batch in its turn."""
    config = toy.config(**{"run.duration": "5 steps", "optim.warmup": "0 steps"})
    starts = {"codebook_starts": (0, 3), "start_batches": 2, "evaluation": False}
    if stopped_after:
        with pytest.raises(Preempted):
            stopping = {"stop_at": stopped_after - 1, "signals": [signal.SIGTERM]}
            loop.train(toy.make_task(**starts, **stopping), config, tmp_path)
    loop.train(toy.make_task(**starts), config, tmp_path)
    _, trees, _, lines = outcome(tmp_path)
    iterator = toy.batches(8, seed=3)
    drawn = [next(iterator) for _ in range(6)]
    assert [line["ids"] for line in lines] == [batch["example_ids"].sum() for batch in drawn[:5]]
    images = [batch["images"][:5] for batch in drawn]
    expected = (images[3] + images[4]) / 2 + np.asarray(jax.random.uniform(rng.step_key(3, "start_codebook", 3)))
    for batch in images[3:5]:
        expected = 0.9 * expected + 0.1 * batch
    np.testing.assert_allclose(trees["model_state"]["quantizer"]["codebook"], expected, rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_evaluated_beside_those_of_the_last_step(unbroken):
    workdir, returned, _ = unbroken
    raw, average = (
        {line["step"]: line[f"{prefix}/accuracy"] for line in read_metrics(workdir) if f"{prefix}/accuracy" in line}
        for prefix in ("eval", "eval_average")
    )
    assert list(raw) == list(average) == [7, 14, 19] and returned["eval_average/accuracy"] == average[19]
    _, trees, _, _ = outcome(workdir)
    task = toy.make_task()
    for name, found in (("params", raw), ("averaged_params", average)):
        sums = [task.evaluate(trees[name], trees["model_state"], task.frozen, rows) for rows in task.eval_batches(0, 1)]
        added = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *sums)
        np.testing.assert_allclose(task.summarize(added)["accuracy"], found[19], rtol=1e-5)
    assert np.abs(trees["params"]["fc1"]["kernel"] - trees["averaged_params"]["fc1"]["kernel"]).max() > 1e-4


def test_finished_run_returns_its_metrics_without_training(unbroken):
    workdir, returned, _ = unbroken
    before = outcome(workdir)
    again = loop.train(toy.make_task(stop_at=0), toy.config(), workdir)
    assert again["steps"] == 19 and again["loss"] == returned["loss"]
    assert again["eval/accuracy"] == returned["eval/accuracy"]
    assert_same_outcome(outcome(workdir), before)


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"run.batch_size": 4}, "19 steps of 4 examples with 3"),
        ({"run.duration": "7 steps"}, "7 steps of 8 examples with 3"),
        ({"run.duration": "5 steps"}, "5 steps of 8 examples with 3"),
        ({"run.duration": "190 steps"}, "190 steps of 8 examples with 3"),
        ({"optim.warmup": "2 steps"}, "19 steps of 8 examples with 2"),
    ],
)
def test_a_checkpoint_goes_on_under_its_own_schedule_only(unbroken, changes, described):
    """Also where the checkpoint stands at the end of the shorter schedule: the run has not got there."""
    workdir, _, _ = unbroken
    before = outcome(workdir)
    with pytest.raises(UserError, match=rf"19 steps of 8 examples with 3 .*, and this run has {described} steps of"):
        loop.train(toy.make_task(stop_at=0), toy.config(**changes), workdir)
    with pytest.raises(UserError, match="counted in steps"):
        loop.check_checkpoint(toy.make_task(), toy.config(**changes), workdir)
    assert_same_outcome(outcome(workdir), before)


def test_a_schedule_in_another_unit_is_the_same_schedule(unbroken):
    workdir, returned, _ = unbroken
    again = loop.train(toy.make_task(stop_at=0), toy.config(**{"run.duration": "152 examples"}), workdir)
    assert again["steps"] == returned["steps"] == 19


def test_run_continued_in_a_fresh_process_equals_the_unbroken_one(unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        loop.train(toy.make_task(stop_at=13), toy.config(), tmp_path)
    assert outcome(tmp_path)[0] == 10
    assert train_elsewhere(tmp_path) == 0
    assert_same_outcome(outcome(tmp_path), outcome(unbroken[0]))


def test_a_run_told_to_end_saves_and_goes_on_as_the_unbroken_one(unbroken, tmp_path):
    """Signalled while step 18 runs, it does one more, the last of all. Ctrl-C reaches the launcher too, which adds a
    SIGTERM of its own."""
    with pytest.raises(Preempted, match="at step 19"):
        loop.train(toy.make_task(stop_at=18, signals=[signal.SIGINT, signal.SIGTERM]), toy.config(), tmp_path)
    assert outcome(tmp_path)[0] == 19
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 20))
    loop.train(toy.make_task(), toy.config(), tmp_path)
    assert_same_outcome(outcome(tmp_path), outcome(unbroken[0]))


@pytest.mark.long
@pytest.mark.parametrize(("signalled_at", "signals"), [(8, [signal.SIGTERM]), (18, [signal.SIGINT, signal.SIGTERM])])
def test_told_to_end_in_processes_of_its_own(unbroken, tmp_path, signalled_at, signals):
    assert train_elsewhere(tmp_path, stop_at=signalled_at, signals=signals) == Preempted.EXIT_CODE == 75
    assert outcome(tmp_path)[0] == signalled_at + 1
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, signalled_at + 2))
    assert train_elsewhere(tmp_path) == 0
    assert_same_outcome(outcome(tmp_path), outcome(unbroken[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_told_twice_it_ends_at_once(tmp_path, number):
    assert train_elsewhere(tmp_path, stop_at=8, signals=[number] * 2) == -number
    assert not (tmp_path / "checkpoints" / "9").exists()


def test_the_loop_gives_the_signal_back(tmp_path):
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Preempted, match="at step 3"):
        loop.train(toy.make_task(stop_at=2, signals=[signal.SIGTERM]), toy.config(), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former


@pytest.mark.long
def test_two_processes_save_at_the_same_step_when_one_is_told_to_end(unbroken, tmp_path):
    one_device = {"XLA_FLAGS": xla_flags(1)}

    def train_together(*, saves, signalled=None):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{server.getsockname()[1]}"
        running = []
        for index in (0, 1):
            # jax looks for the signal once a second
            task = {"pause": 0 if signalled is None else 0.2}
            task |= {"stop_at": 4, "signals": [signal.SIGINT]} if index == signalled else {}
            place = {"coordinator_address": address, "num_processes": 2, "process_id": index}
            options = {"task": task, "place": place, "config": {"run.checkpoint_every": f"{saves} steps"}}
            running.append(start_elsewhere(tmp_path, options, **one_device))
        texts = [process.communicate(timeout=120)[0] for process in running]
        return [process.returncode for process in running], texts

    codes, texts = train_together(saves=3, signalled=1)
    assert codes == [75, 75], texts
    step = outcome(tmp_path)[0]
    assert 5 <= step < 19
    assert all(f"saved at step {step}" in text for text in texts)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, step + 1))
    # the newest checkpoint corrupt, both agree on the one before
    (tmp_path / "checkpoints" / str(step) / "train" / "_METADATA").unlink()
    assert train_together(saves=0)[0] == [0, 0]
    assert (tmp_path / "checkpoints" / f"{step}.corrupt").is_dir()
    found, expected = outcome(tmp_path), outcome(unbroken[0])
    assert [line["ids"] for line in found[3]] == [line["ids"] for line in expected[3]]
    chex.assert_trees_all_close(found[1], expected[1], atol=1e-5)


def test_too_many_bad_steps_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(tmp_path, caplog):
    task = toy.make_task(nan_steps=(2, 6, 7, 8))
    caplog.set_level(logging.WARNING)
    with pytest.raises(UserError, match="3 steps in a row, up to step 9") as caught:
        loop.train(task, toy.config(), tmp_path)
    assert "peak_lr" in caught.value.instead
    step, trees, _, lines = outcome(tmp_path)
    assert step == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))
    assert [line["nonfinite_steps"] for line in lines] == [0, 0, 1, 1, 1, 1, 2, 3]
    assert lines[2]["loss"] is None
    logged = [record.args for record in caplog.records if "changed nothing" in record.msg]
    assert [step for step, *_ in logged] == [3, 7, 8, 9]
    iterator = toy.batches(8, seed=3)
    ids = {step: " ".join(map(str, next(iterator)["example_ids"])) for step in range(1, 10)}
    assert [listed for *_, listed in logged] == [ids[step] for step in (3, 7, 8, 9)]
