"""The training loop: one compiled step, batches and steps one ahead, metrics when logged, state and data together.

Runs any `tasks.api.Task` under the sections `run`, `optim`, `mesh` and the seed of a config.
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax import rng
from beitv2_jax.data.bad_records import BadRecords, refuse_too_many
from beitv2_jax.errors import Preempted, UserError
from beitv2_jax.runtime import preemption, startup_times, watchdog
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.tasks.api import Batch, Task
from beitv2_jax.training import best, inference, optim, sharding, wandb_run
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.checkpoint import Checkpointer
from beitv2_jax.training.metric_log import MetricLog
from beitv2_jax.training.schedule import Schedule
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.step import TrainStep, lower_step, make_train_step
from beitv2_jax.training.stop_rules import StopRules
from beitv2_jax.training.writer import MetricWriter, Progress, read_metrics
from beitv2_jax.typing import PyTree


def train(task: Task, config: ConfigDict, workdir: str | AnyPath) -> dict[str, float]:
    """Train `task` to the end of `config.run.duration`, continuing from the newest checkpoint of `workdir` if any.

    Returns:
        The last logged metrics and evaluation, `steps`, and the `seconds` and `images_per_second` of this call. If the
        checkpoint is that of the last step, nothing runs and the metrics are those in the workdir.

    Raises:
        UserError: the batch does not fit the mesh, the checkpoint belongs to another configuration or another schedule,
            or too many steps in a row changed nothing, more records than `data.max_bad_fraction` allows were
            unreadable, or the last checkpoint could not be written, or any other where `run.on_failed_save` is 'stop'.
        Preempted: the run was asked to stop; it is saved and can be resumed.
    """
    startup_times.begin()
    schedule = Schedule.from_config(config, task.num_train_examples)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(watchdog.Watch(workdir, config.run.hang_timeout))
        stop = config.run.on_failed_save == "stop"
        folder = as_path(workdir) / "checkpoints"
        checkpointer = Checkpointer(folder, keep_every=schedule.keep_every, stop_on_failure=stop)
        stack.enter_context(contextlib.closing(checkpointer))
        start = checkpointer.latest_step()
        _check_schedule(schedule, checkpointer, workdir)
        logged = _logged_at(start, workdir)
        if start == schedule.num_steps and not _lacks_evaluation(task, schedule, start, logged):
            logging.info("%s: finished before, at step %d of %d", task.name, start, schedule.num_steps)
            return _final_metrics(logged, start, seconds=0.0)
        return _run(task, config, schedule, as_path(workdir), checkpointer, watch, logged)


def check(task: Task, config: ConfigDict) -> None:
    """Check what `train` would find out before its first step: that batch, data, devices and processes fit each other.

    Raises:
        UserError: they do not, `run.keep_best` names no metric of the evaluation, or wandb is not installed.
    """
    Schedule.from_config(config, task.num_train_examples)
    mesh = check_devices(config)
    best.check_metric(task, config.run.keep_best, config.optim.weight_average > 0, sharding.row_share(mesh))
    wandb_run.check(config.run.wandb)
    task.train_batches(*sharding.row_share(mesh)).close()


def check_devices(config: ConfigDict) -> Mesh:
    """Return the mesh of a config; raise UserError unless its devices are there and divide the batches equally."""
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_rows(config.run.batch_size, mesh)
    sharding.check_micro_batches(config.run.batch_size, mesh.shape, config.efficiency.accumulation_steps)
    return mesh


def check_checkpoint(task: Task, config: ConfigDict, workdir: str | AnyPath) -> None:
    """Check that the newest checkpoint of `workdir`, if any, has this run's schedule and the structure of its state.

    Raises:
        UserError: it has not, or no checkpoint is whole.
    """
    schedule = Schedule.from_config(config, task.num_train_examples)
    with contextlib.closing(Checkpointer(as_path(workdir) / "checkpoints")) as checkpointer:
        _check_schedule(schedule, checkpointer, workdir)
        if checkpointer.latest_step() is not None:
            _, abstract, _ = _make_step(task, config, schedule, sharding.make_mesh(**config.mesh))
            checkpointer.check_structure(abstract)


def _check_schedule(schedule: Schedule, checkpointer: Checkpointer, workdir: str | AnyPath) -> None:
    step, own = checkpointer.latest_step(), schedule.meaning_of_a_step()
    if step is None:
        return
    position = checkpointer.position()
    saved = {name: position.get(name, value) for name, value in own.items()}
    if saved == own:
        return
    described = [
        "{num_steps} steps of {batch_size} examples with {warmup_steps} steps of warm-up".format(**numbers)
        for numbers in (saved, own)
    ]
    raise UserError(
        f"The checkpoint of step {step} in {workdir} belongs to a run of {described[0]}, and this run has "
        f"{described[1]}.",
        "A run keeps its batch size and its length, because its position in the data and in the schedule is counted in "
        "steps.",
        "Write the former run.batch_size, run.duration and optim.warmup, or begin another run from its weights with "
        f"another --workdir and --config.init_from={workdir}.",
    )


def _run(
    task: Task,
    config: ConfigDict,
    schedule: Schedule,
    workdir: AnyPath,
    checkpointer: Checkpointer,
    watch: watchdog.Watch,
    logged: dict[str, float],
) -> dict[str, float]:
    """Train to the end; `logged` is what the workdir has of the step of its newest checkpoint."""
    started = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_micro_batches(config.run.batch_size, mesh.shape, config.efficiency.accumulation_steps)
    iterator = task.train_batches(*sharding.row_share(mesh))
    frozen = sharding.place_weights(task.frozen, mesh)
    bad_records = BadRecords(workdir, jax.process_index())

    def starts_codebook(steps: int) -> bool:
        return task.start_codebook is not None and steps in task.codebook_starts

    def next_batch() -> tuple[Batch, np.ndarray]:
        host_batch = next(iterator)
        bad_records.note(host_batch, task.splits[0])
        return sharding.place_batch(host_batch, mesh), host_batch["example_ids"]

    train_step, abstract, create = _make_step(task, config, schedule, mesh)
    with futures.ThreadPoolExecutor(1, "state") as pool:
        give_state, position = _start(task, abstract, create, checkpointer)
        # made beside the first batch and the compilation of the step, which needs its shapes alone
        made = pool.submit(give_state)
        iterator.set_state(position)
        batch, example_ids = next_batch()
        startup_times.ended("first batch")
        watch.note("compiling", position["next_batch"])
        compiled = compile_step(train_step, abstract, frozen, batch, mesh)
        state = made.result()
        startup_times.ended("state")
    start = int(state.step)
    if start == 0 and starts_codebook(0):
        state = _start_codebook(task, config.seed, state, frozen, batch, mesh)
        startup_times.ended("codebook")
    evaluate = _make_evaluation(task, mesh, bad_records, watch, config.data.max_bad_fraction)

    is_main = jax.process_index() == 0
    service = None
    if config.run.wandb and is_main:
        service = wandb_run.WandbRun(config.run.wandb, workdir, json.loads(config_lib.to_json(config)))
    writer = MetricWriter(workdir, enabled=is_main, resume_step=start, service=service)
    progress = Progress(schedule.num_steps, task.name, "steps", done=start, enabled=is_main)
    stop_rules = StopRules(
        schedule,
        max_nonfinite_steps=config.run.max_nonfinite_steps,
        max_bad_fraction=config.data.max_bad_fraction,
        workdir=workdir,
        skipped_steps=int(state_lib.nonfinite_steps(state) + state.spikes.left_out),
        unreadable=position["unreadable"],
    )
    metric_log = MetricLog(schedule, writer, progress, stop_rules, task.advise)
    last_metrics = dict(logged)
    best_evaluation = None
    if config.run.keep_best:
        # metrics.jsonl alone says which it is, so that it survives every kind of end
        best_evaluation = best.BestEvaluation(config.run.keep_best, read_metrics(workdir), checkpointer.steps())
        if best_evaluation.step is not None:
            checkpointer.preserve(best_evaluation.step)
    with contextlib.ExitStack() as stack:
        for thing in (metric_log, progress, writer, iterator):
            stack.enter_context(contextlib.closing(thing))
        is_preempted = stack.enter_context(preemption.notices(checkpointer.reached_preemption))

        def evaluate_at(step: int) -> None:
            found = evaluate(state, frozen, step)
            last_metrics.update(found)
            writer.write(step, found)
            writer.flush()
            progress.show_evaluation(found)
            improved = best_evaluation is not None and best_evaluation.is_improved_by(found)
            if improved and checkpointer.preserve(step):
                best_evaluation.take(step, found)

        # a run that ended between a save and the evaluation after it
        if _lacks_evaluation(task, schedule, start, logged):
            evaluate_at(start)
            metric_log.restart_clock()
        for step in range(start + 1, schedule.num_steps + 1):
            if step > 1 and starts_codebook(step - 1):
                metric_log.read()
                watch.note("starting the codebook", step)
                state = _start_codebook(task, config.seed, state, frozen, batch, mesh)
                metric_log.restart_clock()
            watch.note("in the step", step)
            state, metrics = compiled(state, frozen, batch)
            metric_log.add(step, metrics, example_ids)
            ends = is_preempted(step)
            saves = schedule.saves(step) or (best_evaluation is not None and schedule.evaluates(step))
            if schedule.evaluates(step) or saves or ends:
                metric_log.read()
                # On disk before the checkpoint is: a resumed run repeats no line and misses none.
                trouble = writer.flush()
                if ends:
                    text = "%s: preempted, saving after step %d; a second signal ends the process at once"
                    logging.warning(text, task.name, step)
                if saves or ends:
                    watch.note("saving", step)
                    # Before the next batch is drawn: the saved iterator stands where the saved state does.
                    position = {
                        **iterator.get_state(),
                        "unreadable": stop_rules.unreadable,
                        **schedule.meaning_of_a_step(),
                    }
                    checkpointer.save(step, state, position, last=ends or step == schedule.num_steps, trouble=trouble)
                if ends:
                    raise Preempted(
                        f"{task.name} was preempted: checkpoint saved at step {step}; rerun the same command to resume."
                    )
                # After the save: what keeps an evaluation from its end loses no step.
                if schedule.evaluates(step):
                    evaluate_at(step)
                metric_log.restart_clock()
            if step < schedule.num_steps:
                # while the step runs: its devices get the next batch before they are done with this one
                watch.note("waiting for data", step)
                with metric_log.waiting_for_data():
                    batch, example_ids = next_batch()
                watch.note("in the step", step)
            metric_log.follow(leave=1)
            checkpointer.check()
    if start < schedule.num_steps:
        last_metrics |= {**metric_log.metrics, "images_per_second": metric_log.images_per_second}
    return _final_metrics(last_metrics, max(start, schedule.num_steps), seconds=time.monotonic() - started)


def _make_step(
    task: Task, config: ConfigDict, schedule: Schedule, mesh: Mesh
) -> tuple[TrainStep, TrainState, Callable[[], TrainState]]:
    """Return the step, shapes and shardings of its state, and what makes that state as it is at step 0."""
    optimizer, learning_rate = optim.for_task(task, config.optim, schedule.warmup_steps, schedule.num_steps)
    train_step = make_train_step(
        task,
        optimizer,
        schedule=learning_rate,
        seed=config.seed,
        average_decay=config.optim.weight_average,
        accumulation_steps=config.efficiency.accumulation_steps,
        spike_factor=config.optim.spike_factor,
    )
    arguments = dict(mesh=mesh, seed=config.seed, keep_average=config.optim.weight_average > 0)
    create = functools.partial(state_lib.create, task, optimizer, **arguments)
    return train_step, state_lib.abstract(task, optimizer, **arguments), create


def _start(
    task: Task, abstract: TrainState, create: Callable[[], TrainState], checkpointer: Checkpointer
) -> tuple[Callable[[], TrainState], dict[str, int]]:
    """Return a function that gives the state to start from, and the position in the data that belongs to it."""
    if unmatched := sharding.unmatched(abstract.params):
        logging.info("%s: replicated, as no partition rule names them: %s", task.name, ", ".join(unmatched))
    step = checkpointer.latest_step()
    if step is None:
        logging.info("%s: starting at step 0 from %s", task.name, "init_from" if task.initial else "scratch")
        return create, {"next_batch": 0, "unreadable": 0}
    logging.info("%s: continuing from the checkpoint at step %d", task.name, step)
    state, position = checkpointer.restore(abstract)
    return lambda: state, position


def _start_codebook(task: Task, seed: int, state: TrainState, frozen: PyTree, batch: Batch, mesh: Mesh) -> TrainState:
    """Return the state with its codebook started from the batch at hand and, where the task asks for more, the next.

    Those are read by an iterator of their own, so that training sees every batch in its turn.
    """
    step, batches = int(state.step), [batch]
    if task.start_batches > 1:
        logging.info("%s: starting the codebook from %d batches after step %d", task.name, task.start_batches, step)
        with contextlib.closing(task.train_batches(*sharding.row_share(mesh))) as iterator:
            iterator.set_state({"next_batch": step + 1})
            batches += [sharding.place_batch(next(iterator), mesh) for _ in range(task.start_batches - 1)]

    def start(params, codebook, frozen, batches):
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
        return task.start_codebook(params, codebook, frozen, stacked, rng.step_key(seed, "start_codebook", step))

    shardings = sharding.param_shardings(state.model_state, mesh)
    with sharding.activation_rules(mesh):
        codebook = jax.jit(start, out_shardings=shardings)(state.params, state.model_state, frozen, batches)
    return state.replace(model_state=codebook)


def compile_step(train_step: TrainStep, state: TrainState, frozen: PyTree, batch: Batch, mesh: Mesh) -> TrainStep:
    """Compile ahead of time: called with anything else than it was compiled for, the step fails, never recompiles."""
    started = time.monotonic()
    compiled = lower_step(train_step, state, frozen, batch, mesh).compile()
    startup_times.ended("compiling")
    logging.info("compiled the step in %.1f s for %s", time.monotonic() - started, dict(mesh.shape))
    return compiled


def _make_evaluation(
    task: Task, mesh: Mesh, bad_records: BadRecords, watch: watchdog.Watch, max_bad_fraction: float
) -> Callable[[TrainState, PyTree, int], dict[str, float]]:
    """Return the function that evaluates the weights, and the averaged ones if there are any (`eval_average/...`).

    `eval/examples` says how many images the metrics are of: those that could be read. The function raises UserError if
    more than `max_bad_fraction` could not.
    """
    if task.eval_batches is None:
        return lambda state, frozen, step: {}

    def sums(weights, batch):
        params, model_state, frozen = weights
        of_weights = {prefix: task.evaluate(tree, model_state, frozen, batch) for prefix, tree in params.items()}
        return of_weights, jnp.sum(batch["weight"] > 0)

    compiled = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    def evaluate(state: TrainState, frozen: PyTree, step: int) -> dict[str, float]:
        watch.note("evaluating", step)
        batches = task.eval_batches(*sharding.row_share(mesh))
        params = {"eval": state.params}
        if state.averaged_params is not None:
            params["eval_average"] = state.averaged_params
        noted = watch.noted(bad_records.noted(batches, task.splits[1]), "evaluating", step)
        totals, readable = inference.sum_batches(compiled, (params, state.model_state, frozen), noted, mesh)
        refuse_too_many(
            task.num_eval_examples - int(readable),
            task.num_eval_examples,
            max_bad_fraction,
            of=f"of split {task.splits[1]}",
            listed=f"listed in {bad_records.path}",
        )
        metrics = {
            f"{prefix}/{name}": float(value)
            for prefix, of_weights in totals.items()
            for name, value in task.summarize(of_weights).items()
        }
        return {**metrics, "eval/examples": int(readable)}

    return evaluate


def _logged_at(step: int | None, workdir: str | AnyPath) -> dict[str, float]:
    """Return what `metrics.jsonl` has of `step`."""
    return next((line for line in read_metrics(workdir) if line["step"] == step), {})


def _lacks_evaluation(task: Task, schedule: Schedule, step: int, logged: dict[str, float]) -> bool:
    """Return whether the evaluation that follows `step` is missing in what was `logged` of it."""
    evaluates = step > 0 and task.eval_batches is not None and schedule.evaluates(step)
    return evaluates and not any(name.startswith("eval/") for name in logged)


def _final_metrics(metrics: dict[str, float], steps: int, *, seconds: float) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name != "step"} | {"steps": steps, "seconds": seconds}
