"""Worker processes that end with the process they work for, also when that is killed and can tell them nothing."""

import multiprocessing
import os
import threading


def end_with_parent(*_: int) -> None:
    """End this worker process as soon as its parent is gone; to be called once, when the worker starts.

    Without it the workers of a killed run stay, waiting for work, with their memory and shared memory.
    """

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
