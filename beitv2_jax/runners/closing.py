"""What a stage and a pipeline tell at their end: key metrics, best checkpoint, files, and the next command."""

import os
import shlex
from collections.abc import Collection, Mapping

from beitv2_jax import config as config_lib
from beitv2_jax.report.key_metrics import key_metrics
from beitv2_jax.report.page import markdown_table
from beitv2_jax.runners.report import table_of_stages
from beitv2_jax.runners.workdirs import PICTURES, Run, best_text, duration, read_runs
from beitv2_jax.runtime.buckets import AnyPath


def of_stage(workdir: str, *, alone: bool = True) -> str:
    """Return what a finished stage tells at its end: key metrics, best checkpoint, files and, if `alone`, what is next.

    Args:
        workdir: of the stage.
        alone: whether it is no part of a pipeline, which continues by itself.
    """
    (run,) = read_runs(workdir).values()
    lines = [f"{run.config.stage}: finished in {duration(run.summary['seconds'])}"]
    lines += [f"  {line}" for line in key_metrics(run.summary, run.config)]
    if run.best is not None:
        lines.append(f"  {best_text(run)} is {os.path.join(workdir, 'checkpoints', str(run.best[0]))}")
    lines.append(f"  in {workdir}: {', '.join(_contents(run.workdir))}")
    if alone:
        lines += [f"  next: {command}" for command in _next_commands(run, workdir, workdir)]
    return "\n".join(lines)


def of_pipeline(workdir: str) -> str:
    """Return what a pipeline tells at its end: seconds and key metrics of its stages, the report, the next command."""
    runs = read_runs(workdir)
    lines = [markdown_table(table_of_stages({name: {"": run} for name, run in runs.items()}))]
    lines.append(f"in {workdir}: {', '.join(f'{name}/' for name in runs)}, report.html")
    for name, run in runs.items():
        if run.config.stage in ("mim", "regress"):
            commands = _next_commands(run, os.path.join(workdir, name), workdir, runs)
            lines += [f"next: {command}" for command in commands]
    return "\n".join(lines)


def _next_commands(run: Run, workdir: str, beside: str, there: Collection[str] = ()) -> list[str]:
    """Return the commands that use what a finished run has made: those of later stages that are not `there`.

    They use the checkpoint that `run.keep_best` keeps, if there is one. Workdirs are named after the folder `beside`.
    """
    if run.best is not None:
        workdir = os.path.join(workdir, "checkpoints", str(run.best[0]))
    if run.config.stage in ("finetune", "segment"):
        return [shlex.join(["beitv2", "predict", workdir, "IMAGES"])]
    following = _FOLLOWING.get(run.config.stage, ())
    return [_command(stage, {key: workdir}, run, beside) for stage, key in following if stage not in there]


_FOLLOWING = {
    "extract": (("vqkd", "teacher.features"), ("cluster", "teacher.features"), ("regress", "teacher.features")),
    "vqkd": (("mim", "tokenizer.run"), ("tokenize", "tokenizer.run")),
    "cluster": (("mim", "tokenizer.run"), ("tokenize", "tokenizer.run")),
    "tokenize": (("mim", "tokenizer.codes"),),
    "mim": (("finetune", "init_from"), ("probe", "backbone.run")),
    "regress": (("finetune", "init_from"), ("probe", "backbone.run")),
}
"""Stage -> the stages that use it, and the key of theirs that names its workdir."""


def _command(stage: str, given: Mapping[str, str], run: Run, beside: str) -> str:
    defaults, flat = config_lib.flatten(config_lib.load(f"configs/{stage}.py")), config_lib.flatten(run.config)
    # stored targets belong to their views
    views = "views." if run.config.stage in ("extract", "tokenize") else "views.image_size"
    shared = ("data.source", "data.data_dir", "model.codebook_size", views)
    common = [key for key in flat if key in defaults and key.startswith(shared)]
    changed = {key: flat[key] for key in common if flat[key] != defaults[key]}
    if stage in ("finetune", "probe") and not run.inputs["train"]["classes"]:
        changed["data.source"] = "folder:LABELLED_IMAGES"
    keys = [f"--config.{key}={value}" for key, value in {**given, **changed}.items()]
    main = ["python", "-m", "beitv2_jax.main", f"--config=configs/{stage}.py", f"--workdir={beside}-{stage}"]
    return shlex.join([*main, *keys])


def _contents(folder: AnyPath) -> list[str]:
    shown = ("checkpoints", "views", "centre", "features", "metrics.jsonl", "summary.json", *PICTURES, "report.html")
    return [f"{name}/" if (folder / name).is_dir() else name for name in shown if (folder / name).exists()]
