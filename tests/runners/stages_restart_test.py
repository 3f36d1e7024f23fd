"""What a stage does at its next start in a workdir: a changed config, another run there, a preempted run."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from paths import ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import read_run
from beitv2_jax.data.target_cache.leases import Leases
from beitv2_jax.errors import Preempted, UserError
from beitv2_jax.runners import stages
from beitv2_jax.runtime.workdir_lock import held


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A workdir in which a run was interrupted after a checkpoint, its config, and the configs that runs got."""
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    seen = []

    def run(task, config, workdir):
        seen.append(config)
        os.makedirs(os.path.join(workdir, "checkpoints", "2"), exist_ok=True)
        raise Interrupted

    monkeypatch.setitem(stages.RUNNERS, "finetune", run)
    monkeypatch.setattr(stages.loop, "check_checkpoint", lambda task, config, workdir: None)  # it is an empty folder
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


def test_a_change_that_no_checkpoint_bears_is_not_advised(started):
    workdir, config, _ = started
    config.run.batch_size *= 2
    with pytest.raises(UserError, match=r"run\.batch_size: ") as caught:
        stages.run_stage(config, str(workdir))
    assert caught.value.instead.endswith("or the former values.")


def test_a_key_that_an_older_config_lacks_has_its_default(started, caplog):
    workdir, config, seen = started
    former = stored(workdir)
    del former["optim"]["spike_factor"], former["data"]["num_workers"]
    (workdir / "config.json").write_text(json.dumps(former))
    defaults = config_lib.load(str(ROOT / "configs/teacher.py"))
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir), defaults=defaults)
    assert "config changed" not in caplog.text and stored(workdir)["optim"]["spike_factor"] == 0.0
    (workdir / "config.json").write_text(json.dumps(former))
    config.optim.spike_factor = 10.0
    with pytest.raises(UserError, match=r"another config \(optim.spike_factor: 0.0 -> 10.0\)"):
        stages.run_stage(config, str(workdir), defaults=defaults)
    (workdir / "summary.json").write_text(json.dumps({"stage": "finetune", "metrics": {"accuracy": 0.5}}))
    config.optim.spike_factor = 0.0
    assert stages.run_stage(config, str(workdir), defaults=defaults)["metrics"] == {"accuracy": 0.5}
    assert len(seen) == 2


def test_a_run_without_results_blocks_no_other_config_and_no_other_stage(started):
    workdir, config, seen = started
    (workdir / "checkpoints" / "2").rename(workdir / "checkpoints" / "2.orbax-checkpoint-tmp")
    (workdir / "config.json").write_text(json.dumps({**stored(workdir), "stage": "mim", "seed": 7}))
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir))
    assert len(seen) == 2 and stored(workdir)["seed"] == config.seed


@pytest.mark.parametrize(
    ("path", "result"),
    [
        ("config.json", False),
        ("metrics.jsonl", False),
        ("checkpoints/12.orbax-checkpoint-tmp/params/x", False),
        ("views/.writing/plan.json", False),
        ("views/.writing/00000.v0.abc.tmp", False),
        ("features/pretrained_train.0/cls.npy.tmp", False),
        ("summary.json", True),
        ("checkpoints/12/params/x", True),
        ("views/.writing/00000.done", True),
        ("centre/manifest.json", True),
        ("features/pretrained_train.0/part.0-of-1.batches_of_8.0-3.npz", True),
        ("features/pretrained_train.0/example_ids.npy", True),
    ],
)
def test_results_are_what_a_later_start_goes_on_from(tmp_path, path, result):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    assert stages.holds_results(str(tmp_path)) == result


