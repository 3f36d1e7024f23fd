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


def refuse_remote(flag: str, path: str) -> None:
    """Raise UserError if the `path` that `flag` gives is a remote address such as gs://bucket/runs."""
    scheme = re.search(r"[A-Za-z][\w+.-]*://", path)
    if scheme is None:
        return
    mounted = shlex.quote(path.replace(scheme[0], "/mnt/"))
    raise UserError(
        f"{flag}={path} is a remote address, and only mounted file systems are read and written.",
        "Did you mean a bucket that is mounted, or a copy of what it holds?",
        f"Mount it, for example at /mnt, or copy what is needed, and write {flag}={mounted}.",
    )
