"""Which config keys hold paths, and what a path may not be."""

import re
import shlex

from beitv2_jax.errors import UserError

PATH_KEYS = (
    "init_from",
    "data.source",
    "data.data_dir",
    "teacher.weights",
    "teacher.features",
    "tokenizer.run",
    "tokenizer.codes",
    "backbone.run",
)
"""Keys of a stage's config whose value is a path, or a path after the kind of a data source."""
_NEVER_IN_BUCKETS = ("teacher.features", "tokenizer.codes")
"""Target caches."""


def may_be_in_bucket(key: str, source: str) -> bool:
    """Tell whether the value of one of `PATH_KEYS` may begin with gs://; `source` is the value of data.source."""
    if key == "data.source":
        return source.startswith("arrayrecord:")
    return source.startswith("tfds:") if key == "data.data_dir" else key not in _NEVER_IN_BUCKETS


def refuse_remote(flag: str, path: str, *, buckets: bool = False) -> None:
    """Raise UserError if the `path` that `flag` gives is a remote address such as s3://bucket/runs.

    Args:
        buckets: addresses of Cloud Storage, which begin with gs://, are read and written here.
    """
    scheme = re.search(r"[A-Za-z][\w+.-]*://", path)
    if scheme is None or (buckets and scheme[0] == "gs://"):
        return
    mounted = shlex.quote(path.replace(scheme[0], "/mnt/"))
    only = "buckets of Cloud Storage (gs://) and mounted file systems" if buckets else "mounted file systems"
    raise UserError(
        f"{flag}={path} is a remote address, and only {only} are read and written{'' if buckets else ' there'}.",
        "Did you mean a bucket that is mounted, or a copy of what it holds?"
        + " Target caches, image folders and config files cannot lie in a bucket." * (scheme[0] == "gs://"),
        f"Mount it, for example at /mnt, or copy what is needed, and write {flag}={mounted}.",
    )
