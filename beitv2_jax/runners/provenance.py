"""What a run is made from: its data and the frozen networks it learns from, kept in its workdir as `inputs.json`.

Each start compares what it finds with what the former one found, so that the results of two networks, or of two data
sets, are never joined without notice.
"""

import hashlib
import itertools
import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.convert.files import read_weights
from beitv2_jax.convert.runs import is_run, read_run, weights_hash
from beitv2_jax.data.target_cache.manifest import read_manifest
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.atomic_files import write_text
from beitv2_jax.tasks.targets import PARTS

INPUTS_FILE = "inputs.json"
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
    for key, path in config_lib.flatten(config).items():
        if key not in (*NETWORKS, *CACHES) or not path or (there and not os.path.exists(path)):
            continue
        if not os.path.exists(path):
            raise UserError(
                f"There is no file or folder {path}, which {key} names.",
                "The path may be mistyped, or the stage that writes it may not have run yet.",
                f"Write --config.{key}=PATH of something that exists; relative paths begin in {os.getcwd()}.",
            )
        state_dict = config.teacher.state_dict if key == "teacher.weights" else ""
        found[key] = _cache(path) if key in CACHES else _network(path, state_dict)
    return found


def _network(path: str, state_dict: str) -> str:
    if is_run(path):
        run = read_run(path)
        return f"step {run.step}, weights {run.weights_hash}"
    return f"weights {weights_hash(read_weights(path, state_dict).arrays)}"


def _cache(path: str) -> str:
    # a finished cache may be extended, which leaves the views that are there as they are
    manifests = [{**read_manifest(os.path.join(path, part)), "num_views": None} for part in PARTS]
    return f"targets {digest(manifests)}"


def describe_data(sources: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    """Return {'train': ..., 'eval': ...}: name, split, length, classes and, for TFDS, a digest of the files' sizes.

    The name of other sources holds a digest of their files.
    """
    return {
        name: {
            "source": source.name,
            "split": source.split,
            "examples": len(source),
            "classes": list(getattr(source, "class_names", ())),
            "digest": getattr(source, "digest", ""),
        }
        for name, source in zip(("train", "eval"), sources, strict=False)
    }


def write_inputs(workdir: str, inputs: dict[str, Any]) -> None:
    """Keep in `workdir` what the run is made from."""
    write_text(os.path.join(workdir, INPUTS_FILE), json.dumps(inputs, indent=2) + "\n")


def changed_inputs(workdir: str, inputs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (what, former, new) of everything in `inputs` that differs from what `workdir` keeps.

    Of two lists it is the first entry that differs.
    """
    path = os.path.join(workdir, INPUTS_FILE)
    if not os.path.exists(path):
        return []
    with open(path) as file:
        former = config_lib.flatten(json.load(file))
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
