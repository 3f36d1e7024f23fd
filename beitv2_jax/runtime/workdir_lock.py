"""A workdir belongs to one training run at a time: a lock that the system takes back when the process ends.

Around everything that a stage writes to its workdir. Buckets have no locks: there a run renews an object that says who
holds the workdir, and a run that sees another one renew it is refused.
"""

import contextlib
import fcntl
import json
import os
import pwd
import shlex
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import jax
from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import buckets, heartbeat
from beitv2_jax.runtime.buckets import AnyPath

LOCK_FILE = "lock"
PATIENCE_SECONDS, POLL_SECONDS = 120.0, 2.0
"""How long the lock of another machine is waited for: a file server keeps that of a machine it lost for 90 s or so."""
RENEWAL_SECONDS, SETTLING_SECONDS = 20.0, 1.0
"""In a bucket: time between two renewals, and from writing the object to reading whether another start wrote it too."""


@contextlib.contextmanager
def held(workdir: str | AnyPath) -> Iterator[None]:
    """Hold `workdir` for the run of this process, or of all processes if this is process 0 of several.

    Raises:
        UserError: another run holds it, or its lock file belongs to another user.
    """
    if jax.process_index() != 0:
        yield
        return
    if buckets.is_remote(workdir):
        with _held_in_bucket(buckets.as_path(workdir) / LOCK_FILE, workdir):
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
                raise _in_use(workdir, holder) from error
        logging.info("%s is held by %s: waiting for it up to %d s", workdir, holder, PATIENCE_SECONDS)
        time.sleep(POLL_SECONDS)


def _in_use(workdir: str | AnyPath, holder: str) -> UserError:
    return UserError(
        f"{workdir} is in use by another run: {holder}.",
        "Did you start the same command twice?",
        "Wait for that run, stop it, or use another --workdir.",
    )


@contextlib.contextmanager
def _held_in_bucket(path: AnyPath, workdir: str | AnyPath) -> Iterator[None]:
    here = heartbeat.machine()
    owner = {"machine": here, "pid": os.getpid(), "host": socket.gethostname(), "token": uuid.uuid4().hex}
    _await_no_renewal(path, workdir, here)
    _write_lock(path, owner, 0)
    time.sleep(SETTLING_SECONDS)
    if (found := _read_lock(path)) and not _is_of(owner, found):
        raise _in_use(workdir, _holder(found))
    over = threading.Event()

    def renew() -> None:
        renewals = 0
        while not over.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):  # the next renewal makes up for one that fails
                if _is_of(owner, _read_lock(path)):
                    _write_lock(path, owner, renewals := renewals + 1)

    renewing = threading.Thread(target=renew, name="workdir lock", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        with contextlib.suppress(OSError), buckets.os_errors():
            if _is_of(owner, _read_lock(path)):
                path.unlink()


def _await_no_renewal(path: AnyPath, workdir: str | AnyPath, here: str) -> None:
    """Return when the lock is free: there is none, its process has ended, or it was not renewed for a long time."""
    first, started = _read_lock(path), time.monotonic()
    if first and not heartbeat.is_dead(first, here):
        logging.info("%s may be held by %s: it is watched for up to %d s", workdir, _holder(first), PATIENCE_SECONDS)
    while (found := _read_lock(path)) and not heartbeat.is_dead(found, here):
        if found != first:
            raise _in_use(workdir, _holder(found))
        if time.monotonic() - started > PATIENCE_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _read_lock(path: AnyPath) -> bytes:
    try:
        with buckets.os_errors():
            return path.read_bytes()
    except FileNotFoundError:
        return b""


def _write_lock(path: AnyPath, owner: dict[str, str | int], renewals: int) -> None:
    buckets.write_object(path, json.dumps({**owner, "renewals": renewals}).encode())


def _is_of(owner: dict[str, str | int], content: bytes) -> bool:
    return str(owner["token"]).encode() in content


def _holder(content: bytes) -> str:
    try:
        return "process {pid} on {host}".format(**json.loads(content))
    except (ValueError, TypeError, KeyError):
        return "an unknown process"
