"""What a run is made from: its data and the frozen networks it learns from, kept in its workdir as `inputs.json`.

Each start compares what it finds with what the former one found, so that the results of two networks, or of two data
sets, are never joined without notice.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.config.paths import PIXELS
from beitv2_jax.convert.class_names import INPUTS_FILE
from beitv2_jax.convert.files import located, read_weights, run_directory
from beitv2_jax.convert.runs import is_run, read_run, weights_hash
from beitv2_jax.convert.teachers.terms import rows_of, teachers_of
from beitv2_jax.data.sources.label_sets import is_multi_label
from beitv2_jax.data.target_cache.manifest import identity, read_manifest
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.atomic_files import write_text
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.tasks.targets import PARTS

NETWORKS = ("teacher.weights", "tokenizer.run", "backbone.run")
"""Keys of a config that name a frozen network."""
CACHES = ("teacher.features", "tokenizer.codes")
"""Keys of a config that name a target cache, which is what a frozen network said."""


def describe_networks(config: ConfigDict, *, there: bool = False) -> dict[str, str]:
    """Return {config key: what identifies the frozen network or the target cache that it names}.

    The weights count, and not where they lie. With `there`, only of paths that exist.

    Raises:
        UserError: there is no such network or cache, or it cannot be read.
    """
    found = {}
    for key, path in paths_of_networks(config).items():
        if there and not located(path).exists():
            continue
        _refuse_missing(key, path)
        found[key] = describe_network(config, key, path)
    return found


def paths_of_networks(config: ConfigDict) -> dict[str, str]:
    """Return {config key: path} of the frozen networks and target caches that a config names."""
    named = {key: path for key, path in config_lib.flatten(config).items() if key in (*NETWORKS, *CACHES) and path}
    return {key: path for key, path in named.items() if (key, path) != ("teacher.weights", PIXELS)}


def describe_network(config: ConfigDict, key: str, path: str) -> str:
    """Return what identifies the frozen network or the target cache in `path`, which `key` names.

    Raises:
        UserError: it cannot be read.
    """
    if key in CACHES:
        return _cache(path)
    return _network(path, config.teacher.get("state_dict", "") if key == "teacher.weights" else "")


def refuse_missing_paths(config: ConfigDict, earlier: Collection[str]) -> None:
    """Raise UserError if a network, target cache or initial weights that the config names are not there.

    Those in the workdirs `earlier` are left out: the former stages of a pipeline write them.
    """
    named = {**paths_of_networks(config), "init_from": config.get("init_from", "")}
    for key, path in named.items():
        if path and str(run_directory(path)) not in earlier:
            _refuse_missing(key, path)


def _refuse_missing(key: str, path: str) -> None:
    if not located(path).exists():
        raise UserError(
            f"There is no file or folder {path}, which {key} names.",
            "The path may be mistyped, or the stage that writes it may not have run yet.",
            f"Write --config.{key}=PATH of something that exists; relative paths begin in {os.getcwd()}.",
        )


def _network(path: str, state_dict: str) -> str:
    if is_run(path):
        run = read_run(path)
        return f"step {run.step}, weights {run.weights_hash}"
    return f"weights {weights_hash(read_weights(path, state_dict).arrays)}"


def _cache(path: str) -> str:
    # a finished cache may be extended, which leaves the views that are there as they are
    manifests = [{**identity(read_manifest(os.path.join(path, part))), "num_views": None} for part in PARTS]
    return f"targets {digest(manifests)}"


def describe_data(sources: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """Return {'train': ..., 'eval': ...}: name, split, length, classes, and digests of metadata and of files' sizes.

    The name of folders and of ArrayRecord files holds a digest of their files, for the latter with their sizes.
    """
    return {
        name: {
            "source": source.name,
            "split": source.split,
            "examples": len(source),
            "classes": list(getattr(source, "class_names", ())),
            **({"multi_label": True} if is_multi_label(source) else {}),
            "digest": getattr(source, "digest", ""),
            "sizes": getattr(source, "sizes", ""),
        }
        for name, source in zip(("train", "eval"), sources, strict=False)
    }


def write_inputs(workdir: str, inputs: dict[str, Any], config: ConfigDict) -> None:
    """Keep in `workdir` what the run is made from, with licence and origin of the teachers that it learns from."""
    teachers = teachers_of(config.to_dict())
    for name, license, origin in rows_of(teachers):
        logging.info("teacher %s: licence %s, origin %s", name, license, origin)
    write_text(os.path.join(workdir, INPUTS_FILE), json.dumps({**inputs, "teachers": teachers}, indent=2) + "\n")


def changed_inputs(workdir: str, inputs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (what, former, new) of everything in `inputs` that differs from what `workdir` keeps.

    Of two lists it is the first entry that differs.
    """
    path = as_path(workdir) / INPUTS_FILE
    if not path.exists():
        return []
    former = config_lib.flatten(json.loads(path.read_text()))
    changes = []
    for key, new in config_lib.flatten(inputs).items():
        old = former.get(key, new)
        if isinstance(new, list):
            entries = enumerate(itertools.zip_longest(old, new))
            changes += [(f"{key}[{index}]", *pair) for index, pair in entries if pair[0] != pair[1]][:1]
        elif old != new:
            changes.append((key, old, new))
    return changes


def refuse_disagreement(inputs: dict[str, Any]) -> None:
    """Raise UserError, in every process, unless all processes of the run found the same inputs."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(bytes.fromhex(digest(inputs)), np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(own))
    if (others := np.flatnonzero((everyones != everyones[0]).any(axis=1))).size:
        raise UserError(
            f"The data or the networks that process {others[0]} finds differ from those of process 0.",
            "The machines may hold different copies of the data, or a network may still be trained.",
            "Give all machines the same files, and start again when no run writes to them.",
        )


def digest(value: Any) -> str:
    """Return twelve hex digits that identify a tree of lists, mappings and plain values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()
