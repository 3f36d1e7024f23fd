"""Read and write the directory of a run: its resolved config, weights and model state.

Every stage that builds on another one (tokenizer, teacher, backbone) reads it here. Only the items 'params' and
'model_state' of the newest checkpoint are read, as NumPy arrays, independent of the optimizer state and of the devices
of that run. Converted weights are written in the same format.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from beitv2_jax.convert.files import located, read_config, run_directory
from beitv2_jax.errors import UserError
from beitv2_jax.models.quantizer import TRAINING_COUNTERS
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.runtime.checksums import find_damage, write_checksums
from beitv2_jax.typing import PyTree

ITEMS = ("params", "model_state")
"""Items of a checkpoint that later stages read."""
AVERAGE = "averaged_params"
"""Item with the averaged weights of a run that averages them (`optim.weight_average`)."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run: `name` is directory@step, `config` the resolved config as plain dicts."""

    name: str
    config: dict
    step: int
    params: PyTree
    model_state: PyTree

    @property
    def weights_hash(self) -> str:
        """Sixteen hex digits that identify the weights and the model state."""
        return weights_hash({"params": self.params, "model_state": self.model_state})


def is_run(path: str) -> bool:
    """Return whether `path` is the directory of a run, whose config.json has a stage, or one of its checkpoints."""
    return located(path).is_dir() and "stage" in (read_config(path) or {})


def check_stage(workdir: str, stages: Collection[str], key: str) -> None:
    """Check that `workdir` is the directory of a run of one of `stages`, before its checkpoint is read.

    `key` is how the user gives the path: 'config.init_from', or '' on the command line of the converter.

    Raises:
        UserError: `workdir` is a file or does not exist, has no config.json, or is of another stage.
    """
    if not is_run(workdir):
        raise _not_a_run(workdir)
    refuse_other_stage(read_config(workdir)["stage"], workdir, stages, key)


def refuse_other_stage(stage: str, workdir: str, stages: Collection[str], key: str) -> None:
    """Raise UserError unless the `stage` of the run in `workdir` is one of `stages`; `key` as in `check_stage`."""
    if stage not in stages:
        listed = " or ".join(map(repr, stages))
        raise UserError(
            f"{workdir} is the folder of a run of stage {stage!r}, but a run of stage {listed} is needed.",
            "The path may be that of another stage.",
            f"{f'Write --{key}=PATH with' if key else 'Pass'} the directory of a run of stage {listed}.",
        )


def read_run(workdir: str, *, average: bool = False) -> Run:
    """Read the newest checkpoint under `workdir`/checkpoints and the config beside it.

    Where `workdir` is the folder of a checkpoint itself, RUN/checkpoints/STEP, it is that one. `model_state` is the
    codebook, the statistics of batch norm, or empty. With `average`, `params` are the averaged weights. Nothing in the
    directory is changed.

    Raises:
        UserError: no such directory, no config.json, no complete checkpoint, or the newest checkpoint is corrupt. It is
            the result of the run, so an older one is not used in its place.
    """
    directory, place = run_directory(workdir), located(workdir)
    chosen = int(place.name) if directory != place else None
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise _not_a_run(workdir)
    checkpoints = directory / "checkpoints"
    steps = ocp.path.step.standard_name_format()
    complete = steps.find_all(checkpoints) if checkpoints.is_dir() else ()
    found_steps = sorted((found for found in complete if chosen in (None, found.step)), key=lambda found: found.step)
    if not found_steps:
        raise UserError(
            f"{workdir} has no complete checkpoint.",
            "The run may not have saved one yet.",
            "Pass the directory (--workdir) of a run that has saved a checkpoint.",
        )
    *older, newest = found_steps
    checkpoint = as_path(newest.path)
    if damage := find_damage(checkpoint, (*ITEMS, AVERAGE) if average else ITEMS):
        raise UserError(
            f"The checkpoint of step {newest.step} in {directory} is corrupt: {damage}.",
            "The disk may have failed, or the folder may have been copied only in part.",
            f"Copy the folder again, or move {newest.path} away to use the checkpoint before it."
            if older
            else f"Copy the folder again, or delete {newest.path} and give the command of this run again.",
        )
    found = {name: _read_item(checkpoint / name) for name in ITEMS}
    for counter in TRAINING_COUNTERS:
        found["model_state"].get("quantizer", {}).pop(counter, None)
    if average:
        found["params"] = _read_item(checkpoint / AVERAGE)
        if not found["params"]:
            raise UserError(
                f"{workdir} has no averaged weights.",
                "The run may have been started with --config.optim.weight_average=0, which is the default.",
                "Leave --weights=average out to convert the weights of its last step.",
            )
    return Run(
        name=f"{directory.name}@{newest.step}",
        config=read_config(workdir),
        step=newest.step,
        **found,
    )


def write_run(workdir: str, config: dict, variables: dict[str, PyTree]) -> None:
    """Write a directory that `read_run` reads: `config` and, as step 0, the params and the model state (if any).

    It has no optimizer state and no data position, so a run cannot be resumed from it.
    """
    directory = Path(workdir).absolute()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_checkpoint(directory, variables)


def write_checkpoint(directory: Path, variables: dict[str, PyTree]) -> None:
    """Write the params and the model state (if any) as the checkpoint of step 0 of a run, and its checksums."""
    items = {name: variables[name] for name in ITEMS if variables.get(name)}
    with ocp.CheckpointManager(directory.absolute() / "checkpoints") as manager:
        manager.save(0, args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()}))
    write_checksums(directory / "checkpoints" / "0")


def weights_hash(tree: PyTree) -> str:
    """Return sixteen hex digits of SHA-256 over the path, dtype, shape and bytes of every array, sorted by path."""
    leaves = [
        (jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    digest = hashlib.sha256()
    for name, array in sorted(leaves, key=lambda leaf: leaf[0]):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _read_item(path: AnyPath) -> PyTree:
    # Orbax cannot save an empty tree, so an item without arrays does not exist
    if not path.is_dir():
        return {}
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(path).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    handler.close()
    return _as_dicts(tree)


def _as_dicts(tree: PyTree) -> PyTree:
    return {key: _as_dicts(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _not_a_run(workdir: str) -> UserError:
    path = located(workdir)
    if path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return UserError(
            f"{workdir} is not the directory of a run; it is a weights file or a folder with one.",
            "Did you mean the run that it can be converted to?",
            f"Run python -m beitv2_jax.convert {workdir} RUN, then pass RUN.",
        )
    return UserError(
        f"{workdir} {'has no config.json of a run' if path.is_dir() else 'does not exist'}.",
        "The stage that this one builds on may not have run yet, or the path may be mistyped.",
        "Pass the directory (--workdir) of a run that has saved a checkpoint.",
    )
