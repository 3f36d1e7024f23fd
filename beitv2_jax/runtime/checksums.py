"""Checksums of the files of a checkpoint: written into its folder, checked before it is used.

Orbax finds a damaged index by itself; a byte that changed inside a large array it hands over.
"""

import json
import zlib
from collections.abc import Collection
from pathlib import Path

from beitv2_jax.runtime.atomic_files import write_text

CHECKSUMS_FILE = "checksums.json"
_CHUNK = 1 << 22


def write_checksums(folder: Path) -> None:
    """Write size and CRC-32 of the files of all items, the folders in `folder`, to checksums.json in it."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, _crc32(path)] for path in files}
    write_text(folder / CHECKSUMS_FILE, json.dumps(sums, indent=0) + "\n")


def find_damage(folder: Path, items: Collection[str] = ()) -> str | None:
    """Return what is wrong with the files of `folder`, None if they are as they were written; others may be added.

    Args:
        items: the folders in it that are looked at; all if there are none.
    """
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_bytes())
        listed = [(name, size, crc32) for name, (size, crc32) in sums.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} is missing or damaged"
    for name, size, crc32 in listed:
        if items and name.split("/")[0] not in items:
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _crc32(path) != crc32:
            return f"{name} holds other bytes than were written"
    return None


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
