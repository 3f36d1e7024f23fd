"""Run a stage or a pipeline: lock the workdir, skip what is finished, build, run, and leave a summary.

A workdir holds `config.json` (resolved), the stage's own outputs, and `summary.json` once it is finished. A pipeline is
a list of stages in sub-folders of one workdir, each finding what the former wrote.
"""

import contextlib
import importlib
import json
import os
import time
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.report.pipeline import write_pipeline_report
from beitv2_jax.runners import probe, segment, targets, verify
from beitv2_jax.runtime import preemption, startup_times, workdir_lock
from beitv2_jax.runtime.atomic_files import write_json, write_text
from beitv2_jax.tasks.api import Task
from beitv2_jax.training import loop

RUNNERS = {
    "finetune": loop.train,
    "extract": targets.run,
    "vqkd": loop.train,
    "tokenize": targets.run,
    "mim": loop.train,
    "probe": probe.run,
    "segment": segment.run,
}
"""Stage name -> how it runs; what it computes is `beitv2_jax.tasks.<name>.build`."""


STORES = ("extract", "tokenize")
"""Stages whose workdir is a target cache: it can be extended to more views, and verified."""
LOOPLESS = (*STORES, "probe")
"""Stages without a training loop, which listens itself for the notice to end."""


def run_stage(config: ConfigDict, workdir: str, *, allow_config_change: bool = False) -> dict:
    """Run the stage that `config.stage` names in `workdir` and return its summary {stage, seconds, figures}.

    The same call again continues an interrupted run and returns the summary of a finished one; a target cache
    is extended where `views.num_views` has been raised. Processes that fill one target cache share the work; any
    other stage has its workdir for itself. With `allow_config_change` an interrupted run continues under another
    config; a finished stage stays as it is.

    Raises:
        UserError: the config is inconsistent, the workdir is not writable, in use or belongs to another config, or an
            input of the stage is missing. Nothing is written before the inputs have been opened.
        Preempted: the stage was asked to stop; it is saved and can be resumed.
    """
    config_lib.validate(config)
    if config.stage == "pipeline":
        return run_pipeline(config, workdir, allow_config_change=allow_config_change)
    finished = read_summary(workdir)
    refuse_other_config(config, workdir, allowed=allow_config_change)
    if finished is not None and not _is_to_grow(config, finished):
        logging.info("%s: finished before (%s), nothing to do.", config.stage, workdir)
        return finished
    check_writable(workdir)
    started = time.monotonic()
    startup_times.begin()
    with preemption.stops(config.stage) if config.stage in LOOPLESS else contextlib.nullcontext() as stop_if_signalled:
        task = importlib.import_module(f"beitv2_jax.tasks.{config.stage}").build(config)
        if stop_if_signalled:
            stop_if_signalled()
    if isinstance(task, Task):
        config_lib.validate(config, task.num_train_examples)
    startup_times.ended("inputs")
    os.makedirs(workdir, exist_ok=True)
    with contextlib.nullcontext() if config.stage in STORES else workdir_lock.held(workdir):
        write_text(os.path.join(workdir, "config.json"), config_lib.to_json(config))
        figures = RUNNERS[config.stage](task, config, workdir)
        startup_times.drop()
        summary = {"stage": config.stage, "seconds": time.monotonic() - started, "figures": figures}
        write_json(os.path.join(workdir, "summary.json"), summary)
    return summary


def verify_stage(config: ConfigDict, workdir: str) -> dict:
    """Compare what a finished target cache in `workdir` holds with its network's live answer; return {part: figures}.

    For a pipeline that is done for the caches of all its stages: {stage: {part: figures}}.

    Raises:
        UserError: the stage writes no target cache or did not finish, or the cache does not hold what the network says.
    """
    config_lib.validate(config)
    if config.stage == "pipeline":
        stages = {name: config_lib.resolve(stage, workdir) for name, stage in config.stages.items()}
        chosen = {name: stage for name, stage in stages.items() if stage.stage in STORES}
        return {name: verify_stage(stage, os.path.join(workdir, name)) for name, stage in chosen.items()}
    if config.stage not in STORES:
        raise UserError(
            f"A run of the stage '{config.stage}' cannot be verified.",
            "Did you mean the stage that wrote the target cache?",
            f"Write the --config and --workdir of a stage of {', '.join(STORES)}, or of a pipeline.",
        )
    refuse_other_config(config, workdir)
    task = importlib.import_module(f"beitv2_jax.tasks.{config.stage}").build(config)
    return verify.verify(task, config, workdir)


def run_pipeline(config: ConfigDict, workdir: str, *, allow_config_change: bool = False) -> dict:
    """Run `config.stages` in order, each in `workdir/<name>`, then write the report of the whole."""
    stages = {name: config_lib.resolve(stage, workdir) for name, stage in config.stages.items()}
    for stage in stages.values():
        config_lib.validate(stage)
    check_writable(workdir)
    summaries = {}
    for number, (name, stage) in enumerate(stages.items(), 1):
        logging.info("stage %d of %d: %s", number, len(stages), name)
        summaries[name] = run_stage(stage, os.path.join(workdir, name), allow_config_change=allow_config_change)
    if jax.process_index() == 0:
        print(write_pipeline_report(stages, summaries, workdir))
    return {"stage": "pipeline", "seconds": sum(s["seconds"] for s in summaries.values()), "figures": summaries}


def read_summary(workdir: str) -> dict | None:
    """Return the summary of a finished stage, or None; a damaged one is written again by its stage."""
    path = os.path.join(workdir, "summary.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path) as file:
            summary = json.load(file)
        dict(summary["figures"])
        return summary
    except (ValueError, TypeError, KeyError) as error:
        logging.warning("%s is damaged (%r): what the stage finished is looked up again", path, error)
        return None


def refuse_other_config(config: ConfigDict, workdir: str, *, allowed: bool = False) -> None:
    """Raise UserError if `workdir` holds a run whose config differs in a key that changes the result.

    Changes that are harmless, or `allowed`, are logged.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        return
    try:
        with open(path) as file:
            former = config_lib.from_json(file.read())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so it does not say which config this run has.",
            "The machine may have lost its power, or the disk may have been full.",
            f"Delete {path} and run the same command again, if it is the command of this run; the checkpoints stay.",
        ) from error
    differences = [
        (key, old, new)
        for key, old, new in config_lib.changed(former, config)
        if not (config.stage in STORES and key == "views.num_views" and new > old)
    ]
    if differences and not allowed:
        raise UserError(
            f"{workdir} holds a run of another config ({_listed(differences[:5])}).",
            "Did you change a setting and keep the workdir?",
            "Use another --workdir, the former values, or --allow_config_change to resume that run with the new ones.",
        )
    if differences:
        logging.warning("%s: the config changed, and with it the result: %s", workdir, _listed(differences))
    if harmless := config_lib.changed(former, config, harmless=True):
        logging.info("%s: the config changed, the result does not: %s", workdir, _listed(harmless))


def _listed(differences: list[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in differences)


def _is_to_grow(config: ConfigDict, finished: dict) -> bool:
    """Tell whether a finished target cache is to hold more views than it does."""
    return config.stage in STORES and finished["figures"]["views_per_example"] < config.views.num_views


def check_writable(workdir: str) -> None:
    """Raise UserError unless files can be created in `workdir` (or in the nearest parent that exists)."""
    folder = os.path.abspath(workdir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"The workdir {workdir} cannot be written: {folder} is not a folder this user may write to.",
            "The path may be mistyped, or a mount may be missing.",
            "Write --workdir=PATH of a folder that you may write to, such as runs/mine.",
        )
