"""The best evaluation of a run: which it is, that its checkpoint stays, and which metrics may be named."""

import dataclasses

import pytest
import training_toy as toy

from beitv2_jax.errors import UserError
from beitv2_jax.training import loop
from beitv2_jax.training.best import BestEvaluation, check_metric

VALUES = {3: 0.2, 6: 0.6, 9: float("nan"), 12: 0.5, 15: 0.6, 18: 0.1, 19: 0.3}


@pytest.mark.parametrize(
    "metric, steps, expected",
    [
        ("eval/accuracy", {2, 4, 6, 8, 10}, 4),  # the first of two equal ones
        ("eval/accuracy", {2, 6, 8, 10}, 6),  # there is no checkpoint of 4
        ("eval/codebook_perplexity", {2, 4}, 2),
        ("eval/loss", {2, 4, 6, 8, 10}, 8),
        ("eval/accuracy", {10}, None),
        ("eval/other", {2, 4}, None),
    ],
)
def test_high_is_good_but_for_losses(metric, steps, expected):
    lines = [
        {"step": 2, "eval/accuracy": 0.1, "eval/loss": 3.0, "eval/codebook_perplexity": 9.0},
        {"step": 4, "eval/accuracy": 0.9, "eval/loss": None, "eval/codebook_perplexity": 5.0},
        {"step": 6, "eval/accuracy": 0.9, "eval/loss": 2.0},
        {"step": 8, "eval/accuracy": 0.3, "eval/loss": 1.0, "loss": 0.5},
        {"step": 9, "loss": 0.1},
        {"step": 10, "eval/accuracy": float("nan"), "eval/loss": 1.5},
    ]
    assert BestEvaluation(metric, lines, steps).step == expected


def test_the_best_checkpoint_stays_beside_the_newest_through_a_restart(tmp_path):
    """Evaluations give VALUES: the best is of step 6, which is long gone when the run is interrupted and ends."""
    config = toy.config(**{"run.keep_best": "eval/accuracy", "run.eval_every": "3 steps", "optim.weight_average": 0.0})

    def train(values, **task):
        values = iter(values)
        summarize = {"summarize": lambda sums: {"accuracy": next(values)}}
        return loop.train(dataclasses.replace(toy.make_task(**task), **summarize), config, tmp_path)

    def steps():
        return {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}

    with pytest.raises(KeyboardInterrupt):
        train([VALUES[step] for step in (3, 6, 9, 12)], stop_at=14)
    assert steps() == {6, 10, 12}
    train([VALUES[step] for step in (15, 18, 19)])
    assert steps() == {6, 18, 19}


def test_an_unknown_metric_is_refused_with_those_that_there_are():
    task = toy.make_task()
    check_metric(task, "", False, (0, 1))
    check_metric(task, "eval/accuracy", False, (0, 1))
    check_metric(task, "eval_average/accuracy", True, (0, 1))
    for metric, averages, listed in (
        ("accuracy", False, "one of eval/accuracy, or"),
        ("eval_average/accuracy", False, "one of eval/accuracy, or"),
        ("eval/acuracy", True, "one of eval/accuracy, eval_average/accuracy, or"),
    ):
        with pytest.raises(UserError, match=listed):
            check_metric(task, metric, averages, (0, 1))