def test_the_writer_of_a_first_shard_blocks_others_as_long_as_it_lives(tmp_path):
    """Three leases: of this process, of one of this machine that has ended, and of one of another machine."""
    work = tmp_path / "views" / ".writing"
    work.mkdir(parents=True)
    (work / "plan.json").write_text("{}")
    with Leases(work) as leases:
        assert leases.take("0") and stages.holds_results(str(tmp_path))
        alive = json.loads((work / "0.lease").read_text())
    assert not stages.holds_results(str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    (work / "0.lease").write_text(json.dumps({**alive, "pid": ended.pid}))
    assert not stages.holds_results(str(tmp_path)) and not (work / "0.lease").exists()
    foreign = {**alive, "machine": "elsewhere"}
    (work / "0.lease").write_text(json.dumps(foreign))
    assert not Leases(work, stale_seconds=0.05).any_is_held(poll_seconds=0.02)
    (work / "0.lease").write_text(json.dumps(foreign))
    beat = threading.Timer(0.1, lambda: (work / "0.lease").write_text(json.dumps({**foreign, "beats": 1})))
    beat.start()
    assert Leases(work, stale_seconds=60).any_is_held(poll_seconds=0.02)


@pytest.mark.parametrize("allowed", [False, True])
def test_the_workdir_of_another_stage_is_refused_by_its_stage(started, allowed):
    workdir, config, seen = started
    (workdir / "config.json").write_text(json.dumps({**stored(workdir), "stage": "mim"}))
    (workdir / "summary.json").write_text(json.dumps({"stage": "mim", "metrics": {}}))
    pipeline = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke")
    for other, name in ((config, "finetune"), (pipeline, "pipeline")):
        with pytest.raises(UserError, match=f"run of the stage 'mim', and this config is of the stage '{name}'"):
            stages.run_stage(other, str(workdir), allow_config_change=allowed)
    assert len(seen) == 1


def test_a_stage_is_refused_in_the_folder_of_a_pipeline(tmp_path):
    (tmp_path / "p" / "vqkd").mkdir(parents=True)
    (tmp_path / "p" / "vqkd" / "config.json").write_text("{}")
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke")
    with pytest.raises(UserError, match=r"holds the workdirs of other runs, such as vqkd\.") as caught:
        stages.run_stage(config, str(tmp_path / "p"))
    assert f"--workdir={tmp_path / 'p' / 'NAME'}" in caught.value.instead
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["vqkd"]


def test_a_finished_run_takes_no_other_settings(started, caplog):
    workdir, config, seen = started
    caplog.set_level(logging.INFO, logger="absl")
    summary = {"stage": "finetune", "metrics": {"accuracy": 0.5}}
    (workdir / "summary.json").write_text(json.dumps(summary))
    config.data.num_threads = 3
    assert stages.run_stage(config, str(workdir), allow_config_change=True) == summary
    assert "nothing to do" in caplog.text
    config.optim.peak_lr = 0.123
    with pytest.raises(UserError, match=r"a finished run of another config \(optim.peak_lr") as caught:
        stages.run_stage(config, str(workdir), allow_config_change=True)
    assert "--allow_config_change" not in caught.value.instead and "and with it the result" not in caplog.text
    assert len(seen) == 1 and stored(workdir)["optim"]["peak_lr"] != 0.123


def test_a_pipeline_compares_all_its_stages_before_the_first_begins(started):
    workdir, _, seen = started
    pipeline = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke").unlock()
    os.makedirs(workdir / "p" / "mim" / "checkpoints" / "4")
    (workdir / "p" / "mim" / "config.json").write_text(config_lib.to_json(pipeline.stages.mim))
    pipeline.stages.mim.optim.peak_lr = 0.123
    with pytest.raises(UserError, match=r"optim\.peak_lr"):
        stages.run_stage(pipeline, str(workdir / "p"))
    assert len(seen) == 1 and not (workdir / "p" / "teacher").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 50, b"{", b"null", b"[1]"])
def test_what_a_power_cut_leaves_of_the_config_and_the_summary(started, content, caplog):
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
    assert caplog.text.count("summary.json is damaged") == 1


