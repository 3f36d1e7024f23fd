"""Every stage computes the same on every mesh, with micro-batches, and from a checkpoint of another mesh on."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from equality_runs import BOUNDS, STEPS, TRAINED, Outcome, assert_same_run, stage_config, stored
from paths import HELPERS, ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.models import quantizer

MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x4x1": (2, 4, 1), "2x2x2": (2, 2, 2)}
STILL = {
    "vqkd": {},
    "mim": {"model": {"drop_path_rate": 0.0}},
    "finetune": {
        "model": {"drop_path_rate": 0.0},
        "augment": {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0},
    },
}
"""Recipes without draws inside the step, which each micro-batch makes anew."""
WHOLE_RUNS = [
    pytest.param(stage, mesh, marks=[] if (stage, mesh) == ("vqkd", "2x2x2") else pytest.mark.long)
    for stage in TRAINED
    for mesh in MESHES
]
"""The stage with a codebook on the mesh that uses all three axes; with --long every stage on every mesh."""


@pytest.mark.parametrize(("stage", "mesh"), WHOLE_RUNS)
def test_every_mesh_trains_as_one_device_does(equality_runs, stage, mesh):
    assert_same_run(stage, equality_runs.outcome(stage, MESHES[mesh]), equality_runs.outcome(stage))


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=[] if stage == "vqkd" else pytest.mark.long) for stage in TRAINED]
)
def test_step_and_evaluation_are_compiled_once(equality_runs, stage):
    compiled = equality_runs.compiled[equality_runs.workdir(stage, MESHES["2x2x2"]).name]
    assert (compiled["jit(train_step)"], compiled["jit(sums)"]) == (1, 1), compiled


@pytest.mark.long
def test_two_runs_on_eight_devices_are_equal_to_the_bit(equality_runs):
    first = equality_runs.outcome("vqkd", MESHES["2x2x2"])
    second = equality_runs.outcome("vqkd", MESHES["2x2x2"], variant="-again")
    assert second.metrics == first.metrics
    for path, array in first.arrays.items():
        np.testing.assert_array_equal(second.arrays[path], array, err_msg=path)


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh == "2x2x2" else pytest.mark.long) for mesh in MESHES]
)
def test_every_mesh_stores_the_same(equality_runs, mesh):
    assert stored(equality_runs.workdir("tokenize", MESHES[mesh])) == stored(equality_runs.workdir("tokenize"))
    output = {"output": {"dtype": "float32"}}
    ours, theirs = (
        TargetReader(str(equality_runs.workdir("extract", sizes, variant="-float32", **output) / "views"), "train")
        for sizes in (MESHES[mesh], (1, 1, 1))
    )
    expected = np.stack([theirs[i, view] for i in range(len(theirs)) for view in range(2)])
    found = np.stack([ours[i, view] for i in range(len(ours)) for view in range(2)])
    assert len(ours) == len(theirs) and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUNDS["arrays"] * np.abs(expected).max())


@pytest.mark.long
@pytest.mark.parametrize(("stage", "count"), [("vqkd", 2), ("vqkd", 4), ("mim", 4), ("finetune", 2)])
def test_micro_batches_train_as_the_whole_batch_does(equality_runs, stage, count):
    """On a mesh of two devices, so that each holds 8 rows of the batch of 16."""
    mesh, still = (2, 1, 1), STILL[stage]
    whole = equality_runs.outcome(stage, mesh, variant="-still", **still)
    cut = equality_runs.outcome(
        stage, mesh, variant=f"-still-{count}", efficiency={"accumulation_steps": count}, **still
    )
    assert_same_run(stage, cut, whole)


@pytest.mark.long
def test_the_same_codes_are_revived_on_every_mesh_by_micro_batches_and_after_a_stop(equality_runs, monkeypatch):
    """With k-means over three batches, before the first step and after five; a code is dead after four steps unhit."""
    monkeypatch.setattr(quantizer, "DEAD_FRACTION", 0.97)
    run = {"duration": "20 steps", "eval_every": "20 steps"}  # codes are revived until four fifths of them are done
    options = {"revive": True, "kmeans_tokens": 30, "kmeans_again": "5 steps", "run": run}
    runs = {
        "whole": equality_runs.outcome("vqkd", variant="-revive", **options),
        "mesh": equality_runs.outcome("vqkd", MESHES["2x2x2"], variant="-revive", **options),
        "cut": equality_runs.outcome(
            "vqkd", (2, 1, 1), variant="-revive-cut", efficiency={"accumulation_steps": 4}, **options
        ),
    }
    for stop in (5, 14):
        folder = equality_runs.workdir("vqkd", variant=f"-revive-{stop}", stop_after=stop, **options)
        shutil.copytree(folder, equality_runs.root / f"vqkd-1x1x1-revive-{stop}-continued")
        runs[stop] = equality_runs.outcome("vqkd", variant=f"-revive-{stop}-continued", **options)
    for name in ("mesh", "cut", 5, 14):
        assert_same_run("vqkd", runs[name], runs["whole"])
    still = equality_runs.outcome("vqkd", variant="-never-revived", **{**options, "revive": False})
    codebook = next(path for path in still.arrays if "['codebook']" in path)
    assert np.abs(still.arrays[codebook] - runs["whole"].arrays[codebook]).max() > 0.1


@pytest.fixture(scope="module")
def stopped(equality_runs) -> pathlib.Path:
    return equality_runs.workdir("vqkd", MESHES["2x2x2"], variant="-stopped", stop_after=STEPS // 2)


@pytest.mark.long
def test_a_run_goes_on_on_another_mesh(equality_runs, stopped):
    workdir = equality_runs.root / "vqkd-2x4x1-continued"
    shutil.copytree(stopped, workdir)
    assert_continued(equality_runs, stopped, equality_runs.workdir("vqkd", MESHES["2x4x1"], variant="-continued"))


@pytest.mark.long
def test_a_run_goes_on_with_half_of_the_devices(equality_runs, stopped):
    workdir, jobs = equality_runs.root / "vqkd-on-four", equality_runs.root / "four.json"
    shutil.copytree(stopped, workdir)
    config = config_lib.to_json(stage_config("vqkd", equality_runs.root, (-1, 1, 1)))
    jobs.write_text(json.dumps([{"config": config, "workdir": str(workdir), "evaluates": False}]))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    path = os.pathsep.join([str(ROOT), *sys.path])
    program = str(HELPERS / "equality_runs.py")
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path}
    subprocess.run([sys.executable, program, str(jobs)], env=environment, check=True, timeout=300)
    assert_continued(equality_runs, stopped, workdir)


def assert_continued(runs, stopped, workdir):
    before, after = Outcome.read(stopped), Outcome.read(workdir)
    assert [line["step"] for line in before.metrics] == list(range(1, STEPS // 2 + 1))
    assert after.metrics[: STEPS // 2] == before.metrics
    assert_same_run("vqkd", after, runs.outcome("vqkd", MESHES["2x2x2"]))
