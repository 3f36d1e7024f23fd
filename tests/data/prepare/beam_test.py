"""Beam's command without Beam, and the scripts that cover it: what they would run, and what they ask for."""

import os
import shlex
import subprocess
import sys

import pytest
from paths import ROOT

from beitv2_jax.data.prepare import beam as prepare_beam

SCRIPTS = ROOT / "launch" / "beam"
ARGUMENTS = ["--input=/a b/*.tar", "--name=birds", "--data_dir=/data"]
NEEDED = {
    "local": {},
    "dataflow": {"PROJECT": "p", "REGION": "r", "TEMP": "gs://b/t"},
    "flink": {"MASTER": "h:1", "IMAGE": "i"},
}
RUNNERS = {"local": "DirectRunner", "dataflow": "DataflowRunner", "flink": "FlinkRunner"}


def _run(name, *arguments, **environment):
    kept = {
        key: value for key, value in os.environ.items() if key not in {"PROJECT", "REGION", "TEMP", "MASTER", "IMAGE"}
    }
    command = ["sh", str(SCRIPTS / f"{name}.sh"), *arguments]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True)


def test_without_beam_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "beitv2_jax.data.prepare.beam_images", raising=False)
    assert prepare_beam.main(ARGUMENTS) == 2
    assert "pip install -e '.[beam]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", NEEDED)
def test_a_dry_run_shows_a_command_that_the_parser_takes(name):
    done = _run(name, *ARGUMENTS, "--dry-run", "--num_shards=7", **NEEDED[name])
    assert done.returncode == 0, done.stderr
    _, *command = shlex.split(done.stdout)
    assert command[:2] == ["-m", "beitv2_jax.data.prepare.beam"]
    options, beam_arguments = prepare_beam._parser().parse_known_args(command[2:])
    assert (options.input, options.name, options.data_dir, options.num_shards) == ("/a b/*.tar", "birds", "/data", 7)
    assert f"--runner={RUNNERS[name]}" in beam_arguments and "--dry-run" not in beam_arguments


@pytest.mark.parametrize("name, key", [(name, key) for name, needed in NEEDED.items() for key in needed])
def test_what_is_missing_is_asked_for(name, key):
    done = _run(name, *ARGUMENTS, "--dry-run", **{k: v for k, v in NEEDED[name].items() if k != key})
    assert done.returncode == 2 and f"{key} is not set" in done.stderr and "Instead:" in done.stderr


def test_every_script_is_tried():
    assert {path.stem for path in SCRIPTS.glob("*.sh")} == {*NEEDED, "common"}
