"""What the workdir of a run says of it: its settings, metrics, data and how it was started."""

import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from beitv2_jax import __version__
from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.atomic_files import write_json
from beitv2_jax.runtime.buckets import AnyPath, absolute, as_path
from beitv2_jax.training.best import BestEvaluation
from beitv2_jax.training.writer import read_metrics

STARTED_FILE = "started.json"
"""File in a workdir that says how its run was started last: command, versions, devices."""
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
PICTURES = {
    "examples.jpg": "Images of the training split",
    "codes.png": "16 codes on the evaluation images, one row each: the 8 most used, and 8 down to the rarest",
    "dense.png": "Evaluation images: image, true classes, by the nearest patches, by logistic regression (IoU of both)",
    "segmentation.png": "Evaluation images: image, true classes, predicted classes, where they differ",
}
"""Picture in a workdir -> its title."""


def write_started(workdir: str, config: ConfigDict, defaults: ConfigDict | None) -> None:
    """Keep in `workdir` how this start of the run was made, and which settings are not those of its config file.

    Args:
        workdir: of a stage.
        config: of the stage.
        defaults: the config file without presets and overrides; None if it is unknown.
    """
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
    try:
        found = {name: json.loads(path.read_text()) for name, path in texts.items() if path.is_file()}
        config = config_lib.from_json(found["config"])
        config.stage  # noqa: B018 a config.json of something else has none
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} does not hold what a run leaves: {error}.",
            "Did you mean the workdir of a stage or a pipeline?",
            "Write beitv2 report WORKDIR with the --workdir that the run was given.",
        ) from error
    lines = read_metrics(folder)
    return Run(folder, config, found.get("summary"), lines, found.get("started", {}), found.get("inputs", {}))


def best_text(run: Run) -> str:
    """Say which evaluation of a run with `run.keep_best` was the best."""
    step, value = run.best
    return f"best {run.config.run.keep_best}, {value:.4g} at step {step},"


def duration(seconds: float) -> str:
    """Return a time in words."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h" if whole >= 3600 else f"{whole} s"


def as_text(value: Any) -> str:
    """Return a setting or a metric as tables show it."""
    if isinstance(value, list):  # what JSON has for a tuple
        value = tuple(value)
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
