"""Two processes with four devices each, or four with two (--long), compute what one process with eight does."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from equality_runs import STEPS, TRAINED, Outcome, assert_same_run, stage_config, stored
from paths import HELPERS, ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.runners import stages

MESH, SPANNING = (8, 1, 1), (2, 1, 4)
"""`tensor` of the second spans two processes, which then hold the same rows of the batch."""
MESHES = {"finetune": SPANNING, "vqkd": MESH, "mim": MESH, "segment": MESH}


LONG = ("finetune", "mim", "segment", "tokenize")
"""Stages that run with --long only."""


@pytest.fixture(scope="module")
def num_processes(request) -> int:
    return 4 if request.config.getoption("--long") else 2


@pytest.fixture(scope="module")
def together(equality_runs, request, num_processes) -> pathlib.Path:
    """Run the stages in several processes; with --long also resume one from the middle of a run of one process."""
    chosen = [
        stage
        for stage in (*TRAINED, *stages.TARGET_CACHE_STAGES)
        if stage not in LONG or request.config.getoption("--long")
    ]
    trained = [stage for stage in chosen if stage in TRAINED]
    folder = equality_runs.root / "together"
    jobs = [(stage, stage, MESHES[stage]) for stage in trained]
    if request.config.getoption("--long"):
        stopped = equality_runs.workdir("vqkd", MESH, variant="-stopped", stop_after=STEPS // 2)
        shutil.copytree(stopped, folder / "continued")
        jobs.append(("continued", "vqkd", MESH))
    # the stages that write a target cache compute on the devices of each process alone
    jobs += [(stage, stage, (-1, 1, 1)) for stage in chosen if stage in stages.TARGET_CACHE_STAGES]
    for stage in trained:
        equality_runs.workdir(stage)
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(
        json.dumps(
            [
                {
                    "config": config_lib.to_json(stage_config(stage, equality_runs.root, mesh)),
                    "workdir": str(folder / name),
                    "evaluates": name == "finetune",
                }
                for name, stage, mesh in jobs
            ]
        )
    )
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // num_processes}")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    program = [str(HELPERS / "equality_runs.py"), str(folder / "jobs.json")]
    command = [sys.executable, str(ROOT / "launch" / "processes.py"), str(num_processes), "0", *program]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = launcher.communicate(timeout=900)
    finally:
        launcher.terminate()  # which it passes on; it has ended unless they hang
    assert launcher.returncode == 0, output[-5000:]
    return folder


def marked(names):
    return [pytest.param(name, marks=pytest.mark.long if name in LONG else []) for name in names]


@pytest.mark.parametrize("stage", marked(TRAINED))
def test_several_processes_train_as_one_does(equality_runs, together, stage):
    mesh = MESH if MESHES[stage] == MESH else (1, 1, 1)
    assert_same_run(stage, Outcome.read(together / stage), equality_runs.outcome(stage, mesh))
    assert len(list((together / stage).rglob("metrics*"))) == 1


@pytest.mark.parametrize("stage", marked(stages.TARGET_CACHE_STAGES))
def test_several_processes_store_the_same_bytes(equality_runs, together, num_processes, stage):
    """As one process with as many devices as each of them: another number of devices rounds otherwise."""
    assert stored(together / stage) == stored(equality_runs.workdir(stage, (8 // num_processes, 1, 1)))


@pytest.mark.long
def test_a_run_of_one_process_resumes_in_several(equality_runs, together):
    before = Outcome.read(equality_runs.workdir("vqkd", MESH, variant="-stopped", stop_after=STEPS // 2))
    after = Outcome.read(together / "continued")
    assert after.metrics[: STEPS // 2] == before.metrics
    assert_same_run("vqkd", after, equality_runs.outcome("vqkd", MESH))
