"""Run a stage or a pipeline: lock the workdir, skip what is finished, build, run, and leave a summary and a report.

A workdir holds `config.json`, `inputs.json` (see `provenance`), `started.json` (see `workdirs`), the stage's own
outputs, and `summary.json` once it is finished. A pipeline is a list of stages in sub-folders of one workdir, each
finding what the former wrote.
"""

import contextlib
import importlib
import os
import time

import jax
from absl import logging
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.convert.files import run_directory
from beitv2_jax.data.bad_records import BadRecords
from beitv2_jax.data.order import BatchRows
from beitv2_jax.data.sources import Source
from beitv2_jax.data.sources.label_sets import is_multi_label
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.report.codes import draw_code_rows
from beitv2_jax.report.examples import draw_examples
from beitv2_jax.runners import (
    closing,
    cluster,
    dense,
    probe,
    provenance,
    report,
    segment,
    targets,
    verify,
    workdirs,
)
from beitv2_jax.runners.earlier_start import (
    TARGET_CACHE_STAGES,
    config_path,
    folder_of_pipeline,
    holds_results,
    listed_changes,
    read_config,
    read_summary,
    refuse_other_config,
    refuse_other_inputs,
    refuse_outdated,
    resolved_in,
)
from beitv2_jax.runtime import buckets, preemption, startup_times, workdir_lock
from beitv2_jax.runtime.atomic_files import write_json, write_text
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.runtime.disk_checks import refuse_pattern
from beitv2_jax.tasks import fit, initial
from beitv2_jax.tasks import inputs as tasks_inputs
from beitv2_jax.tasks.api import Task
from beitv2_jax.training import loop, sharding

RUNNERS = {
    "finetune": loop.train,
    "extract": targets.run,
    "vqkd": loop.train,
    "cluster": cluster.run,
    "tokenize": targets.run,
    "mim": loop.train,
    "regress": loop.train,
    "probe": probe.run,
    "segment": segment.run,
    "dense": dense.run,
    "segment_linear": segment.run_linear,
}
"""Stage name -> how it runs; what it computes is `beitv2_jax.tasks.<name>.build`."""


WITHOUT_LOOP = (*TARGET_CACHE_STAGES, "cluster", "probe", "dense")
"""Stages without a training loop, which listens itself for the notice to end."""


def run_stage(
    config: ConfigDict,
    workdir: str,
    *,
    allow_config_change: bool = False,
    defaults: ConfigDict | None = None,
    alone: bool = True,
) -> dict:
    """Run the stage that `config.stage` names in `workdir` and return its summary {stage, seconds, metrics}.

    Keys that were not set follow from the weights, stored targets and data that the config names (`tasks.initial`).
    The same call again continues an interrupted run and returns the summary of a finished one; a target cache is
    extended where `views.num_views` has been raised. Processes that fill one target cache share the work; any other
    stage has its workdir for itself. With `allow_config_change` an interrupted run continues under another config.
    `defaults` is the config file without presets and overrides; keys that the config of an older run lacks have their
    values there. `alone` is False for a stage of a pipeline, which does not tell what to run next.

    Raises:
        UserError: the config is inconsistent, the workdir is not writable, in use or belongs to another config, or an
            input of the stage is missing. Nothing is written before the inputs have been opened.
        Preempted: the stage was asked to stop; it is saved and can be resumed.
    """
    config_lib.validate(config)
    _refuse_remote_workdir(config, workdir)
    if config.stage == "pipeline":
        return run_pipeline(config, workdir, allow_config_change=allow_config_change, defaults=defaults)
    finished = read_summary(workdir)
    changes, harmless = refuse_other_config(config, workdir, allowed=allow_config_change, defaults=defaults)
    if changes:
        logging.warning("%s: the config changed, and with it the result: %s", workdir, listed_changes(changes))
    if harmless:
        logging.info("%s: the config changed, the result does not: %s", workdir, listed_changes(harmless))
    config = _completed(config, workdir)
    resolved = resolved_in(config, workdir)
    if finished is not None and not _is_to_grow(config, finished):
        networks = provenance.describe_networks(resolved, there=True)
        refuse_other_inputs(config.stage, workdir, {"networks": networks})
        logging.info("%s: finished before (%s), nothing to do.", config.stage, workdir)
        return finished
    check_writable(workdir)
    started = time.monotonic()
    startup_times.begin()
    with (
        preemption.stops(config.stage)
        if config.stage in WITHOUT_LOOP
        else contextlib.nullcontext() as stop_if_signalled
    ):
        networks = provenance.describe_networks(resolved)
        task = importlib.import_module(f"beitv2_jax.tasks.{config.stage}").build(resolved)
        if stop_if_signalled:
            stop_if_signalled()
    check_start(task, resolved)
    inputs = {**provenance.describe_data(task.sources), "networks": networks}
    changes += refuse_other_inputs(config.stage, workdir, inputs, allowed=allow_config_change)
    if config.stage not in TARGET_CACHE_STAGES:
        provenance.refuse_disagreement(inputs)
    startup_times.ended("inputs")
    as_path(workdir).mkdir(parents=True, exist_ok=True)
    # Cloud Storage refuses when many processes replace one object within a second
    writes = jax.process_index() == 0 or not buckets.is_remote(workdir)
    with contextlib.nullcontext() if config.stage in TARGET_CACHE_STAGES else workdir_lock.held(workdir):
        if changes and isinstance(task, Task):
            loop.check_checkpoint(task, resolved, workdir)
        if writes:
            write_text(config_path(workdir), config_lib.to_json(config))
            provenance.write_inputs(workdir, inputs, resolved)
        if jax.process_index() == 0:
            workdirs.write_started(workdir, config, defaults)
            records = BadRecords(workdir)
            for source in task.sources:
                records.note_left_out(source)
        metrics = RUNNERS[config.stage](task, resolved, workdir)
        startup_times.drop()
        summary = {"stage": config.stage, "seconds": time.monotonic() - started, "metrics": metrics}
        if writes:
            write_json(os.path.join(workdir, "summary.json"), summary)
        if jax.process_index() == 0:
            _report(config.stage, task.sources, workdir, alone)
    return summary


