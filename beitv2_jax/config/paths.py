"""Which config keys hold paths, and what a path may not be."""

import re
import shlex
from typing import NamedTuple

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
WEIGHT_KEYS = ("init_from", "teacher.weights", "tokenizer.run", "backbone.run")
"""Those of them that name weights, which may also lie on the Hugging Face hub."""
PIXELS = "pixels"
"""Value of teacher.weights that names no network: its features of a patch are the pixels of the patch."""
HUB = "hf:"
"""Start of an address of the Hugging Face hub."""
_NEVER_IN_BUCKETS = ("teacher.features", "tokenizer.codes")
"""Target caches."""


def may_be_in_bucket(key: str, source: str) -> bool:
    """Tell whether the value of one of `PATH_KEYS` may begin with gs://; `source` is the value of data.source."""
    if key == "data.source":
        return source.startswith("arrayrecord:")
    return source.startswith("tfds:") if key == "data.data_dir" else key not in _NEVER_IN_BUCKETS


class HubAddress(NamedTuple):
    """Weights on the Hugging Face hub; `revision` None is the main branch, `file` None the usual file."""

    repo: str
    revision: str | None
    file: str | None


def parse_hub(flag: str, address: str) -> HubAddress:
    """Return the parts of hf:OWNER/NAME[@REVISION][/FILE], which `flag` gives.

    Raises:
        UserError: it is written otherwise.
    """
    part = r"[\w-][\w.-]*"
    found = re.fullmatch(rf"{HUB}({part}/{part})(?:@([^/]+))?(?:/(.*[^/]))?", address)
    if found is None:
        raise UserError(
            f"{flag}={address} is no address of the Hugging Face hub.",
            "Did you leave out the owner of the repository, or take the address from a browser?",
            f"Write {flag}={HUB}OWNER/NAME, if needed with @REVISION and then /FILE after it.",
        )
    return HubAddress(*found.groups())


def refuse_remote(flag: str, path: str, *, buckets: bool = False, weights: bool = False) -> None:
    """Raise UserError if the `path` that `flag` gives is a remote address such as s3://bucket/runs.

    Args:
        buckets: addresses of Cloud Storage, which begin with gs://, are read and written here.
        weights: an address of the Hugging Face hub may be given, as `parse_hub` reads it.
    """
    if path.startswith(HUB) and weights:
        parse_hub(flag, path)
        return
    if path.startswith(HUB):
        raise UserError(
            f"{flag}={path} is an address of the Hugging Face hub, from which weights alone are read.",
            "Did you mean a file or a folder on this machine?",
            f"Download what is needed with hf download, and write {flag}=PATH.",
        )
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
