"""What an earlier start of a run has left in its workdir, and whether this start may go on from there."""

import functools
import json
import os
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.convert.files import located
from beitv2_jax.data.target_cache.writer import is_begun
from beitv2_jax.errors import UserError
from beitv2_jax.runners import provenance
from beitv2_jax.runtime import buckets
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.tasks.targets import PARTS
from beitv2_jax.training.checkpoint import is_complete

TARGET_CACHE_STAGES = ("extract", "tokenize")
"""Stages whose workdir is a target cache: it can be extended to more views, and verified."""
_ALLOWING = "; or add --allow_config_change to resume that run with the new ones."

Changes = list[tuple[str, Any, Any]]
"""(key, former value, new value) of settings."""


def refuse_other_config(
    config: ConfigDict, workdir: str, *, allowed: bool = False, defaults: ConfigDict | None = None
) -> tuple[Changes, Changes]:
    """Raise UserError if `workdir` holds results of another stage, or of a config that differs in what changes them.

    A run that has left no results is no obstacle. A finished run has no use for other settings, so they are refused
    there even if they are `allowed`.

    Returns:
        The changes that change the result and are allowed, and those that are harmless.
    """
    path = config_path(workdir)
    if config.stage != "pipeline" and (others := sorted(as_path(workdir).glob("*/config.json"))):
        raise UserError(
            f"{workdir} holds the workdirs of other runs, such as {others[0].parent.name}.",
            "Did you mean a folder inside it, or is it the workdir of a pipeline?",
            f"Write --workdir={os.path.join(workdir, 'NAME')} with a folder that does not exist yet.",
        )
    if not path.exists():
        return [], []
    refusal, found = None, ([], [])
    try:
        found = _compared(config, workdir, path, allowed, defaults)
    except UserError as error:
        refusal = error
    # asked last, as it may take a while
    if not (refusal or any(found)) or not holds_results(workdir):
        return [], []
    if refusal:
        raise refusal
    return found


def _compared(
    config: ConfigDict, workdir: str, path: AnyPath, allowed: bool, defaults: ConfigDict | None
) -> tuple[Changes, Changes]:
    """Return the changes from the config in `path` as `refuse_other_config` does, and raise as it does."""
    former = read_config(path)
    if former.stage != config.stage:
        raise UserError(
            f"{workdir} holds a run of the stage '{former.stage}', and this config is of the stage '{config.stage}'.",
            "Did you mean the --workdir of another run?",
            "Write --workdir=DIR with a folder that does not exist yet, or with that of a run of this stage.",
        )
    finished = read_summary(workdir) is not None
    open_keys = config_lib.undecided(config)
    changes = [
        (key, old, new)
        for key, old, new in config_lib.changed(former, config, defaults=defaults)
        if key not in open_keys and not (config.stage in TARGET_CACHE_STAGES and key == "views.num_views" and new > old)
    ]
    if changes and (finished or not allowed):
        raise UserError(
            f"{workdir} holds {'a finished' if finished else 'an interrupted'} run of another config "
            f"({listed_changes(changes[:5])}).",
            "Did you change a setting and keep the workdir?",
            "Write --workdir=DIR with a folder that does not exist yet, or the former values"
            + ("." if finished or not _can_resume(config.stage, changes) else _ALLOWING),
        )
    return changes, config_lib.changed(former, config, harmless=True, defaults=defaults)


def refuse_other_inputs(stage: str, workdir: str, inputs: dict[str, Any], *, allowed: bool = False) -> Changes:
    """Raise UserError if the results in `workdir` were made from other data or networks; log it if `allowed`.

    Returns:
        The changes that are allowed.
    """
    changes = provenance.changed_inputs(workdir, inputs)
    if not changes or not holds_results(workdir):
        return []
    if allowed:
        logging.warning("%s: the inputs changed, and with them the result: %s", workdir, listed_changes(changes))
        return changes
    # a target cache is of one data set, and another number of examples moves a schedule that is counted in epochs
    fixed = stage in TARGET_CACHE_STAGES or any(key == "train.examples" for key, _, _ in changes)
    resumable = read_summary(workdir) is None and not fixed
    raise UserError(
        f"What the run in {workdir} is made from has changed since it was started ({listed_changes(changes[:5])}).",
        "Did you add or rename images, prepare the data again, or train a network of an earlier stage further?",
        "Write --workdir=DIR with a folder that does not exist yet, bring the former inputs back, or delete "
        f"{workdir} and what later stages made from it" + (_ALLOWING if resumable else "."),
    )


