"""Fill a target cache: run a frozen network over every fixed view of a data set, write its outputs as TFDS data sets.

Any number of processes on one file system run the same stage in the same workdir at the same time, each on its own
devices; they communicate only through files.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from beitv2_jax.data.bad_records import bad_record, refuse_too_many
from beitv2_jax.data.target_cache.leases import Leases
from beitv2_jax.data.target_cache.manifest import read_manifest
from beitv2_jax.data.target_cache.writer import ShardLost, ShardWriter, TargetCache
from beitv2_jax.data.view_stream import view_stream
from beitv2_jax.errors import UserError
from beitv2_jax.runtime import startup_times, watchdog
from beitv2_jax.runtime.disk_checks import cause_of, free_space, remedy
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks import targets as targets_lib
from beitv2_jax.tasks.api import Batch, TargetCacheTask
from beitv2_jax.training.inference import apply_batches
from beitv2_jax.training.sharding import make_mesh
from beitv2_jax.training.writer import Progress

POLL_SECONDS = 2.0
"""Time between two looks at what the other workers do."""
SHOW_SECONDS = 10.0

Apply = Callable[[Iterable[Batch]], Iterator[tuple[Batch, Mapping[str, np.ndarray]]]]


def run(task: TargetCacheTask, config, workdir: str) -> dict[str, float]:
    """Write the targets of the train split (K random views) and of the eval split (one centre crop).

    They are two TFDS data sets, `workdir/views` and `workdir/centre`. Whoever runs this takes part in what is left to
    do and returns when all is done, by whichever process; a finished part is left alone.

    Returns:
        Counts of examples, views and unreadable images.

    Raises:
        UserError: a target cache of another network or of other views is there, too many images are unreadable, or the
            network gives values that cannot be stored.
        Preempted: this process was asked to stop; finished shards stay, the current shard is written again.
    """
    apply = on_local_devices(task, config, lambda targets: task.encoding.shrink(targets, jax.numpy))
    return fill(task, config, workdir, lambda part: apply, shard_examples=config.output.shard_examples)


def fill(
    task: TargetCacheTask, config, workdir: str, apply_to: Callable[[str], Apply], *, shard_examples: int
) -> dict[str, float]:
    """Do what `run` does with targets that `apply_to(part)` computes in place of `task.apply`."""
    with watchdog.watched(task.name, workdir, config.run.hang_timeout) as on_move, explained(workdir):
        return _fill(task, config, workdir, apply_to, shard_examples, on_move)


@contextlib.contextmanager
def explained(workdir: str) -> Iterator[None]:
    """Raise UserError in place of an error of the system that writing to `workdir` meets."""
    try:
        yield
    except OSError as error:
        cause = cause_of(error)
        meant, instead = remedy(cause)
        raise UserError(
            f"The targets could not be written to {workdir}: {cause} ({free_space(workdir)}).",
            meant,
            f"{instead} The same command continues: finished shards are kept.",
        ) from error


def _fill(
    task: TargetCacheTask,
    config,
    workdir: str,
    apply_to: Callable[[str], Apply],
    shard_examples: int,
    on_move: Callable[[str], None],
) -> dict[str, float]:
    unreadable = 0
    for part, source in zip(targets_lib.PARTS, task.sources, strict=True):
        directory = os.path.join(workdir, part)
        cache = TargetCache(
            directory,
            name=task.name,
            manifest={**targets_lib.cache_manifest(config, source, part), **task.manifest},
            shard_examples=shard_examples,
        )
        filler = Filler(
            cache,
            load=targets_lib.view_rows(config, source, part, cache.views),
            apply=apply_to(part),
            encoding=task.encoding,
            split=source.split,
            batch_size=config.run.batch_size,
            reading=inputs.reading(config),
            max_bad_fraction=config.data.max_bad_fraction,
            label=f"{task.name} {part}",
            on_move=on_move,
        )
        with Leases(cache.work) as leases:
            filler.run(leases)
        unreadable += read_manifest(directory)["unreadable"]
    return {
        "train_examples": len(task.sources[0]),
        "eval_examples": len(task.sources[1]),
        "views_per_example": config.views.num_views,
        "unreadable_examples": unreadable,
    }


def on_local_devices(task: TargetCacheTask, config, finish: Callable[[jax.Array], Any]) -> Apply:
    """Return the function batches -> (batch, `finish(targets)`) that computes on the devices of this process."""
    mesh = make_mesh(**config.mesh, devices=jax.local_devices())

    def finished(frozen, batch):
        return finish(task.apply(frozen, batch))

    return lambda batches: apply_batches(finished, task.frozen, batches, mesh)


class Filler:
    """One worker on one part of a target cache: leases input shards, fills them, and finishes when none is left.

    Args:
        cache: what is to be filled.
        load: example id -> rows of the views that `cache` lacks.
        apply: batches -> (batch, arrays of `encoding.shrink`), in order.
        encoding: how targets are stored.
        split: name of the source's split, for the list of unreadable examples.
        batch_size: examples in a batch, which never crosses the border of a shard.
        reading: `num_threads` and `num_workers` of `view_stream`.
        max_bad_fraction: largest fraction of unreadable examples with which the cache is published.
        label: what is shown to run.
        on_move: called with what comes next, at least once a batch; it may raise `Preempted`.
    """

    def __init__(
        self,
        cache: TargetCache,
        *,
        load: Callable[[int], list[Batch]],
        apply: Apply,
        encoding: Any,
        split: str,
        batch_size: int,
        reading: Mapping[str, int],
        max_bad_fraction: float,
        label: str,
        on_move: Callable[[str], None] = lambda phase: None,
    ):
        self._cache, self._load, self._apply, self._encoding, self._split = cache, load, apply, encoding, split
        self._batch_size, self._reading, self._max_bad_fraction = batch_size, reading, max_bad_fraction
        self._label, self._on_move = label, on_move

    def run(self, leases: Leases, poll_seconds: float = POLL_SECONDS) -> None:
        """Work until the cache is finished, by this or another process.

        Raises:
            UserError: too many images are unreadable, or the network gives values that cannot be stored.
        """
        cache = self._cache
        if cache.finished:
            return
        shown = _ShownProgress(cache, self._label)
        while not cache.finished:
            if self._fill_free_shards(leases, shown):
                continue
            if cache.remaining() or not leases.take("finish"):
                self._on_move("waiting for other workers")
                time.sleep(poll_seconds)
                shown.update(0)
                continue
            self._on_move("finishing the cache")
            self._check_share()
            cache.finish()
            leases.release("finish")
        shown.close()

    def _fill_free_shards(self, leases: Leases, shown: "_ShownProgress") -> bool:
        """Fill every shard that is free; return whether there was one."""
        cache, chunks = self._cache, self._claimed_chunks(leases)
        first = next(chunks, None)
        if first is None:
            return False
        batches = view_stream(
            self._load,
            itertools.chain([first], chunks),
            cache.views,
            batch_size=self._batch_size,
            **self._reading,
        )
        writer: ShardWriter | None = None
        for batch, shrunk in self._apply(batches):
            startup_times.report("first batch of targets")
            examples = batch["example_ids"][batch["example_ids"] >= 0]
            shard, view = cache.shard_of(int(examples[0])), int(batch["views"][0])
            at_start = int(examples[0]) == cache.shards[shard].start and view == cache.views.start
            try:
                self._on_move("computing targets")
                if at_start:
                    writer, bad = cache.open_shard(shard), []
                if writer is None:
                    continue  # lost: the rest of its batches is in the pipeline still
                writer.write(view, self._packed(batch, shrunk, len(examples)))
                bad += self._bad_records(batch) if view == cache.views.start else []
                at_end = int(examples[-1]) == cache.shards[shard].stop - 1 and view == cache.views.stop - 1
                if at_end:
                    writer.close(bad)
                    leases.release(str(shard))
                    writer = None
                    self._check_share()
                shown.update(0 if at_end else int(examples[-1]) + 1 - cache.shards[shard].start)
            except ShardLost:
                logging.warning("%s: shard %d was taken over by another process.", self._label, shard)
                leases.release(str(shard))
                writer = None
            except BaseException:
                if writer is not None:
                    writer.discard()
                raise
        return True

    def _claimed_chunks(self, leases: Leases) -> Iterator[range]:
        """Yield the batches, as ranges of example ids, of one free shard after the other, leasing each."""
        while True:
            shard = next((shard for shard in self._cache.remaining() if leases.take(str(shard))), None)
            if shard is None:
                return
            if self._cache.is_done(shard):  # between the look at what remains and the lease
                leases.release(str(shard))
                continue
            ids = self._cache.shards[shard]
            for first in range(ids.start, ids.stop, self._batch_size):
                yield range(first, min(first + self._batch_size, ids.stop))

    def _packed(self, batch: Batch, shrunk: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        kept = {name: np.array(array[:count]) for name, array in shrunk.items()}
        for array in kept.values():
            array[batch["weight"][:count] == 0] = 0
        try:
            return self._encoding.pack(kept)
        except ValueError as error:
            raise UserError(
                f"{self._label}: the network gives {error}, among the examples {batch['example_ids'][0]} to "
                f"{batch['example_ids'][count - 1]}.",
                "It may overflow in its precision, or its weights may be damaged.",
                "Write --config.efficiency.dtype=float32, or a wider --config.output.dtype.",
            ) from error

    def _bad_records(self, batch: Batch) -> list[dict[str, Any]]:
        faults = zip(batch["example_ids"], batch["faults"], strict=True)
        return [bad_record(self._split, int(example_id), str(fault)) for example_id, fault in faults if fault]

    def _check_share(self) -> None:
        """Raise UserError if more examples are unreadable, by what is known, than the cache may have."""
        bad, count = self._cache.unreadable(), self._cache.shards[-1].stop
        if bad:
            example = f"(for example {bad[-1]['where']}: {bad[-1]['cause']}) and delete {self._cache.work}"
            refuse_too_many(len(bad), count, self._max_bad_fraction, of=f"of {self._label}", listed=example)


class _ShownProgress:
    """Show how many examples of a part all workers together have done, with the rate since this one began."""

    def __init__(self, cache: TargetCache, label: str):
        self._cache = cache
        self._first = self._done = self._finished_examples()
        self._started = self._shown = time.monotonic()
        self._progress = Progress(cache.shards[-1].stop, label, "images", done=self._first)

    def _finished_examples(self) -> int:
        remaining = self._cache.remaining()
        return self._cache.shards[-1].stop - sum(len(self._cache.shards[shard]) for shard in remaining)

    def update(self, in_progress: int) -> None:
        """Count what is done; `in_progress` are the examples of this worker's unfinished shard."""
        now = time.monotonic()
        if now - self._shown < SHOW_SECONDS:
            return
        done = max(self._done, self._finished_examples() + in_progress)
        self._progress.advance(done - self._done)
        self._done, self._shown = done, now
        self._progress.show({"images_per_second": (done - self._first) / (now - self._started)})

    def close(self) -> None:
        """Show the end."""
        self._progress.advance(self._cache.shards[-1].stop - self._done)
        self._progress.show({})
        self._progress.close()
