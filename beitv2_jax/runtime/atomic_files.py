"""Atomic writes of text and JSON files, and of heartbeat files."""

import contextlib
import io
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from beitv2_jax.runtime import buckets


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file under a temporary name, which becomes `path` at the end: complete or absent, for many writers.

    It is on the disk before it is renamed: a power cut leaves the old file or the new one, never an empty one. In a
    bucket, which has no rename, it is held in memory and written whole.
    """
    if buckets.is_remote(path):
        memory = io.BytesIO() if "b" in mode else io.StringIO()
        yield memory
        content = memory.getvalue()
        buckets.write_object(path, content if isinstance(content, bytes) else content.encode())
        return
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every file system can bring a folder to the disk
        sync(os.path.dirname(os.path.abspath(path)))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path) as file:
        file.write(text)


def sync(path: str | Path) -> None:
    """Bring a closed file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as `write_text` does, as `json_text` lays it out over several lines."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON, which has no NaN and no infinity: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_over(path: str | Path, text: str) -> None:
    """Write text over what a file holds, in one piece and with spaces where it was longer: it is at no moment empty.

    For a page that one process writes again and again: a process that dies at it leaves the old text or the new one,
    and network file systems, which show a renamed file late, show this one soon. In a bucket the object is replaced.
    """
    if buckets.is_remote(path):
        buckets.write_object(path, text.encode())
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, text.encode().ljust(os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)
