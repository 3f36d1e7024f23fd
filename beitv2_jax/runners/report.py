"""Reports of runs: report.md and report.html of one run or pipeline, or of several side by side, from their workdirs.

    beitv2 report runs/a runs/b --out=compared

A workdir is only read: a report shows what is there, also of a run that was interrupted or still goes on.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax import __version__
from beitv2_jax import config as config_lib
from beitv2_jax.command_line import Parser, report_errors
from beitv2_jax.config.paths import refuse_remote
from beitv2_jax.errors import UserError
from beitv2_jax.report.curves import Chart, draw_curves
from beitv2_jax.report.key_metrics import key_metrics
from beitv2_jax.report.page import Page, markdown_table
from beitv2_jax.runtime.atomic_files import write_json
from beitv2_jax.runtime.buckets import AnyPath, absolute, as_path
from beitv2_jax.training.best import BestEvaluation
from beitv2_jax.training.writer import read_metrics

STARTED_FILE = "started.json"
"""File in a workdir that says how its run was started last: command, versions, devices."""
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
PICTURES = {
    "examples.jpg": "Images of the training split",
    "codes.png": "The 16 most used codes on the evaluation images, one row each",
    "segmentation.png": "Evaluation images: image, true classes, predicted classes, where they differ",
}
"""Picture in a workdir -> its title."""
_EXAMPLES = """\
examples:
  # one page on two runs: metrics and settings side by side, curves in the same charts
  beitv2 report runs/mim runs/mim-long --out=compared
  # a run that still goes on
  beitv2 report runs/mim --out=now
