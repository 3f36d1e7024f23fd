"""`--plan`: print what a run would need and take on chips that are not here, and keep it as plan.json."""

import dataclasses
import json
import os

from ml_collections import ConfigDict

from beitv2_jax.planning import planner, search, topologies
from beitv2_jax.planning.figures import Forecast
from beitv2_jax.planning.report import compare_forecasts, describe_forecast
from beitv2_jax.runners.stages import check_writable
from beitv2_jax.runtime.atomic_files import write_text


def run_plan(
    config: ConfigDict,
    wanted: str,
    workdir: str = "",
    *,
    num_examples: int = 0,
    compile_it: bool = True,
    minutes: float = 10,
) -> dict:
    """Plan the stage that `config` trains, print the plan, write it to `workdir`/plan.json, and return its figures.

    Args:
        wanted: a target such as `v5e:16x16`, or `auto:v5e` (`auto:v5e:64`) for the best of many.
        workdir: '' writes nothing. Nothing else in it is read or changed.
        num_examples: training images, where the data set is neither known nor here; 0: look.
        compile_it: False takes arithmetic for everything.
        minutes: after which `auto` begins no further compilation.

    Raises:
        UserError: the config is inconsistent, the target unknown, or the TPU compiler is not installed.
    """
    if workdir:
        check_writable(workdir)
    planner.start_compilers()
    chip = topologies.chip_of(wanted.removeprefix("auto:"))
    stage = planner.prepare(config, num_examples, platform=chip.platform)
    if wanted.startswith("auto:"):
        make = make_forecast if compile_it else None
        best = search.auto(stage, wanted.removeprefix("auto:"), make=make, minutes=minutes)
        asked = " ".join(f"--config.{key}={value}" for key, value in search.keys_of(best[0]).items())
        print(compare_forecasts(best))
        print(
            "\nmesh: data x fsdp x tensor. compiled: memory, bytes and exchanges are those of a compiled program; "
            "computed: by arithmetic.\nTimes are peak rates; reading the images is not part of them. "
            f"More of the first: --plan={best[0].target.name} {asked}"
        )
        figures = {"target": wanted, "best": [forecast.figures() for forecast in best]}
    else:
        make = make_forecast if compile_it else planner.compute
        forecast = make(stage, topologies.parse(wanted))
        forecast = search.with_switches(forecast, stage, confirm=make_forecast if forecast.compile_s > 0 else None)
        print(describe_forecast(forecast))
        figures = forecast.figures()
    if workdir:
        os.makedirs(workdir, exist_ok=True)
        write_text(os.path.join(workdir, "plan.json"), json.dumps(figures, indent=2) + "\n")
    return figures


def make_forecast(stage: planner.Stage, target: topologies.Target) -> Forecast:
    """Return the compiled forecast of a stage.

    Without the CUDA plugin that of a GPU is computed, and says so. Without libtpu there is an error.
    """
    platform = target.chip.platform
    if platform == "cuda" and not topologies.is_installed(platform):
        note = f"no compiler for {target.chip.name} is installed ({topologies.PIP[platform]}): all figures are computed"
        return planner.compute(dataclasses.replace(stage, notes=(*stage.notes, note)), target)
    return planner.make(stage, target)
