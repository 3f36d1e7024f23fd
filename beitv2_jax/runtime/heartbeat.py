"""Who wrote a heartbeat or lease file, and whether that process still exists."""

import contextlib
import json
import os
import pathlib
import socket


def machine() -> str:
    """Return a name for this boot of this machine and its process id namespace, within which process ids are unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # where there is no /proc, the host's name has to do
        parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def is_dead(content: bytes, here: str) -> bool:
    """Return whether a heartbeat (`machine` and `pid` in JSON) is of a process of the machine `here` that has ended."""
    return _exists(content, here) is False


def is_alive(content: bytes, here: str) -> bool:
    """Return whether a heartbeat is of a process of the machine `here` that exists."""
    return _exists(content, here) is True


def _exists(content: bytes, here: str) -> bool | None:
    """Return whether the process of a heartbeat exists; None where this machine cannot know."""
    try:
        owner = json.loads(content)
        if owner["machine"] != here:
            return None
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    except (ValueError, KeyError, TypeError, OSError, OverflowError):
        return None
    return True
