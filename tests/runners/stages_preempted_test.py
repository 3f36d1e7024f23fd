"""Stages without a training loop, preempted: they stop at a batch, exit with 75, and finish when started again.

Alone in this process, and as two processes under `jax.distributed`, where jax listens for the signal otherwise.
"""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from paths import HELPERS, ROOT
from testing import variables_of

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import write_run
from beitv2_jax.errors import Preempted
from beitv2_jax.runners import stages
from beitv2_jax.runtime import watchdog
from beitv2_jax.tasks import finetune, mim, vqkd
from tests.runners.stages_test import image_folder, stage_config  # noqa: F401

STAGES = {"extract": "teacher", "tokenize": "vqkd", "probe": "mim"}
"""Stage -> the one whose network it takes; all but the first run with --long only."""

MOVE = 3
"""The batch at which the notice comes."""

PROGRAM = """
import ctypes, json, os, pathlib, signal, sys

from beitv2_jax.runtime import launch

config_file, workdir, address, index = sys.argv[1:]
getsig = ctypes.pythonapi.PyOS_getsig
getsig.restype = ctypes.c_void_p
os.environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index}
launch.start_jax(None, "")
of_jax = getsig(signal.SIGTERM)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and of_jax  # Python does not know of it

from tests.runners import stages_preempted_test
from beitv2_jax import config as config_lib
from beitv2_jax.errors import Preempted
from beitv2_jax.runners import feature_cache, stages
from beitv2_jax.runtime import watchdog

undisturbed = watchdog.moving
watchdog.moving = stages_preempted_test.interrupted(undisturbed)
configs = {name: config_lib.from_json(text) for name, text in json.loads(open(config_file).read()).items()}
folders = {"extract": f"{workdir}/extract-{index}", "probe": f"{workdir}/probe"}
for name, config in configs.items():
    try:
        stages.run_stage(config, folders[name])
    except Preempted as preempted:
        print(preempted, flush=True)
    # jax hears of the next signal again
    assert getsig(signal.SIGTERM) == of_jax

# the probe again, by both, undisturbed
watchdog.moving = undisturbed
run_batches, rows = feature_cache.run_batches, []

def noted(*args, **kwargs):
    for batch, outputs in run_batches(*args, **kwargs):
        rows.extend(batch["example_ids"][batch["weight"] > 0].tolist())
        yield batch, outputs

feature_cache.run_batches = noted
stages.run_stage(configs["probe"], folders["probe"])
pathlib.Path(workdir, f"rows-{index}").write_text(json.dumps(rows))
launch.leave(Preempted.EXIT_CODE)
"""


def interrupted(moving):
    """Return `watchdog.moving`, but with SIGTERM to this process at batch `MOVE`."""

    def replaced(watch, stop_if_signalled):
        on_move, moves = moving(watch, stop_if_signalled), itertools.count(1)

        def moved(phase):
            if next(moves) == MOVE:
                os.kill(os.getpid(), signal.SIGTERM)
            on_move(phase)

        return moved

    return replaced


@pytest.fixture(scope="module")
def configs(request, image_folder, tmp_path_factory):  # noqa: F811
    """Configs of the stages, of networks as they are before training, and what each leaves undisturbed."""
    workdir = tmp_path_factory.mktemp("networks")
    chosen = list(STAGES) if request.config.getoption("--long") else list(STAGES)[:1]
    builds = {"teacher": finetune.build, "vqkd": vqkd.build, "mim": mim.build}
    for name in (STAGES[stage] for stage in chosen):
        config = stage_config(image_folder, str(workdir), name)
        if name == "vqkd":
            config.teacher.update(features="", weights=str(workdir / "teacher"))
        if name == "mim":
            config.tokenizer.update(codes="", run=str(workdir / "vqkd"))
        variables = variables_of(builds[name](config))
        write_run(str(workdir / name), json.loads(config_lib.to_json(config)), variables)
    configs = {name: stage_config(image_folder, str(workdir), name) for name in chosen}
    for name, config in configs.items():
        if "output" in config:
            config.output.shard_examples = 7
        stages.run_stage(config, str(workdir / "undisturbed" / name))
    return configs, workdir / "undisturbed"


def outcome(workdir):
    """Return the metrics, and every file of targets or features and what they were made from, with its contents."""
    files = {
        str(path.relative_to(workdir)): np.load(path) if path.suffix == ".npz" else path.read_bytes()
        for path in (*sorted(pathlib.Path(workdir).glob("*/**/*")), pathlib.Path(workdir, "inputs.json"))
        if path.is_file()
    }
    return stages.read_summary(str(workdir))["metrics"], {
        name: {key: value[key].tobytes() for key in value} if hasattr(value, "files") else value
        for name, value in files.items()
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "extract" else pytest.mark.long) for name in STAGES]
)
def test_told_it_stops_and_finishes_when_started_again(configs, tmp_path, monkeypatch, name):
    configs, undisturbed = configs
    former = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(watchdog, "moving", interrupted(watchdog.moving))
        with pytest.raises(Preempted, match=f"{name} was preempted"):
            stages.run_stage(configs[name], str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is former
    assert stages.read_summary(str(tmp_path)) is None
    stages.run_stage(configs[name], str(tmp_path))
    assert outcome(tmp_path) == outcome(undisturbed / name)


def test_told_while_it_reads_its_network_it_stops_before_it_writes(configs, tmp_path, monkeypatch):
    configs, _ = configs
    monkeypatch.setattr(stages.importlib, "import_module", lambda name: pytest.MonkeyPatch)
    monkeypatch.setattr(pytest.MonkeyPatch, "build", lambda config: os.kill(os.getpid(), signal.SIGTERM), raising=False)
    with pytest.raises(Preempted):
        stages.run_stage(configs["extract"], str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.long
def test_two_processes_under_jax_distributed_end_when_told(configs, tmp_path):
    configs, undisturbed = {name: configs[0][name] for name in ("extract", "probe")}, configs[1]
    configs["probe"] = configs["probe"].copy_and_resolve_references()
    configs["probe"].run.batch_size *= 2  # for both, so that each device computes as many rows as here
    (tmp_path / "configs").write_text(
        json.dumps({name: config_lib.to_json(config) for name, config in configs.items()})
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    # as many devices in each process as here, so that each computes as this one does, to the bit
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS), *sys.path])}
    arguments = [str(tmp_path / "configs"), str(tmp_path), address]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    texts = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [75, 75], texts
    for index, text in enumerate(texts):
        for name in configs:
            assert f"{name} was preempted" in text, text
        assert stages.read_summary(str(tmp_path / f"extract-{index}")) is None
    # whoever goes on: here, alone
    stages.run_stage(configs["extract"], str(tmp_path / "extract-0"))
    assert outcome(tmp_path / "extract-0") == outcome(undisturbed / "extract")
    # both: each computed its share of every batch, and what they left is what one process leaves
    assert outcome(tmp_path / "probe") == outcome(undisturbed / "probe")
    rows = [set(json.loads((tmp_path / f"rows-{index}").read_text())) for index in (0, 1)]
    assert rows == [{*range(8), *range(16, 24)}, {*range(8, 16), 24, 25}]
