"""Checksums of the files of a checkpoint: written into its folder, checked before it is used.

Orbax finds a damaged index, but returns a large array in which a byte has changed. A bucket has checksums of
its objects and checks them itself, so only their sizes are written there.
"""

import json
import zlib
from collections.abc import Collection

from beitv2_jax.runtime import buckets
from beitv2_jax.runtime.atomic_files import write_text
from beitv2_jax.runtime.buckets import AnyPath

CHECKSUMS_FILE = "checksums.json"
_CHUNK = 1 << 22


def write_checksums(folder: AnyPath) -> None:
    """Write size and CRC-32 of the files of all items, the folders in `folder`, to checksums.json in it."""
    remote = buckets.is_remote(folder)
    sums = {
        name: [size, None if remote else _crc32(folder / name)] for name, size in sorted(buckets.sizes(folder).items())
    }
    write_text(folder / CHECKSUMS_FILE, json.dumps(sums, indent=0) + "\n")


def find_damage(folder: AnyPath, items: Collection[str] = ()) -> str | None:
    """Return what is wrong with the files of `folder`, None if they are as they were written; others may be added.

    Args:
        items: the folders in it that are looked at; all if there are none.
    """
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_bytes())
        listed = [(name, size, crc32) for name, (size, crc32) in sums.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{CHECKSUMS_FILE} is missing or damaged"
    found = buckets.sizes(folder)
    for name, size, crc32 in listed:
        if items and name.split("/")[0] not in items:
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes of {size}"
        if crc32 is not None and _crc32(folder / name) != crc32:
            return f"{name} holds other bytes than were written"
    return None


def _crc32(path: AnyPath) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
