"""The number of files that this process may have open."""

import contextlib
import errno
import os
import resource

from beitv2_jax.errors import UserError

WANTED = 65536
REMEDY = (
    "Raise the limit before the command: `ulimit -n 65536` as root, `nofile` in /etc/security/limits.conf, `docker run "
    "--ulimit nofile=65536:65536`, or LimitNOFILE of the service that starts the run."
)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def raise_limit() -> None:
    """Raise the soft limit of this process, and of those it starts, to the hard limit or `WANTED`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may allow less than its hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """Return how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return WANTED if soft == resource.RLIM_INFINITY else soft


def is_exhausted(error: BaseException | str) -> bool:
    """Return whether `error`, of the system or a message that quotes it, says that no more files can be opened."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _EXHAUSTED
    return any(os.strerror(number) in str(error) for number in _EXHAUSTED)


def too_many(error: BaseException) -> UserError:
    """Return the error that says what is needed where no more files can be opened."""
    return UserError(
        f"No more files can be opened ({error}); this process may have {limit()} open at a time.",
        "The hard limit of open files may be too low for this run.",
        REMEDY,
    )
