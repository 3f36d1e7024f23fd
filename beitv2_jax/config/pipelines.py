"""Errors of one stage of a pipeline, with the keys that the config of the pipeline has for it."""

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax.config.load import flatten
from beitv2_jax.errors import UserError


@contextlib.contextmanager
def stage_errors(pipeline: ConfigDict, name: str) -> Iterator[None]:
    """Let a UserError raised inside say which stage it is of, and give the keys to set in the config of `pipeline`."""
    try:
        yield
    except UserError as error:

        def named(text: str) -> str:
            return re.sub(r"--config\.(\w+(?:\.\w+)*)", lambda key: f"--config.{key_of(pipeline, name, key[1])}", text)

        happened = f"Stage {name} of the pipeline: {error.happened}"
        raise UserError(named(happened), named(error.meant), named(error.instead)) from error


def key_of(pipeline: ConfigDict, name: str, key: str) -> str:
    """Return the key of `pipeline` that sets `key` of its stage `name`: one that stages share, or the stage's own."""
    own = f"stages.{name}.{key}"
    leaves = flatten(pipeline)
    for shared in (other for other in leaves if other.split(".")[-1] == key.split(".")[-1]):
        if not shared.startswith("stages.") and _follows(pipeline, own, shared):
            return shared
    return own


def _follows(config: ConfigDict, follower: str, leader: str) -> bool:
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict({leader: _another(flatten(config)[leader])})
    return flatten(changed).get(follower) != flatten(config).get(follower)


def _another(value: Any) -> Any:
    """Return a value of the same type that differs."""
    if isinstance(value, bool):
        return not value
    return value + {str: "?", tuple: (0,)}.get(type(value), 1)
