"""`--plan`: print what a run would need and take on chips that are not here, and keep it as plan.json."""

import dataclasses
import json
import os

from ml_collections import ConfigDict

from beitv2_jax.planning import planner, search, topologies
from beitv2_jax.planning.figures import Plan
from beitv2_jax.planning.report import compare_plans, describe_plan
from beitv2_jax.files import write_text
from beitv2_jax.stages import check_writable


def run_plan(
    config: ConfigDict, wanted: str, workdir: str = "", *, num_examples: int = 0, compile_it: bool = True
) -> dict:
    """Plan the stage that `config` trains, print the plan, write it to `workdir`/plan.json, and return its figures.

    Args:
        wanted: a target such as `v5e:16x16`, or `auto:v5e` (`auto:v5e:64`) for the best of many.
        workdir: '' writes nothing. Nothing else in it is read or changed.
        num_examples: training images, where the data set is neither known nor here; 0: look.
        compile_it: False takes arithmetic for everything.

    Raises:
        UserError: the config is inconsistent, the target unknown, or the TPU compiler is not installed.
    """
    if workdir:
        check_writable(workdir)
    planner.start_compilers()
    stage = planner.prepare(config, num_examples)
    if wanted.startswith("auto:"):
        plans = search.auto(stage, wanted.removeprefix("auto:"), compile_it=compile_it)
        print(compare_plans(plans))
        figures = {"target": wanted, "best": [plan.figures() for plan in plans]}
    else:
        plan = make_plan(stage, topologies.parse(wanted), compile_it=compile_it)
        plan = search.with_switches(plan, stage, confirm=plan.compile_s > 0)
        print(describe_plan(plan))
        figures = plan.figures()
    if workdir:
        os.makedirs(workdir, exist_ok=True)
        write_text(os.path.join(workdir, "plan.json"), json.dumps(figures, indent=2) + "\n")
    return figures


def make_plan(stage: planner.Stage, target: topologies.Target, *, compile_it: bool = True) -> Plan:
    """Return the compiled plan of a stage, or the computed one where that is asked for.

    Without the CUDA plugin a GPU's plan is computed, and says so. Without libtpu there is an error.
    """
    platform = target.chip.platform
    if compile_it and platform == "cuda" and not topologies.is_installed(platform):
        note = f"no compiler for {target.chip.name} is installed ({topologies.PIP[platform]}): all figures are computed"
        return planner.compute(dataclasses.replace(stage, notes=(*stage.notes, note)), target)
    return planner.make(stage, target) if compile_it else planner.compute(stage, target)
