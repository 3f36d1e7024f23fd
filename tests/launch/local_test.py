"""The launch scripts with stub interpreters: what they make, install, start and return. Nothing is downloaded."""

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from paths import ROOT


@pytest.fixture
def repository(tmp_path):
    """Return a repository with the launch scripts only, beside a folder of stub commands."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("setup.py", "pyproject.toml"):
        (root / name).write_text("")
        os.utime(root / name, (1, 1))
    return root


def write_script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return path


@pytest.fixture
def venv(repository):
    """Make the stub interpreter of an environment: it logs how it was called; $FAIL_PIP and $CODE are exit codes."""
    body = (
        'printf "%s\\n" "$PWD: $*" >>"$LOG"\n'
        'case "$*" in *"pip install"*) exit ${FAIL_PIP:-0};; esac\n'
        "exit ${CODE:-0}\n"
    )
    return write_script(repository / ".venv/bin/python", body)


def launch(repository, script, *arguments, **environment):
    log = repository.parent / "log"
    log.unlink(missing_ok=True)
    result = subprocess.run(
        ["sh", str(repository / "launch" / script), *arguments],
        cwd="/",
        env={"PATH": os.environ["PATH"], "LOG": str(log), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = log.read_text().splitlines() if log.exists() else []
    prefix = f"{repository.resolve()}: "
    assert all(call.startswith(prefix) for call in calls)
    return result, [call.removeprefix(prefix) for call in calls]


PIP = "-m pip install --quiet --disable-pip-version-check --no-compile --editable"


def test_local_installs_once_and_runs_main(repository, venv):
    result, calls = launch(repository, "local.sh", "--config=a b", "--workdir=w")
    assert result.returncode == 0
    assert calls == [f"{PIP} .", "-m beitv2_jax.main --config=a b --workdir=w"]
    assert "Installing beitv2_jax into .venv" in result.stderr
    result, calls = launch(repository, "local.sh")
    assert calls == ["-m beitv2_jax.main"]
    assert result.stderr == ""


@pytest.mark.parametrize("changed", ["setup.py", "pyproject.toml"])
def test_a_changed_setup_is_installed_again(repository, venv, changed):
    launch(repository, "local.sh")
    later = time.time() + 10
    os.utime(repository / changed, (later, later))
    _, calls = launch(repository, "local.sh")
    assert calls[0] == f"{PIP} ."


def test_extras_are_installed_where_they_are_missing(repository, venv):
    _, calls = launch(repository, "test.sh", "-k", "one or two")
    assert calls == [f"{PIP} .[test]", "-m pytest -n 2 --dist loadscope --no-loadscope-reorder -k one or two"]
    assert launch(repository, "test.sh", TEST_PROCESSES="0")[1] == [
        "-m pytest -n 0 --dist loadscope --no-loadscope-reorder"
    ]
    assert launch(repository, "local.sh")[1] == ["-m beitv2_jax.main"]  # test contains all that it needs
    assert launch(repository, "local.sh", EXTRAS="cuda")[1][0] == f"{PIP} .[cuda]"
    assert launch(repository, "test.sh", EXTRAS="cuda")[1][0] == f"{PIP} .[cuda,test]"


@pytest.mark.parametrize("script", ["local.sh", "test.sh"])
def test_exit_codes_are_passed_on(repository, venv, script):
    result, _ = launch(repository, script, CODE="2")
    assert result.returncode == 2


def test_where_python_may_write_no_bytecode_pip_writes_it(repository, venv):
    _, calls = launch(repository, "local.sh", PYTHONDONTWRITEBYTECODE="1")
    assert calls[0] == f"{PIP} .".replace("--no-compile", "--compile")


def test_a_failed_installation_stops_and_is_tried_again(repository, venv):
    result, calls = launch(repository, "local.sh", FAIL_PIP="1")
    assert result.returncode == 1
    assert calls == [f"{PIP} ."]
    assert launch(repository, "local.sh")[1][0] == f"{PIP} ."


def test_venv_names_another_environment(repository, venv):
    other = repository.parent / "other"
    shutil.copytree(repository / ".venv", other)
    launch(repository, "local.sh", VENV=str(other))
    assert list(other.glob(".installed*")) and not list((repository / ".venv").glob(".installed*"))


def test_no_python_is_explained(repository):
    result, _ = launch(repository, "local.sh", PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no Python 3.11 or newer was found (tried: no-such-python)" in result.stderr
    assert not (repository / ".venv").exists()


def test_an_old_python_is_passed_over(repository):
    old = write_script(repository.parent / "stubs/old", "exit 1\n")  # fails the version check
    result, _ = launch(repository, "local.sh", PYTHON=str(old))
    assert "no Python 3.11 or newer" in result.stderr


def test_a_missing_venv_module_is_explained(repository):
    body = 'case "$*" in *ensurepip*) exit 1;; esac\nexit 0\n'
    stub = write_script(repository.parent / "stubs/python3.11", body)
    result, _ = launch(repository, "local.sh", PYTHON=str(stub))
    assert result.returncode == 1
    assert "apt install python3-venv" in result.stderr
    assert not (repository / ".venv").exists()


def test_the_environment_is_made_with_the_interpreter_found(repository):
    body = (
        'case "$*" in "-m venv "*) mkdir -p "$3/bin"; ln -s "$0" "$3/bin/python";; esac\n'
        'printf "%s\\n" "$PWD: $*" >>"$LOG"\n'
    )
    stub = write_script(repository.parent / "stubs/python3.11", body)
    result, calls = launch(repository, "local.sh", PYTHON=str(stub))
    assert result.returncode == 0, result.stderr
    assert "-m venv .venv" in calls and calls[-1] == "-m beitv2_jax.main"


SCRIPTS = [path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch", ".env")]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_posix_shell(script):
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert "[[" not in script.read_text() and "function " not in script.read_text()


def test_ci_runs_the_two_commands_of_the_readme():
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "\nsh launch/test.sh ||" in text
    assert "\nsh launch/local.sh --config=configs/quickstart.py:smoke --workdir=" in text


def test_setup_states_lower_bounds_only(monkeypatch):
    arguments = {}
    stub = types.ModuleType("setuptools")
    stub.setup, stub.find_packages = arguments.update, lambda include: include
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(ROOT / "setup.py"))
    assert arguments["name"] == "beitv2_jax" and arguments["python_requires"] == ">=3.11"
    assert {"cuda", "tpu", "test"} <= set(arguments["extras_require"])
    assert arguments["packages"] == ["beitv2_jax", "beitv2_jax.*", "beitv2_jax.configs"]
    for requirement in itertools.chain(arguments["install_requires"], *arguments["extras_require"].values()):
        assert re.fullmatch(r"[A-Za-z0-9_-]+(\[\w+\])?>=[\d.]+", requirement)