def _report(stage: str, sources: tuple[Source, Source], workdir: str, alone: bool) -> None:
    """Draw the pictures of a finished stage, write its report, and print what to know at its end."""
    source, eval_source = sources
    draw_examples(source, os.path.join(workdir, "examples.jpg"))
    if stage == "tokenize":
        reader = TargetReader(os.path.join(workdir, "centre"), eval_source.split)
        draw_code_rows(eval_source, reader, os.path.join(workdir, "codes.png"))
    report.write_report([workdir], workdir)
    print(closing.of_stage(workdir, alone=alone), flush=True)


def verify_stage(config: ConfigDict, workdir: str, *, defaults: ConfigDict | None = None) -> dict:
    """Compare what a finished target cache in `workdir` holds with its network's live answer; return {part: metrics}.

    For a pipeline that is done for the caches of all its stages: {stage: {part: metrics}}. `defaults` is that of
    `run_stage`.

    Raises:
        UserError: the stage writes no target cache or did not finish, or the cache does not hold what the network says.
    """
    config_lib.validate(config)
    _refuse_remote_workdir(config, workdir)
    if config.stage == "pipeline":
        chosen = {name: stage for name, stage in config.stages.items() if stage.stage in TARGET_CACHE_STAGES}
        return {
            name: verify_stage(stage, os.path.join(workdir, name), defaults=_of_stage(defaults, name))
            for name, stage in chosen.items()
        }
    if config.stage not in TARGET_CACHE_STAGES:
        raise UserError(
            f"A run of the stage '{config.stage}' cannot be verified.",
            "Did you mean the stage that wrote the target cache?",
            f"Write the --config and --workdir of a stage of {', '.join(TARGET_CACHE_STAGES)}, or of a pipeline.",
        )
    refuse_other_config(config, workdir, defaults=defaults)
    resolved = resolved_in(_completed(config, workdir), workdir)
    task = importlib.import_module(f"beitv2_jax.tasks.{config.stage}").build(resolved)
    return verify.verify(task, resolved, workdir)


