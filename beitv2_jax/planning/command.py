"""The `--plan` command: predict a training step for chips that are not here, and write the result to plan.json."""

import dataclasses
import os

from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.planning import planner, search, topologies
from beitv2_jax.planning.prediction import Prediction
from beitv2_jax.planning.report import compare_predictions, describe_prediction
from beitv2_jax.runners.stages import check_writable
from beitv2_jax.runtime.atomic_files import write_json
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.tasks.initial import completed


def run_plan(
    config: ConfigDict,
    wanted: str,
    workdir: str = "",
    *,
    num_examples: int = 0,
    compile_it: bool = True,
    minutes: float = 10,
) -> dict:
    """Plan the stage that `config` trains, print the plan, write it to `workdir`/plan.json, and return its metrics.

    Args:
        wanted: a target such as `v5e:16x16`, or `auto:v5e` (`auto:v5e:64`) for the best of many.
        workdir: '' writes nothing. Nothing else in it is read or changed.
        num_examples: training images, where the data set is neither known nor here; 0 looks for them.
        compile_it: False estimates everything from the traced step.
        minutes: time after which `auto` begins no further compilation.

    Raises:
        UserError: the config is inconsistent, the target unknown, or the TPU compiler is not installed.
    """
    if workdir:
        check_writable(workdir)
    planner.start_compilers()
    config = config_lib.resolve(completed(config, workdir, tolerant=True), workdir)
    chip = topologies.chip_of(wanted.removeprefix("auto:"))
    step = planner.prepare(config, num_examples, platform=chip.platform)
    if wanted.startswith("auto:"):
        make = make_prediction if compile_it else None
        best = search.find_best(step, wanted.removeprefix("auto:"), make=make, minutes=minutes)
        flags = " ".join(f"--config.{key}={value}" for key, value in search.config_keys(best[0]).items())
        print(compare_predictions(best))
        print(
            "\nmesh: data x fsdp x tensor. compiled: memory, memory access and collectives are those of a compiled "
            "program. traced: they are estimated from the traced step.\nTimes are at peak rates and leave out reading "
            f"the images. For details of the first row: --plan={best[0].target.name} {flags}"
        )
        metrics = {"target": wanted, "best": [prediction.metrics() for prediction in best]}
    else:
        make = make_prediction if compile_it else planner.predict
        prediction = make(step, topologies.parse(wanted))
        confirm = make_prediction if prediction.compile_s > 0 else None
        prediction = search.with_remedies(prediction, step, confirm=confirm)
        print(describe_prediction(prediction))
        metrics = prediction.metrics()
    if workdir:
        as_path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(os.path.join(workdir, "plan.json"), metrics)
    return metrics


def make_prediction(step: planner.PlannedStep, target: topologies.Target) -> Prediction:
    """Compile a step and return its prediction.

    Without the CUDA plugin that of a GPU is estimated from the traced step, and says so. Without libtpu there is an
    error.
    """
    platform = target.chip.platform
    if platform == "cuda" and not topologies.is_installed(platform):
        note = (
            f"No compiler for {target.chip.name} is installed ({topologies.PIP[platform]} installs it), so everything "
            "is estimated from the traced step."
        )
        return planner.predict(dataclasses.replace(step, notes=(*step.notes, note)), target)
    return planner.compile_and_predict(step, target)
