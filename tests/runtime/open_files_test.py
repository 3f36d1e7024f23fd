"""The limit of open files: raised at the start, and distinguished from a full disk where it is reached."""

import errno
import os
import resource

import pytest

from beitv2_jax.runtime import disk_checks, open_files


@pytest.fixture
def limits():
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield former
    resource.setrlimit(resource.RLIMIT_NOFILE, former)


def test_the_soft_limit_is_raised_to_the_hard_one(limits):
    _, hard = limits
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    assert open_files.limit() == 512
    open_files.raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard)
    assert open_files.limit() == wanted
    # never lowered
    if wanted < hard or hard == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted + 1, hard))
        open_files.raise_limit()
        assert open_files.limit() == wanted + 1


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENFILE, "x"), True),
        (RuntimeError("open() failed: Too many open files; opening a"), True),
        (ValueError("Error opening 'a' [source locations='b'] [os_error_code='24']"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("Corrupted file"), False),
    ],
)
def test_a_save_without_files_left_is_no_full_disk(error, exhausted):
    assert open_files.is_exhausted(disk_checks.cause_of(error)) == exhausted
    meant, instead = disk_checks.remedy(disk_checks.cause_of(error))
    assert ("ulimit -n" in instead) == exhausted != ("The disk" in meant)


def test_the_limit_is_named_where_it_is_reached():
    error = open_files.too_many(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert str(open_files.limit()) in error.happened and "ulimit -n 65536" in error.instead
