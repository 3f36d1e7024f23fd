"""The card of a store of targets: everything that decides its values, and the refusal of a store that does not fit.

`card.json` lies beside the TFDS metadata of each part of a store. The stages extract and tokenize write it last, the
stages that read a store compare it with what they expect of it.
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
CARD_FILE = "card.json"

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


def card_fields(part: str, target: str) -> dict[str, type]:
    """Return name -> type of every field in the card of a store's `part` that holds `target`."""
    return {**_COMMON, **_OF_PART[part], **_OF_TARGET[target]}


def plain(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return `card` as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(card))


def encoding_of(card: Mapping[str, Any]) -> Encoding:
    """Return how the targets that `card` describes are stored."""
    num_tokens = card["grid"][0] * card["grid"][1]
    if card["target"] == CODE_IDS:
        return CodeEncoding(card["codebook_size"], num_tokens)
    return FeatureEncoding(card["dtype"], num_tokens, card["teacher_width"])


def read_card(directory: str | os.PathLike) -> dict[str, Any]:
    """Read and check the card of the part of a store in `directory`.

    Raises:
      UserError: there is none, or it is damaged, of another version, or lacks a field or has one of a wrong type.
    """
    path = pathlib.Path(directory) / CARD_FILE
    if not path.is_file():
        raise UserError(
            f"There are no targets in {directory}.",
            "the stage that makes them (extract or tokenize) did not run or did not finish",
            "run that stage first, or run it again to go on with it, or correct the directory",
        )
    try:
        card = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({error})") from error
    if not isinstance(card, dict):
        raise _damaged(path, f"it holds a {type(card).__name__}, not fields")
    if card.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"The targets in {directory} have schema_version = {card.get('schema_version')!r}, this program reads "
            f"{SCHEMA_VERSION}.",
            "they were made by another version of this program",
            "make the targets again in another directory",
        )
    _check_fields(card, path)
    return card


def _check_fields(card: dict[str, Any], path: pathlib.Path) -> None:
    for name, known in (("part", _OF_PART), ("target", _OF_TARGET)):
        if not isinstance(card.get(name), str) or card[name] not in known:
            raise _damaged(path, f"its field {name} is {card.get(name)!r}, not one of {', '.join(known)}")
    for name, kind in card_fields(card["part"], card["target"]).items():
        if name not in card:
            raise _damaged(path, f"it has no field {name}")
        # bool is an int in Python; a whole number may stand where a fraction is allowed
        fits = isinstance(card[name], (int, float) if kind is float else kind) and not isinstance(card[name], bool)
        if not fits:
            raise _damaged(path, f"its field {name} is {card[name]!r}, which is no {kind.__name__}")
    if len(card["grid"]) != 2 or not all(type(side) is int and side > 0 for side in card["grid"]):
        raise _damaged(path, f"its field grid is {card['grid']!r}, not two numbers of patches")
    for name in ("num_examples", "num_views", "image_size", "teacher_width", "codebook_size"):
        if card.get(name, 1) < 1:
            raise _damaged(path, f"its field {name} is {card[name]!r}")
    dtypes = FEATURE_DTYPES if card["target"] == FEATURES else (encoding_of(card).dtype,)
    if card["dtype"] not in dtypes:
        raise _damaged(path, f"its field dtype is {card['dtype']!r}, not {' or '.join(dtypes)}")


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"The card {path} cannot be used: {why}.",
        "it was edited, or damaged on its way here",
        "a fresh copy of the whole store, or make the targets again in another directory",
    )


def check_card(found: Mapping[str, Any], expected: Mapping[str, Any], directory: str | os.PathLike) -> None:
    """Compare a card with what a run expects.

    Raises:
      UserError: names the first field that differs, with both values.
    """
    for field, value in plain(expected).items():
        if found.get(field) != value:
            raise UserError(
                f"The targets in {directory} were made with {field} = {found.get(field)!r}, this run has {value!r}.",
                "they belong to another configuration, so their views or values would not match the images",
                f"set {field} to {found.get(field)!r} here, or make the targets again in another directory",
            )
