"""tpu_vm.sh against a fake gcloud, which keeps the state of a queued resource and loses its machines on request."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import ROOT

GCLOUD = '''#!{python} -IS
"""Keeps one queued resource in $FAKE/state; what is not possible in its state fails as "illegal"."""
import json, os, pathlib, sys

folder, arguments = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
plan = json.loads((folder / "plan").read_text())  # what happens at the next requests and runs
state = (folder / "state").read_text()
steps = {{"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE", "SUSPENDING": "SUSPENDED"}}
assert arguments[:2] == ["compute", "tpus"], arguments
verb = " ".join(arguments[2:4])
command = next((a.removeprefix("--command=") for a in arguments if a.startswith("--command=")), "")
if "worker.sh" in command:
    verb = "install" if "install" in command else "run"
code, call = 0, verb
if verb == "queued-resources describe":
    call = ""
    if plan["blind"]:
        plan["blind"] -= 1
        code = print("UNAVAILABLE: try later", file=sys.stderr) or 1
    elif state == "ABSENT":
        code = print("NOT_FOUND: no such resource", file=sys.stderr) or 1
    else:
        print(state)
        state = steps.get(state, state)
elif verb == "queued-resources create" and state == "ABSENT":
    state = plan["requests"].pop(0) if plan["requests"] else "WAITING_FOR_RESOURCES"
elif verb == "queued-resources delete" and state in ("ACTIVE", "SUSPENDED", "FAILED"):
    state = "ABSENT"
elif verb in ("install", "run", "tpu-vm ssh", "tpu-vm scp") and state == "ACTIVE":
    if plan.get(verb):
        code, state = plan[verb].pop(0)
elif verb == "tpu-vm scp" and state != "ACTIVE":
    code, call = 1, "lost log"
else:
    code, call = 1, "" if plan["blind"] else "illegal " + verb + " in " + state
(folder / "state").write_text(state)
(folder / "plan").write_text(json.dumps(plan))
with open(folder / "calls", "a") as file:
    file.write(json.dumps([call, arguments]) + "\\n")
sys.exit(code)
'''


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def repository(tmp_path):
    """Return a small repository with the launch scripts, beside a fake gcloud."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", root / "launch")
    for folder in ("configs", "beitv2_jax"):
        (root / folder).mkdir()
    for name in ("setup.py", "pyproject.toml"):
        (root / name).touch()
        os.utime(root / name, (1, 1))
    write_script(tmp_path / "bin/gcloud", GCLOUD.format(python=sys.executable))
    return root


