"""The start of a process: what it takes from the environment, and what it refuses there."""

import errno

import jax
import pytest

from beitv2_jax import main
from beitv2_jax.errors import UserError
from beitv2_jax.runtime import launch
from beitv2_jax.runtime.launch import in_cluster, process_place


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # inside sbatch, but not started by srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"JAX_NUM_PROCESSES": "", "SLURM_STEP_NUM_TASKS": "", "OMPI_COMM_WORLD_SIZE": ""}, False),
        ({"JAX_NUM_PROCESSES": "1"}, False),
        ({"JAX_NUM_PROCESSES": "3"}, True),
    ],
)
def test_in_cluster(environment, expected):
    assert in_cluster(environment) is expected


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, {}),
        ({"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": " "}, {}),
        ({"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}, {"num_processes": 3, "process_id": 0}),
        ({"JAX_NUM_PROCESSES": "3"}, {"num_processes": 3}),  # the cluster gives jax the rest
    ],
)
def test_process_place(environment, expected):
    assert process_place(environment) == expected


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_number_of_processes_that_is_no_number_is_refused(name):
    with pytest.raises(UserError, match=f"{name} is 'two'") as caught:
        in_cluster({name: "two"})
    assert name in caught.value.instead


OTHERS = {
    "jax_enable_x64": True,
    "jax_disable_jit": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 3,
}


@pytest.mark.parametrize("name", OTHERS)
def test_settings_of_jax_that_break_a_run_or_change_its_draws_are_refused(name):
    launch.check_jax_settings()
    default = getattr(jax.config, name)
    jax.config.update(name, OTHERS[name])
    try:
        with pytest.raises(UserError, match=f"{name}=") as caught:
            launch.check_jax_settings()
        assert caught.value.instead.startswith(f"Unset {name.upper()}:")
    finally:
        jax.config.update(name, default)
    launch.check_jax_settings()


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu': it is in use"), AssertionError()])
def test_a_missing_device_is_told_in_a_message(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match="no device it can use") as caught:
        launch.start_jax(False, "")
    assert str(error) in caught.value.happened and "JAX_PLATFORMS=cpu" in caught.value.instead
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)  # a lost machine is no mistake of the user
    with pytest.raises(type(error)):
        launch.start_jax(False, "")


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENOSPC, "full"), "A file of this run cannot be opened or written: No space left on device."),
        (PermissionError(errno.EACCES, "no", "/w/metrics.jsonl"), "/w/metrics.jsonl cannot be opened or written"),
        (FileNotFoundError(errno.ENOENT, "gone", "/w/a"), None),
        (ValueError("something else"), None),
    ],
)
def test_a_full_disk_and_files_of_others_are_told_without_a_traceback(error, expected, monkeypatch, capsys):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(main.app, "run", run)
    with pytest.raises(SystemExit) as ended:
        main.main()
    printed = capsys.readouterr().err
    assert ended.value.code == (2 if expected else 1)
    assert ("Traceback" in printed) == (expected is None)
    assert printed.startswith(f"Error: {expected}" if expected else "Traceback")
