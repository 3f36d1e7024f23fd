"""Run the probe: cache the features of both splits, then evaluate them by a protocol."""

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
from beitv2_jax.errors import UserError
from beitv2_jax.evaluation.features import Features, ProbeSettings
from beitv2_jax.evaluation.protocols import PROTOCOLS
from beitv2_jax.runners.provenance import describe_data, digest
from beitv2_jax.runtime import atomic_files, buckets, preemption, watchdog
from beitv2_jax.runtime.buckets import AnyPath, as_path
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.probe import FeatureSet, Probe
from beitv2_jax.training.inference import run_batches
from beitv2_jax.training.sharding import make_mesh

POLL_SECONDS = 0.5
"""Time between two looks at what the other processes have written."""
PART_BYTES = 2**27
"""Features that a process holds in memory before it writes them."""
_LABELS = "labels.npy"
"""The file of a cache that is written last."""


def run(probe: Probe, config, workdir: str) -> dict[str, float]:
    """Probe every feature set and return its accuracies as {'pretrained/cls/linear': ..., ...}.

    `train_examples` and `eval_examples` say how many images they are of: those that could be read. What was chosen is
    in 'chosen/pretrained/cls/linear_rate', ....

    Features are cached in `features/<set>_<split>.<hash>/` under `workdir`, the hash of what they were made from: one
    array a file, which is mapped and not read as a whole. What is cached is not computed again.

    Raises:
        Preempted: this process was asked to stop; cached features stay.
    """
    with (
        preemption.stops("probe") as stop_if_signalled,
        watchdog.Watch(workdir, config.run.hang_timeout, alone=True) as watch,
    ):
        return _probe(probe, config, workdir, watchdog.moving(watch, stop_if_signalled))


def _probe(probe: Probe, config, workdir: str, on_move: Callable[[str], None]) -> dict[str, float]:
    settings = dict(config.probe)
    protocol = settings.pop("protocol")
    del settings["layers"], settings["duration"]
    settings = ProbeSettings(num_steps=probe.num_steps, seed=config.seed, **settings)
    metrics = {}
    for feature_set in probe.feature_sets:
        train, test = (cached_features(feature_set, source, config, workdir, on_move) for source in probe.sources)
        metrics |= {"train_examples": len(train.labels), "eval_examples": len(test.labels)}
        # accelerators round products of float32 further unless told not to
        with jax.default_matmul_precision(None if protocol == "ours" else "highest"):
            result = PROTOCOLS[protocol](train, test, settings, on_move)
        metrics |= {f"{feature_set.name}/{name}": value for name, value in result.accuracies.items()}
        metrics |= {f"chosen/{feature_set.name}/{name}": value for name, value in result.chosen.items()}
    return metrics


def cached_features(
    feature_set: FeatureSet, source, config, workdir: str, on_move: Callable[[str], None] = lambda phase: None
) -> Features:
    """Return the features and labels of a whole split, computed once for its data and network and kept in the workdir.

    Of several processes each computes its part of the rows on its devices and writes it piece by piece; an interrupted
    process goes on after its last piece. Process 0 joins the pieces, and the others wait for that. In a bucket, which
    cannot be mapped, arrays are joined in memory and read as a whole.

    Raises:
        UserError: the disk has no space for the features, or more images than `data.max_bad_fraction` allows were
            unreadable.
    """
    made_from = [
        weights_hash(feature_set.frozen),
        describe_data((source,)),
        config.views.image_size,
        config.probe.protocol,
        feature_set.layers,
    ]
    split = re.sub(r"[^\w-]", "_", source.split)
    folder = as_path(workdir) / "features" / f"{feature_set.name}_{split}.{digest(made_from)}"
    if not (folder / _LABELS).exists():
        _refuse_small_disk(folder, feature_set, len(source), config)
        folder.mkdir(parents=True, exist_ok=True)
        index, count = jax.process_index(), jax.process_count()
        parts = [_Parts(folder, number, count, config.run.batch_size) for number in range(count)]
        num_batches = _write_part(parts[index], feature_set, source, config, workdir, on_move)

        def is_written() -> bool:
            if index:
                return (folder / _LABELS).exists()
            return all(part.num_batches == num_batches for part in parts)

        while not is_written():
            on_move("waiting for other processes")
            time.sleep(POLL_SECONDS)
        if index == 0:
            _join(folder, [path for part in parts for path in part.files()], on_move)
    if jax.process_index() == 0:
        for part in folder.glob("part.*"):
            part.unlink()
    labels = _read(folder / _LABELS)
    refuse_too_many(
        len(source) - len(labels),
        len(source),
        config.data.max_bad_fraction,
        of=f"of split {source.split}",
        listed=f"listed in {as_path(workdir) / 'bad_records.jsonl'} and delete {folder}",
    )
    arrays = {path.stem: _read(path) for path in sorted(folder.glob("*.npy")) if path.name != _LABELS}
    return Features(arrays, labels, feature_set.layers, source.num_classes)


def _refuse_small_disk(folder: AnyPath, feature_set: FeatureSet, num_rows: int, config) -> None:
    """Raise UserError unless the disk has space for the pieces of the features and for the joined arrays."""
    if buckets.is_remote(folder):
        return
    images = jax.ShapeDtypeStruct((1, config.views.image_size, config.views.image_size, 3), np.uint8)
    row = jax.eval_shape(feature_set.apply, feature_set.frozen, {"images": images})
    needed = 2 * num_rows * sum(math.prod(array.shape) * array.dtype.itemsize for array in row.values())
    needed -= sum(path.stat().st_size for path in folder.glob("part.*"))
    existing = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"The features of {num_rows} images need {needed / 1e9:.3g} GB while they are written, and {existing} has "
            f"{free / 1e9:.3g} GB free.",
            "Did you mean a protocol that does not keep every patch token, as 'capi' and 'ep' do?",
            "Write --workdir=DIR on a larger disk, --config.probe.protocol=dinov3, or a smaller --config.data.source.",
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
    parts: _Parts, feature_set: FeatureSet, source, config, workdir: str, on_move: Callable[[str], None]
) -> int:
    """Write what is missing of a process's features, labels and example ids; return how many batches there are."""
    batches = inputs.eval_batches(source, config, parts.index, parts.count)
    first = parts.num_batches
    if first == len(batches):
        return len(batches)
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
        arrays = {**outputs, **{name: batch[name] for name in ("labels", "example_ids")}}
        rows.append({name: array[real] for name, array in arrays.items()})
        num_bytes += sum(array.nbytes for array in rows[-1].values())
        if num_bytes >= PART_BYTES or end == len(batches):
            _write(parts.path(first, end), {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
            rows, num_bytes, first = [], 0, end
    return len(batches)


def _join(folder: AnyPath, parts: list[AnyPath], on_move: Callable[[str], None]) -> None:
    """Write one file for each array, its rows in the order of their example ids."""
    ids = np.sort(np.concatenate([_read(part, only="example_ids")["example_ids"] for part in parts]))
    joined: dict[str, np.ndarray] = {}
    for part in parts:
        on_move("joining features")
        rows = _read(part)
        places = np.searchsorted(ids, rows.pop("example_ids"))
        for name, array in rows.items():
            if name not in joined:
                joined[name] = _new_array(folder / f"{name}.npy", array.dtype, (len(ids), *array.shape[1:]))
            joined[name][places] = array
    for name in sorted(joined, key=lambda name: f"{name}.npy" == _LABELS):  # the labels last
        _finish_array(folder / f"{name}.npy", joined.pop(name))


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
        if path.suffix == ".npy" and not buckets.is_remote(path) and path.name != _LABELS:
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
