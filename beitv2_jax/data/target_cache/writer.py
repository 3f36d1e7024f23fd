"""Write a target cache: shards, each of which appears complete, and one final step that publishes all of them.

Used by the stages extract and tokenize. While a part is being written, `directory/.writing` holds the plan, leases,
unfinished files and one line for each input shard that is done; finishing removes it. Any number of processes on one
file system may write the same part: what is written depends on the plan alone, and files appear by renaming.
"""

import contextlib
import json
import os
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beitv2_jax.data import array_files
from beitv2_jax.data.sources.tfds import opened_builder
from beitv2_jax.data.target_cache.leases import Leases
from beitv2_jax.data.target_cache.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    check_manifest,
    encoding_of,
    plain,
    read_manifest,
)
from beitv2_jax.data.target_cache.reader import BAD_RECORDS_FILE, view_split
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.atomic_files import sync, write_json

_WRITER_OPTIONS = "group_size:1,uncompressed"
"""One record a group: random access reads no other. Uncompressed: neither features nor ids can be made smaller."""
_READ_AT_ONCE = 64
_CLEARED = ".cleared-"
_WORK, _DONE = ".writing", ".done"


def is_begun(directory: str | os.PathLike) -> bool:
    """Tell whether a part of a target cache is finished, has a finished shard, or is being written by a live worker.

    What workers left that died before their first shard was done is nothing to go on from. Where such a worker was of
    another machine, this takes as long as `Leases.any_is_held`.
    """
    part = pathlib.Path(directory)
    return (part / MANIFEST_FILE).exists() or _binds(part / _WORK)


def _binds(work: pathlib.Path) -> bool:
    """Tell whether what is unfinished has a shard that is done, or a live worker."""
    return any(work.glob(f"*{_DONE}")) or Leases(work).any_is_held()


