"""Four processes with two devices each compute what one process with eight does."""

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

pytestmark = pytest.mark.long
NUM_PROCESSES = 4
MESH, SPANNING = (8, 1, 1), (2, 1, 4)
"""`tensor` of the second spans two processes, which then hold the same rows of the batch."""
MESHES = {"finetune": SPANNING, "vqkd": MESH, "mim": MESH, "segment": MESH}


@pytest.fixture(scope="module")
def together(equality_runs) -> pathlib.Path:
    """Run the stages in several processes, and resume one of them from the middle of a run of one process."""
    folder = equality_runs.root / "together"
    stopped = equality_runs.workdir("vqkd", MESH, variant="-stopped", stop_after=STEPS // 2)
    shutil.copytree(stopped, folder / "continued")
    jobs = [("continued", "vqkd", MESH), *((stage, stage, MESHES[stage]) for stage in TRAINED)]
    # the stages that write a target cache compute on the devices of each process alone
    jobs += [(stage, stage, (-1, 1, 1)) for stage in stages.TARGET_CACHE_STAGES]
    for stage in TRAINED:
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
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // NUM_PROCESSES}")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    program = [str(HELPERS / "equality_runs.py"), str(folder / "jobs.json")]
    command = [sys.executable, str(ROOT / "launch" / "processes.py"), str(NUM_PROCESSES), "0", *program]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = launcher.communicate(timeout=900)
    finally:
        launcher.terminate()  # which it passes on; it has ended unless they hang
    assert launcher.returncode == 0, output[-5000:]
    return folder


@pytest.mark.parametrize("stage", TRAINED)
def test_several_processes_train_as_one_does(equality_runs, together, stage):
    mesh = MESH if MESHES[stage] == MESH else (1, 1, 1)
    assert_same_run(stage, Outcome.read(together / stage), equality_runs.outcome(stage, mesh))
    assert len(list((together / stage).rglob("metrics*"))) == 1


@pytest.mark.parametrize("stage", stages.TARGET_CACHE_STAGES)
def test_several_processes_store_the_same_bytes(equality_runs, together, stage):
    """As one process with as many devices as each of them: another number of devices rounds otherwise."""
    assert stored(together / stage) == stored(equality_runs.workdir(stage, (8 // NUM_PROCESSES, 1, 1)))


def test_a_run_of_one_process_resumes_in_several(equality_runs, together):
    before = Outcome.read(equality_runs.workdir("vqkd", MESH, variant="-stopped", stop_after=STEPS // 2))
    after = Outcome.read(together / "continued")
    assert after.metrics[: STEPS // 2] == before.metrics
    assert_same_run("vqkd", after, equality_runs.outcome("vqkd", MESH))
