"""2 000 steps of the toy in a fresh process: memory, threads, handles and shared memory files stay what they are."""

import json
import os
import subprocess
import sys

import pytest
from paths import HELPERS, ROOT
from xla_flags import xla_flags

PROGRAM = """
import json, sys

import training_toy as toy
from absl import flags
from benchmarks.soak import Sampler
from beitv2_jax.training.loop import train

flags.FLAGS(["soak"])
workdir, config = sys.argv[1], json.loads(sys.argv[2])
with Sampler(workdir, period=0.02) as sampler:
    train(toy.make_task(), toy.config(**config), workdir)
print(json.dumps(sampler.growth()))
"""
STEPS = 2000
pytestmark = pytest.mark.long
EVERY = {"log_every": 1, "eval_every": 100, "checkpoint_every": 250}


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    config = {f"run.{key}": f"{steps} steps" for key, steps in EVERY.items()} | {"run.duration": f"{STEPS} steps"}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS), *sys.path]),
        "XLA_FLAGS": xla_flags(1),
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("soak")), json.dumps(config)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_memory_stays_flat(growth):
    assert growth["MB"]["first"] > 100
    assert growth["MB"]["per_1000_steps"] < 5


@pytest.mark.parametrize(
    "held, allowed", [("threads", 3), ("handles", 3), ("shared memory files", 3), ("processes", 0.5)]
)
def test_nothing_is_left_open(growth, held, allowed):
    assert growth[held]["last"] - growth[held]["first"] < allowed
