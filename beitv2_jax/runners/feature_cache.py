"""Features of a split, computed once by all processes and kept in the workdir, one mapped array a file."""

import dataclasses
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping

import jax
import numpy as np

from beitv2_jax.convert.runs import weights_hash
from beitv2_jax.data.bad_records import BadRecords, refuse_too_many
from beitv2_jax.data.pipeline import Batches
from beitv2_jax.data.sources import Source
from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.features import OnMove
from beitv2_jax.runners.provenance import describe_data, digest
from beitv2_jax.runtime import atomic_files, buckets
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.tasks.api import Batch
from beitv2_jax.tasks.frozen import FeatureSet
from beitv2_jax.training.inference import run_batches
from beitv2_jax.training.sharding import make_mesh

FOLDER = "features"
"""Folder of a workdir that holds cached features and what protocols found by them."""
POLL_SECONDS = 0.5
"""Time between two looks at what the other processes have written."""
PART_BYTES = 2**27
"""Features that a process holds in memory before it writes them."""
_LAST = "example_ids"
"""The array of a cache whose file is written last; all rows are in its order."""


def cached_arrays(
    feature_set: FeatureSet,
    source: Source,
    config,
    workdir: str,
    on_move: OnMove,
    *,
    batches: Callable[..., Batches],
    beside: Callable[[Batch], dict[str, np.ndarray]],
    made_from: list,
    smaller: str,
) -> tuple[str, dict[str, np.ndarray]]:
    """Return the features of every readable image of a split, what is kept beside them, and `example_ids`.

    Before them is the hash of what they were made from.

    They are computed once for their data, their network and `made_from`. Of several processes each computes its part of
    the rows on its devices and writes it piece by piece; an interrupted process goes on after its last piece. Process 0
    joins the pieces in the order of the example ids, and the others wait for that. In a bucket, which cannot be mapped,
    arrays are joined in memory and read as a whole.

    Args:
        feature_set: whose features.
        source: the split.
        config: of the stage.
        workdir: the cache is its folder `features/<set>_<split>.<hash>`.
        on_move: is called with what is done.
        batches: (source, config, process index, number of processes) -> the batches of that process.
        beside: batch -> arrays that are kept beside its features.
        made_from: what the arrays depend on beside the weights, the data and the image size; it goes into the hash.
        smaller: what to write for smaller features.

    Raises:
        UserError: the disk has no space for the features, or more images than `data.max_bad_fraction` allows were
            unreadable.
    """
    made_from = [weights_hash(feature_set.frozen), describe_data((source,)), config.views.image_size, *made_from]
    split, made_from = re.sub(r"[^\w-]", "_", source.split), digest(made_from)
    folder = as_path(workdir) / FOLDER / f"{feature_set.name}_{split}.{made_from}"
    last = folder / f"{_LAST}.npy"
    if not last.exists():
        index, count = jax.process_index(), jax.process_count()
        own = batches(source, config, index, count)
        example = {name: np.asarray(value)[None] for name, value in own.load(0).items()}
        features = jax.eval_shape(feature_set.apply, feature_set.frozen, {"images": example["images"]})
        _refuse_small_disk(folder, features | beside(example), len(source), smaller)
        folder.mkdir(parents=True, exist_ok=True)
        parts = [_Parts(folder, number, count, config.run.batch_size) for number in range(count)]
        _write_part(parts[index], own, feature_set, beside, source, config, workdir, on_move)

        def is_written() -> bool:
            if index:
                return last.exists()
            return all(part.num_batches == len(own) for part in parts)

        while not is_written():
            on_move("waiting for other processes")
            time.sleep(POLL_SECONDS)
        if index == 0:
            _join(folder, [path for part in parts for path in part.files()], on_move)
    if jax.process_index() == 0:
        for part in folder.glob("part.*"):
            part.unlink()
    example_ids = _read(last)
    refuse_too_many(
        len(source) - len(example_ids),
        len(source),
        config.data.max_bad_fraction,
        of=f"of split {source.split}",
        listed=f"listed in {as_path(workdir) / 'bad_records.jsonl'} and delete {folder}",
    )
    files = (path for path in sorted(folder.glob("*.npy")) if path.stem != _LAST)
    return made_from, {_LAST: example_ids} | {path.stem: _read(path) for path in files}


