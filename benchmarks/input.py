"""Is the input or the step the bound: each alone and both together, and how many cores keep the devices busy.

    python -m benchmarks.input --config=configs/mim.py:small --source=folder:PATH --config.run.batch_size=64
        [--threads=8] [--workers=0] [--steps=20] [--tokenizer=configs/vqkd.py] [--out=FILE.json] [--quick]

Writes the table of docs/data-at-scale.md. Every stage that trains can be measured;
the pixels count, not the weights, so a mim config that names neither codes nor a tokenizer gets an untrained one of the
sizes of `--tokenizer`. Each measurement is warmed before it is taken:

    input alone   host batches as fast as they come; a core's rate is by processor time, workers included
    step alone    the compiled step on one batch that stays on the devices
    whole loop    `training.loop`, checkpoints and evaluations left out, with the share of time spent waiting for data

`--quick` takes few small batches, to see that everything runs; its metrics mean nothing.
"""

import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from beitv2_jax import config as config_lib
from beitv2_jax.convert.arguments import initialised
from beitv2_jax.convert.weights import Weights
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.models.backbone import Compute
from beitv2_jax.runtime.launch import start_logging
from beitv2_jax.tasks import inputs, mim, tokenize
from beitv2_jax.tasks.api import Task
from beitv2_jax.training import loop, optim, sharding
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.schedule import Schedule
from beitv2_jax.training.step import make_train_step
from beitv2_jax.training.writer import read_metrics

WARM_BATCHES = 3  # beyond those that are prepared ahead
INPUT_FACTOR = 4  # of the input alone, the fastest of the three, as many times more batches are measured


def measure(config: ConfigDict, task: Task, steps: int) -> dict[str, float | str]:
    """Return rates in images a second, and what follows from them."""
    input_rate, core_rate = input_alone(task, config, steps)
    step_rate = step_alone(task, config, steps)
    loop_rate, wait_share = whole_loop(task, config, steps)
    return {
        "input_images_per_second": input_rate,
        "input_images_per_second_per_core": core_rate,
        "step_images_per_second": step_rate,
        "loop_images_per_second": loop_rate,
        "data_wait_share": wait_share,
        "bound": "input" if input_rate < step_rate else "step",
        "cores_to_keep_the_step_busy": step_rate / core_rate,
    }


def input_alone(task: Task, config: ConfigDict, steps: int) -> tuple[float, float]:
    """Return images per second of the clock, and per second of processor time, of host batches."""
    iterator = task.train_batches(0, 1)
    # what lies ready when the clock starts is replaced by as much when it stops
    for _ in range(WARM_BATCHES + max(config.data.num_threads, 4)):
        next(iterator)
    clock, processor = time.monotonic(), _processor_seconds()
    for _ in range(INPUT_FACTOR * steps):
        next(iterator)
    clock, processor = time.monotonic() - clock, _processor_seconds() - processor
    iterator.close()
    images = INPUT_FACTOR * steps * config.run.batch_size
    return images / clock, images / processor


