"""Metrics and stop rules: unreadable records are listed and counted, too many stop the run; waiting for data."""

import concurrent.futures
import json
import types

import numpy as np
import pytest
import training_toy as toy

from beitv2_jax.data.bad_records import read_bad_records, refuse_too_many
from beitv2_jax.errors import UserError
from beitv2_jax.training import loop, metric_log
from beitv2_jax.training.stop_rules import StopRules
from beitv2_jax.training.writer import read_metrics

UNREADABLE = (1, 9, 17, 25, 33, 41)


def unreadable_rows(count=19):
    """Return how many rows of each batch are unreadable."""
    iterator = toy.batches(8, seed=3, unreadable=UNREADABLE)
    rows = [int((next(iterator)["weight"] == 0).sum()) for _ in range(count)]
    iterator.close()
    return rows


def limit(step, share):
    return share * max(8 * step, toy.NUM_EXAMPLES)


def test_unreadable_records_are_counted_and_listed_once(tmp_path):
    config = toy.config(**{"data.max_bad_fraction": 0.2})
    loop.train(toy.make_task(unreadable=UNREADABLE), config, tmp_path)
    assert [line["unreadable"] for line in read_metrics(tmp_path)] == unreadable_rows()
    records = read_bad_records(tmp_path)
    assert {record["example_id"] for record in records if record["split"] == "train"} == set(UNREADABLE)
    assert len(records) == len(UNREADABLE) + 1
    assert {"split": "train", "example_id": 9, "where": "toy 9", "cause": "it is corrupt"} in records
    # the evaluation has one of its own, which is listed and left out of its metrics
    expected = {"split": "validation", "example_id": 5, "where": "toy 5", "cause": "it was corrupt in the evaluation"}
    assert [record for record in records if record["split"] == "validation"] == [expected]
    assert {line["eval/examples"] for line in read_metrics(tmp_path) if "eval/examples" in line} == {12.0}


@pytest.mark.parametrize("interrupted_at", [None, 13])
def test_too_many_unreadable_records_stop_the_run_at_the_same_step_after_a_resume(tmp_path, interrupted_at):
    rows, share = unreadable_rows(), 0.1
    over = [step for step in range(1, 20) if sum(rows[:step]) > limit(step, share)]
    assert over[0] > 13  # not in the first epoch, and after the checkpoint from which the run goes on
    config = toy.config(**{"data.max_bad_fraction": share})
    if interrupted_at:
        with pytest.raises(KeyboardInterrupt):
            loop.train(toy.make_task(unreadable=UNREADABLE, stop_at=interrupted_at), config, tmp_path)
    with pytest.raises(UserError) as caught:
        loop.train(toy.make_task(unreadable=UNREADABLE), config, tmp_path)
    count, seen = sum(rows[: over[0]]), 8 * over[0]
    assert f"{count} of {seen} images up to step {over[0]} are unreadable" in caught.value.happened
    assert "data.max_bad_fraction allows 10.000%" in caught.value.happened
    assert str(tmp_path / "bad_records.jsonl") in caught.value.instead
    listed = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    found = [record["example_id"] for record in listed if record["split"] == "train"]
    assert sorted(found) == sorted(set(found)) and set(found) <= set(UNREADABLE)


def test_an_evaluation_with_too_many_unreadable_records_stops_the_run_after_its_save(tmp_path):
    config = toy.config(**{"data.max_bad_fraction": 0.07, "run.duration": "5 steps", "run.checkpoint_every": "5 steps"})
    with pytest.raises(UserError, match="1 of 13 images of split validation are unreadable") as caught:
        loop.train(toy.make_task(unreadable=(100,)), config, tmp_path)
    assert str(tmp_path / "bad_records.jsonl") in caught.value.instead
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    allowed = float(caught.value.instead.rstrip(".").rpartition("max_bad_fraction=")[2])
    assert allowed == 0.077  # 1 / 13, rounded up
    # all five steps are done: what was missing is the evaluation
    config.data.max_bad_fraction = allowed
    metrics = loop.train(toy.make_task(unreadable=(100,), stop_at=1), config, tmp_path)
    assert metrics["eval/examples"] == 12 and 0 <= metrics["eval/accuracy"] <= 1
    assert metrics["loss"] == read_metrics(tmp_path)[-1]["loss"]
    assert loop.train(toy.make_task(unreadable=(100,)), config, tmp_path)["eval/accuracy"] == metrics["eval/accuracy"]


def test_a_pass_over_nothing_readable_is_refused_whatever_is_allowed():
    refuse_too_many(3, 8, 0.4, of="of split test", listed="listed in x")
    with pytest.raises(UserError, match="8 of 8 images of split test") as caught:
        refuse_too_many(8, 8, 1.0, of="of split test", listed="listed in x")
    assert "max_bad_fraction" not in caught.value.instead


def test_one_unreadable_record_in_a_thousand_is_allowed_from_the_first_step(tmp_path):
    """The fraction is one of the data set at first: a bad record in the first batch is no reason to stop."""
    config = toy.config(**{"run.duration": "1 step", "optim.warmup": "0 steps", "data.max_bad_fraction": 2 / 61})
    first = next(toy.batches(8, seed=3))["example_ids"]
    loop.train(toy.make_task(unreadable=first[:2].tolist(), evaluation=False), config, tmp_path / "two")
    with pytest.raises(UserError, match="3 of 61 images up to step 1 "):
        loop.train(toy.make_task(unreadable=first[:3].tolist(), evaluation=False), config, tmp_path / "three")


@pytest.mark.parametrize(
    ("ended", "wait", "starved"),
    [
        (10.0, (4.0, 9.0), 0.0),  # the batch came while the step ran
        (10.0, (4.0, 13.0), 3.0),  # the step ended first
        (10.0, (11.0, 13.0), 2.0),  # asked for when the devices were idle already: by something else than data
        (10.0, (0.0, 0.0), 0.0),  # no further batch
    ],
)
def test_waiting_counts_from_the_end_of_the_step_on(ended, wait, starved):
    step = metric_log._Step(1, {}, np.arange(3), concurrent.futures.Future(), wait)
    step.ended.set_result(ended)
    assert step.starved() == starved


def test_a_wait_is_part_of_the_step_that_waited(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=9.0)
    monkeypatch.setattr(metric_log, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    schedule = types.SimpleNamespace(logs=lambda step: True, batch_size=8, num_examples=61)
    lines = {}
    writer = types.SimpleNamespace(write=lambda step, metrics: lines.update({step: metrics}))
    progress = types.SimpleNamespace(advance=lambda: None, show=lambda metrics: None)
    rules = StopRules(schedule, max_nonfinite_steps=0, max_bad_fraction=1.0, workdir=tmp_path)
    log = metric_log.MetricLog(schedule, writer, progress, rules)
    # (end of the step, when the batch after it is there): the second step starts 3 s after the first has ended
    for step, (ended, ready) in enumerate([(10.0, 13.0), (14.0, 14.0), (19.0, 21.0)], start=1):
        clock.now = ended
        metrics = {"loss": 0.5, "grad_norm": 1.0, "nonfinite_steps": 0, "unreadable": 0}
        log.add(step, {name: np.asarray(value) for name, value in metrics.items()}, np.arange(8))
        log._running[-1].ended.result()
        with log.waiting_for_data():
            clock.now = ready
        log.follow(leave=1)
    log.read()
    log.close()
    assert [line["data_wait_share"] for line in lines.values()] == [0.0, 3 / 4, 0.0]
    assert [line["images_per_second"] for line in lines.values()] == [8 / 1, 8 / 4, 8 / 5]