"""
_BEHIND = ("learning_rate", "grad_norm", "images_per_second", "data_wait_share")
"""Metrics of a step whose charts stand last."""
_PREFIXES = {"eval/": "evaluation", "eval_average/": "evaluation, averaged weights"}


def write_started(workdir: str, config: ConfigDict, defaults: ConfigDict | None) -> None:
    """Keep in `workdir` how this start of the run was made, and which settings are not those of its config file.

    Args:
        workdir: of a stage.
        config: of the stage.
        defaults: the config file without presets and overrides; None if it is unknown.
    """
    import jax

    devices = jax.devices()
    changed: dict[str, Any] | None = None
    if defaults is not None:
        both = (config_lib.changed(defaults, config, harmless=harmless) for harmless in (False, True))
        changed = dict(sorted((key, default) for changes in both for key, default, _ in changes))
    write_json(
        os.path.join(workdir, STARTED_FILE),
        {
            "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.orig_argv),
            "folder": os.getcwd(),
            "versions": {
                "beitv2_jax": __version__,
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in PACKAGES},
            },
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "processes": jax.process_count(),
            "changed": changed,
        },
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What the workdir of a stage says of it; `summary` is None while it has not ended, other files may be absent."""

    workdir: AnyPath
    config: ConfigDict
    summary: dict[str, Any] | None
    lines: list[dict[str, float]]
    started: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float | None]:
        """The metrics of the summary; before there is one, the last value of each that is in metrics.jsonl."""
        if self.summary is not None:
            return self.summary["metrics"]
        return {name: value for line in self.lines for name, value in line.items() if name != "step"}

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the checkpoint that `run.keep_best` keeps, and the value of that metric there."""
        metric = self.config.get("run", {}).get("keep_best", "")
        if not metric:
            return None
        folders = (path.name for path in (self.workdir / "checkpoints").glob("*"))
        best = BestEvaluation(metric, self.lines, {int(name) for name in folders if name.isdecimal()})
        return None if best.step is None else (best.step, best.value)


def read_runs(workdir: str | AnyPath) -> dict[str, Run]:
    """Return the run in `workdir` by the name of its stage, or those of a pipeline by theirs, in the order they began.

    Raises:
        UserError: there is no run.
    """
    folder = as_path(absolute(workdir))
    if (folder / "config.json").is_file():
        run = _read_run(folder)
        return {run.config.stage: run}
    runs = [_read_run(path.parent) for path in folder.glob("*/config.json")]
    if not runs:
        raise UserError(
            f"{workdir} is not the workdir of a run: it holds no config.json.",
            "Did you mistype the path, or has the run not begun yet?",
            "Write beitv2 report WORKDIR with the --workdir of a stage or a pipeline.",
        )
    return {run.workdir.name: run for run in sorted(runs, key=lambda run: run.started.get("time", ""))}


def _read_run(folder: AnyPath) -> Run:
    texts = {name: folder / f"{name}.json" for name in ("config", "summary", "started", "inputs")}
    found = {name: json.loads(path.read_text()) for name, path in texts.items() if path.is_file()}
    try:
        config = config_lib.from_json(found["config"])
        config.stage  # noqa: B018 a config.json of something else has none
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{texts['config']} is not the config of a run.",
            "Did you mean the workdir of a stage or a pipeline?",
            "Write beitv2 report WORKDIR with the --workdir that the run was given.",
        ) from error
    lines = read_metrics(folder)
    return Run(folder, config, found.get("summary"), lines, found.get("started", {}), found.get("inputs", {}))


def write_report(workdirs: Sequence[str | AnyPath], out: str | AnyPath) -> AnyPath:
    """Write report.md and report.html about the runs in `workdirs` to the folder `out`; return the path of the latter.

    A pipeline stands for its stages. Runs of the same stage are compared: metrics, settings that differ, and curves.

    Raises:
        UserError: one of `workdirs` holds no run.
    """
    folders = [as_path(absolute(workdir)) for workdir in workdirs]
    names = _short_names(folders)
    stages: dict[str, dict[str, Run]] = {}
    for name, folder in zip(names, folders, strict=True):
        for stage, run in read_runs(folder).items():
            stages.setdefault(stage, {})[name] = run
    writer = _Writer(Page(f"Report: {' and '.join(names)}", out), several_stages=len(stages) > 1)
    if len(stages) > 1:
        writer.page.table(_table_of_stages(stages, several=len(folders) > 1))
    for stage, runs in stages.items():
        writer.add_stage(stage, runs)
    return writer.page.write()[1]


def closing(workdir: str, *, alone: bool = True) -> str:
    """Return what a finished stage tells at its end: key metrics, best checkpoint, files and, if `alone`, what is next.

    Args:
        workdir: of the stage.
        alone: whether it is no part of a pipeline, which goes on by itself.
    """
    (run,) = read_runs(workdir).values()
    lines = [f"{run.config.stage}: finished in {_duration(run.summary['seconds'])}"]
    lines += [f"  {line}" for line in key_metrics(run.summary, run.config)]
    if run.best is not None:
        lines.append(f"  {_best_text(run)} is {os.path.join(workdir, 'checkpoints', str(run.best[0]))}")
    lines.append(f"  in {workdir}: {', '.join(_contents(run.workdir))}")
    if alone:
        lines += [f"  next: {command}" for command in _next_commands(run, workdir, workdir)]
    return "\n".join(lines)


def closing_of_pipeline(workdir: str) -> str:
    """Return what a pipeline tells at its end: seconds and key metrics of its stages, the report, the next command."""
    runs = read_runs(workdir)
    lines = [markdown_table(_table_of_stages({name: {"": run} for name, run in runs.items()}))]
    lines.append(f"in {workdir}: {', '.join(f'{name}/' for name in runs)}, report.html")
    for name, run in runs.items():
        if run.config.stage == "mim":
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
    "extract": (("vqkd", "teacher.features"),),
    "vqkd": (("mim", "tokenizer.run"), ("tokenize", "tokenizer.run")),
    "tokenize": (("mim", "tokenizer.codes"),),
    "mim": (("finetune", "init_from"), ("probe", "backbone.run")),
}
"""Stage -> the stages that use it, and the key of theirs that names its workdir."""


def _command(stage: str, given: Mapping[str, str], run: Run, beside: str) -> str:
    defaults, flat = config_lib.flatten(config_lib.load(f"configs/{stage}.py")), config_lib.flatten(run.config)
    # stored targets belong to their views
    views = "views." if run.config.stage in ("extract", "tokenize") else "views.image_size"
    common = [key for key in flat if key in defaults and key.startswith(("data.source", "data.data_dir", views))]
    changed = {key: _text(flat[key]) for key in common if flat[key] != defaults[key]}
    if stage in ("finetune", "probe") and not run.inputs["train"]["classes"]:
        changed["data.source"] = "folder:LABELLED_IMAGES"
    keys = [f"--config.{key}={value}" for key, value in {**given, **changed}.items()]
    main = ["python", "-m", "beitv2_jax.main", f"--config=configs/{stage}.py", f"--workdir={beside}-{stage}"]
    return shlex.join([*main, *keys])


def _contents(folder: AnyPath) -> list[str]:
    shown = ("checkpoints", "views", "centre", "features", "metrics.jsonl", "summary.json", *PICTURES, "report.html")
    return [f"{name}/" if (folder / name).is_dir() else name for name in shown if (folder / name).exists()]


def _table_of_stages(stages: Mapping[str, Mapping[str, Run]], several: bool = False) -> list[tuple[str, ...]]:
    rows, total = [("stage", *(["run"] if several else []), "seconds", "metrics")], 0.0
    for stage, runs in stages.items():
        for name, run in runs.items():
            if run.summary is None:
                rows.append((stage, *([name] if several else []), "", "not finished"))
                continue
            total += run.summary["seconds"]
            for number, line in enumerate(key_metrics(run.summary, run.config)):
                left = (stage, *([name] if several else []), f"{run.summary['seconds']:.0f}")
                rows.append((*(left if number == 0 else [""] * len(left)), line))
    if not several:
        rows.append(("total", f"{total:.0f}", ""))
    return rows


class _Writer:
    """Write the sections of stages; a table or picture that was shown before on the page is not shown again."""

    def __init__(self, page: Page, *, several_stages: bool):
        self.page, self._several_stages = page, several_stages
        self._level = 3 if several_stages else 2
        self._shown: set[Any] = set()

    def add_stage(self, stage: str, runs: Mapping[str, Run]) -> None:
        """Add what there is about the runs of a stage, by their names."""
        page = self.page
        if self._several_stages:
            page.heading(stage)
        if len(runs) == 1:
            (run,) = runs.values()
            page.text(_how_far(run))
            if run.summary is not None:
                page.table([("key metrics",), *((line,) for line in key_metrics(run.summary, run.config))])
            if run.best is not None:
                page.text(f"The checkpoint of the {_best_text(run)} is kept.")
            self._curves(stage, _charts_of(run))
            self._data_and_pictures(run)
            self._settings(run)
            self._start(run)
            page.table(_table_of_metrics({"value": run}), summary="All metrics at the end")
            return
        page.table(_table_of_metrics(runs))
        self._curves(stage, _charts_side_by_side(runs))
        page.heading("Settings that differ", self._level)
        rows = _settings_that_differ(runs)
        page.table([("setting", *runs), *rows]) if rows else page.text("None.")
        self._level += 1
        for name, run in runs.items():
            page.heading(name, self._level - 1)
            page.text(_how_far(run))
            self._data_and_pictures(run)
            self._start(run)
        self._level -= 1

    def _curves(self, stage: str, charts: Sequence[Chart]) -> None:
        # counts of what went wrong, when nothing did
        charts = [chart for chart in charts if any(value for curve in chart.curves.values() for _, value in curve)]
        if charts:
            self.page.heading("Curves", self._level)
            self.page.drawing(draw_curves(charts), f"curves_{stage}.svg" if self._several_stages else "curves.svg")

    def _data_and_pictures(self, run: Run) -> None:
        data = _table_of_data(run)
        if self._is_new(data):
            self.page.heading("Data", self._level)
            self.page.table(data)
        for name, title in PICTURES.items():
            path = run.workdir / name
            if path.is_file() and self._is_new(path.read_bytes()):
                self.page.text(f"{title}:")
                self.page.picture(path, title)

    def _settings(self, run: Run) -> None:
        flat, changed = config_lib.flatten(run.config), run.started.get("changed")
        self.page.heading("Settings", self._level)
        if changed:
            rows = [(key, _text(flat.get(key)), _text(default)) for key, default in changed.items()]
            self.page.table([("other than by default", "value", "default"), *rows])
        rows = [(key, _text(value)) for key, value in flat.items()]
        self.page.table([("setting", "value"), *rows], summary="All settings")

    def _start(self, run: Run) -> None:
        if run.started and self._is_new(run.started["command"]):
            self.page.heading("How it was started", self._level)
            self.page.code(_over_lines(run.started["command"]))
            self.page.table(_table_of_start(run))

    def _is_new(self, shown: Any) -> bool:
        shown = str(shown)
        new = shown not in self._shown
        self._shown.add(shown)
        return new


def _over_lines(command: str) -> str:
    """Return a command with a line for each flag, as a shell takes it."""
    program, *flags = re.split(r" (?='?--)", command)
    return " \\\n  ".join([program, *flags])


def _how_far(run: Run) -> str:
    if run.summary is not None:
        return f"Finished in {_duration(run.summary['seconds'])}."
    return f"Not finished: step {run.lines[-1]['step'] if run.lines else 0} is the last one logged."


def _best_text(run: Run) -> str:
    step, value = run.best
    return f"best {run.config.run.keep_best}, {value:.4g} at step {step},"


def _settings_that_differ(runs: Mapping[str, Run]) -> list[tuple[str, ...]]:
    flats = [config_lib.flatten(run.config) for run in runs.values()]
    rows = [(key, *(_text(flat.get(key)) for flat in flats)) for key in sorted({key for flat in flats for key in flat})]
    return [row for row in rows if len(set(row[1:])) > 1]


def _charts_of(run: Run) -> list[Chart]:
    """Return a chart for each metric of the steps, with that of the same name of the evaluation in it."""
    charts: dict[str, dict[str, list]] = {}
    for line in run.lines:
        for name, value in line.items():
            label, base = "training", name
            for prefix, of_prefix in _PREFIXES.items():
                if name.startswith(prefix):
                    label, base = of_prefix, name.removeprefix(prefix)
            if _is_shown(name):
                charts.setdefault(base, {}).setdefault(label, []).append((int(line["step"]), value))
    order = sorted(charts, key=lambda base: (base in _BEHIND, base != "loss"))
    return [Chart(base, charts[base]) for base in order]


def _charts_side_by_side(runs: Mapping[str, Run]) -> list[Chart]:
    names = list(dict.fromkeys(name for run in runs.values() for line in run.lines for name in line))
    order = sorted(filter(_is_shown, names), key=lambda name: (name in _BEHIND, name != "loss", "/" not in name))
    curves = {
        name: {
            label: [(int(line["step"]), line[name]) for line in run.lines if name in line]
            for label, run in runs.items()
            if any(name in line for line in run.lines)
        }
        for name in order
    }
    return [Chart(name, of_runs) for name, of_runs in curves.items()]


def _is_shown(name: str) -> bool:
    # not the metrics of every single class, nor numbers that stay the same
    return name.count("/") < 2 and name not in ("step", "eval/examples")


def _table_of_metrics(runs: Mapping[str, Run]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(name for run in runs.values() for name in run.metrics))
    rows = [("metric", *runs)]
    rows += [(name, *(_text(run.metrics.get(name)) for run in runs.values())) for name in names]
    if any(run.best for run in runs.values()):
        bests = ("" if run.best is None else f"{run.best[1]:.4g} at step {run.best[0]}" for run in runs.values())
        rows.append(("best by run.keep_best", *bests))
    return rows


def _table_of_data(run: Run) -> list[tuple[str, ...]]:
    rows = [("split", "images", "classes", "data set")]
    for part in ("train", "eval"):
        if part in run.inputs:
            data = run.inputs[part]
            classes = len(data["classes"])
            rows.append((data["split"], f"{data['examples']:,}", str(classes or "none"), data["source"]))
    return rows


def _table_of_start(run: Run) -> list[tuple[str, ...]]:
    started = run.started
    versions = ", ".join(f"{name} {version}" for name, version in started["versions"].items())
    return [
        ("", ""),
        ("started", started["time"]),
        ("in", started["folder"]),
        ("workdir", str(run.workdir)),
        ("devices", f"{started['devices']}, {started['processes']} process{'es' * (started['processes'] > 1)}"),
        ("versions", versions),
    ]


def _short_names(folders: Sequence[AnyPath]) -> list[str]:
    """Return the last parts of paths, as many as make them differ."""
    if len(folders) == 1:
        return [folders[0].name]
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{folders[0]} is named twice.", "Did you mean another workdir?", "Write every workdir once.")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h" if whole >= 3600 else f"{whole} s"


def _text(value: Any) -> str:
    if isinstance(value, list):  # what JSON has for a tuple
        value = tuple(value)
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the report that `argv` asks for."""
    options = _parser().parse_args(argv)
    for path in (*options.workdirs, options.out):
        refuse_remote("WORKDIR", path, buckets=True)
    path = write_report(options.workdirs, options.out)
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 report", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", help="--workdir of a stage or a pipeline")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder of the report (default: report)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