def _processor_seconds() -> float:
    """Return what this process, all its threads and its worker processes have used so far."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def step_alone(task: Task, config: ConfigDict, steps: int) -> float:
    """Return images per second of the compiled step on one batch that stays on the devices."""
    mesh = sharding.make_mesh(**config.mesh)
    schedule = Schedule.from_config(config, task.num_train_examples)
    optimizer, learning_rate = optim.for_task(task, config.optim, schedule.warmup_steps, schedule.num_steps)
    state = state_lib.create(task, optimizer, mesh=mesh, seed=config.seed, keep_average=config.optim.weight_average > 0)
    iterator = task.train_batches(0, 1)
    batch = sharding.place_batch(next(iterator), mesh)
    iterator.close()
    frozen = sharding.place_weights(task.frozen, mesh)
    step = make_train_step(
        task, optimizer, schedule=learning_rate, seed=config.seed, average_decay=config.optim.weight_average
    )
    compiled = loop.compile_step(step, state, frozen, batch, mesh)
    for count in (WARM_BATCHES, steps):
        started = time.monotonic()
        for _ in range(count):
            state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, metrics))
    return steps * config.run.batch_size / (time.monotonic() - started)


def whole_loop(task: Task, config: ConfigDict, steps: int) -> tuple[float, float]:
    """Return images per second and the share of time without work for want of data, in the second half of a run."""
    config = config_lib.from_json(config_lib.to_json(config)).unlock()
    config.optim.warmup = "0 steps"
    config.run.update(duration=f"{2 * steps} steps", log_every=f"{steps} steps")
    config.run.update(checkpoint_every="0 steps", keep_every="0 steps", eval_every="0 steps")
    with tempfile.TemporaryDirectory() as workdir:
        loop.train(dataclasses.replace(task, eval_batches=None), config, workdir)
        last = read_metrics(workdir)[-1]
    return last["images_per_second"], last["data_wait_share"]


def build(config: ConfigDict, tokenizer_config: str) -> Task:
    """Build the stage of `config`; a mim stage that names no tokenizer gets an untrained one."""
    if config.stage == "mim" and not (config.tokenizer.codes or config.tokenizer.run):
        tokenizer, variables = untrained_tokenizer(config, config_lib.load(tokenizer_config))
        opened = inputs.Opened(inputs.open_sources(config), network=tokenizer, frozen={"tokenizer": variables})
        return mim.make_task(config, opened)
    return importlib.import_module(f"beitv2_jax.tasks.{config.stage}").build(config)


def untrained_tokenizer(config: ConfigDict, tokenizer_config: ConfigDict):
    """Return a tokenizer of the sizes in `tokenizer_config` and its random variables, fitting the mim `config`."""
    size, rows = inputs.tokenizer_view(config).image_size, config.views.image_size // config.model.patch_size
    tokenizer_config.views.image_size = size
    tokenizer_config.model.encoder.patch_size = size // rows
    tokenizer_config.model.codebook_size = config.model.codebook_size
    arguments = {**tokenizer_config.model.to_dict(), "image_size": size, "teacher_width": 512}
    variables = jax.jit(functools.partial(initialised, "vqkd", arguments))(jax.random.key(0))
    weights = Weights("vqkd", arguments, variables, "run")
    return tokenize.tokenizer_of(weights, Compute(dtype=config.efficiency.dtype), name="untrained"), variables


def table(metrics: dict[str, float | str], config: ConfigDict) -> str:
    """Return the metrics as a Markdown table with one line of conclusion."""
    cores = metrics["cores_to_keep_the_step_busy"]
    return "\n".join(
        [
            "| what | images/s |",
            "|---|---|",
            f"| input alone, {_workers(config)} | {metrics['input_images_per_second']:.1f} |",
            f"| input alone, a core | {metrics['input_images_per_second_per_core']:.1f} |",
            f"| step alone, {_devices()} | {metrics['step_images_per_second']:.1f} |",
            f"| whole loop | {metrics['loop_images_per_second']:.1f} |",
            "",
            f"The bound is the {metrics['bound']}; the loop waits for data {metrics['data_wait_share']:.1%} of the "
            f"time. The input needs {cores:.2f} cores to keep this step busy.",
        ]
    )


def _workers(config: ConfigDict) -> str:
    workers = config.data.num_workers
    return f"{workers} worker processes" if workers else f"{config.data.num_threads} threads"


def _devices() -> str:
    return f"{len(jax.devices())} x {jax.devices()[0].device_kind}"


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define this program's flags in `values`; `argv` shows which config keys will be overridden."""
    config_flags.DEFINE_config_file("config", None, "Stage to measure.", values, sys_argv=list(argv))
    flags.DEFINE_string("source", None, "In place of config.data.source.", flag_values=values)
    flags.DEFINE_integer("threads", None, "In place of config.data.num_threads.", flag_values=values)
    flags.DEFINE_integer("workers", None, "In place of config.data.num_workers.", flag_values=values)
    flags.DEFINE_integer("steps", 20, "Batches of each measurement.", flag_values=values)
    configs = Path(__file__).parents[1] / "configs"
    flags.DEFINE_string("tokenizer", str(configs / "vqkd.py"), "Sizes of an untrained tokenizer.", flag_values=values)
    flags.DEFINE_string("out", "benchmark_input.json", "File for the metrics.", flag_values=values)
    flags.DEFINE_boolean("quick", False, "Few small batches.", flag_values=values)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Define and parse the flags in `argv`."""
    define_flags(flags.FLAGS, argv)
    flags.mark_flag_as_required("config")
    return flags.FLAGS(list(argv))


def main(argv: Sequence[str]) -> None:
    """Measure what the parsed flags describe; print the table and write the metrics."""
    del argv
    start_logging(False)
    values = flags.FLAGS
    config, steps = values.config, values.steps
    for key, given in (("source", values.source), ("num_threads", values.threads), ("num_workers", values.workers)):
        if given is not None:
            config.data[key] = given
    if values.quick:
        config.run.batch_size, steps = 8, 3
    metrics = measure(config, build(config, values.tokenizer), steps)
    print(table(metrics, config))
    described = {"config": config.to_dict(), "devices": _devices(), "steps": steps, **metrics}
    Path(values.out).write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        print_error(f"Error: {error}")
        sys.exit(2)
