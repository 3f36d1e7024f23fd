"""Every view of chosen examples as batches for a frozen network, each image decoded once.

Between the sources and the stages that write a target cache. A batch holds one view of up to `batch_size` consecutive
examples, so that what is in it depends neither on who asks for it nor on which other views are wanted.
"""

import collections
import contextlib
import multiprocessing.context
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from beitv2_jax.data.transform import Example
from beitv2_jax.data.workers import end_with_parent, starting
from beitv2_jax.errors import Resumable


def view_stream(
    load: Callable[[int], list[Example]],
    chunks: Iterable[range],
    views: range,
    *,
    batch_size: int,
    num_threads: int,
    num_workers: int,
) -> Iterator[Example]:
    """Yield, for every chunk of example ids and every view, one batch of `batch_size` rows.

    The next chunk is drawn, and its images are decoded, while the batches of the last one are used; what is held in
    memory are two chunks. Rows beyond the chunk repeat its last one with weight 0, no fault and example id -1.

    Args:
      load: example id -> its rows, one for each of `views`.
      chunks: ranges of at most `batch_size` ids.
      num_threads: images decoded at the same time.
      num_workers: processes that decode in place of the threads; 0 for none.
    """
    waiting: collections.deque = collections.deque()
    with _executor(load, num_threads, num_workers) as pool:
        try:
            for chunk in chunks:
                with starting() if num_workers else contextlib.nullcontext():
                    waiting.append([pool.submit(_load if num_workers else load, example_id) for example_id in chunk])
                if len(waiting) > 1:
                    yield from _batches(waiting.popleft(), views, batch_size)
            if waiting:
                yield from _batches(waiting.popleft(), views, batch_size)
        finally:
            pool.shutdown(cancel_futures=True)


def _executor(load: Callable[[int], list[Example]], num_threads: int, num_workers: int) -> Executor:
    if not num_workers:
        return ThreadPoolExecutor(max(1, num_threads))
    return ProcessPoolExecutor(num_workers, mp_context=_WorkerContext(), initializer=_start_worker, initargs=(load,))


class _Worker(multiprocessing.context.SpawnProcess):
    """A worker that blocks SIGTERM: a pool that terminates it would wait for it forever."""

    terminate = multiprocessing.context.SpawnProcess.kill


class _WorkerContext(multiprocessing.context.SpawnContext):
    """Workers are not forked: a process that runs jax has threads whose locks would be copied."""

    Process = _Worker


def _start_worker(load: Callable[[int], list[Example]]) -> None:
    end_with_parent()
    global _load  # of a worker process: sent once, not with every example
    _load = load


def _load(example_id: int) -> list[Example]:
    raise RuntimeError("a worker process has nothing to load")


def _batches(loading: list, views: range, batch_size: int) -> Iterator[Example]:
    try:
        examples = [future.result() for future in loading]
    except BrokenProcessPool as error:
        raise Resumable(
            "A worker process that decodes images was killed, most likely because the memory of the machine or the "
            "container was full; the shards that are finished stay. Rerun the same command to resume. If it happens "
            "again, lower --config.data.num_workers, or give the run more memory."
        ) from error
    padding = batch_size - len(examples)
    for place, view in enumerate(views):
        rows = [rows[place] for rows in examples]
        rows += [{**rows[-1], "example_ids": np.int64(-1), "weight": np.float32(0), "faults": np.str_("")}] * padding
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        yield {**batch, "views": np.full(batch_size, view, np.int32)}
