"""The training loop: one compiled step, batches one ahead, figures one step late, state and data position together.

Runs any `tasks.api.Task` under the sections `run`, `optim`, `mesh` and the seed of a config.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax import rng
from beitv2_jax.errors import UserError
from beitv2_jax.tasks.api import Batch, Task
from beitv2_jax.training import inference, optim, sharding
from beitv2_jax.training import state as state_lib
from beitv2_jax.training.checkpoint import Checkpointer
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.writer import MetricWriter, Progress, read_metrics
from beitv2_jax.typing import PyTree

TrainStep = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]


def train(task: Task, config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Train `task` to the end of `config.run.duration`, continuing from the newest checkpoint of `workdir` if any.

    Returns:
        The last logged figures and evaluation, `steps`, and the `seconds` and `images_per_second` of this call. If the
        checkpoint stands at the end already, nothing runs and the figures are those in the workdir.

    Raises:
        UserError: the batch does not fit the mesh, the checkpoint belongs to another configuration, or too many steps
            in a row were not finite.
    """
    plan = Plan.from_config(config, task.num_train_examples)
    checkpointer = Checkpointer(Path(workdir) / "checkpoints", keep_every=plan.keep_every)
    with contextlib.closing(checkpointer):
        start = checkpointer.latest_step()
        if start is not None and start >= plan.num_steps:
            logging.info("%s: the checkpoint stands at step %d of %d", task.name, start, plan.num_steps)
            return _final_figures(read_metrics(workdir), start, seconds=0.0)
        return _run(task, config, plan, Path(workdir), checkpointer)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Hold when things happen, in steps; 0 means never."""

    batch_size: int
    num_steps: int
    warmup_steps: int
    log_every: int
    checkpoint_every: int
    keep_every: int
    eval_every: int
    max_nonfinite_steps: int

    @classmethod
    def from_config(cls, config: ConfigDict, num_examples: int) -> "Plan":
        """Resolve the durations of a config."""
        run = config.run
        steps = functools.partial(config_lib.steps, batch_size=run.batch_size, num_examples=num_examples)
        every = {name: steps(run[name]) for name in ("log_every", "checkpoint_every", "keep_every", "eval_every")}
        return cls(
            batch_size=run.batch_size,
            num_steps=steps(run.duration),
            warmup_steps=steps(config.optim.warmup),
            max_nonfinite_steps=run.max_nonfinite_steps,
            **every,
        )

    def logs(self, step: int) -> bool:
        """Tell whether the figures of the step are written; so they are wherever else something happens."""
        return self._due(step, self.log_every) or self.evaluates(step)

    def evaluates(self, step: int) -> bool:
        """Tell whether an evaluation follows the step."""
        return self._due(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Tell whether a checkpoint follows the step."""
        return self._due(step, self.checkpoint_every, self.keep_every)

    def _due(self, step: int, *periods: int) -> bool:
        return step == self.num_steps or any(period and step % period == 0 for period in periods)


