"""Run a frozen or a trained network over many batches, one batch ahead, and bring the results to the host."""

import operator
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from beitv2_jax.tasks.api import Batch, Rows
from beitv2_jax.training import sharding
from beitv2_jax.training.writer import Progress
from beitv2_jax.typing import PyTree


def run_batches(
    fn: Callable[[PyTree, Batch], PyTree],
    frozen: PyTree,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    total: int | None = None,
    label: str = "inference",
) -> Iterator[tuple[Batch, PyTree]]:
    """Yield (host batch, host outputs) of `fn(frozen, batch)` for every batch; the device works one batch ahead.

    Every output leaf has the batch axis first. A process gives its own rows and gets the outputs of the same rows.

    Args:
        fn: pure function, compiled here once for batches of one shape.
        frozen: weights, placed by the rules of `training.sharding`.
        batches: host batches of this process, all of one size.
        total: number of batches, for the progress shown.
        label: what is shown to run.
    """
    progress = Progress(total, label, "batches", enabled=jax.process_index() == 0)
    tenth = max(1, (total or 100) // 10)
    for number, results in enumerate(apply_batches(fn, frozen, batches, mesh), 1):
        yield results
        progress.advance()
        if number % tenth == 0:
            progress.show({})
    progress.close()


def apply_batches(
    fn: Callable[[PyTree, Batch], PyTree], frozen: PyTree, batches: Iterable[Batch], mesh: Mesh
) -> Iterator[tuple[Batch, PyTree]]:
    """Do what `run_batches` does without showing it; the mesh may be of this process's devices alone."""
    compiled = jax.jit(fn, out_shardings=sharding.batch_sharding(mesh))
    placed = sharding.place_weights(frozen, mesh)
    for batch, outputs in outputs_ahead(compiled, placed, batches, mesh):
        yield batch, jax.tree.map(_local_rows, outputs)


def sum_batches(
    compiled: Callable[[PyTree, Batch], PyTree], weights: PyTree, batches: Iterable[Batch], mesh: Mesh
) -> PyTree:
    """Return the sums of `compiled(weights, batch)` over all batches, added in float64 on the host.

    `Rows` among the outputs are joined instead, in the order of the batches.

    Args:
        compiled: jitted function whose outputs are whole on every device.
        weights: placed weights.
        batches: host batches of this process, all of one size, equally many on every process.
    """
    sums: PyTree = None
    for _, outputs in outputs_ahead(compiled, weights, batches, mesh):
        values = jax.tree.map(_on_host, outputs, is_leaf=_are_rows)
        sums = values if sums is None else jax.tree.map(operator.add, sums, values)
    return {} if sums is None else jax.tree.map(lambda leaf: leaf.joined() if isinstance(leaf, _Parts) else leaf, sums)


class _Parts:
    """The rows of some batches; a leaf of a tree."""

    def __init__(self, parts: list[Rows]):
        self._parts = parts

    def __add__(self, other: "_Parts") -> "_Parts":
        self._parts += other._parts
        return self

    def joined(self) -> Rows:
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *self._parts)


def _are_rows(node: PyTree) -> bool:
    return isinstance(node, Rows)


def _on_host(output: jax.Array | Rows) -> np.ndarray | _Parts:
    if not isinstance(output, Rows):
        return np.asarray(output, np.float64)
    counted = np.asarray(output.weight) > 0
    return _Parts([jax.tree.map(lambda array: np.asarray(array)[counted], output)])


def outputs_ahead(
    compiled: Callable[[PyTree, Batch], PyTree], weights: PyTree, batches: Iterable[Batch], mesh: Mesh
) -> Iterator[tuple[Batch, PyTree]]:
    """Yield (host batch, outputs on the devices) of every batch, which the device computes one ahead."""
    waiting = None
    for batch in batches:
        # The context only surrounds the call: held across a yield it would leak into the caller.
        with sharding.activation_rules(mesh):
            outputs = compiled(weights, sharding.place_batch(batch, mesh))
        if waiting is not None:
            yield waiting
        waiting = batch, outputs
    if waiting is not None:
        yield waiting


def _local_rows(array: jax.Array) -> np.ndarray:
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])