class TargetCache:
    """A part of a target cache that is being written, or is finished.

    Attributes:
      directory: of the part.
      shards: the example ids of every input shard.
      views: the views that are still to be written; a finished target cache of fewer views is extended.
      work: folder of what is unfinished; leases belong there.

    Args:
      name: TFDS name of the set: lower case, digits, underscores.
      manifest: every field of the manifest but `schema_version` and `unreadable`.
      shard_examples: examples in an input shard.

    Raises:
      UserError: another target cache is there, finished or begun.
    """

    def __init__(self, directory: str | os.PathLike, *, name: str, manifest: Mapping[str, Any], shard_examples: int):
        self.directory, self._name = pathlib.Path(directory), name
        self._manifest = plain({"schema_version": SCHEMA_VERSION, **manifest})
        self._encoding = encoding_of(self._manifest)
        count = self._manifest["num_examples"]
        self.shards = [range(first, min(first + shard_examples, count)) for first in range(0, count, shard_examples)]
        self.work = self.directory / _WORK
        self.views = range(self._published_views(), self._manifest["num_views"])
        self._unreadable: dict[int, list] = {}
        self._remove_finished_work()
        if self.views:
            self._join_plan(
                {"manifest": self._manifest, "first_view": self.views.start, "shard_examples": shard_examples}
            )

    def _published_views(self) -> int:
        """Return how many views are finished, after checking that they belong to this manifest."""
        if not (self.directory / MANIFEST_FILE).is_file():
            return 0
        found = read_manifest(self.directory)
        check_manifest(
            found, {name: value for name, value in self._manifest.items() if name != "num_views"}, self.directory
        )
        return found["num_views"]

    def _remove_finished_work(self) -> None:
        """Remove what a process left that was killed between publishing and clearing up."""
        for path in self.directory.glob(f"{_CLEARED}*"):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            plan = json.loads((self.work / "plan.json").read_text())
            if plan["manifest"]["num_views"] <= self.views.start:
                self._remove_work()

    def _remove_work(self) -> None:
        # renamed first, so that a half-deleted folder is never taken for unfinished work
        cleared = self.directory / f"{_CLEARED}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.work, cleared)
        shutil.rmtree(cleared, ignore_errors=True)

    def _join_plan(self, plan: dict[str, Any]) -> None:
        path = self.work / "plan.json"
        self.work.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, plan)
        try:
            self._check_plan(path, plan)
        except UserError:
            # a plan of workers that died before one of its shards was done may be replaced
            if _binds(self.work):
                raise
            write_json(path, plan)

    def _check_plan(self, path: pathlib.Path, plan: dict[str, Any]) -> None:
        try:
            begun = json.loads(path.read_text())
            check_manifest(
                {**begun, **begun["manifest"]},
                {**plan, **plan["manifest"], "manifest": begun["manifest"]},
                self.directory,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is corrupt ({error!r}).",
                "The disk may have been full.",
                f"Delete {self.work} and run the stage again.",
            ) from error

    @property
    def finished(self) -> bool:
        """Whether every view is published, by whoever it was."""
        return not self.views or self._published_views() >= self.views.stop

    def shard_of(self, example_id: int) -> int:
        """Return the number of the input shard that holds an example."""
        return example_id // len(self.shards[0])

    def is_done(self, shard: int) -> bool:
        """Return whether all views of an input shard are written."""
        return self.done_path(shard).exists()

    def remaining(self) -> list[int]:
        """Return the numbers of the input shards that are not done."""
        try:
            done = set(os.listdir(self.work))
        except FileNotFoundError:  # another process finished
            return []
        return [shard for shard in range(len(self.shards)) if self.done_path(shard).name not in done]

    def unreadable(self) -> list[dict[str, Any]]:
        """Return the examples that could not be read in the shards done so far, as lines of `bad_records.jsonl`."""
        for shard in set(range(len(self.shards))) - set(self.remaining()) - self._unreadable.keys():
            with contextlib.suppress(FileNotFoundError):  # another process finished
                self._unreadable[shard] = self._done(shard)["unreadable"]
        return [bad for shard in sorted(self._unreadable) for bad in self._unreadable[shard]]

    def _done(self, shard: int) -> dict[str, Any]:
        path = self.done_path(shard)
        try:
            return dict(json.loads(path.read_text()))
        except ValueError as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path} was damaged ({error}), and is removed.",
                "The machine may have lost its power, or the disk may have been full.",
                "Run this stage again, which writes this shard again.",
            ) from error

    def open_shard(self, shard: int) -> "ShardWriter":
        """Return the writer of an input shard, after removing what a killed worker left of it.

        Raises:
          ShardLost: another process finished the whole part.
        """
        if not self.work.is_dir():
            raise ShardLost
        for path in self.work.glob(f"{shard:05d}.*.tmp"):
            path.unlink(missing_ok=True)
        return ShardWriter(self, shard)

    def done_path(self, shard: int) -> pathlib.Path:
        """Return the file that says that an input shard is done."""
        return self.work / f"{shard:05d}{_DONE}"

    def shard_path(self, shard: int, view: int) -> pathlib.Path:
        """Return the file that TFDS looks for one view of an input shard in."""
        name = self._template(view, self.directory).sharded_filepath(shard_index=shard, num_shards=len(self.shards))
        return pathlib.Path(os.fspath(name))

    def _template(self, view: int, directory: pathlib.Path):
        return array_files.shard_template(self._name, view_split(self._manifest["split"], view), directory)

    def features(self):
        """Return the TFDS features of a record."""
        import tensorflow_datasets as tfds

        return tfds.features.FeaturesDict(
            {
                name: tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")
                for name, (shape, dtype) in self._encoding.fields.items()
            }
        )

    def finish(self) -> None:
        """Check that every example is there, write the TFDS metadata and the manifest, and remove what was unfinished.

        Two processes may finish at the same time: both write the same, one file at a time, the manifest last.

        Raises:
          UserError: a shard's file has gone or has another number of records. It is to be written again then.
        """
        done = [self._done(shard) for shard in range(len(self.shards))]
        for view in self.views:
            for shard in range(len(self.shards)):
                self._check_count(shard, view)
        unreadable = [bad for shard in done for bad in shard["unreadable"]]
        temporary = self.work / f"metadata.{uuid.uuid4().hex}"
        temporary.mkdir()
        self._write_metadata(temporary, [shard["num_bytes"] for shard in done])
        if unreadable:
            (temporary / BAD_RECORDS_FILE).write_text("".join(json.dumps(bad) + "\n" for bad in unreadable))
        write_json(temporary / MANIFEST_FILE, {**self._manifest, "unreadable": len(unreadable)})
        # the manifest makes the cache readable, so it goes last
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
            sync(path)
            os.replace(path, self.directory / path.name)
        self._remove_work()

    def _check_count(self, shard: int, view: int) -> None:
        path = self.shard_path(shard, view)
        found = array_files.num_records(path) if path.exists() else 0
        if found != len(self.shards[shard]):
            self.done_path(shard).unlink(missing_ok=True)
            raise UserError(
                f"{path} holds {found} of {len(self.shards[shard])} records.",
                "The file may have been removed or damaged after it had been written.",
                "Run this stage again, which writes this shard again.",
            )

    def _write_metadata(self, directory: pathlib.Path, num_bytes: Sequence[int]) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info

        splits = [
            tfds.core.SplitInfo(
                name=view_split(self._manifest["split"], view),
                shard_lengths=[len(shard) for shard in self.shards],
                num_bytes=sum(num_bytes),
                filename_template=self._template(view, directory),
            )
            for view in self.views
        ]
        if self.views.start:
            splits = [*opened_builder(self.directory).info.splits.values(), *splits]
        info = tfds.core.DatasetInfo(
            builder=dataset_info.DatasetIdentity(
                name=self._name, version=tfds.core.Version("1.0.0"), data_dir=directory, module_name=""
            ),
            features=self.features(),
            description=f"{self._encoding.target} of fixed views; record i belongs to example i. See manifest.json.",
        )
        info.set_file_format("array_record")
        info.set_splits(tfds.core.splits.SplitDict(splits))
        info.write_to_directory(directory)


