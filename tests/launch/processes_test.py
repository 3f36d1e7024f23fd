"""Several processes of one run on this machine: real processes, some of which die; and once real `jax.distributed`."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
from paths import ROOT

SCRIPT = ROOT / "launch/processes.py"


def run(folder, count, restarts, program, **options):
    """Run `program` in `count` processes; it finds `rank`, `attempt` (from 1) and `mark(word)`, which leaves a file."""
    prelude = (
        "import os, pathlib, signal, sys, time\n"
        "rank, folder = int(os.environ.get('JAX_PROCESS_ID', 9)), pathlib.Path(sys.argv[1])\n"
        "attempt = len(list(folder.glob(f'started-*-{rank}'))) + 1\n"
        "def mark(word): (folder / f'{word}-{attempt}-{rank}').touch()\n"
        "def await_file(name):\n"
        "    while not (folder / name).exists(): time.sleep(0.01)\n"
        "mark('started')\n"
    )
    command = [sys.executable, str(SCRIPT), str(count), str(restarts), "-c", prelude + program, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_process_learns_its_place(tmp_path):
    program = "mark('-'.join(os.environ[k] for k in ('JAX_NUM_PROCESSES', 'JAX_PLATFORMS', 'JAX_COORDINATOR_ADDRESS')))"
    result = run(tmp_path, 3, 0, program)
    assert (result.returncode, result.stderr) == (0, "")
    mark = [name for name in names(tmp_path) if name.startswith("3-cpu-127.0.0.1:")]
    assert [name[-1] for name in mark] == ["0", "1", "2"]
    assert len({name[:-2] for name in mark}) == 1  # one address


def test_a_single_process_is_told_nothing(tmp_path):
    run(tmp_path, 1, 2, "mark(os.environ.get('JAX_COORDINATOR_ADDRESS', 'alone'))", env={"PATH": os.environ["PATH"]})
    assert names(tmp_path) == ["alone-1-9", "started-1-9"]


def test_a_killed_process_stops_the_others_and_all_start_again(tmp_path):
    program = (
        "signal.signal(signal.SIGTERM, lambda *_: (mark('asked'), sys.exit(75)))\n"
        "mark('ready')\n"
        "if attempt == 1 and rank == 1:\n"
        "    [await_file(f'ready-1-{other}') for other in (0, 2)]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if attempt == 1:\n"
        "    time.sleep(50)\n"
    )
    result = run(tmp_path, 3, 1, program)
    assert result.returncode == 0, result.stderr
    assert "process 1 of 3 ended with exit code 137; all are stopped" in result.stderr
    assert "ended with exit code 137: starting again, 0 restarts left" in result.stderr
    assert [name for name in names(tmp_path) if name.startswith("asked")] == ["asked-1-0", "asked-1-2"]
    assert len([name for name in names(tmp_path) if name.startswith("ready-2")]) == 3


@pytest.mark.parametrize("code, attempts", [(75, 3), (1, 1), (2, 1), (0, 1)])
def test_only_a_preemption_is_followed_by_a_restart(tmp_path, code, attempts):
    result = run(tmp_path, 2, 2, f"sys.exit({code} if rank == 0 else 0)")
    assert result.returncode == code
    assert len([name for name in names(tmp_path) if name.startswith("started") and name.endswith("0")]) == attempts


def test_one_that_does_not_end_is_killed(tmp_path, monkeypatch):
    scope = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(scope["run"].__globals__, "GRACE", 0.5)
    stubborn = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(50)"
    command = [sys.executable, "-c", stubborn]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE), subprocess.Popen([sys.executable, "-c", "exit(2)"])]
    processes[0].stdout.readline()
    assert scope["run"](processes) == 2
    assert processes[0].returncode == -signal.SIGKILL
    processes[0].stdout.close()


def test_a_stopped_process_is_killed_and_all_start_again(tmp_path):
    program = (
        "if attempt == 1 and rank == 1:\n"
        "    mark('stops'); os.kill(os.getpid(), signal.SIGSTOP); mark('went on')\n"
        "if attempt == 1:\n"
        "    await_file('stops-1-1'); sys.exit(75)\n"
    )
    result = run(tmp_path, 3, 1, program, env=os.environ | {"GRACE": "0.5"})
    assert result.returncode == 0, result.stderr
    assert names(tmp_path) == [
        "started-1-0",
        "started-1-1",
        "started-1-2",
        "started-2-0",
        "started-2-1",
        "started-2-2",
        "stops-1-1",
    ]


def test_sigterm_is_passed_on_and_ends_it(tmp_path):
    program = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nmark('ready')\ntime.sleep(50)"
    prelude = "import pathlib, os, signal, sys, time\nrank = os.environ['JAX_PROCESS_ID']\n"
    prelude += "def mark(word): (pathlib.Path(sys.argv[1]) / f'{word}-{rank}').touch()\n"
    process = subprocess.Popen([sys.executable, str(SCRIPT), "2", "9", "-c", prelude + program, str(tmp_path)])
    deadline = time.monotonic() + 30
    while len(names(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 75  # and not started nine times more


STAGES = """
import os
import runpy

def run_stage(config, workdir, allow_config_change, defaults):
    import jax
    from jax.experimental import multihost_utils

    own = jax.numpy.array([10 ** jax.process_index()])
    total = int(multihost_utils.process_allgather(own).sum())
    with open(f"{workdir}-{jax.process_index()}", "w") as file:
        file.write(f"{config.stage} {jax.process_count()} {jax.device_count()} {jax.default_backend()} {total}")

"""


def test_two_processes_of_main_compute_together(tmp_path):
    """The whole way: local.sh, processes.py, main and jax.distributed; only the stage is replaced."""
    launch, package = tmp_path / "launch", tmp_path / "beitv2_jax"
    launch.mkdir()
    for name in ("local.sh", "common.sh", "venv.sh", "processes.py"):
        (launch / name).write_text((ROOT / "launch" / name).read_text())
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'beitv2_jax')!r})\n")
    (package / "runners").mkdir()
    (package / "runners" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'beitv2_jax/runners')!r})\n")
    (package / "runners" / "stages.py").write_text(STAGES)
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv/.installed-none").touch()
    config = f"--config={ROOT}/configs/teacher.py:smoke"
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    result = subprocess.run(
        ["sh", str(launch / "local.sh"), config, f"--workdir={tmp_path}/w", "--compilation_cache="],
        env=environment | {"PROCESSES": "2", "VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"w-{rank}").read_text() for rank in (0, 1)] == ["finetune 2 2 cpu 11"] * 2


def test_a_message_is_one_write_as_the_processes_share_the_stream():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    command = [sys.executable, str(SCRIPT), "2", "0", "-c", "import sys; sys.exit(3)"]
    assert subprocess.run(command, stderr=theirs, timeout=60).returncode == 3
    assert ours.recv(10_000).endswith(b" of 2 ended with exit code 3; all are stopped\n")


def test_a_log_that_takes_nothing_stops_no_launcher(tmp_path):
    command = [sys.executable, str(SCRIPT), "1", "1", "-c", "import sys; sys.exit(75)"]
    with open("/dev/full", "w") as full_disk:
        assert subprocess.run(command, stderr=full_disk, timeout=60).returncode == 75
