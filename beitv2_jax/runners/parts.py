"""Compute something for every row of a data set in parts, by any number of processes, and go on after a kill.

The parts are files in a folder beside what they become, whose name holds a digest of all that they are made from: the
same command finds them again, and another one does not. Their rows do not depend on batches, devices or processes.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beitv2_jax.data.pipeline import finite_batches
from beitv2_jax.errors import UserError, print_error
from beitv2_jax.runners.provenance import digest
from beitv2_jax.runtime.atomic_files import sync
from beitv2_jax.tasks.api import Batch
from beitv2_jax.training.inference import apply_batches
from beitv2_jax.training.sharding import make_mesh
from beitv2_jax.training.writer import Progress
from beitv2_jax.typing import PyTree

POLL_SECONDS = 0.2
"""Time between two looks at what the other processes have written."""
SHOW_SECONDS = 5.0
"""Time between two lines of progress, at least."""


class Parts:
    """The parts of the file or folder `out`: part n, of `rows_per_part` rows, is the file `paths[n]`.

    Args:
        out: what the parts become.
        made_from: plain values that determine the result.
        num_rows: of the whole.
        rows_per_part: of every part but the last.
        suffix: of the files.

    Raises:
        UserError: `out` exists, in the first process, which joins the parts; others may come when it has done so.
    """

    def __init__(self, out: Path, made_from: dict[str, Any], num_rows: int, rows_per_part: int, suffix: str):
        self.out, self.num_rows, self.rows_per_part = out, num_rows, rows_per_part
        self.folder = out.with_name(f"{out.name}.{digest({**made_from, 'rows_per_part': rows_per_part})}.parts")
        self.paths = [self.folder / f"{number:06d}{suffix}" for number in range(-(-num_rows // rows_per_part))]
        if out.exists() and jax.process_index() == 0:
            raise UserError(
                f"{out} exists already.",
                "Did you give this command before, or another one with the same --out?",
                "Write another --out, or delete the old one.",
            )

    def fill(
        self,
        load: Callable[[int], Batch],
        apply: Callable[[PyTree, Batch], dict[str, jax.Array]],
        weights: PyTree,
        save: Callable[[Path, Batch], None],
        *,
        batch_size: int,
        num_threads: int,
        label: str,
        show: bool = True,
    ) -> None:
        """Compute the parts that are missing, of several processes each its own, and wait until all are there.

        Args:
            load: row number -> what the host prepares of it, with `weight` and `faults`.
            apply: function (weights, batch) -> arrays of rows, compiled here.
            weights: of the network.
            save: is given the path and all arrays of a part, and writes the file complete or not at all.
            batch_size: rows that this process computes at once, rounded up to a multiple of its devices.
            num_threads: batches that are prepared at the same time.
            label: what is shown to run, if `show`.
        """
        index, count = jax.process_index(), jax.process_count()
        if self.out.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        own = range(index, len(self.paths), count)
        missing = [number for number in own if not self.paths[number].exists()]
        sizes = [self._size(number) for number in missing]
        rows, done = sum(sizes), sum(map(self._size, own)) - sum(sizes)
        if count > 1:
            label = f"{label}, process {index} of {count},"
        progress = Progress(rows + done, label, "images", done=done, enabled=show and index == 0)
        mesh = make_mesh(devices=jax.local_devices())
        batches = finite_batches(
            _MissingRows(load, tuple(missing), self.rows_per_part),
            rows,
            batch_size=-(-batch_size // mesh.size) * mesh.size,
            num_threads=num_threads,
        )
        results = apply_batches(apply, weights, batches, mesh)
        for number, part in zip(missing, _cut(results, sizes, progress), strict=True):
            save(self.paths[number], part)
        progress.close()
        awaited = self.paths if index == 0 else [self.out]
        # the parts are gone when the first process has joined them
        while not (self.out.exists() or all(path.exists() for path in awaited)):
            time.sleep(POLL_SECONDS)

    def _size(self, number: int) -> int:
        return min(self.rows_per_part, self.num_rows - number * self.rows_per_part)

    @property
    def joined(self) -> Path:
        """Where the first process writes what the parts become."""
        return self.folder / f"joined{self.out.suffix}"

    def finish(self) -> None:
        """Make `joined` be `out`, and remove the parts."""
        self.joined.rename(self.out)
        sync(self.out.absolute().parent)
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _MissingRows:
    """The rows of some parts, one after the other; a shorter part can only be the last."""

    load: Callable[[int], Batch]
    parts: tuple[int, ...]
    rows_per_part: int

    def __call__(self, row: int) -> Batch:
        place, within = divmod(row, self.rows_per_part)
        return self.load(self.parts[place] * self.rows_per_part + within)


def _cut(
    results: Iterator[tuple[Batch, dict[str, np.ndarray]]], sizes: list[int], progress: Progress
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of one part after the other, without those that fill up the last batch."""
    held: dict[str, np.ndarray] = {}
    left, started = sum(sizes), time.monotonic()
    shown = started
    sizes, computed = iter(sizes), 0
    size = next(sizes, 0)
    for batch, outputs in results:
        rows = min(left, len(batch["weight"]))
        left, computed = left - rows, computed + rows
        for fault in filter(None, batch["faults"][:rows]):
            print_error(f"cannot be read: {fault}")
        found = {name: array[:rows] for name, array in {**batch, **outputs}.items() if name not in ("images", "faults")}
        held = {name: np.concatenate([held[name], array]) for name, array in found.items()} if held else found
        progress.advance(rows)
        while size and len(held["weight"]) >= size:
            yield {name: array[:size] for name, array in held.items()}
            held, size = {name: array[size:] for name, array in held.items()}, next(sizes, 0)
            now = time.monotonic()
            if now - shown > SHOW_SECONDS or not left:
                progress.show({"images/s": computed / (now - started)})
                shown = now
