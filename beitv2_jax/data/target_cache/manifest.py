"""The manifest of a target cache: everything that determines its values, and the check that it fits a run.

`manifest.json` lies beside the TFDS metadata of each part of a target cache. The stages extract and tokenize write it
last; the stages that read the cache compare it with what they expect.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from beitv2_jax.data.target_cache.encoding import (
    CODE_IDS,
    FEATURE_DTYPES,
    FEATURES,
    CodeEncoding,
    Encoding,
    FeatureEncoding,
)
from beitv2_jax.errors import UserError

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"

_COMMON = {
    "schema_version": int,
    "part": str,
    "target": str,
    "dtype": str,
    "compute_dtype": str,
    "grid": list,
    "source": str,
    "split": str,
    "num_examples": int,
    "unreadable": int,
    "image_size": int,
    "num_views": int,
    "interpolation": str,
    "augmentation_version": str,
}
_OF_PART = {
    "views": {"seed": int, "min_scale": float, "color_jitter": float},
    "centre": {"crop_fraction": float},
}
_OF_TARGET = {
    FEATURES: {
        "teacher": str,
        "teacher_hash": str,
        "teacher_width": int,
        "teacher_normalization": str,
        "teacher_output": str,
        "teacher_activation": str,
        "teacher_num_heads": int,
        "teacher_grid_match": str,
        "teacher_position_resize": str,
        "teacher_input_size": int,
    },
    CODE_IDS: {"tokenizer": str, "tokenizer_hash": str, "codebook_size": int},
}

_STATED = {"teacher_license": str, "teacher_origin": str}
"""What is stated of the teacher of features. It determines no value, so it is not compared; older caches lack it."""


def manifest_fields(part: str, target: str) -> dict[str, type]:
    """Return name -> type of every field that the manifest of a target cache's `part` with `target` must have."""
    return {**_COMMON, **_OF_PART[part], **_OF_TARGET[target]}


def plain(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return `manifest` as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(manifest))


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a manifest that determine the values in the cache."""
    return {name: value for name, value in manifest.items() if name not in _STATED}


def encoding_of(manifest: Mapping[str, Any]) -> Encoding:
    """Return how the targets that `manifest` describes are stored."""
    num_tokens = manifest["grid"][0] * manifest["grid"][1]
    if manifest["target"] == CODE_IDS:
        return CodeEncoding(manifest["codebook_size"], num_tokens)
    return FeatureEncoding(manifest["dtype"], num_tokens, manifest["teacher_width"])


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """Read and check the manifest of the part of a target cache in `directory`.

    Raises:
      UserError: there is none, or it is damaged, of another version, or lacks a field or has one of a wrong type.
    """
    path = pathlib.Path(directory) / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"There are no targets in {directory}.",
            "The stage that computes them (extract or tokenize) may not have run, or not have finished.",
            "Run that stage, which also resumes an unfinished one, or correct the directory.",
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise _damaged(path, f"it holds a {type(manifest).__name__}, not fields")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"The targets in {directory} have schema_version = {manifest.get('schema_version')!r}, this program reads "
            f"{SCHEMA_VERSION}.",
            "They were computed by another version of this program.",
            "Compute the targets again in another directory.",
        )
    _check_fields(manifest, path)
    return manifest


def _check_fields(manifest: dict[str, Any], path: pathlib.Path) -> None:
    for name, known in (("part", _OF_PART), ("target", _OF_TARGET)):
        if not isinstance(manifest.get(name), str) or manifest[name] not in known:
            raise _damaged(path, f"its field {name} is {manifest.get(name)!r}, not one of {', '.join(known)}")
    stated = {name: kind for name, kind in _STATED.items() if name in manifest}
    for name, kind in (manifest_fields(manifest["part"], manifest["target"]) | stated).items():
        if name not in manifest:
            raise _damaged(path, f"it has no field {name}")
        # bool is an int in Python; a whole number may stand where a fraction is allowed
        fits = isinstance(manifest[name], (int, float) if kind is float else kind) and not isinstance(
            manifest[name], bool
        )
        if not fits:
            raise _damaged(path, f"its field {name} is {manifest[name]!r}, which is no {kind.__name__}")
    if len(manifest["grid"]) != 2 or not all(type(side) is int and side > 0 for side in manifest["grid"]):
        raise _damaged(path, f"its field grid is {manifest['grid']!r}, not two numbers of patches")
    for name in ("num_examples", "num_views", "image_size", "teacher_width", "codebook_size"):
        if manifest.get(name, 1) < 1:
            raise _damaged(path, f"its field {name} is {manifest[name]!r}")
    dtypes = FEATURE_DTYPES if manifest["target"] == FEATURES else (encoding_of(manifest).dtype,)
    if manifest["dtype"] not in dtypes:
        raise _damaged(path, f"its field dtype is {manifest['dtype']!r}, not {' or '.join(dtypes)}")


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"The manifest {path} cannot be used: {why}.",
        "It may have been edited, or damaged when it was copied.",
        "Copy the whole folder again, or compute the targets again in another directory.",
    )


def check_manifest(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    directory: str | os.PathLike,
    flags: Mapping[str, str] | None = None,
) -> None:
    """Compare a manifest with what a run expects; `flags` are, by field, those that give the run what was `found`.

    Raises:
      UserError: names the first field that differs, with both values.
    """
    for field, value in identity(plain(expected)).items():
        if found.get(field) != value:
            given = f"Give this run what the targets are made with ({field} = {found.get(field)!r})"
            if flags and field in flags:
                given = f"Write {flags[field]}"
            raise UserError(
                f"The targets in {directory} are made with {field} = {found.get(field)!r}, this run has {value!r}.",
                "They belong to another config, so their views or values would not match the images.",
                f"{given}, or compute the targets again in another directory.",
            )


def check_views(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    directory: str | os.PathLike,
    flags: Mapping[str, str] | None = None,
) -> None:
    """Compare as `check_manifest` does; a target cache may hold more views than the `num_views` of a run.

    Raises:
      UserError: names the first field that differs, with both values.
    """
    enough = found["num_views"] >= expected.get("num_views", 0)
    expected = {field: value for field, value in expected.items() if not (field == "num_views" and enough)}
    check_manifest(found, expected, directory, flags)
