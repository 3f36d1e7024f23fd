"""The command line: every mistake is explained in three sentences with exit code 2; a correct one reaches the stage."""

import os
import socket
import subprocess
import sys

import pytest
from absl import flags
from paths import ROOT

from beitv2_jax import main
from beitv2_jax.config.flags import FLAG_NAMES, parse_flags
from beitv2_jax.errors import UserError

GOOD = ["--config=configs/vqkd.py:dino", "--workdir=w"]


def parse(*arguments):
    values = flags.FlagValues()
    rest = parse_flags(["program", *arguments], values)
    return values, rest


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_overrides_reach_the_locked_config():
    values, rest = parse(
        "--config=configs/vqkd.py:dino,smoke",
        "--workdir=w",
        "--config.run.batch_size",
        "24",
        "--config.optim.betas=(.8, .7)",
        "--config.optim.peak_lr=1",
        "--noconfig.kmeans_start",
        "--config.teacher.weights=a.npz",
        "--nodistributed",
    )
    config = values.config
    assert rest == ["program"]
    assert (config.teacher.normalization, config.run.duration) == ("imagenet", "4 steps")
    assert (config.run.batch_size, config.optim.betas, config.optim.peak_lr) == (24, (0.8, 0.7), 1.0)
    assert (config.kmeans_start, config.teacher.weights) == (False, "a.npz")
    assert values.workdir == "w" and values.distributed is False
    assert config.is_locked


def test_the_last_override_of_a_key_counts():
    values, _ = parse(
        *GOOD,
        "--config.optim.betas=(.8, .7)",
        "--config.run.batch_size",
        "24",
        "--config.optim.betas",
        "(.6, .5)",
        "--config.run.batch_size=32",
        "--noconfig.kmeans_start",
        "--config.kmeans_start=true",
    )
    config = values.config
    assert (config.optim.betas, config.run.batch_size, config.kmeans_start) == ((0.6, 0.5), 32, True)


def test_overrides_reach_stages_of_a_pipeline():
    values, _ = parse(
        "--config=configs/quickstart.py", "--workdir=w", "--config.seed=5", "--config.stages.mim.run.duration=7 steps"
    )
    assert values.config.stages.mim.run.duration == "7 steps"
    assert {stage.seed for stage in values.config.stages.values()} == {5}


def test_flags_have_defaults():
    values, _ = parse(*GOOD)
    assert values.distributed is None
    assert values.compilation_cache == os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/beitv2_jax/xla")


