"""Text files that are whole or not there, and heartbeats that are never half-written (floor 0)."""

import os
import uuid
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a name of its own and rename it: nobody sees half of it, several may write it at once."""
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def write_over(path: str | Path, text: str) -> None:
    """Write text over what a file holds, in one piece and with spaces where it was longer: it is at no moment empty.

    For a page that one process writes again and again: a process that dies at it leaves the old text or the new one,
    and network file systems, which show a renamed file late, show this one soon.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, text.encode().ljust(os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)