def test_a_pipeline_hands_the_permission_on(started):
    workdir, _, seen = started
    pipeline = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke").unlock()
    stage = pipeline.stages.teacher
    os.makedirs(workdir / "p" / "teacher" / "checkpoints" / "2")
    (workdir / "p" / "teacher" / "config.json").write_text(config_lib.to_json(stage))
    stage.optim.peak_lr = 0.123
    with pytest.raises(UserError, match=r"optim\.peak_lr"):
        stages.run_stage(pipeline, str(workdir / "p"))
    with pytest.raises(Interrupted):
        stages.run_stage(pipeline, str(workdir / "p"), allow_config_change=True)
    assert seen[-1].optim.peak_lr == 0.123


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.batch_size", 100_000, r"run.batch_size=100000 is not valid: the training split has \d+ examples"),
        ("run.batch_size", 9, r"A batch of 9 rows cannot be divided over 2 devices"),
        ("mesh.tensor", 5, r"does not fit 2 device"),
        ("efficiency.accumulation_steps", 8, r"rows that each device has of a batch of 8 cannot be divided"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch, key, value, message):
    monkeypatch.setattr(jax, "devices", lambda: [jax.local_devices()[0]] * 2)
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    section, _, name = key.partition(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        stages.run_stage(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["run[1]", "a]b/run", "run*", "wh?t", "gs:/run"])
@pytest.mark.parametrize("spec", ["teacher.py:smoke", "quickstart.py:smoke"])
def test_a_workdir_that_orbax_takes_for_a_pattern_is_refused(tmp_path, spec, name):
    with pytest.raises(UserError, match="path has the character"):
        stages.run_stage(config_lib.load(f"{ROOT}/configs/{spec}"), str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_checks_the_batches_of_all_stages_before_the_first_begins(tmp_path):
    pipeline = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke").unlock()
    pipeline.stages.probe.probe.update(duration="2 epochs", batch_size=100_000)
    with pytest.raises(UserError, match=r"^Stage probe of the pipeline: An epoch of \d+ examples holds no") as caught:
        stages.run_stage(pipeline, str(tmp_path / "p"))
    assert re.search(r"--config\.stages\.probe\.probe\.batch_size=\d+ or less", caught.value.instead)
    assert not (tmp_path / "p").exists()


@pytest.mark.long
def test_a_checkpoint_of_another_model_is_refused_and_the_former_config_stays(tmp_path):
    """After one whole run of two steps, the interrupted run of which is continued with a wider model."""
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    config.model.update(depth=1, width=16, num_heads=2, mlp_dim=16)
    config.views.image_size = 32
    config.run.update(duration="2 steps", eval_every="0 steps")
    config.optim.warmup = "1 step"
    stages.run_stage(config, str(tmp_path))
    (tmp_path / "summary.json").unlink()
    former = stored(tmp_path)
    config.model.mlp_dim = 32
    with pytest.raises(UserError, match=r"The checkpoint .*/2 has .*, this run has .*32"):
        stages.run_stage(config, str(tmp_path), allow_config_change=True)
    assert stored(tmp_path) == former


def test_a_workdir_in_use_is_refused_and_let_go_afterwards(started):
    workdir, config, seen = started
    before = {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    with held(workdir), pytest.raises(UserError, match=f"in use by another run: process {os.getpid()} on "):
        stages.run_stage(config, str(workdir))
    assert len(seen) == 1
    assert {path.name: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    with pytest.raises(Interrupted):
        stages.run_stage(config, str(workdir))


def test_caches_are_written_by_many_at_once(tmp_path, monkeypatch):
    class Source:
        name, split, left_out, empty_classes = "images", "train", (), ()

        def __len__(self):
            return 64

    class Anything:
        def build(self, config):
            return SimpleNamespace(sources=(Source(), Source()))

    config = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke").stages.extract
    monkeypatch.setattr(stages.importlib, "import_module", lambda name: Anything())
    monkeypatch.setattr(stages.provenance, "describe_networks", lambda config: {})
    monkeypatch.setitem(stages.RUNNERS, "extract", lambda task, config, workdir: {"views_per_example": 1})
    monkeypatch.setattr(stages, "_report", lambda *arguments: None)  # there are no images to show
    with held(tmp_path):
        assert stages.run_stage(config, str(tmp_path))["metrics"] == {"views_per_example": 1}


def test_a_pipeline_stops_at_a_stage_that_was_told_to_end(tmp_path, monkeypatch):
    def preempted(task, config, workdir):
        raise Preempted("saved")

    monkeypatch.setitem(stages.RUNNERS, "finetune", preempted)
    with pytest.raises(Preempted):
        stages.run_stage(config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke"), str(tmp_path))
    assert stages.read_summary(str(tmp_path / "teacher")) is None
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.long
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


@pytest.mark.long
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
