"""Run the cluster stage: draw tokens, cluster them, count the codes of the eval split, and save the tokenizer."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from beitv2_jax.convert.runs import write_checkpoint
from beitv2_jax.convert.weights import TEACHER_FILE
from beitv2_jax.runtime import watchdog
from beitv2_jax.runtime.atomic_files import write_json
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.tasks.cluster import ROWS, Clustering, clustered, drawn_tokens, evaluated, features_of_codes
from beitv2_jax.tasks.vqkd import summarize
from beitv2_jax.training.writer import Progress


def run(task: Clustering, config, workdir: str) -> dict[str, float]:
    """Make the tokenizer, save it as the checkpoint of step 0, and return its metrics.

    `reconstruction_loss` is of the clustered `tokens`, `eval/...` of the stored features of the eval split.

    Raises:
        Preempted: this process was asked to stop; nothing is saved.
    """
    with watchdog.watched("cluster", workdir, config.run.hang_timeout) as on_move:
        codebook, metrics = _made(task, config, on_move)
        root = as_path(workdir)
        shutil.rmtree(root / "checkpoints", ignore_errors=True)  # of an earlier start, which did not finish
        write_json(root / TEACHER_FILE, task.teacher)
        variables = {"params": task.params, "model_state": jax.tree.map(np.asarray, codebook)}
        write_checkpoint(root, variables)
    return metrics


def _made(task: Clustering, config, on_move: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the codebook, as `models.cluster.ClusterTokenizer` has it, and the metrics."""
    (train, held_out), settings = task.stored, config.clustering
    drawn = drawn_tokens(train, config.views.num_views, settings.max_tokens, config.seed)
    shown = _shown(drawn, len(drawn), "views read", on_move)
    tokens = np.concatenate([train[view.example_id, view.view][view.patches] for view in shown])
    rounds = clustered(
        tokens,
        codebook_size=config.model.codebook_size,
        iterations=settings.iterations,
        components=settings.components,
        seed=config.seed,
    )
    *_, codebook = _shown(rounds, settings.iterations, "rounds of k-means", on_move)
    codebook["features"] = features_of_codes(codebook, tokens)
    chunks = [tokens[start : start + ROWS, None] for start in range(0, len(tokens), ROWS)]
    metrics = {"reconstruction_loss": _metrics(codebook, chunks)["reconstruction_loss"]}
    readable = [number for number in range(len(held_out)) if number not in held_out.unreadable]
    size = config.run.batch_size
    batches = [readable[start : start + size] for start in range(0, len(readable), size)]
    chunks = (
        np.stack([held_out[number, 0] for number in batch])
        for batch in _shown(batches, len(batches), "batches of the eval split", on_move)
    )
    metrics |= {f"eval/{name}": value for name, value in _metrics(codebook, chunks).items()}
    return codebook, {"tokens": len(tokens), **metrics}


def _metrics(codebook: dict[str, Any], chunks: Iterable[np.ndarray]) -> dict[str, float]:
    sums = [evaluated(codebook, chunk, np.ones(len(chunk), np.float32)) for chunk in chunks]
    return summarize(jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *sums))


def _shown(items: Iterable, total: int, unit: str, on_move: Callable[[str], None]) -> Iterator:
    """Yield the items and show how many there have been; a result of jax is waited for."""
    progress, tenth = Progress(total, "cluster", unit), max(1, total // 10)
    for item in items:
        on_move(unit)
        yield jax.block_until_ready(item)
        progress.advance()
        if progress.done % tenth == 0:
            progress.show({})
    progress.close()