def test_flags_can_come_from_a_file(tmp_path):
    """In the place of --flagfile, with comments; an override in it is known to the config like one on the line."""
    (tmp_path / "flags").write_text("# a run\n--config=configs/vqkd.py:dino\n\n--config.optim.betas=(.8, .7)\n")
    values, _ = parse(f"--flagfile={tmp_path}/flags", "--workdir=w", "--config.seed=7")
    assert (values.config.optim.betas, values.config.seed, values.workdir) == ((0.8, 0.7), 7, "w")
    values, _ = parse("--flagfile", f"{tmp_path}/flags", "--workdir=w")
    assert values.config.teacher.normalization == "imagenet"


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "-h"])
def test_help_lists_the_flags_and_exits_with_0(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--config=configs/vqkd.py", flag)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"{name}:" in printed for name in FLAG_NAMES)


@pytest.mark.parametrize(
    "arguments, happened, instead",
    [
        (["--workdir=w"], "flag --config is missing", "--config=configs/quickstart.py"),
        (["--config=configs/mim.py"], "flag --workdir is missing", "--workdir=runs/"),
        (["--config=mim:large", "--workdir=w"], "not a Python file", "--config=configs/mim.py:large"),
        (["--config=configs/mmi.py", "--workdir=w"], "no config file configs/mmi.py", "configs/mim.py"),
        (["--config", "configs/mmi.py", "--workdir=w"], "no config file configs/mmi.py", "configs/mim.py"),
        (["--config=configs/mim.py:lrge", "--workdir=w"], "no preset 'lrge'", "large"),
        ([*GOOD, "--config.optim.peek_lr=1"], "no key 'optim.peek_lr'", "--config.optim.peak_lr=1."),
        ([*GOOD, "--config.batch_size", "3"], "no key 'batch_size'", "--config.run.batch_size=3."),
        ([*GOOD, "--config.model.batch_size=3"], "no key 'model.batch_size'", "--config.run.batch_size=3."),
        ([*GOOD, "--noconfig.kmean_start"], "no key 'kmean_start'", "--config.kmeans_start=False."),
        ([*GOOD, "--config.optim.foo=3"], "no key 'optim.foo'", "the section optim, which has betas, clip_norm, eps"),
        ([*GOOD, "--config.foo=3"], "no key 'foo'", "a key of the config, which has data, efficiency,"),
        ([*GOOD, "--config.run=3"], "section 'run' has no value", "--config.run."),
        ([*GOOD, "--config.run.batch_size=many"], "batch_size=many", "--config.run.batch_size=512"),
        ([*GOOD, "--config.run.batch_size=1.5"], "batch_size=1.5", "--config.run.batch_size=512"),
        ([*GOOD, "--config.optim.peak_lr=high"], "peak_lr=high", "--config.optim.peak_lr=0.0002"),
        ([*GOOD, "--config.optim.betas=(.9, x"], "betas=", "--config.optim.betas='(0.9, 0.99)'"),
        ([*GOOD, "--config.seed"], "config.seed", "--config.seed=0"),
        ([*GOOD, "--wrkdir=w"], "no flag --wrkdir", "--workdir=VALUE"),
        ([*GOOD, "--foo=w"], "no flag --foo", "--config, --workdir, --task"),
        (["--config=beitv2_jax/sizes.py", "--workdir=w"], "no function get_config", "--config=configs/"),
        (["--flagfile=nowhere", *GOOD], "nowhere", "--flagfile=PATH"),
        ([*GOOD, "--flagfile"], "--flagfile with no argument", "--flagfile=PATH"),
        ([*GOOD, "stray"], "argument 'stray' is not expected", "in quotes"),
        (["--config.seed=1", *GOOD], "--config.seed=1 comes before --config", "--config=FILE --config.seed=1"),
    ],
)
def test_mistakes_are_explained(arguments, happened, instead):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert happened in caught.value.happened
    assert instead in caught.value.instead
    assert caught.value.meant.endswith(("?", ".")) and caught.value.instead.endswith(".")


def _run(*arguments, code=None, **environment):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "beitv2_jax.main"]
    environment = {**os.environ, **environment}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_mistake_is_printed_without_traceback_and_exits_2(tmp_path):
    result = _run("--config=configs/vqkd.py", f"--workdir={tmp_path}/w", "--config.teacher.weigths=x")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "Error: The config has no key 'teacher.weigths'.",
        "  Did you mean 'teacher.weights', whose value is ''?",
        "  Write --config.teacher.weights=x.",
    ]
    assert not (tmp_path / "w").exists()


SECOND = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    "environment, happened, instead",
    [
        ({"JAX_ENABLE_X64": "1"}, "jax is set to jax_enable_x64=True", "Unset JAX_ENABLE_X64"),
        ({"JAX_DISABLE_JIT": "maybe"}, "jax cannot be imported", "Unset"),
        (SECOND | {"JAX_COORDINATOR_ADDRESS": ""}, "cannot be connected", "JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (SECOND | {"JAX_COORDINATOR_ADDRESS": "nowhere"}, "cannot be connected", "JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    ],
)
def test_an_environment_that_cannot_be_used_is_told_before_the_run(tmp_path, environment, happened, instead):
    result = _run("--config=configs/finetune.py:smoke", f"--workdir={tmp_path}/w", **environment)
    lines = result.stderr.splitlines()[-3:]
    assert result.returncode == 2
    assert happened in lines[0] and instead in lines[2]
    assert not (tmp_path / "w").exists()