def make_train_step(
    task: Task, optimizer: optax.GradientTransformationExtraArgs, *, schedule: Callable, seed: int, ema_decay: float
) -> TrainStep:
    """Return the pure function `(state, frozen, batch) -> (state, metrics)` of one optimizer step.

    A step whose loss or gradient norm is not finite changes nothing but `step`; `nonfinite_steps` counts them.
    `grad_norm` is taken before clipping. The averages are `ema = ema_decay * ema + (1 - ema_decay) * params`.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = rng.step_key(seed, "train", state.step)
        loss_and_grads = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (codebook, metrics)), grads = loss_and_grads(
            state.params, state.codebook, frozen, batch, key, state.step
        )
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - ema_decay)
        moved = TrainState(state.step, params, opt_state, codebook, ema_params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
        moved = moved.replace(step=state.step + 1)
        return moved, {
            **metrics,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "nonfinite_steps": state_lib.nonfinite_steps(moved),
        }

    return train_step


class Ledger:
    """Keep what the host knows of the steps: figures not read yet, the clock, steps in a row that were not finite."""

    def __init__(self, plan: Plan, writer: MetricWriter, progress: Progress, nonfinite_steps: int):
        self._plan, self._writer, self._progress = plan, writer, progress
        self._unread: list[tuple[int, dict[str, jax.Array]]] = []
        self._nonfinite_steps, self._nonfinite_run = nonfinite_steps, 0
        self._window = self._total = _Window()
        self.restart_clock()
        self.figures: dict[str, float] = {}

    @property
    def images_per_second(self) -> float:
        """Rate over all steps so far, without evaluations and checkpoints."""
        total = self._total
        return total.steps * self._plan.batch_size / total.seconds if total.seconds else 0.0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take over the figures of a step that may still be running."""
        self._unread.append((step, metrics))

    def read(self, *, leave: int = 0) -> None:
        """Fetch the figures of all steps but the newest `leave`, and write those that the plan wants logged.

        Raises:
            UserError: `max_nonfinite_steps` steps in a row were not finite.
        """
        while len(self._unread) > leave:
            step, metrics = self._unread.pop(0)
            figures = {name: value.item() for name, value in jax.device_get(metrics).items()}
            self._lap()
            self._progress.advance()
            self._refuse_nonfinite(step, figures)
            if self._plan.logs(step):
                window, self._window = self._window, _Window()
                speed = window.steps * self._plan.batch_size / window.seconds
                self.figures = {
                    **figures,
                    "images_per_second": speed,
                    "data_wait_share": window.waited / window.seconds,
                }
                self._writer.write(step, self.figures)
                self._progress.show({"loss": figures["loss"], "images/s": speed})

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        started = time.monotonic()
        yield
        self._window = dataclasses.replace(self._window, waited=self._window.waited + time.monotonic() - started)

    def restart_clock(self) -> None:
        """Leave out the time since the last step was read: it went into something else than training."""
        self._clock = time.monotonic()

    def _lap(self) -> None:
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self._window, self._total = (
            dataclasses.replace(window, steps=window.steps + 1, seconds=window.seconds + seconds)
            for window in (self._window, self._total)
        )

    def _refuse_nonfinite(self, step: int, figures: dict[str, float]) -> None:
        new = figures["nonfinite_steps"] > self._nonfinite_steps
        self._nonfinite_run = self._nonfinite_run + 1 if new else 0
        self._nonfinite_steps = figures["nonfinite_steps"]
        if new:
            logging.warning("step %d changed nothing: loss %s", step, figures["loss"])
        if self._nonfinite_run >= self._plan.max_nonfinite_steps > 0:
            raise UserError(
                f"{self._nonfinite_run} steps in a row, up to step {step}, had a loss or gradient that is not finite",
                "the learning rate is too high, the warm-up too short, or the data is broken",
                "lower --config.optim.peak_lr, set --config.optim.clip_norm=3.0, or look at the data; the parameters "
                "in the newest checkpoint are those of the last finite step",
            )


@dataclasses.dataclass(frozen=True)
class _Window:
    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0


def _run(task: Task, config: ConfigDict, plan: Plan, workdir: Path, checkpointer: Checkpointer) -> dict[str, float]:
    started = time.monotonic()
    mesh = sharding.make_mesh(**config.mesh)
    optimizer, schedule = make_optimizer(task, config.optim, plan.warmup_steps, plan.num_steps)
    iterator = task.train_batches(jax.process_index(), jax.process_count())
    state, fresh = _start(task, config, optimizer, mesh, checkpointer, iterator)
    start = int(state.step)
    frozen = sharding.place_weights(task.frozen, mesh)
    batch = sharding.place_batch(next(iterator), mesh)
    if fresh and task.start_codebook is not None:
        state = _start_codebook(task, config.seed, state, frozen, batch, mesh)

    train_step = make_train_step(task, optimizer, schedule=schedule, seed=config.seed, ema_decay=config.optim.ema_decay)
    compiled = compile_step(train_step, state, frozen, batch, mesh)
    evaluate = _make_evaluation(task, mesh)

    is_main = jax.process_index() == 0
    writer = MetricWriter(workdir, enabled=is_main, resume_step=start)
    progress = Progress(plan.num_steps, task.name, "steps", done=start, enabled=is_main)
    ledger = Ledger(plan, writer, progress, int(state_lib.nonfinite_steps(state)))
    eval_figures: dict[str, float] = {}
    with contextlib.closing(iterator), contextlib.closing(writer), contextlib.closing(progress):
        for step in range(start + 1, plan.num_steps + 1):
            state, metrics = compiled(state, frozen, batch)
            ledger.add(step, metrics)
            if plan.evaluates(step) or plan.saves(step):
                ledger.read()
                if plan.evaluates(step):
                    eval_figures = evaluate(state, frozen)
                    writer.write(step, eval_figures)
                # On disk before the checkpoint is: a resumed run repeats no line and misses none.
                writer.flush()
                if plan.saves(step):
                    # Before the next batch is drawn: the saved iterator stands where the saved state does.
                    checkpointer.save(step, state, iterator)
                ledger.restart_clock()
            if step < plan.num_steps:
                with ledger.waiting_for_data():
                    host_batch = next(iterator)
                batch = sharding.place_batch(host_batch, mesh)
            ledger.read(leave=1)
    figures = [{**ledger.figures, **eval_figures, "images_per_second": ledger.images_per_second}]
    return _final_figures(figures, plan.num_steps, seconds=time.monotonic() - started)


