"""Build configs from their files and presets, and turn them into text and back."""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax.config.settings import watch
from beitv2_jax.errors import UserError, did_you_mean

HARMLESS = (
    "efficiency",
    "mesh",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_every",
    "run.hang_timeout",
    "run.on_failed_save",
    "run.keep_best",
    "run.wandb",
    "data.num_threads",
    "data.num_workers",
    "data.max_bad_fraction",
    "output.verify_examples",
    "data.data_dir",
    "teacher.license",
    "teacher.origin",
)
"""Sections and keys that may change between two starts of one run.

They move no result, or only its rounding; `efficiency.accumulation_steps` also moves what is drawn in the step
(stochastic depth, mixup), as every micro-batch draws anew.
"""


def apply_presets(
    config: ConfigDict, arg: str | None, presets: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Apply the comma separated preset names in `arg` to `config`, in the order they are written, and return it.

    From here on `config` knows which of its keys are set (`config.settings`), by presets first.

    Raises:
        UserError: `arg` names no preset of this file.
    """
    watch(config)
    for name in (part.strip() for part in arg.split(",")) if arg else ():
        if name not in presets:
            raise UserError(
                f"This config has no preset '{name}'.",
                did_you_mean(name, presets) if presets else "Did you mean a preset of another config?",
                f"Write one or more of {', '.join(sorted(presets)) or '(none)'}, separated by commas.",
            )
        presets[name](config)
    return config


def load(spec: str) -> ConfigDict:
    """Build the config that `spec` names: 'vqkd', 'vqkd:large' or 'path/to/vqkd.py:large'.

    A bare name is a sibling of the calling file, which is how one config file builds on another, or, where there is
    no such file (`python -c`, a notebook), in the current folder.

    Raises:
        UserError: there is no such file, or no such preset in it.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    if path.suffix != ".py":
        path = Path(sys._getframe(1).f_globals.get("__file__", name)).parent / f"{name}.py"
    path = config_file(path)
    if not path.is_file():
        folders = dict.fromkeys((path.parent, Path("configs")))
        others = [str(other) for folder in folders for other in _config_files(folder)]
        raise UserError(
            f"There is no config file {path}.",
            did_you_mean(str(path), others) if others else f"Did you mean another folder than {path.parent}?",
            f"Write one of {', '.join(others) or 'the files of the folder configs'}.",
        )
    module_spec = importlib.util.spec_from_file_location(f"beitv2_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"{path} is not a config file: it has no function get_config.",
            "Did you mean a file of the folder configs?",
            "Write --config=configs/NAME.py.",
        )
    return module.get_config(arg)


def config_file(path: Path) -> Path:
    """Return `path`; where there is no such file and it is configs/NAME.py, the config that came with the package."""
    package = Path(__file__).parents[1]
    # in a wheel the configs lie inside the package, in a clone beside it
    candidates = [folder / path.name for folder in (package / "configs", package.parent / "configs")]
    if path.is_file() or path.parent != Path("configs"):
        return path
    return next((candidate for candidate in candidates if candidate.is_file()), path)


def _config_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if "def get_config(" in path.read_text(errors="replace")]


def link(target: ConfigDict, source: ConfigDict) -> None:
    """Let each key of `target` follow the key of that name in `source`, until it is set itself, as in pipelines."""
    for key in target:
        if key in source:
            target[key] = source.get_oneway_ref(key)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {'section.key': value} of every leaf."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def _freeze(value: Any, *, workdir: str | None = None) -> Any:
    """Copy a tree of settings: mappings become ConfigDicts that keep their order, lists tuples, references values."""
    if isinstance(value, (Mapping, ConfigDict)):
        copy = ConfigDict(sort_keys=False)
        for key, inner in value.items():
            copy[key] = _freeze(inner, workdir=workdir)
        return copy
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(inner, workdir=workdir) for inner in value)
    if isinstance(value, str) and workdir is not None:
        return expand_home(_filled_in(value, workdir) if "{workdir}" in value else value)
    return value


def _filled_in(path: str, workdir: str) -> str:
    """Return a path without '..' after a folder: 'a/../b' cannot be opened as long as there is no folder 'a'."""
    scheme, separator, path = path.replace("{workdir}", workdir).rpartition("://")
    return scheme + separator + os.path.normpath(path)


def expand_home(path: str) -> str:
    """Return a path in which a leading '~' is the home directory.

    Raises:
        UserError: there is no such home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(
            f"The home directory that {path} names is unknown.",
            "The variable HOME may not be set, as in some containers, or there may be no such user.",
            "Set HOME, or write the path without '~'.",
        )
    return expanded


def resolve(config: ConfigDict, workdir: str) -> ConfigDict:
    """Return a locked copy without references, in which '{workdir}' in a string and '~' before one are replaced."""
    return _freeze(config, workdir=str(workdir)).lock()


def to_json(config: ConfigDict) -> str:
    """Return the config as text: keys in a stable order (alphabetical, stages in the order they run)."""
    return json.dumps(_plain(config), indent=2) + "\n"


def _plain(value: Any) -> Any:
    """Return the JSON form of a tree of settings: dicts, lists and scalars."""
    if isinstance(value, (Mapping, ConfigDict)):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def from_json(text: str | Mapping[str, Any]) -> ConfigDict:
    """Return the locked config that `to_json` wrote, from its text or from the dict read out of it."""
    return _freeze(json.loads(text) if isinstance(text, str) else text).lock()


def changed(
    old: ConfigDict, new: ConfigDict, *, harmless: bool = False, defaults: ConfigDict | None = None
) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of every setting that differs and would change results.

    `HARMLESS` keys are left out; with `harmless` it is they alone that are returned. A key that `old` lacks, because it
    was written before the key existed, has its value in `defaults`. A key that one side lacks otherwise has None there;
    tuples are compared as lists.
    """
    before, after = ({} if config is None else flatten(_plain(config)) for config in (defaults, new))
    before = {key: value for key, value in before.items() if key in after} | flatten(_plain(old))
    keys = [key for key in sorted(before | after) if _harmless(key) == harmless]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _harmless(key: str) -> bool:
    key = re.sub(r"^stages\.[^.]+\.", "", key)
    return any(key == name or key.startswith(name + ".") for name in HARMLESS)
