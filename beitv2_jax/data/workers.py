"""Worker processes that prepare batches: they live exactly as long as the process they work for needs them."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

from beitv2_jax.errors import Resumable, UserError

SHARED_MEMORY = "/dev/shm"


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


def _death(number: int) -> Exception | None:
    """Return the error for a worker process that was killed by signal `number`; None if it was not."""
    if number <= 0:
        return None
    if number == signal.SIGBUS:
        usage = shutil.disk_usage(SHARED_MEMORY)
        return UserError(
            f"A worker process died of a bus error while it put a batch into {SHARED_MEMORY}, which has "
            f"{usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free.",
            "The shared memory may be too small for the batches of data.num_workers processes.",
            "Make it larger (`docker run --shm-size=8g`, on Kubernetes a volume `emptyDir: {medium: Memory}` at "
            "/dev/shm), or write --config.data.num_workers=0, which prepares batches in threads.",
        )
    cause = ", most likely because the memory of the machine or the container was full" * (number == signal.SIGKILL)
    return Resumable(
        f"A worker process that prepares batches was killed by signal {number}{cause}; the newest checkpoint is valid. "
        "Rerun the same command to resume. If it happens again, lower --config.data.num_workers, or give the run more "
        "memory."
    )


class WorkerBatches(Iterator[Any]):
    """The batches of a Grain iterator over worker processes, which it starts while batches are asked for."""

    def __init__(self, batches: Any):
        self._batches = batches

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            UserError: a worker died of a bus error, which a small /dev/shm causes.
            Resumable: a worker was killed by another signal.
        """
        try:
            with starting():
                return next(self._batches)
        except RuntimeError as error:
            # Grain has no class and no field for it
            found = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if found and (death := _death(-int(found[1]))):
                raise death from error
            raise

    def close(self) -> None:
        """End the worker processes."""
        self._batches.close()
