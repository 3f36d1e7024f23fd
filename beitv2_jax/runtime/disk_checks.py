"""Disk-space and permission checks before a save, agreed on by all processes, and the causes of failed writes.

Used by the checkpointer. If one of several processes fails in the middle of a save, the others wait for it forever; so
all of them check first whether they can write, and exchange the results.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import buckets, open_files
from beitv2_jax.runtime.buckets import AnyPath
from beitv2_jax.typing import PyTree

_LENGTH = 200
_NO_RESERVING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def cause_of(error: BaseException) -> str:
    """Return the operating system's message for a failed write, as far as `error` contains it."""
    # a failed write of an array is a ValueError that has the system's number in its text
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return os.strerror(number) if number else f"{type(error).__name__}: {str(error)[:_LENGTH]}"


def refuse_pattern(folder: str | AnyPath) -> None:
    """Raise UserError if Orbax would take the path of a folder for checkpoints for a pattern or a remote address."""
    if found := re.search(r"[\[\]*?]|:(?=/)", buckets.absolute(folder).removeprefix(buckets.SCHEME)):
        raise UserError(
            f"Checkpoints cannot be written to {folder}, because the path has the character {found[0]!r}.",
            "Orbax takes such a path for a pattern or a remote address and would not find the files that it wrote.",
            "Choose a path without [, ], * and ? and without a folder whose name ends in ':'.",
        )


def remedy(cause: str) -> tuple[str, str]:
    """Return the likely reason of a failed write and what to do; `cause` is a result of `cause_of`."""
    if open_files.is_exhausted(cause):
        return "The hard limit of open files may be too low for this run.", open_files.REMEDY
    return (
        "The disk or a quota may be full, or the permissions of the folder or its mount may have changed.",
        "Free space or repair the folder.",
    )


def free_space(folder: AnyPath) -> str:
    """Return the free space of the file system of `folder`, as text."""
    if buckets.is_remote(folder):
        return "a bucket"
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return "free space unknown"
    return f"{usage.free / 1e9:.3f} GB of {usage.total / 1e9:.1f} GB free"


@contextlib.contextmanager
def reserved(folder: AnyPath, tree: PyTree) -> Iterator[str | None]:
    """Reserve space in `folder` for the arrays of `tree` that this process writes; yield the cause if that fails.

    A bucket reserves nothing.
    """
    if buckets.is_remote(folder):
        yield None
        return
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.replica_id == 0)
    size = sum(shard.data.nbytes for shard in shards)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            # some file systems cannot reserve space; then the save itself shows whether there is enough
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            yield None if error.errno in _NO_RESERVING else cause_of(error)
        else:
            yield None


def agreed(cause: str | None) -> str | None:
    """Return the causes of all processes with their numbers, None if there are none; all must call it together."""
    if jax.process_count() == 1:
        return cause
    text = (cause or "").encode()[:_LENGTH].ljust(_LENGTH)
    everyones = np.asarray(multihost_utils.process_allgather(np.frombuffer(text, np.uint8)))
    causes = {index: row.tobytes().decode(errors="ignore").strip() for index, row in enumerate(everyones)}
    return "; ".join(f"{text} (process {index})" for index, text in causes.items() if text) or None
