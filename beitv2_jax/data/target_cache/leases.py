"""Leases on shards: files with a heartbeat, for any number of processes on one file system.

Leases only avoid duplicate work; correctness does not depend on them: two workers on one shard write the same bytes,
and each renames whole files.
"""

import contextlib
import json
import os
import pathlib
import threading
import time
import uuid

from absl import logging

from beitv2_jax.runtime import heartbeat
from beitv2_jax.runtime.atomic_files import write_over

HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 180.0
"""A lease whose heartbeat has not changed for this long is free; longer than network file systems show old contents."""


class Leases:
    """The leases of one worker in `directory`; a thread renews them until they are released or the worker dies.

    A lease is a file that only one process can create. It is free again when its worker released it, when its worker
    was a process of this machine that is no longer there, or when its heartbeat stood still for `stale_seconds` on this
    process's clock: clocks of machines are never compared. A lease without an owner was left by a worker that died
    while writing it, because a live worker completes it with its next heartbeat: it is free after two heartbeats.

    Use as a context manager: leaving it releases what is held.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ):
        self._directory = pathlib.Path(directory)
        self._heartbeat_seconds, self._stale_seconds = heartbeat_seconds, stale_seconds
        self._owner = {"machine": heartbeat.machine(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._beats = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self, name: str) -> bool:
        """Try to lease `name` and return whether it is ours now."""
        if name in self._held:
            return False
        path = self._path(name)
        if self._is_left_over(name, path):
            path.unlink(missing_ok=True)
        try:
            with self._lock, open(path, "x") as file:
                file.write(self._content())
                self._held.add(name)
        except (FileExistsError, FileNotFoundError):  # another's, or the folder has gone
            return False
        return True

    def release(self, name: str) -> None:
        """Release `name`, unless another worker has taken it over."""
        with self._lock:
            self._held.discard(name)
            if self._is_ours(self._path(name)):
                self._path(name).unlink(missing_ok=True)

    def any_is_held(self, poll_seconds: float = 0.5) -> bool:
        """Tell whether a worker holds a lease in the directory, and remove those of workers that have died.

        A worker of this machine is looked up. Of one of another machine only the heartbeat tells, so that this may take
        `stale_seconds`.
        """
        first = {path: _read(path) for path in self._directory.glob("*.lease")}
        while True:
            for path in self._directory.glob("*.lease"):
                content = _read(path)
                if self._is_left_over(path.stem, path):
                    path.unlink(missing_ok=True)
                elif content != first.get(path) or heartbeat.is_alive(content, self._owner["machine"]):
                    return True
            if not any(self._directory.glob("*.lease")):
                return False
            logging.log_first_n(
                logging.INFO,
                "waiting up to %d s to see whether the process of another machine that wrote to %s is alive",
                1,
                self._stale_seconds,
                self._directory,
            )
            time.sleep(poll_seconds)

    def _is_left_over(self, name: str, path: pathlib.Path) -> bool:
        """Return whether there is a lease that is not renewed. The first look at a heartbeat only starts its clock."""
        content = _read(path)
        if content is None:
            return False
        if heartbeat.is_dead(content, self._owner["machine"]):
            return True
        now = time.monotonic()
        before, since = self._seen.get(name, (None, now))
        if content != before:
            self._seen[name] = content, now
            return False
        return now - since > (self._stale_seconds if _is_whole(content) else 2 * self._heartbeat_seconds)

    def _is_ours(self, path: pathlib.Path) -> bool:
        return self._owner["token"].encode() in (_read(path) or b"")

    def _renew(self) -> None:
        while not self._stop.wait(self._heartbeat_seconds):
            with self._lock:
                self._beats += 1
                for name in self._held:
                    # a beat that fails is made up by the next
                    with contextlib.suppress(OSError):
                        if self._is_ours(self._path(name)):
                            write_over(self._path(name), self._content())

    def _content(self) -> str:
        return json.dumps({**self._owner, "beats": self._beats})

    def _path(self, name: str) -> pathlib.Path:
        return self._directory / f"{name}.lease"

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        for name in tuple(self._held):
            self.release(name)


def _read(path: pathlib.Path) -> bytes | None:
    """Return what a lease holds; None if it is gone."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _is_whole(content: bytes) -> bool:
    try:
        return "pid" in json.loads(content)
    except (ValueError, TypeError):
        return False
