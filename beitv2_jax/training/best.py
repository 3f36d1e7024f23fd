"""Which evaluation of a run was the best by `run.keep_best`, and the metrics that this key may name."""

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping

import jax
import numpy as np

from beitv2_jax.errors import UserError, did_you_mean
from beitv2_jax.tasks.api import Task
from beitv2_jax.typing import PyTree


class BestEvaluation:
    """The evaluation with the best value of `metric`; of equal ones the first.

    Of a metric whose name ends in 'loss' the lowest value is the best, of every other one the highest.

    Args:
        metric: its name in metrics.jsonl, such as 'eval/accuracy'.
        lines: metrics of former evaluations by step, as in metrics.jsonl.
        steps: those of which there is a checkpoint; the others do not count.
    """

    def __init__(self, metric: str, lines: Iterable[Mapping[str, float]] = (), steps: Collection[int] = ()):
        self.metric = metric
        self.step: int | None = None
        self.value = math.nan
        for line in lines:
            if line["step"] in steps and self.is_improved_by(line):
                self.take(int(line["step"]), line)

    def is_improved_by(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the evaluation with these metrics is better than all before it."""
        value = metrics.get(self.metric)
        if value is None or math.isnan(value):
            return False
        better = value < self.value if self.metric.endswith("loss") else value > self.value
        return self.step is None or better

    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the evaluation after `step` for the best one."""
        self.step, self.value = step, metrics[self.metric]


def check_metric(task: Task, metric: str, averages: bool, rows: tuple[int, int]) -> None:
    """Check, without computing anything, that `metric` is one that the evaluation of `task` has.

    Args:
        task: its first batch for an evaluation is read, for the shapes.
        metric: the value of `run.keep_best`; '' is always right.
        averages: whether the run averages its weights and evaluates them too.
        rows: this process's share of a batch, as `Task.eval_batches` takes it.

    Raises:
        UserError: it has no such metric; the message lists those that it has.
    """
    if not metric:
        return
    prefixes = ("eval", "eval_average") if averages else ("eval",)
    names = [f"{prefix}/{name}" for prefix in prefixes for name in _metric_names(task, rows)]
    if metric not in names:
        few = [name for name in names if name.count("/") == 1]  # without those of every single class
        raise UserError(
            f"run.keep_best={metric!r} names no metric of the evaluation of this stage.",
            did_you_mean(metric, few),
            f"Write --config.run.keep_best=NAME with one of {', '.join(few)}, or leave it out.",
        )


def _metric_names(task: Task, rows: tuple[int, int]) -> list[str]:
    if task.eval_batches is None:
        return []
    batches = iter(task.eval_batches(*rows))
    batch = next(batches)
    with contextlib.suppress(AttributeError):  # what reads ahead is a generator and stops; a list needs no end
        batches.close()
    state = jax.eval_shape(task.init, jax.random.key(0))
    arrays: PyTree = {name: array for name, array in batch.items() if name != "faults"}
    sums = jax.eval_shape(task.evaluate, state["params"], state["model_state"], task.frozen, arrays)
    return list(task.summarize(jax.tree.map(lambda leaf: np.ones(leaf.shape), sums)))