def _refuse_small_disk(folder: AnyPath, row: Mapping[str, jax.ShapeDtypeStruct], num_rows: int, smaller: str) -> None:
    """Raise UserError unless the disk has space for the pieces of `num_rows` such rows and for the joined arrays."""
    if buckets.is_remote(folder):
        return
    needed = 2 * num_rows * sum(math.prod(array.shape) * array.dtype.itemsize for array in row.values())
    needed -= sum(path.stat().st_size for path in folder.glob("part.*"))
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"The features of {num_rows} images need {needed / 1e9:.3g} GB while they are written, and {existing} has "
            f"{free / 1e9:.3g} GB free.",
            "Did you mean another disk, smaller features or fewer images?",
            f"Write --workdir=DIR on a larger disk, {smaller}, or a smaller --config.data.source.",
        )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The files that a process writes: the rows of its part of consecutive batches of one size."""

    folder: AnyPath
    index: int
    count: int
    batch_size: int

    def path(self, first: int, end: int | str) -> AnyPath:
        """Return the file of the batches `first` to `end` - 1."""
        return self.folder / f"part.{self.index}-of-{self.count}.batches_of_{self.batch_size}.{first}-{end}.npz"

    def files(self) -> list[AnyPath]:
        """Return the files that are there, in the order of their batches."""
        return self._found()[0]

    @property
    def num_batches(self) -> int:
        """Number of batches, from the first on, whose rows are in files."""
        return self._found()[1]

    def _found(self) -> tuple[list[AnyPath], int]:
        files, end = [], 0
        while following := sorted(self.folder.glob(self.path(end, "*").name)):
            files.append(following[0])
            end = int(following[0].stem.rpartition("-")[2])
        return files, end


def _write_part(
    parts: _Parts,
    batches: Batches,
    feature_set: FeatureSet,
    beside: Callable[[Batch], dict[str, np.ndarray]],
    source: Source,
    config,
    workdir: str,
    on_move: OnMove,
) -> None:
    """Write what is missing of a process's features, what is kept beside them, and the example ids."""
    first = parts.num_batches
    if first == len(batches):
        return
    left = dataclasses.replace(batches, first=first)
    rows, num_bytes = [], 0
    for end, (batch, outputs) in enumerate(
        run_batches(
            feature_set.apply,
            feature_set.frozen,
            BadRecords(workdir, parts.index).noted(left, source.split),
            make_mesh(**config.mesh, devices=jax.local_devices()),
            total=len(batches) - first,
            label=f"features {feature_set.name}",
        ),
        first + 1,
    ):
        on_move("computing features")
        real = batch["weight"] > 0
        arrays = {**outputs, **beside(batch), _LAST: batch["example_ids"]}
        rows.append({name: array[real] for name, array in arrays.items()})
        num_bytes += sum(array.nbytes for array in rows[-1].values())
        if num_bytes >= PART_BYTES or end == len(batches):
            _write(parts.path(first, end), {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
            rows, num_bytes, first = [], 0, end


def _join(folder: AnyPath, parts: list[AnyPath], on_move: OnMove) -> None:
    """Write one file for each array, its rows in the order of their example ids."""
    ids = np.sort(np.concatenate([_read(part, only=_LAST)[_LAST] for part in parts]))
    joined: dict[str, np.ndarray] = {}
    for part in parts:
        on_move("joining features")
        rows = _read(part)
        places = np.searchsorted(ids, rows.pop(_LAST))
        for name, array in rows.items():
            if name not in joined:
                joined[name] = _new_array(folder / f"{name}.npy", array.dtype, (len(ids), *array.shape[1:]))
            joined[name][places] = array
    for name in sorted(joined):
        _finish_array(folder / f"{name}.npy", joined.pop(name))
    _finish_array(folder / f"{_LAST}.npy", ids)


def _new_array(path: AnyPath, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array that `_finish_array` brings to `path`, mapped from a file beside it where that is possible."""
    if buckets.is_remote(path) or not shape[0]:
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(f"{path}.tmp", "w+", dtype, shape)


def _finish_array(path: AnyPath, array: np.ndarray) -> None:
    if not isinstance(array, np.memmap):
        with atomic_files.replacing(path, "wb") as file:
            np.save(file, array)
        return
    array.flush()
    atomic_files.sync(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    atomic_files.sync(path.parent)


def _write(path: AnyPath, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_files.replacing(path, "wb") as file:
        np.savez(file, **arrays)


def _read(path: AnyPath, only: str = "") -> np.ndarray | dict[str, np.ndarray]:
    """Return the array of an .npy file, mapped where that is possible, or the arrays of an .npz file, all or one."""
    try:
        if path.suffix == ".npy" and not buckets.is_remote(path) and path.stem != _LAST:
            return np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            if path.suffix == ".npy":
                return np.load(file)
            with np.load(file) as arrays:
                return {name: arrays[name] for name in ([only] if only else arrays.files)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"The cached features in {path} are damaged: {error}.",
            "The machine may have lost its power, or the disk may have been full.",
            f"Delete {path.parent} and run the same command again.",
        ) from error
