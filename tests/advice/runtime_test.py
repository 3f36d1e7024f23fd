"""Every error about the machine and its environment: provoked, its advice followed, and then it is gone."""

import builtins
import errno
import importlib.util

import jax
import pytest
from user_errors import check_all_provoked, provoked

from beitv2_jax.runtime import buckets, disk_checks, launch, open_files, workdir_lock


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "gs:/d"])
def test_paths_that_are_patterns(name, tmp_path):
    with provoked("without [, ], * and ? and without a folder whose name ends in ':'"):
        disk_checks.refuse_pattern(tmp_path / name)
    disk_checks.refuse_pattern(tmp_path / name.translate(str.maketrans("[]*?:", "_____")))


def test_numbers_of_processes(monkeypatch):
    with provoked("Set JAX_NUM_PROCESSES to a number, or unset it for a run of one process"):
        launch.process_place({"JAX_NUM_PROCESSES": "two"})
    assert launch.process_place({"JAX_NUM_PROCESSES": "2"}) == {"num_processes": 2}
    assert launch.process_place({}) == {}


def test_settings_of_jax():
    jax.config.update("jax_random_seed_offset", 3)
    try:
        with provoked("Unset JAX_RANDOM_SEED_OFFSET"):
            launch.check_jax_settings()
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    launch.check_jax_settings()


def test_a_setting_that_jax_does_not_know(monkeypatch):
    load = builtins.__import__

    def failing(name, *arguments):
        if name == "jax":
            raise ValueError("JAX_LOG_COMPILES is 'maybe'")
        return load(name, *arguments)

    with monkeypatch.context() as patch, provoked("Unset that variable"):
        patch.setattr(builtins, "__import__", failing)
        launch.check_jax_settings()
    launch.check_jax_settings()


def failing_with(error):
    def fail(*_, **__):
        raise error

    return fail


def test_devices_and_other_processes(monkeypatch):
    with monkeypatch.context() as patch, provoked("or set JAX_PLATFORMS=cpu to compute on the CPU"):
        patch.setattr(jax, "devices", failing_with(RuntimeError("Unable to initialize backend 'tpu'")))
        launch.start_jax(False, "")
    patch = monkeypatch.context()
    with patch as patched, provoked("write --nodistributed for a run of one process"):
        patched.setattr(
            jax.distributed, "initialize", failing_with(ValueError("coordinator_address should be defined."))
        )
        launch.start_jax(True, "")
    launch.start_jax(False, "")  # JAX_PLATFORMS is cpu in the tests; False is --nodistributed


def test_disks_and_files_of_others(tmp_path, monkeypatch):
    error = launch.failed_write(OSError(errno.ENOSPC, "full", str(tmp_path / "metrics.jsonl")))
    assert "Free space there or change the permissions" in error.instead and "another --workdir" in error.instead
    with monkeypatch.context() as patch, provoked("Use another --workdir, or let that user run chmod -R a+rwX"):
        (tmp_path / "lock").touch()
        patch.setattr(workdir_lock, "open", failing_with(PermissionError(13, "Permission denied")), raising=False)
        with workdir_lock.held(tmp_path):
            pass
    (tmp_path / "another").mkdir()
    for workdir in (tmp_path, tmp_path / "another"):
        with workdir_lock.held(workdir):
            pass


def test_a_workdir_in_use(tmp_path):
    (tmp_path / "another").mkdir()
    with workdir_lock.held(tmp_path), provoked("Wait for that run, stop it, or use another --workdir"):
        with workdir_lock.held(tmp_path / "another"):
            pass
        with workdir_lock.held(tmp_path):
            pass
    with workdir_lock.held(tmp_path):
        pass


def test_open_files():
    # that more can be opened with a higher limit is tried in tests/runtime/open_files_test.py
    assert "ulimit -n 65536" in open_files.too_many(OSError(errno.EMFILE, "Too many open files")).instead


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs the extra gcs")
def test_buckets(bucket, monkeypatch):
    with provoked("Write --workdir=gs://BUCKET/FOLDER of a bucket that the account may use") as caught:
        buckets.refuse_unwritable("gs://forbidden/run")
    assert "Give the same command again when that is repaired" in buckets.unusable(caught.value.__cause__).instead
    buckets.refuse_unwritable("gs://bucket/run")
    buckets._prepare_gcsfs.cache_clear()
    with monkeypatch.context() as patch, provoked('Run pip install "beitv2_jax[gcs]"'):
        patch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
        buckets._prepare_gcsfs()
    buckets._prepare_gcsfs()


def test_every_error_about_the_machine_was_provoked(request):
    check_all_provoked(request, "runtime")
