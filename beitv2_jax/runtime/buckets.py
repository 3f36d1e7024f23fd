"""Paths of buckets (gs://...) beside those of mounted file systems: what differs between the two is known here.

A bucket holds objects. One appears when all of it is written, is replaced as a whole, and cannot be appended to, locked
or renamed; folders exist only as the beginnings of names.
"""

import atexit
import contextlib
import errno
import functools
import glob
import importlib.util
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("EPATH_USE_TF", "false")  # gcsfs reads and writes, whether TensorFlow is installed or not

from etils import epath

from beitv2_jax.errors import UserError

SCHEME = "gs://"
AnyPath = Path | epath.Path
_NEEDED = (
    "An account needs the roles Storage Object User and Storage Legacy Bucket Reader; where the machine has none "
    "of its own, run `gcloud auth application-default login`."
)


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether `path` lies in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def as_path(path: str | os.PathLike) -> AnyPath:
    """Return a pathlib path, or one with the same methods for a path in a bucket.

    Raises:
        UserError: gcsfs, which reads and writes buckets, is not installed.
    """
    if not is_remote(path):
        return Path(path)
    _prepare_gcsfs()
    return epath.Path(path)


def absolute(path: str | os.PathLike) -> str:
    """Return an absolute path, in which '..' and double slashes are resolved."""
    if not is_remote(path):
        return os.path.abspath(path)
    return SCHEME + posixpath.normpath(os.fspath(path).removeprefix(SCHEME)).lstrip("/")


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Turn the errors of gcsfs, which has classes of its own for what the service answers, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def write_object(path: str | os.PathLike, content: bytes) -> None:
    """Write a whole object.

    Raises:
        OSError: it could not be written, for whatever reason.
    """
    target = as_path(path)
    with os_errors():
        target.write_bytes(content)


def sizes(folder: str | os.PathLike) -> dict[str, int]:
    """Return {path below `folder`: bytes} of all files in its sub-folders, at any depth."""
    if not is_remote(folder):
        found = (path for path in Path(folder).glob("*/**/*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    system, root = _file_system(folder)
    below = {name.removeprefix(root).lstrip("/"): entry for name, entry in system.find(root, detail=True).items()}
    return {name: entry["size"] for name, entry in below.items() if "/" in name}


def size(file: str) -> int:
    """Return the size of a file in bytes."""
    return as_path(file).stat().length if is_remote(file) else os.path.getsize(file)


def matching_files(pattern: str) -> list[str]:
    """Return the sorted files that match a glob."""
    if not is_remote(pattern):
        found = glob.glob(os.path.expanduser(pattern), recursive=True)
        return sorted(file for file in found if os.path.isfile(file))
    system, pattern = _file_system(pattern)
    return sorted(SCHEME + name for name, entry in system.glob(pattern, detail=True).items() if entry["type"] == "file")


@functools.lru_cache
def local_copy(path: str) -> Path:
    """Return `path`, or, of one in a bucket, a copy on this machine that is deleted when the process ends.

    Of a folder the files in it are copied, those of sub-folders are not.
    """
    if not is_remote(path):
        return Path(path)
    folder = tempfile.mkdtemp(prefix="beitv2_jax_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, copy = as_path(path), Path(folder, posixpath.basename(path.rstrip("/")))
    system, _ = _file_system(path)
    if source.is_dir():
        copy.mkdir()
        for file in source.iterdir():
            if not file.is_dir():
                system.get_file(os.fspath(file), os.fspath(copy / file.name))
    elif source.exists():
        system.get_file(path, os.fspath(copy))
    return copy


def refuse_unwritable(workdir: str) -> None:
    """Raise UserError unless an object can be written below `workdir` in a bucket, and be deleted again."""
    probe = as_path(workdir) / f"writable-{uuid.uuid4().hex}"
    from google.cloud import storage

    try:
        storage.Client().get_bucket(workdir.removeprefix(SCHEME).partition("/")[0])  # as Orbax does
        write_object(probe, b"")
        probe.unlink()
    except Exception as error:  # gcsfs, the library for the bucket and that for the login each have their own
        raise UserError(
            f"The workdir {workdir} cannot be written: {type(error).__name__}: {' '.join(str(error).split())}.",
            "The bucket may not exist, this machine may not be logged in, or its account may not create and delete "
            "objects there.",
            f"Write --workdir=gs://BUCKET/FOLDER of a bucket that the account may use. {_NEEDED}",
        ) from error


def unusable(error: Exception) -> UserError | None:
    """Return the message for an error of the libraries that read and write buckets; None for another error."""
    libraries = ("aiohttp", "gcsfs", "google.api_core", "google.auth", "google.cloud")
    if not type(error).__module__.startswith(libraries) and not str(error).startswith("Forbidden: "):
        return None
    return UserError(
        f"A bucket cannot be read or written: {type(error).__name__}: {' '.join(str(error).split())}.",
        "This machine may not be logged in, its account may lack a role, or the network may have failed.",
        f"Give the same command again when that is repaired. {_NEEDED}",
    )


@functools.cache
def _prepare_gcsfs() -> None:
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"Addresses that begin with {SCHEME} need the package gcsfs, which is not installed.",
            "Did you install beitv2_jax without what buckets need?",
            'Run pip install "beitv2_jax[gcs]".',
        )
    import fsspec

    # what another process wrote must be seen
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _file_system(path: str | os.PathLike):
    """Return the file system of a bucket, and the path in it."""
    _prepare_gcsfs()
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))