def _start(
    task: Task,
    config: ConfigDict,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    checkpointer: Checkpointer,
    iterator: grain.DatasetIterator,
) -> tuple[TrainState, bool]:
    arguments = dict(mesh=mesh, seed=config.seed, keep_ema=config.optim.ema_decay > 0)
    abstract = state_lib.abstract(task, optimizer, **arguments)
    if unmatched := sharding.unmatched(abstract.params):
        logging.info("%s: replicated, as no partition rule names them: %s", task.name, ", ".join(unmatched))
    step = checkpointer.latest_step()
    if step is None:
        logging.info("%s: starting at step 0 from %s", task.name, "init_from" if task.initial else "scratch")
        return state_lib.create(task, optimizer, **arguments), True
    logging.info("%s: continuing from the checkpoint at step %d", task.name, step)
    return checkpointer.restore(abstract, iterator), False


def make_optimizer(
    task: Task, config: ConfigDict, warmup_steps: int, num_steps: int
) -> tuple[optax.GradientTransformationExtraArgs, Callable]:
    """Return the optimizer that the section `optim` of a config describes, and its learning rate by step."""
    schedule = functools.partial(
        optim.learning_rate,
        peak_lr=config.peak_lr,
        min_lr=config.min_lr,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        xp=jnp,
    )
    weight_decay = functools.partial(
        optim.cosine, start=config.weight_decay, end=config.weight_decay_end, num_steps=num_steps, xp=jnp
    )
    optimizer = optim.make_optimizer(
        schedule=schedule,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=weight_decay,
        no_decay=task.no_decay,
        clip_norm=config.clip_norm,
        layer_decay=config.layer_decay,
        layer_of=task.layer_of,
        num_layers=task.num_layers,
    )
    return optimizer, schedule


def _start_codebook(task: Task, seed: int, state: TrainState, frozen: PyTree, batch: Batch, mesh: Mesh) -> TrainState:
    def start(params, codebook, frozen, batch):
        started = task.start_codebook(params, codebook, frozen, batch, rng.step_key(seed, "start_codebook"))
        return codebook if started is None else started

    shardings = sharding.param_shardings(state.codebook, mesh)
    with sharding.activation_rules(mesh):
        codebook = jax.jit(start, out_shardings=shardings)(state.params, state.codebook, frozen, batch)
    return state.replace(codebook=codebook)


def compile_step(train_step: TrainStep, state: TrainState, frozen: PyTree, batch: Batch, mesh: Mesh) -> TrainStep:
    """Compile ahead of time: called with anything else than it was compiled for, the step fails, never recompiles."""
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh))
    started = time.monotonic()
    with sharding.activation_rules(mesh):
        lowered = jax.jit(train_step, out_shardings=shardings, donate_argnames="state").lower(state, frozen, batch)
    compiled = lowered.compile()
    logging.info("compiled the step in %.1f s for %s", time.monotonic() - started, dict(mesh.shape))
    return compiled


def _make_evaluation(task: Task, mesh: Mesh) -> Callable[[TrainState, PyTree], dict[str, float]]:
    """Return the function that runs the whole evaluation pass; it is compiled at its first use only."""
    if task.eval_batches is None:
        return lambda state, frozen: {}

    def sums(weights, batch):
        return task.evaluate(*weights, batch)

    compiled = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    def evaluate(state: TrainState, frozen: PyTree) -> dict[str, float]:
        batches = task.eval_batches(jax.process_index(), jax.process_count())
        if batches is None:
            return {}
        totals = inference.sum_batches(compiled, (state.params, state.codebook, frozen), batches, mesh)
        return {f"eval/{name}": float(value) for name, value in task.summarize(totals).items()}

    return evaluate


def _final_figures(lines: list[dict[str, float]], steps: int, *, seconds: float) -> dict[str, float]:
    last = lines[-1] if lines else {}
    return {name: value for name, value in last.items() if name != "step"} | {"steps": steps, "seconds": seconds}
