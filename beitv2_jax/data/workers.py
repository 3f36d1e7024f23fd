"""Worker processes that prepare batches: they live exactly as long as the process they work for needs them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any


def end_with_parent(*_: int) -> None:
    """End this worker process as soon as its parent is gone; to be called once, when the worker starts.

    Without it the workers of a killed run stay, waiting for work, with their memory and shared memory.
    """

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Block SIGTERM and SIGINT in the worker processes that are started inside, for all their life.

    Clusters and Ctrl-C signal every process of a group. The main process answers by saving, for which it needs its
    workers. Here the signals wait until the end of the context.
    """
    resource_tracker.ensure_running()  # which unblocks them where it is started
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


class WorkerBatches(Iterator[Any]):
    """The batches of a Grain iterator over worker processes, which it starts while batches are asked for."""

    def __init__(self, batches: Any):
        self._batches = batches

    def __next__(self) -> Any:
        with starting():
            return next(self._batches)

    def close(self) -> None:
        """End the worker processes."""
        self._batches.close()