class ShardLost(Exception):
    """Say that another process has written what this one was writing; nothing is missing."""


class ShardWriter:
    """Write all missing views of one input shard under temporary names; `close` checks and publishes them."""

    def __init__(self, cache: TargetCache, shard: int):
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._cache, self._shard = cache, shard
        self._features = cache.features()
        self._serializer = ExampleSerializer(self._features.get_serialized_info())
        owner = uuid.uuid4().hex
        self._paths = {view: cache.work / f"{shard:05d}.v{view}.{owner}.tmp" for view in cache.views}
        self._files = {view: ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS) for view, path in self._paths.items()}
        self._sums = dict.fromkeys(cache.views, (0, 0))
        self._num_bytes = 0

    def write(self, view: int, packed: Mapping[str, np.ndarray]) -> None:
        """Append records of one view, in example order: the arrays 'b ...' of an encoding's `pack`."""
        for row in range(len(next(iter(packed.values())))):
            record = self._serialize({name: array[row] for name, array in packed.items()})
            self._files[view].write(record)
            count, checksum = self._sums[view]
            self._sums[view] = count + 1, zlib.crc32(record, checksum)
            self._num_bytes += len(record) if view == self._cache.views.start else 0

    def _serialize(self, example: Mapping[str, np.ndarray]) -> bytes:
        # TFDS's own serialization leaves the order of the features to chance, so that equal records would differ
        encoded = self._features.encode_example(example)
        return self._serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    def close(self, unreadable: Sequence[Mapping[str, Any]]) -> None:
        """Close the files, read them again, give them their names, and mark the shard as done.

        Raises:
          OSError: a file does not hold what was written.
          ShardLost: another worker took this shard over, after this one had seemed dead.
        """
        length = len(self._cache.shards[self._shard])
        for view, file in self._files.items():
            try:
                file.close()
            except Exception as error:  # the library's own class, which it does not export
                raise OSError(f"{self._paths[view]}: {error}") from error
        if not all(path.exists() for path in self._paths.values()):
            raise ShardLost
        for view, path in self._paths.items():
            if self._sums[view][0] != length or _reread(path) != self._sums[view]:
                raise OSError(f"{path} does not hold the {length} records that were written to it")
            sync(path)
        try:
            for view, path in self._paths.items():
                os.rename(path, self._cache.shard_path(self._shard, view))
            write_json(
                self._cache.done_path(self._shard), {"num_bytes": self._num_bytes, "unreadable": list(unreadable)}
            )
        except FileNotFoundError as error:
            raise ShardLost from error

    def discard(self) -> None:
        """Close and remove the unfinished files."""
        for view, path in self._paths.items():
            with contextlib.suppress(Exception):  # the disk may be full
                self._files[view].close()
            path.unlink(missing_ok=True)


def _reread(path: pathlib.Path) -> tuple[int, int]:
    """Return the number of records in a file and the checksum over their bytes, read back in order."""
    with array_files.opened(path) as reader:
        count, checksum = reader.num_records(), 0
        for first in range(0, count, _READ_AT_ONCE):
            for record in reader.read(first, min(first + _READ_AT_ONCE, count)):
                checksum = zlib.crc32(record, checksum)
    return count, checksum
