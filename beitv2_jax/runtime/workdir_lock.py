"""A workdir belongs to one training run at a time: a lock that the system takes back when the process ends.

Around everything that a stage writes to its workdir.
"""

import contextlib
import fcntl
import os
import pwd
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax
from absl import logging

from beitv2_jax.errors import UserError

LOCK_FILE = "lock"
PATIENCE_SECONDS, POLL_SECONDS = 120.0, 2.0
"""How long the lock of another machine is waited for: a file server keeps that of a machine it lost for 90 s or so."""


@contextlib.contextmanager
def held(workdir: str | Path) -> Iterator[None]:
    """Hold `workdir` for the run of this process, or of all processes if this is process 0 of several.

    Raises:
        UserError: another run holds it, or its lock file belongs to another user.
    """
    if jax.process_index() != 0:
        yield
        return
    with _opened(Path(workdir) / LOCK_FILE) as file:
        try:
            _lock(file, workdir)
        except OSError as error:
            logging.warning("%s is on a file system without locks (%s): start no second run there", workdir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _opened(path: Path) -> IO[str]:
    try:
        return open(path, "a+")
    except PermissionError as error:
        number = path.stat().st_uid
        try:
            owner = f"user {pwd.getpwuid(number).pw_name}"
        except KeyError:
            owner = f"the user of number {number}"
        raise UserError(
            f"The run in {path.parent} belongs to {owner}: this user may not write to its lock file.",
            "Did another user start this run, or did you start it in a container as another user?",
            f"Use another --workdir, or let that user run chmod -R a+rwX {shlex.quote(str(path.parent))}.",
        ) from error


def _lock(file: IO[str], workdir: str | Path) -> None:
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read()
            nearby = holder.endswith(f" on {socket.gethostname()}")
            if nearby or time.monotonic() - started > PATIENCE_SECONDS:
                raise UserError(
                    f"{workdir} is in use by another run: {holder}.",
                    "Did you start the same command twice?",
                    "Wait for that run, stop it, or use another --workdir.",
                ) from error
        logging.info("%s is held by %s: waiting for it up to %d s", workdir, holder, PATIENCE_SECONDS)
        time.sleep(POLL_SECONDS)