def launch(repository, *arguments, requests=(), runs=(), installs=(), blind=0, **environment):
    """Run tpu_vm.sh; `requests` are states after a request, `runs` and `installs` pairs (exit code, state after it)."""
    fake = repository.parent / "fake"
    shutil.rmtree(fake, ignore_errors=True)
    fake.mkdir()
    (fake / "state").write_text("ABSENT")
    (fake / "plan").write_text(json.dumps({"requests": requests, "run": runs, "install": installs, "blind": blind}))
    (fake / "calls").touch()
    result = subprocess.run(
        ["sh", str(repository / "launch/tpu_vm.sh"), *arguments],
        env={
            "PATH": f"{repository.parent}/bin:{os.environ['PATH']}",
            "FAKE": str(fake),
            **{"NAME": "mim", "ZONE": "z-1", "TYPE": "v5litepod-64", "POLL": "0"},
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = [json.loads(line) for line in (fake / "calls").read_text().splitlines()]
    assert not [call for call, _ in calls if call.startswith("illegal")], calls
    return result, [(call, arguments) for call, arguments in calls if call], (fake / "state").read_text()


REQUEST, DELETE = "queued-resources create", "queued-resources delete"
START = ["tpu-vm scp", "install"]
LOG = "tpu-vm scp"


def kinds(calls):
    return [call for call, _ in calls]


def test_an_undisturbed_run(repository):
    result, calls, state = launch(repository, "--config=c", "--workdir=/mnt/it's here", SETUP="mount it")
    assert result.returncode == 0, result.stderr
    assert kinds(calls) == [REQUEST, *START, "run", LOG, DELETE]
    assert state == "ABSENT"
    by_kind = dict(calls)
    assert by_kind[REQUEST][2:] == [
        "queued-resources",
        "create",
        "mim",
        "--node-id=mim",
        "--accelerator-type=v5litepod-64",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=z-1",
        "--quiet",
    ]
    assert by_kind[LOG][4:7] == ["mim:run.log", "mim.1.log", "--worker=0"]
    assert by_kind[DELETE][4:6] == ["mim", "--force"]
    for kind in ("install", "run"):
        assert by_kind[kind][4:6] == ["mim", "--worker=all"]
    assert "{ mount it; } && sh launch/tpu_vm_worker.sh install" in by_kind["install"][6]
    worker = shlex.split(by_kind["run"][6].removeprefix("--command="))
    assert worker[-9:-5] == ["cd", "beitv2_jax", "&&", "CHIP=v5e"]
    assert worker[-5:] == ["sh", "launch/tpu_vm_worker.sh", "run", "--config=c", "--workdir=/mnt/it's here"]


def test_a_preemption_during_the_run(repository):
    result, calls, state = launch(repository, runs=[(255, "SUSPENDING"), (0, "ACTIVE")])
    assert result.returncode == 0
    again = [DELETE, REQUEST, *START, "run", LOG, DELETE]
    assert kinds(calls) == [REQUEST, *START, "run", "lost log", *again]
    assert state == "ABSENT"
    assert "try 1 ended with exit code 255" in result.stderr
    assert [a[5] for call, a in calls if call == LOG and a[4] == "mim:run.log"] == ["mim.2.log"]


def test_a_preemption_during_the_installation(repository):
    result, calls, _ = launch(repository, installs=[(255, "SUSPENDED")])
    assert result.returncode == 0
    assert kinds(calls)[:5] == [REQUEST, *START, "lost log", DELETE]
    assert kinds(calls).count("run") == 1


@pytest.mark.parametrize("code", [75, 137, 255])
def test_a_run_that_saved_or_was_killed_goes_on_on_the_same_machines(repository, code):
    result, calls, _ = launch(repository, runs=[(code, "ACTIVE")])
    assert result.returncode == 0
    assert kinds(calls) == [REQUEST, *START, "run", LOG, *START, "run", LOG, DELETE]


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_decided_is_not_started_again_even_if_the_machines_go(repository, code):
    result, calls, _ = launch(repository, runs=[(code, "SUSPENDING")])
    assert result.returncode == code and kinds(calls).count("run") == 1


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_ones_own_ends_it_and_keeps_the_log(repository, code):
    result, calls, state = launch(repository, runs=[(code, "ACTIVE")])
    assert result.returncode == code
    assert kinds(calls) == [REQUEST, *START, "run", LOG, DELETE]
    assert state == "ABSENT"


def test_an_error_of_a_process_whose_neighbour_was_preempted_does_not_end_it(repository):
    result, calls, _ = launch(repository, runs=[(1, "SUSPENDING")])
    assert result.returncode == 0
    assert kinds(calls).count(REQUEST) == 2


def test_tries_are_counted(repository):
    result, calls, state = launch(repository, runs=[(75, "ACTIVE")] * 9, TRIES="3")
    assert (result.returncode, kinds(calls).count("run"), state) == (75, 3, "ABSENT")
    result, calls, _ = launch(repository, requests=["FAILED"] * 9, TRIES="2")
    assert result.returncode == 1
    assert kinds(calls) == [REQUEST, DELETE] * 2


def test_a_gap_in_the_connection_is_waited_out(repository):
    result, calls, _ = launch(repository, blind=3)
    assert result.returncode == 0 and "UNAVAILABLE" in result.stderr
    assert kinds(calls) == [REQUEST, *START, "run", LOG, DELETE]
    result, calls, _ = launch(repository, blind=99, TRIES="4")
    assert result.returncode == 1 and REQUEST not in kinds(calls)


def test_a_refused_request_is_granted_later(repository):
    result, calls, _ = launch(repository, requests=["FAILED"], REQUEST="--reserved --internal-ips")
    assert result.returncode == 0
    assert kinds(calls) == [REQUEST, DELETE, REQUEST, *START, "run", LOG, DELETE]
    assert calls[0][1][7:9] == ["--runtime-version=v2-alpha-tpuv5-lite", "--reserved"]


@pytest.mark.parametrize(
    "changed, word", [({"TYPE": "v9-8"}, "v5litepod"), ({"NAME": ""}, "NAME"), ({"ZONE": ""}, "ZONE")]
)
def test_slips_are_told_before_anything_is_asked_for(repository, changed, word):
    result, calls, _ = launch(repository, **changed)
    assert result.returncode == 2 and word in result.stderr
    assert calls == []


@pytest.mark.parametrize("kind, chip", [("v4-64", "v4"), ("v5p-128", "v5p"), ("v6e-256", "v6e")])
def test_the_type_tells_image_and_chip(repository, kind, chip):
    _, calls, _ = launch(repository, TYPE=kind)
    assert chip.removesuffix("e")[-1] in calls[0][1][7]
    assert f"CHIP={chip} " in dict(calls)["run"][6]


# ---- what a worker does ----


def work(repository, *arguments, program='echo "out of $$"\nexit ${CODE:-0}\n', **environment):
    home = repository.parent / "home"
    write_script(home / "venv/bin/python", '#!/bin/sh\nprintf "%s\\n" "$*" >>"$HOME/log"\n' + program)
    (home / "venv/.installed-tpu").touch()
    return subprocess.run(
        ["sh", str(repository / "launch/tpu_vm_worker.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    ), home


@pytest.mark.parametrize("code", ["0", "75"])
def test_a_worker_passes_arguments_output_and_code(repository, code):
    result, home = work(repository, "run", "--workdir=a b", CODE=code)
    assert result.returncode == int(code)
    assert (home / "log").read_text() == "-m beitv2_jax.main --distributed --workdir=a b\n"
    assert (home / "run.log").read_text() == result.stdout
    assert result.stdout == f"out of {(repository / 'run.pid').read_text()}"  # the number is that of the program


def test_a_worker_ends_what_a_lost_connection_left(repository):
    left = subprocess.Popen(["sleep", "60"])
    (repository / "run.pid").write_text(str(left.pid))
    reaper = threading.Thread(target=left.wait)
    reaper.start()
    started = time.monotonic()
    result, _ = work(repository, "run")
    assert result.returncode == 0 and time.monotonic() - started < 30
    reaper.join()
    assert left.returncode == -signal.SIGTERM


def test_a_worker_tells_the_program_of_maintenance(repository):
    script = 'echo "$*" >>"$HOME/asked"\ncase $* in *maintenance-event) cat "$HOME/notice";; *) echo FALSE;; esac\n'
    write_script(repository.parent / "tools/curl", "#!/bin/sh\n" + script)
    home = repository.parent / "home"
    home.mkdir()
    (home / "notice").write_text("NONE\n")
    body = "trap 'echo saved; exit 75' TERM\nsleep 0.5\necho TERMINATE_ON_HOST_MAINTENANCE >$HOME/notice\n"
    body += "while :; do sleep 0.05; done\n"
    path = {"PATH": f"{repository.parent}/tools:{os.environ['PATH']}"}
    result, home = work(repository, "run", program=body, POLL="0.1", **path)
    assert result.returncode == 75 and "saved" in result.stdout
    assert "signalled by the machine: TERMINATE_ON_HOST_MAINTENANCE" in result.stdout
    asked = (home / "asked").read_text()
    assert "-H Metadata-Flavor: Google metadata.google.internal/computeMetadata/v1/instance/preempted" in asked


def test_a_worker_installs_with_a_python_of_its_own(repository):
    home = repository.parent / "home"
    body = 'printf "uv %s\\n" "$*" >>"$HOME/log"\ncase "$*" in "python find"*) echo "$HOME/python3.12";; esac\n'
    write_script(home / ".local/bin/uv", "#!/bin/sh\n" + body)
    result, home = work(repository, "install")
    assert result.returncode == 0, result.stderr
    assert (home / "log").read_text() == "uv python install --quiet 3.12\nuv python find 3.12\n"


def test_a_worker_knows_two_commands(repository):
    result, _ = work(repository, "go")
    assert result.returncode == 2 and "'go'" in result.stderr
