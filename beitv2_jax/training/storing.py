"""Run a store stage: a frozen network over every fixed view of a data set, its outputs written as a TFDS data set."""

import os

import jax
import numpy as np

from beitv2_jax.data import pipeline
from beitv2_jax.data.targets import TargetReader, TargetWriter
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import StoreTask
from beitv2_jax.training.inference import run_batches
from beitv2_jax.training.sharding import make_mesh


def run(task: StoreTask, config, workdir: str) -> dict[str, float]:
    """Write the targets of the train split (K random views) and of the eval split (one centre crop).

    They are two TFDS data sets, `workdir/views` and `workdir/centre`. Each is published when it is complete; an
    interrupted one is written again from its start, a published one is left alone.

    Returns:
        Counts of examples and views written.

    Raises:
        UserError: more than one process, or a store of another network or of other views is there already.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"The {task.name} stage was started with {jax.process_count()} processes.",
            "stores are written by one process so far; it uses all of its local devices.",
            "the same command in one process.",
        )
    mesh = make_mesh(**config.mesh)
    train, evaluation = task.sources
    loading = {"batch_size": config.run.batch_size, "num_threads": config.data.num_threads}
    views = pipeline.view_batches(train, seed=config.seed, **config.views, **loading)
    for part, source, batches in (
        ("views", train, views),
        ("centre", evaluation, inputs.eval_batches(evaluation, config)),
    ):
        _write(task, source, batches, {**task.card, **inputs.store_card(config, source, part)}, mesh, workdir, part)
    return {
        "train_examples": len(train),
        "eval_examples": len(evaluation),
        "views_per_example": config.views.num_views,
    }


def _write(task: StoreTask, source, batches, card: dict, mesh, workdir: str, part: str) -> None:
    directory = os.path.join(workdir, part)
    if os.path.isdir(directory):
        TargetReader(directory, source.split).check(card)
        return
    shape = (card["num_views"], *task.shape)
    writer = TargetWriter(
        directory, name=task.name, card=card, split=source.split, features={task.target: (shape, task.dtype)}
    )
    with writer:
        outputs = run_batches(task.apply, task.frozen, batches, mesh, total=len(batches), label=f"{task.name} {part}")
        for example_id, targets in _whole_examples(outputs, card["num_views"]):
            writer.write(example_id, targets)


def _whole_examples(outputs, views: int):
    """Regroup batches of single views into (example id, targets 'views ...'); views of an example are consecutive."""
    pending = []
    for batch, targets in outputs:
        for example_id, weight, target in zip(batch["example_ids"], batch["weight"], targets, strict=True):
            if weight > 0:
                pending.append(target)
                if len(pending) == views:
                    yield int(example_id), np.stack(pending)
                    pending = []