def test_a_file_of_the_package_started_as_a_script_says_what_to_write():
    result = subprocess.run([sys.executable, "beitv2_jax/main.py", *GOOD], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 3
    assert "python -m beitv2_jax.main" in result.stderr


def test_a_message_is_one_write_so_that_processes_may_share_a_stream(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    command = [sys.executable, "-m", "beitv2_jax.main", "--config=configs/vqkd.py", f"--workdir={tmp_path}/w"]
    subprocess.run([*command, "--config.teacher.weigths=x"], cwd=ROOT, stderr=theirs, timeout=120)
    assert ours.recv(10_000).endswith(b"--config.teacher.weights=x.\n")


def test_a_contradiction_is_printed_before_jax_is_loaded(tmp_path):
    code = (
        "import sys\n"
        "from beitv2_jax import main\n"
        "assert 'jax' not in sys.modules\n"
        "try:\n"
        "    main.main()\n"
        "finally:\n"
        "    assert 'jax' not in sys.modules\n"
    )
    result = _run("--config=configs/vqkd.py", f"--workdir={tmp_path}/w", code=code)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("Error: teacher.features=''")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("task", ["run", "verify"])
def test_the_stage_gets_the_config_and_an_absolute_workdir(tmp_path, task, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code = (
        "import sys, types\n"
        "stages = types.ModuleType('beitv2_jax.runners.stages')\n"
        f"def {task}_stage(config, workdir, defaults, allow_config_change=False):\n"
        "    import jax\n"
        "    print(config.stage, config.teacher.weights, workdir, jax.config.jax_compilation_cache_dir, end=' ')\n"
        "    print(allow_config_change)\n"
        "    return {'metrics': {}}\n"
        f"stages.{task}_stage = {task}_stage\n"
        "sys.modules['beitv2_jax.runners.stages'] = stages\n"
        "from beitv2_jax import main\n"
        "main.main()\n"
    )
    result = _run(
        "--config=configs/vqkd.py:smoke",
        "--workdir=~/relative",
        "--allow_config_change" if task == "run" else f"--task={task}",
        "--config.teacher.weights=x",
        f"--compilation_cache={tmp_path}/cache",
        code=code,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["vqkd", "x", f"{tmp_path}/relative", f"{tmp_path}/cache", str(task == "run")]


def test_ctrl_c_before_a_stage_runs_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.app, "run", interrupted)
    monkeypatch.setattr(main.launch, "keep_running_without_log", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "Interrupted before there was anything to save; the same command starts again.\n"
    )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_that_takes_nothing_changes_no_exit_code(stream):
    """stdout gets a page of help, stderr an error."""
    arguments = (
        ["--config=configs/vqkd.py:smoke", "--workdir=w", "--helpfull"] if stream == "stdout" else ["--workdir=w"]
    )
    expected = subprocess.run([sys.executable, "-m", "beitv2_jax.main", *arguments], capture_output=True)
    assert getattr(expected, stream)
    reading, broken_pipe = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full_disk, os.fdopen(broken_pipe, "w") as pipe:
        for taker in (full_disk, pipe):
            other = {"stdout": "stderr", "stderr": "stdout"}[stream]
            found = subprocess.run(
                [sys.executable, "-m", "beitv2_jax.main", *arguments],
                **{stream: taker, other: subprocess.PIPE},
                text=True,
            )
            assert found.returncode == expected.returncode
            assert "Traceback" not in (found.stderr or "") and "Exception ignored" not in (found.stderr or "")


def test_progress_goes_on_where_nothing_can_be_shown():
    program = """
from beitv2_jax.runtime import launch
from beitv2_jax.training.writer import Progress
launch.keep_running_without_log()
progress = Progress(1000, "toy", "steps")
for _ in range(1000):
    progress.advance()
    progress.show({"loss": 1.0})
progress.close()
raise SystemExit(75)
"""
    with open("/dev/full", "w") as full_disk:
        found = subprocess.run([sys.executable, "-c", program], stdout=full_disk, stderr=full_disk)
    assert found.returncode == 75
