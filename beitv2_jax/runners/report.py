"""Reports of runs: report.md and report.html of one run or pipeline, or of several side by side, from their workdirs.

    beitv2 report runs/a runs/b --out=compared

A workdir is only read: a report shows what is there, also of a run that was interrupted or is still running.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from beitv2_jax import config as config_lib
from beitv2_jax.command_line import Parser, report_errors
from beitv2_jax.config.paths import refuse_remote
from beitv2_jax.convert.teachers.terms import rows_of
from beitv2_jax.errors import UserError
from beitv2_jax.report.curves import Chart, draw_curves
from beitv2_jax.report.key_metrics import key_metrics
from beitv2_jax.report.page import Page
from beitv2_jax.runners.workdirs import PICTURES, Run, as_text, best_text, duration, read_runs
from beitv2_jax.runtime.buckets import AnyPath, absolute, as_path

_EXAMPLES = """\
examples:
  # one page on two runs: metrics and settings side by side, curves in the same charts
  beitv2 report runs/mim runs/mim-long --out=compared
  # a run that is still running
  beitv2 report runs/mim --out=now
"""
_BEHIND = ("learning_rate", "grad_norm", "images_per_second", "data_wait_share")
"""Metrics of a step whose charts stand last."""
_PREFIXES = {"eval/": "evaluation", "eval_average/": "evaluation, averaged weights"}


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
        writer.page.table(table_of_stages(stages, several=len(folders) > 1))
    for stage, runs in stages.items():
        writer.add_stage(stage, runs)
    return writer.page.write()[1]


def table_of_stages(stages: Mapping[str, Mapping[str, Run]], several: bool = False) -> list[tuple[str, ...]]:
    """Return the rows with seconds and key metrics of runs, by stage and name; names are shown if `several`."""
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
                page.text(f"The checkpoint of the {best_text(run)} is kept.")
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
        teachers = rows_of(run.inputs.get("teachers", []))
        if teachers and self._is_new(teachers):
            self.page.heading("Teacher", self._level)
            self.page.table([("teacher", "licence", "origin"), *teachers])
        for name, title in PICTURES.items():
            path = run.workdir / name
            if path.is_file() and self._is_new(path.read_bytes()):
                self.page.text(f"{title}:")
                self.page.picture(path, title)

    def _settings(self, run: Run) -> None:
        flat, changed = config_lib.flatten(run.config), run.started.get("changed")
        self.page.heading("Settings", self._level)
        if changed:
            rows = [(key, as_text(flat.get(key)), as_text(default)) for key, default in changed.items()]
            self.page.table([("other than by default", "value", "default"), *rows])
        rows = [(key, as_text(value)) for key, value in flat.items()]
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
        return f"Finished in {duration(run.summary['seconds'])}."
    return f"Not finished: step {run.lines[-1]['step'] if run.lines else 0} is the last one logged."


def _settings_that_differ(runs: Mapping[str, Run]) -> list[tuple[str, ...]]:
    flats = [config_lib.flatten(run.config) for run in runs.values()]
    rows = [
        (key, *(as_text(flat.get(key)) for flat in flats)) for key in sorted({key for flat in flats for key in flat})
    ]
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
    rows += [(name, *(as_text(run.metrics.get(name)) for run in runs.values())) for name in names]
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


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the report that `argv` asks for."""
    options = _parser().parse_args(argv)
    for name, path in (*(("WORKDIR", workdir) for workdir in options.workdirs), ("--out", options.out)):
        refuse_remote(name, path, buckets=True)
    print(write_report(options.workdirs, options.out))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="beitv2 report", description=__doc__, epilog=_EXAMPLES)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", help="--workdir of a stage or a pipeline")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder of the report (default: report)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
