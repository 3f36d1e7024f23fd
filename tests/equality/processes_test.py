"""Four processes with two devices each compute what one process with eight does."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from equality_runs import CLASSES, STEPS, TRAINED, Outcome, assert_same_run, stage_config, stored
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
    run_together(
        folder,
        [
            {
                "config": config_lib.to_json(stage_config(stage, equality_runs.root, mesh)),
                "workdir": str(folder / name),
                "evaluates": name == "finetune",
            }
            for name, stage, mesh in jobs
        ],
        num_processes=NUM_PROCESSES,
        num_devices=8 // NUM_PROCESSES,
    )
    return folder


def run_together(folder: pathlib.Path, jobs: list[dict], *, num_processes: int, num_devices: int) -> None:
    """Run the jobs of `equality_runs` in processes of `num_devices` each."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={num_devices}")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    program = [str(HELPERS / "equality_runs.py"), str(folder / "jobs.json")]
    command = [sys.executable, str(ROOT / "launch" / "processes.py"), str(num_processes), "0", *program]
    launcher = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = launcher.communicate(timeout=900)
    finally:
        launcher.terminate()  # which it passes on; it has ended unless they hang
    assert launcher.returncode == 0, output[-5000:]


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


def test_several_classes_an_image_in_two_processes(equality_runs):
    """The same losses and the same mean average precision as in one process, with an unreadable image in each split."""
    root, labels = equality_runs.root / "several", np.random.default_rng(5)
    shutil.copytree(equality_runs.root / "classes", root)
    for split in ("train", "validation"):
        names = sorted(str(path.relative_to(root / split)) for path in (root / split).rglob("*.jpg"))
        rows = "".join(f"{name},{','.join(map(str, labels.integers(0, 2, CLASSES)))}\n" for name in names)
        (root / split / "labels.csv").write_text(f"file_name,ant,bee,cat\n{rows}")
    damaged = root / "validation" / "0" / "03.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    data = {"source": f"folder:{root}"}
    expected = equality_runs.outcome("finetune", variant="-several", data=data)
    config = stage_config("finetune", equality_runs.root, (2, 1, 1), data=data)
    folder = equality_runs.root / "two"
    folder.mkdir()
    job = {"config": config_lib.to_json(config), "workdir": str(folder / "run"), "evaluates": True}
    run_together(folder, [job], num_processes=2, num_devices=1)
    found = Outcome.read(folder / "run")
    assert_same_run("finetune", found, expected)
    metrics = found.metrics[-1]  # of 21 images
    assert 0 < metrics["eval/mean_average_precision"] < 1 and metrics["eval/examples"] == 20