def run_pipeline(
    config: ConfigDict, workdir: str, *, allow_config_change: bool = False, defaults: ConfigDict | None = None
) -> dict:
    """Run `config.stages` in order, each in `workdir/<name>`, then write the report of the whole.

    Before the first stage begins, the workdirs of all stages are compared with their configs and with each other, the
    networks and the data that they name must be there, every stage must fit what it names and what former stages will
    write, and a probe is left out where the data have no labels. The data are opened last.
    """
    refuse_other_config(config, workdir)
    stages = config.stages
    arguments = {
        name: {"allow_config_change": allow_config_change, "defaults": _of_stage(defaults, name)} for name in stages
    }
    check_writable(workdir)
    folders = {name: os.path.join(workdir, name) for name in stages}
    runs = {name: str(run_directory(folder)) for name, folder in folders.items()}
    unfinished = {name for name, folder in folders.items() if read_summary(folder) is None}
    for number, (name, stage) in enumerate(stages.items()):
        with config_lib.stage_errors(config, name):
            tasks_inputs.check_implementations(stage)
            refuse_other_config(stage, folders[name], allowed=allow_config_change, defaults=arguments[name]["defaults"])
            if name in unfinished:
                provenance.refuse_missing_paths(resolved_in(stage, folders[name]), list(runs.values())[:number])
    refuse_outdated(config, workdir, allowed=allow_config_change)
    earlier = {}
    for name, stage in stages.items():
        with config_lib.stage_errors(config, name):
            completed = resolved_in(_completed(stage, folders[name], with_data=False), folders[name])
            if name in unfinished:
                fit.check(completed, earlier)
                check_devices(completed)
            earlier[runs[name]] = completed
    opened, chosen = {}, dict(stages.items())
    for name, stage in ((name, earlier[runs[name]]) for name in stages if name in unfinished):
        with config_lib.stage_errors(config, name):
            data = tuple(stage.data.items())
            if data not in opened:
                opened[data], _ = tasks_inputs.open_sources(stage)
            source = opened[data]
            if stage.stage == "probe" and (is_multi_label(source) or tasks_inputs.num_classes_with_images(source) < 2):
                text = "the stage %s is left out: %s has no single label of each image to probe"
                logging.info(text, name, source.name)
                del chosen[name]
            else:
                config_lib.validate(stage, len(opened[data]))
    del opened
    summaries = {}
    for number, (name, stage) in enumerate(chosen.items(), 1):
        logging.info("stage %d of %d: %s", number, len(chosen), name)
        with config_lib.stage_errors(config, name):
            summaries[name] = run_stage(stage, os.path.join(workdir, name), **arguments[name], alone=False)
    if jax.process_index() == 0:
        report.write_report([workdir], workdir)
        print(closing.of_pipeline(workdir), flush=True)
    return {"stage": "pipeline", "seconds": sum(s["seconds"] for s in summaries.values()), "metrics": summaries}


def check_start(task, config: ConfigDict) -> None:
    """Check, before anything is written, that config, data, devices and processes fit each other.

    Raises:
        UserError: they do not.
    """
    if isinstance(task, Task):
        config_lib.validate(config, task.num_train_examples)
        loop.check(task, config)
        return
    config_lib.validate(config, len(task.sources[0]))
    check_devices(config)


def check_devices(config: ConfigDict) -> None:
    """Raise UserError unless the devices of a stage are there and divide its batches equally."""
    if config.stage not in WITHOUT_LOOP:
        loop.check_devices(config)
        return
    if config.stage == "cluster":  # one process, whose batches are divided over no devices
        return
    rows = config.run.batch_size
    # the processes of these share every batch; those that fill a target cache share nothing
    if config.stage in ("probe", "dense"):
        rows = BatchRows(rows, jax.process_index(), jax.process_count()).share
    sharding.check_rows(rows, sharding.make_mesh(**config.mesh, devices=jax.local_devices()))


def _completed(config: ConfigDict, workdir: str, *, with_data: bool = True) -> ConfigDict:
    """Return the config of a stage with every key decided: as in the run that is continued, or by what it names.

    Without `with_data` the data are not opened, and what they decide stays as it is declared.

    Raises:
        UserError: what it names is not there, or the values do not fit the rest of the config.
    """
    path = config_path(workdir)
    open_keys = config_lib.undecided(config)
    former = read_config(path) if open_keys and path.exists() and holds_results(workdir) else None
    if former is None and with_data and "model.num_classes" in open_keys:  # which the data decide
        fit.check(resolved_in(_completed(config, workdir, with_data=False), workdir), {})
    config = initial.completed(config, folder_of_pipeline(workdir), former=former, with_data=with_data)
    config_lib.validate(config)
    return config


def _of_stage(defaults: ConfigDict | None, name: str) -> ConfigDict | None:
    """Return the part of a pipeline's defaults that belongs to one of its stages."""
    return None if defaults is None else defaults.stages.get(name)


def _is_to_grow(config: ConfigDict, finished: dict) -> bool:
    """Return whether a finished target cache must be extended by more views."""
    return config.stage in TARGET_CACHE_STAGES and finished["metrics"]["views_per_example"] < config.views.num_views


def _refuse_remote_workdir(config: ConfigDict, workdir: str) -> None:
    """Raise UserError for a remote workdir that is in no bucket, or in none that this run can write and use."""
    stages = config.stages.values() if config.stage == "pipeline" else (config,)
    has_cache = any(stage.stage in (*TARGET_CACHE_STAGES, "cluster") for stage in stages)
    config_lib.refuse_remote("--workdir", workdir, buckets=not has_cache)
    if buckets.is_remote(workdir):  # one that cannot be reached cannot be read either
        check_writable(workdir)


def check_writable(workdir: str) -> None:
    """Raise UserError unless a run can write to `workdir` (or to the nearest parent that exists)."""
    refuse_pattern(workdir)
    if buckets.is_remote(workdir):
        buckets.refuse_unwritable(workdir)
        return
    folder = os.path.abspath(workdir)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"The workdir {workdir} cannot be written: {folder} is not a folder this user may write to.",
            "The path may be mistyped, or a mount may be missing.",
            "Write --workdir=PATH of a folder that you may write to, such as runs/mine.",
        )
