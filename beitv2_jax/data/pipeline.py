"""Source -> host batches: every batch is a pure function of (seed, its number), whoever prepares it.

Batches are asked for by number, so order and draws need no state beyond the number of batches taken. Grain prepares
them ahead, in threads or in worker processes.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from beitv2_jax.data.order import BatchRows, EpochOrder
from beitv2_jax.data.sources import Source
from beitv2_jax.data.transform import (
    EvalRow,
    EvalTransform,
    Example,
    PaddedRow,
    TrainRow,
)
from beitv2_jax.data.workers import WorkerBatches, end_with_parent
from beitv2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a process prepares its batches; no choice here changes what is in them.

    Attributes:
      process_index, process_count: of the run; this process yields `batch_size / process_count` rows.
      num_threads: batches prepared at the same time; 0 prepares each when asked for.
      num_workers: worker processes that prepare one batch each at a time in place of the threads; 0 for none. They
        need parsed absl flags and a main module that can be imported, as `beitv2_jax.main` can.
      prefetch: batches held ready, in memory.
    """

    process_index: int = 0
    process_count: int = 1
    num_threads: int = 4
    num_workers: int = 0
    prefetch: int = 4

    def start(
        self, load: Callable[[int], Example], batch_size: int, first: int, end: int
    ) -> grain.DatasetIterator | WorkerBatches:
        """Return the iterator over the batches `first` to `end` - 1 of the stream whose rows `load` gives."""
        rows = BatchRows(batch_size, self.process_index, self.process_count)
        batches = grain.MapDataset.range(first, end).map(_Batch(load, rows))
        if not self.num_workers:
            # grain counts the buffer in batches here, and uses no more threads than it has places
            places = max(self.prefetch, self.num_threads) if self.num_threads else 0
            return iter(batches.to_iter_dataset(grain.ReadOptions(self.num_threads, places)))
        in_turn = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        each = max(1, self.prefetch // self.num_workers)
        workers = grain.MultiprocessingOptions(self.num_workers, each)
        return WorkerBatches(iter(in_turn.mp_prefetch(workers, worker_init_fn=end_with_parent)))


@dataclasses.dataclass(frozen=True)
class _Batch:
    load: Callable[[int], Example]
    rows: BatchRows

    def __call__(self, step: int) -> Example:
        examples = [self.load(row) for row in self.rows(step)]
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


class TrainIterator(Iterator[Example]):
    """This process's part of every training batch, without end.

    The state is {"next_batch": n}, n the number of batches taken: it may be saved by one process and restored by any
    number of them, with other threads and workers.
    """

    def __init__(self, load: Callable[[int], Example], batch_size: int, reading: Reading):
        self._load, self._batch_size, self._reading = load, batch_size, reading
        self._next_batch = 0
        self._running: grain.DatasetIterator | WorkerBatches | None = None

    def __next__(self) -> Example:
        if self._running is None:
            self._running = self._reading.start(self._load, self._batch_size, self._next_batch, sys.maxsize)
        batch = next(self._running)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Return the position."""
        return {"next_batch": self._next_batch}

    def set_state(self, state: dict[str, int]) -> None:
        """Go to a position; batches prepared for another one are thrown away."""
        self.close()
        self._next_batch = int(state["next_batch"])

    def close(self) -> None:
        """End the threads or worker processes; the next batch would start them again."""
        if self._running is not None:
            self._running.close()
            self._running = None


def train_iterator(
    source: Source, transform: Callable[[dict[str, Any], int], Example], *, batch_size: int, seed: int, **reading: int
) -> TrainIterator:
    """Return the endless iterator over this process's part of every batch.

    The order is a new permutation each epoch, a function of (seed, epoch); the ragged tail of an epoch (fewer than
    `batch_size` examples, different ones each time) is dropped.

    Args:
      batch_size: global.
      reading: attributes of `Reading`.

    Raises:
      UserError: the batch is larger than the source or not divisible by the processes; targets of another length.
    """
    if batch_size > len(source):
        raise UserError(
            f"The batch of {batch_size} is larger than the {len(source)} examples of {source.name}.",
            "Is run.batch_size that of a larger data set?",
            f"Write --config.run.batch_size=N with a number up to {len(source)}.",
        )
    targets = getattr(transform, "targets", None)
    if targets is not None and len(targets) != len(source):
        raise UserError(
            f"The stored targets have {len(targets)} examples, {source.name} split {source.split} has {len(source)}.",
            "Were they made from another data set or another split?",
            "Make the targets again from these data, in another --workdir of the stage that made them.",
        )
    rows_per_epoch = len(source) // batch_size * batch_size
    load = TrainRow(source, transform, EpochOrder(seed, len(source)), rows_per_epoch)
    return TrainIterator(load, batch_size, _checked(batch_size, reading))


def _checked(batch_size: int, reading: dict[str, int]) -> Reading:
    settled = Reading(**reading)
    BatchRows(batch_size, settled.process_index, settled.process_count)  # refuses here what would fail in a thread
    return settled


@dataclasses.dataclass(frozen=True)
class Batches:
    """A finite sequence of host batches: `len` of them, read anew by every `iter`.

    The last one is filled up with rows of `weight` 0, so that all processes get equally many batches of one size. What
    an interrupted pass has done is left out by `first`, the number of the batch that `iter` begins with.
    """

    load: Callable[[int], Example]
    num_rows: int
    batch_size: int
    reading: Reading
    first: int = 0

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Example]:
        iterator = self.reading.start(PaddedRow(self.load, self.num_rows), self.batch_size, self.first, len(self))
        try:
            yield from iterator
        finally:
            iterator.close()


def eval_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    crop_fraction: float = 0.875,
    interpolation: str = "bicubic",
    tokenizer_image_size: int = 0,
    **reading: int,
) -> Batches:
    """Return the central crop of every example, in order. `reading` are attributes of `Reading`.

    Raises:
      UserError: the batch is not divisible by the processes.
    """
    transform = EvalTransform(image_size, crop_fraction, interpolation, tokenizer_image_size)
    return finite_batches(EvalRow(source, transform), len(source), batch_size=batch_size, **reading)


def finite_batches(load: Callable[[int], Example], num_rows: int, *, batch_size: int, **reading: int) -> Batches:
    """Return the batches of the rows that `load` gives. `reading` are attributes of `Reading`.

    Raises:
      UserError: the batch is not divisible by the processes.
    """
    return Batches(load, num_rows, batch_size, _checked(batch_size, reading))
