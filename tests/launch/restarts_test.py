"""A run of four processes, of which one is killed and then one hangs: the launcher brings it to its end."""

import json
import os
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

from beitv2_jax.training import loop
from beitv2_jax.training.writer import read_metrics

STEPS, LIMIT = 18, 10

PROGRAM = """
import json, os, pathlib, runpy, sys

workdir, toy, plan, config = sys.argv[1:]
rank, started = os.environ["JAX_PROCESS_ID"], pathlib.Path(workdir).parent / "started"
with open(f"{started}-{rank}", "a+") as file:
    file.write("x")
    attempt = file.tell()
place = {
    "coordinator_address": os.environ["JAX_COORDINATOR_ADDRESS"],
    "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
    "process_id": int(rank),
}
task = json.loads(plan)[attempt - 1].get(rank, {})
sys.argv = [toy, workdir, json.dumps({"task": task, "place": place, "config": json.loads(config)})]
sys.path.insert(0, str(pathlib.Path(toy).parent))
from beitv2_jax.runtime import watchdog
watchdog.SLACK = 30.0  # compiling takes far longer here than a step, which `LIMIT` is for
runpy.run_path(toy, run_name="__main__")
"""


def launch(folder, config, plan):
    """Run the toy by the launcher; `plan` says for each attempt what is special about the task of which process."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "XLA_FLAGS": xla_flags(1),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "GRACE": "4",
    }
    command = [sys.executable, str(ROOT / "launch/processes.py"), "4", str(len(plan) - 1), "-c", PROGRAM]
    return subprocess.run(
        [*command, str(folder / "run"), str(HELPERS / "training_toy.py"), json.dumps(plan), json.dumps(config)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def newest(workdir):
    """Return step and parameters of the newest checkpoint, as read by Orbax alone."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.CheckpointManager(Path(workdir) / "checkpoints") as manager:
        args = ocp.args.Composite(params=ocp.args.StandardRestore(fallback_sharding=here))
        return manager.latest_step(), jax.device_get(manager.restore(manager.latest_step(), args=args)["params"])


@pytest.mark.long
def test_killed_and_hung_the_run_ends_as_an_undisturbed_one(tmp_path):
    config = {"run.duration": f"{STEPS} steps", "run.checkpoint_every": "4 steps", "run.hang_timeout": LIMIT}
    plan = [
        {"2": {"stop_at": 7, "signals": [9]}},
        {"0": {"hang_at": 11}},
        {},
    ]
    result = launch(tmp_path, config, plan)
    assert result.returncode == 0, result.stderr
    host = socket.gethostname()
    messages = [line for line in result.stderr.splitlines() if " ends: " in line or "starting again" in line]
    starts = [index for index, line in enumerate(messages) if "starting again" in line]
    assert [messages[index] for index in starts] == [
        "ended with exit code 137: starting again, 1 restarts left",
        "ended with exit code 75: starting again, 0 restarts left",
    ]
    assert "process 2 of 4 ended with exit code 137; all are stopped" in result.stderr
    hung = messages[starts[0] + 1 : starts[1]]
    reason = f"no progress for {LIMIT} s, behind: process 0 on {host}, waiting for data at step 11"
    assert sorted(hung) == [f"process {index} on {host} ends: {reason}" for index in range(4)]

    loop.train(toy.make_task(), toy.config(**config), tmp_path / "undisturbed")
    found, expected = newest(tmp_path / "run"), newest(tmp_path / "undisturbed")
    assert found[0] == expected[0] == STEPS
    chex.assert_trees_all_close(found[1], expected[1], atol=1e-5)
    lines, undisturbed = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "undisturbed")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["ids"] for line in lines] == [line["ids"] for line in undisturbed]
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in undisturbed], rtol=1e-5)
