"""What a stage does at its next start in a workdir: a changed config, another run there, a preempted run."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from paths import ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import read_run
from beitv2_jax.errors import Preempted, UserError
from beitv2_jax.runners import stages
from beitv2_jax.runtime.workdir_lock import held


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A workdir in which a run was interrupted, its config, and the list of configs that runs are started with."""
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    seen = []

    def run(task, config, workdir):
        seen.append(config)
        raise Interrupted

    monkeypatch.setitem(stages.RUNNERS, "finetune", run)
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(tmp_path))
    return tmp_path, config, seen


def stored(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_harmless_changes_pass_and_are_named_in_one_line(started, caplog):
    workdir, config, seen = started
    caplog.set_level(logging.INFO, logger="absl")
    config.data.num_threads, config.run.log_every, config.run.checkpoint_every = 3, "7 steps", "5 steps"
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir))
    (line,) = [message for message in caplog.messages if "config changed" in message]
    assert "the result does not" in line
    for key, value in (
        ("data.num_threads", "3"),
        ("run.log_every", "'7 steps'"),
        ("run.checkpoint_every", "'5 steps'"),
    ):
        assert f"{key}: " in line and f" -> {value}" in line
    assert len(seen) == 2 and stored(workdir)["data"]["num_threads"] == 3


def test_changes_of_the_result_pass_only_when_allowed(started, caplog):
    workdir, config, seen = started
    caplog.set_level(logging.INFO, logger="absl")
    config.optim.peak_lr, config.data.num_threads = 0.123, 3
    with pytest.raises(UserError, match=r"another config \(optim.peak_lr: .* -> 0.123\)") as caught:
        stages.run_stage(config, str(workdir))
    assert "--allow_config_change" in caught.value.instead
    assert len(seen) == 1 and stored(workdir)["optim"]["peak_lr"] != 0.123 and "config changed" not in caplog.text
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir), allow_config_change=True)
    changing, harmless = [message for message in caplog.messages if "config changed" in message]
    assert "and with it the result: optim.peak_lr: " in changing and "num_threads" not in changing
    assert "the result does not: data.num_threads" in harmless
    assert len(seen) == 2 and stored(workdir)["optim"]["peak_lr"] == 0.123


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"{", b"null", b"[1]"])
def test_what_a_power_cut_leaves_of_the_config_and_the_summary(started, content):
    workdir, config, _ = started
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config.json is damaged") as caught:
        stages.run_stage(config, str(workdir))
    assert f"Delete {workdir / 'config.json'}" in caught.value.instead
    (workdir / "config.json").unlink()
    # a summary that says nothing is that of no finished stage
    (workdir / "summary.json").write_bytes(content)
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir))
    assert stored(workdir)["stage"] == "finetune"


def test_a_pipeline_hands_the_permission_on(started):
    workdir, _, seen = started
    pipeline = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke").unlock()
    stage = pipeline.stages.teacher
    os.makedirs(workdir / "p" / "teacher")
    (workdir / "p" / "teacher" / "config.json").write_text(config_lib.to_json(stage))
    stage.optim.peak_lr = 0.123
    with pytest.raises(UserError, match=r"optim\.peak_lr"):
        stages.run_stage(pipeline, str(workdir / "p"))
    with pytest.raises(Interrupted):
        stages.run_stage(pipeline, str(workdir / "p"), allow_config_change=True)
    assert seen[-1].optim.peak_lr == 0.123


def test_a_workdir_in_use_is_refused_and_let_go_afterwards(started):
    workdir, config, seen = started
    before = {path.name: path.read_bytes() for path in workdir.iterdir()}
    with held(workdir), pytest.raises(UserError, match=f"in use by another run: process {os.getpid()} on "):
        stages.run_stage(config, str(workdir))
    assert len(seen) == 1
    assert {path.name: path.read_bytes() for path in workdir.iterdir()} == before
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir))


def test_caches_are_written_by_many_at_once(tmp_path, monkeypatch):
    class Anything:
        def build(self, config):
            return None

    config = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke").stages.extract
    monkeypatch.setattr(stages.importlib, "import_module", lambda name: Anything())
    monkeypatch.setitem(stages.RUNNERS, "extract", lambda task, config, workdir: {"views_per_example": 1})
    with held(tmp_path):
        assert stages.run_stage(config, str(tmp_path))["figures"] == {"views_per_example": 1}


def test_a_pipeline_stops_at_a_stage_that_was_told_to_end(tmp_path, monkeypatch):
    def told(task, config, workdir):
        raise Preempted("saved")

    monkeypatch.setitem(stages.RUNNERS, "finetune", told)
    with pytest.raises(Preempted):
        stages.run_stage(config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke"), str(tmp_path))
    assert stages.read_summary(str(tmp_path / "teacher")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_the_program_told_to_end_saves_and_exits_with_75(tmp_path):
    """The whole way, in a real process: `main`, the stage, the loop; what it continues with is tested with the loop."""
    command = [sys.executable, "-m", "beitv2_jax.main", f"--config={ROOT}/configs/teacher.py:smoke"]
    command += [f"--workdir={tmp_path}", "--compilation_cache=", "--config.run.duration=100000 steps"]
    command += [f"--config.run.{key}=0 steps" for key in ("eval_every", "checkpoint_every", "keep_every")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 75, text
    (step,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert text.rstrip().endswith(f"was preempted: checkpoint saved at step {step}; rerun the same command to resume.")
    assert "Traceback" not in text and f"preempted, saving after step {step}" in text
    assert not (tmp_path / "summary.json").exists()


def test_runs_that_fail_exit_with_2_and_keep_the_last_good_checkpoint(tmp_path):
    """Too many steps that are not finite, and a checkpoint that cannot be written: the whole way, in real processes."""
    command = [sys.executable, "-m", "beitv2_jax.main", f"--config={ROOT}/configs/teacher.py:smoke"]
    command += ["--compilation_cache=", "--config.run.eval_every=0 steps", "--config.run.duration=9 steps"]
    small = ["depth=1", "width=16", "num_heads=2", "mlp_dim=16"]
    command += [f"--config.model.{size}" for size in small] + ["--config.views.image_size=32"]
    cases = {
        "nonfinite": [
            "--config.optim.peak_lr=1e38",
            "--config.optim.clip_norm=0.0",
            "--config.run.max_nonfinite_steps=3",
        ],
        "full": ["--config.run.on_failed_save=stop"],
    }
    processes = {}
    for name, flags in cases.items():
        full = [*command, *flags, f"--workdir={tmp_path / name}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
        processes[name] = subprocess.Popen(full, **pipes)
    resource.prlimit(processes["full"].pid, resource.RLIMIT_FSIZE, (3000, 3000))
    texts = {name: process.communicate(timeout=200)[1] for name, process in processes.items()}
    assert {name: process.returncode for name, process in processes.items()} == {"nonfinite": 2, "full": 2}, texts
    assert re.search(r"Error: 3 steps in a row, up to step \d, .* not finite", texts["nonfinite"])
    params = read_run(str(tmp_path / "nonfinite")).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)) and "changed nothing" in texts["nonfinite"]
    folder = tmp_path / "full" / "checkpoints"
    text = f"Error: The checkpoint of step 2 could not be written to {folder}: File too large"
    assert text in texts["full"] and "there is no valid one yet.\n  " in texts["full"]
    assert list(folder.iterdir()) == [] and not (tmp_path / "full" / "summary.json").exists()
