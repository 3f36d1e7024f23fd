"""Runs, weights and data in a bucket, against a server that stands for Cloud Storage."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import training_toy as toy
from paths import HELPERS, ROOT
from safetensors.numpy import save

from beitv2_jax import config as config_lib
from beitv2_jax.convert.files import read_weights
from beitv2_jax.convert.runs import read_run
from beitv2_jax.data import embedded
from beitv2_jax.data.bad_records import BadRecords, read_bad_records
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages
from beitv2_jax.runtime import buckets, workdir_lock
from beitv2_jax.training import loop, optim, sharding, state
from beitv2_jax.training.checkpoint import Checkpointer
from beitv2_jax.training.writer import MetricWriter, read_metrics

RUN = {"run.duration": "7 steps", "run.checkpoint_every": "2 steps", "run.eval_every": "3 steps"}


def final_state(workdir):
    config = toy.config(**RUN)
    optimizer, _ = optim.for_task(toy.make_task(), config.optim, 3, 7)
    abstract = state.abstract(toy.make_task(), optimizer, sharding.make_mesh(), seed=3, keep_average=True)
    with contextlib.closing(Checkpointer(buckets.as_path(workdir) / "checkpoints")) as checkpointer:
        return jax.device_get(checkpointer.restore(abstract))


def lines(workdir):
    timing = ("images_per_second", "data_wait_share")
    return [{key: value for key, value in line.items() if key not in timing} for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    loop.train(toy.make_task(unreadable=(3,)), toy.config(**RUN), workdir)
    return workdir


def assert_same_run(workdir, undisturbed):
    chex.assert_trees_all_equal(final_state(workdir), final_state(undisturbed))
    assert lines(workdir) == lines(undisturbed)
    assert read_bad_records(workdir) == read_bad_records(undisturbed) != []


@pytest.mark.long
def test_an_interrupted_run_in_a_bucket_ends_as_an_undisturbed_one_on_a_disk(bucket, undisturbed):
    workdir = "gs://bucket/interrupted"
    with pytest.raises(KeyboardInterrupt):
        loop.train(toy.make_task(unreadable=(3,), stop_at=5), toy.config(**RUN), workdir)
    # what a save leaves that was killed, and one that is damaged
    bucket["interrupted/checkpoints/9/params/d/0"] = b"unfinished"
    damaged = next(name for name in bucket if name.startswith("interrupted/checkpoints/4/params/ocdbt"))
    bucket[damaged] = bucket[damaged][:-1]
    loop.train(toy.make_task(unreadable=(3,)), toy.config(**RUN), workdir)
    folders = {name.split("/")[2] for name in bucket if name.startswith("interrupted/checkpoints/")}
    assert folders == {"4.corrupt", "6", "7"}
    assert sum(name.startswith("interrupted/tensorboard/") for name in bucket) == 2
    assert_same_run(workdir, undisturbed)


@pytest.mark.long
def test_a_killed_run_in_a_bucket_ends_as_an_undisturbed_one_on_a_disk(bucket, undisturbed, server):
    workdir = "gs://bucket/killed"
    environment = {**os.environ, **server.environment, "PYTHONPATH": f"{ROOT}:{HELPERS}"}
    for stop_at in (3, 5, -1):
        task = {"unreadable": [3], "stop_at": stop_at, "signals": [signal.SIGKILL]}
        command = [sys.executable, f"{HELPERS}/training_toy.py", workdir, json.dumps({"task": task, "config": RUN})]
        code = subprocess.run(command, env=environment, check=False).returncode
        assert code == (-signal.SIGKILL if stop_at > 0 else 0)
    assert_same_run(workdir, undisturbed)


def test_metrics_wait_for_a_bucket_that_cannot_be_written(bucket, server):
    writer = MetricWriter("gs://bucket/metrics")
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    assert bucket["metrics/metrics.jsonl"] == b""  # a bucket is not written at every line
    assert writer.flush() is None
    away = server.pop("bucket")
    writer.write(3, {"loss": 3.0})
    assert isinstance(writer.flush(), OSError)
    server["bucket"] = away
    writer.close()
    assert [json.loads(line)["step"] for line in bucket["metrics/metrics.jsonl"].splitlines()] == [1, 2, 3]


def test_a_save_that_fails_leaves_the_others(bucket, server, caplog):
    task, mesh = toy.make_task(), sharding.make_mesh()
    optimizer, _ = optim.for_task(task, toy.config().optim, 3, 7)
    state_ = state.create(task, optimizer, mesh, seed=3, keep_average=False)
    checkpointer = Checkpointer("gs://bucket/saves/checkpoints")
    checkpointer.save(1, state_, {"next_batch": 1}, last=True)
    away = server.pop("bucket")
    checkpointer.save(2, state_, {"next_batch": 2})
    with pytest.raises(UserError, match="the newest valid one is of step 1"):
        checkpointer.save(3, state_, {"next_batch": 3}, last=True)
    server["bucket"] = away
    checkpointer.save(4, state_, {"next_batch": 4}, last=True)
    checkpointer.close()
    assert {name.split("/")[2] for name in bucket if name.startswith("saves/checkpoints/")} == {"1", "4"}


def test_a_workdir_in_a_bucket_belongs_to_one_run(bucket, monkeypatch):
    monkeypatch.setattr(workdir_lock, "SETTLING_SECONDS", 0.0)
    monkeypatch.setattr(workdir_lock, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(workdir_lock, "RENEWAL_SECONDS", 0.05)
    workdir = "gs://bucket/locked"
    with (
        workdir_lock.held(workdir),
        pytest.raises(UserError, match=f"in use by another run: process {os.getpid()} on "),
        workdir_lock.held(workdir),
    ):
        pass
    assert "locked/lock" not in bucket
    ended = subprocess.Popen(["true"])
    ended.wait()
    for patience, machine, pid in ((60.0, workdir_lock.heartbeat.machine(), ended.pid), (0.1, "elsewhere", 1)):
        monkeypatch.setattr(workdir_lock, "PATIENCE_SECONDS", patience)
        bucket["locked/lock"] = json.dumps({"machine": machine, "pid": pid, "host": "there"}).encode()
        with workdir_lock.held(workdir):
            assert json.loads(bucket["locked/lock"])["pid"] == os.getpid()


def test_two_starts_at_the_same_moment_leave_one(bucket, monkeypatch):
    def other_writes(seconds):
        bucket["race/lock"] = json.dumps({"pid": 7, "host": "elsewhere", "token": "other"}).encode()

    monkeypatch.setattr(workdir_lock.time, "sleep", other_writes)
    with pytest.raises(UserError, match="process 7 on elsewhere"), workdir_lock.held("gs://bucket/race"):
        pass
    assert b"elsewhere" in bucket["race/lock"]


def test_the_same_record_files_are_the_same_data_set(bucket):
    folder = Path(embedded.prepare("", "tiny"))
    root, name = folder.parents[2], "/".join(folder.parts[-3:-1])
    for file in folder.iterdir():
        bucket[f"data/{file.relative_to(root)}"] = file.read_bytes()
    for spec in (f"arrayrecord:ROOT/{name}/{folder.name}/*-{{split}}*array_record*", f"tfds:{name}"):
        here, there = (
            open_source(spec.replace("ROOT", place), "test", place) for place in (str(root), "gs://bucket/data")
        )
        assert (there.name, there.split, len(there)) == (here.name, here.split, len(here))
        assert there.class_names == here.class_names
        assert there[5]["image"] == here[5]["image"] and there[5]["label"] == here[5]["label"]
        assert there[5]["where"].startswith("gs://bucket/data/")


def test_weights_are_copied_to_this_machine(bucket):
    weights = {"a.kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    bucket["weights/net.safetensors"] = bucket["weights/folder/model.safetensors"] = save(weights)
    bucket["weights/folder/config.json"] = b'{"hidden_size": 3}'
    for path in ("gs://bucket/weights/net.safetensors", "gs://bucket/weights/folder"):
        np.testing.assert_array_equal(read_weights(path).arrays["a.kernel"], weights["a.kernel"])
    with pytest.raises(UserError, match="no weights file at gs://bucket/weights/none"):
        read_weights("gs://bucket/weights/none.safetensors")


def test_a_stage_in_a_bucket_is_found_and_read(bucket, monkeypatch):
    def train(task, config, workdir):
        return loop.train(toy.make_task(evaluation=False), toy.config(**{"run.duration": "4 steps"}), workdir)

    monkeypatch.setitem(stages.RUNNERS, "finetune", train)
    monkeypatch.setattr(workdir_lock, "SETTLING_SECONDS", 0.0)
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    workdir = "gs://bucket/runs/teacher"
    summary = stages.run_stage(config, workdir)
    assert {"config.json", "inputs.json", "metrics.jsonl", "summary.json"} <= {
        name.removeprefix("runs/teacher/") for name in bucket
    }
    assert stages.run_stage(config, workdir) == summary
    run = read_run(workdir)
    assert (run.name, run.config["stage"]) == ("teacher@4", "finetune")
    config.seed += 1
    with pytest.raises(UserError, match="a finished run of another config"):
        stages.run_stage(config, workdir)


def test_what_cannot_be_in_a_bucket_is_refused(bucket):
    extract = config_lib.load(f"{ROOT / 'configs/extract.py'}:smoke").unlock()
    extract.teacher.weights = "FILE"
    before = dict(bucket)
    with pytest.raises(UserError, match="only mounted file systems are read and written there"):
        stages.run_stage(extract, "gs://bucket/targets")
    with pytest.raises(UserError, match="gs://elsewhere/run cannot be written: NotFound"):
        stages.run_stage(config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke"), "gs://elsewhere/run")
    with pytest.raises(UserError, match="has the character"):
        stages.run_stage(config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke"), "gs://bucket/a[b]")
    assert bucket == before


def test_a_bucket_that_may_not_be_used_is_told(server):
    with pytest.raises(UserError, match="cannot be written: Forbidden"):
        buckets.refuse_unwritable("gs://forbidden/run")
    with pytest.raises(OSError, match="Forbidden") as caught:
        buckets.as_path("gs://forbidden/run/config.json").exists()
    assert "Storage Object User" in buckets.unusable(caught.value).instead
    assert buckets.unusable(OSError(2, "no such file")) is None


def test_without_gcsfs_it_is_asked_for(monkeypatch):
    buckets._prepare_gcsfs.cache_clear()
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        buckets.as_path("gs://bucket/run")
    assert 'pip install "beitv2_jax[gcs]"' in caught.value.instead


@pytest.mark.parametrize(
    "path, expected", [("gs://b/x/../y//z/", "gs://b/y/z"), ("gs://b", "gs://b"), ("/a/../b", "/b")]
)
def test_absolute_paths(path, expected):
    assert buckets.absolute(path) == expected


def test_left_out_records_are_listed_once(bucket):
    batch = {"faults": np.array(["a.jpg: cut", ""]), "example_ids": np.array([4, 5])}
    for _ in range(2):
        records = BadRecords("gs://bucket/bad")
        records.note(batch, "train")
    records.note({"faults": np.array(["b.jpg: cut"]), "example_ids": np.array([9])}, "train")
    assert [json.loads(line)["example_id"] for line in bucket["bad/bad_records.jsonl"].splitlines()] == [4, 9]
