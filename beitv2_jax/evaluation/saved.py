"""What a protocol has found so far, in files, so that the same command goes on after a kill.

A protocol consists of parts, such as its nearest neighbours and its heads of one kind. The result of a finished part is
a file, and so is the state of the one that is being trained, which is written every minute.
"""

import json
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging

from beitv2_jax.runtime import atomic_files
from beitv2_jax.runtime.buckets import AnyPath
from beitv2_jax.typing import PyTree

SAVE_SECONDS = 60.0
"""Time between two states that are written, and between two lines of progress."""


class Saved:
    """The state of one part while it is trained, in the file `path`; None: it is not kept.

    Of several processes, each of which trains for itself, process 0 writes; all read.
    """

    def __init__(self, path: AnyPath | None = None):
        self._path = path
        self._written = self._started = time.monotonic()
        self._first = 0

    def restored(self, state: PyTree) -> tuple[int, PyTree]:
        """Return how many steps are done, and the state after them: 0 and `state` where no other is in the file."""
        if self._path is None or not self._path.exists():
            return 0, state
        try:
            with self._path.open("rb") as file, np.load(file) as arrays:
                self._first = int(arrays["done"])
                leaves = [arrays[f"leaf_{number}"] for number in range(len(arrays.files) - 1)]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            logging.warning("%s is damaged (%s), so its part begins again.", self._path, error)
            return 0, state
        logging.info("%s: going on after step %d", self._path.stem, self._first)
        return self._first, jax.tree.unflatten(jax.tree.structure(state), leaves)

    def offer(self, done: int, total: int, state: PyTree) -> None:
        """Write the state after `done` of `total` steps, if the last one was written a minute ago or more."""
        now = time.monotonic()
        if self._path is None or jax.process_index() or now - self._written < SAVE_SECONDS:
            return
        leaves = {f"leaf_{number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(state))}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.replacing(self._path, "wb") as file:
            np.savez(file, done=done, **leaves)
        left = (now - self._started) / (done - self._first) * (total - done)
        logging.info("%s: %d of %d steps, %.0f minutes left", self._path.stem, done, total, left / 60)
        self._written = time.monotonic()


class SavedParts:
    """The parts of a protocol, whose results and states are files of `folder`; None: they are not kept."""

    def __init__(self, folder: AnyPath | None = None):
        self._folder = folder

    def __call__(self, name: str, find: Callable[[Saved], Any]) -> Any:
        """Return what `find` returns, a value of JSON; it is read if the part `name` was finished before."""
        if self._folder is None:
            return find(Saved())
        result, state = (self._folder / f"{name.replace('/', '_')}{suffix}" for suffix in (".json", ".npz"))
        if result.exists():
            try:
                return json.loads(result.read_text())
            except ValueError as error:
                logging.warning("%s is damaged (%s), so its part is done again.", result, error)
        found = find(Saved(state))
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_files.write_json(result, found)
            if state.exists():
                state.unlink()
        return found