def refuse_outdated(config: ConfigDict, workdir: str, *, allowed: bool = False) -> None:
    """Raise UserError if stages of a pipeline hold results that were made from a network which has changed or is gone.

    Otherwise an earlier stage could run for days before the first one that depends on it is refused. A target cache
    that is gone is no obstacle, because the same network gives the same targets again. Neither are interrupted stages
    if changes are `allowed`.
    """
    outdated, changed = [], []
    for name, stage in config.stages.items():
        folder = os.path.join(workdir, name)
        if not holds_results(folder) or (allowed and read_summary(folder) is None):
            continue
        resolved = resolved_in(stage, folder)
        for key, path in provenance.paths_of_networks(resolved).items():
            earlier = os.path.relpath(path, workdir)
            if earlier in outdated:
                outdated.append(name)
                break
            if _has_changed(resolved, folder, key, path, own=earlier in config.stages):
                outdated.append(name)
                changed.append(earlier if earlier in config.stages else path)
                break
    if outdated:
        raise UserError(
            f"The results of {', '.join(outdated)} in {workdir} were made from {', '.join(changed)}, which changed "
            "afterwards or is not finished any more.",
            "Did you delete an earlier stage or train it again, and mean to make the later ones again too?",
            f"Delete {', '.join(os.path.join(workdir, name) for name in outdated)} and run the same command again, or "
            f"bring the former {', '.join(changed)} back.",
        )


def _has_changed(config: ConfigDict, workdir: str, key: str, path: str, *, own: bool) -> bool:
    """Tell whether `workdir` was made from another network or target cache than the one in `path`, which `key` names.

    One of the pipeline itself (`own`) that is not there has changed: it will be made again.
    """
    if key in provenance.CACHES and own and read_summary(path) is None:
        return False
    if not located(path).exists():
        return own
    try:
        found = provenance.describe_network(config, key, path)
    except UserError:  # damaged, or without a checkpoint
        return own
    return bool(provenance.changed_inputs(workdir, {"networks": {key: found}}))


def _can_resume(stage: str, changes: Changes) -> bool:
    """Return whether a run can continue from its results with other values of these keys, if that is allowed."""
    keys = [key for key, _, _ in changes]
    if stage in TARGET_CACHE_STAGES:
        return keys == ["run.batch_size"]
    return not any(key.startswith(("model.", "run.batch_size", "run.duration", "optim.warmup")) for key in keys)


def read_summary(workdir: str) -> dict | None:
    """Return the summary of a finished stage, or None; a damaged one is written again by its stage."""
    path = as_path(workdir) / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        dict(summary["metrics"])
        return summary
    except (ValueError, TypeError, KeyError) as error:
        _warn_of_summary(path, repr(error))
        return None


@functools.cache  # a start asks for the summary several times
def _warn_of_summary(path: str, error: str) -> None:
    logging.warning("%s is damaged (%s): what the stage finished is looked up again", path, error)


def holds_results(workdir: str) -> bool:
    """Return whether an earlier start left something in `workdir` that a later one continues from, or is finished.

    That is a checkpoint (a damaged one too), cached features, or shards of a target cache, those included
    that a live process is writing. To find out whether a process of another machine is alive takes up to three minutes.
    """
    root = as_path(workdir)
    left = [root / "summary.json", *(root / "features").glob("*/*.np[yz]")]
    left += [path for path in (root / "checkpoints").glob("*") if path.name.isdecimal() and is_complete(path)]
    return any(path.exists() for path in left) or any(is_begun(root / part) for part in PARTS)


def config_path(workdir: str) -> AnyPath:
    """Return where the config of a run is kept."""
    return as_path(workdir) / "config.json"


def read_config(path: AnyPath) -> ConfigDict:
    """Return the config in the file `path`.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return config_lib.from_json(path.read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so it does not say which config this run has.",
            "The machine may have lost its power, or the disk may have been full.",
            f"Delete {path} and run the same command again, if it is the command of this run; the checkpoints stay.",
        ) from error


def folder_of_pipeline(workdir: str) -> str:
    """Return the folder that a stage's workdir lies in, which is that of its pipeline if it has one."""
    return os.path.dirname(buckets.absolute(workdir))


def resolved_in(config: ConfigDict, workdir: str) -> ConfigDict:
    """Return the config of a stage in which '{workdir}' is the folder of its pipeline, in which its own workdir lies.

    The config that is kept in the workdir is the one before that: the pipeline's folder may be renamed.
    """
    return config_lib.resolve(config, folder_of_pipeline(workdir))


def listed_changes(changes: Changes) -> str:
    """Return the changes as text: each key with its former and its new value."""
    return ", ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in changes)
