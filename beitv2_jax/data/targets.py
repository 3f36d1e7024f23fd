"""Store of what a frozen network said about every fixed view: teacher features or code ids, as a TFDS set.

Written by the stages extract and tokenize, read by the data pipeline of the stages that follow. Record i of a
split belongs to example i of the source and holds all its views: `tfds.builder_from_directory(directory)` opens it.
`card.json` beside the records says what they were computed from.
"""

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from beitv2_jax.errors import UserError

SCHEMA_VERSION = 1
_SHARD_BYTES = 2**30


def code_id_dtype(codebook_size: int) -> str:
    """Return the smallest unsigned type that numbers `codebook_size` codes: 2 bytes up to 65536 codes."""
    return "uint16" if codebook_size <= 65536 else "uint32"


def _plain(card: dict[str, Any]) -> dict[str, Any]:
    """Return `card` as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(card))


def _check_card(found: dict[str, Any], expected: dict[str, Any], directory: pathlib.Path) -> None:
    for field, value in _plain(expected).items():
        if found.get(field) != value:
            raise UserError(
                f"The targets in {directory} were made with {field} = {found.get(field)!r}, this run has {value!r}.",
                "they belong to another configuration, so their views or values would not match the images",
                f"set {field} to {found.get(field)!r} here, or make the targets again in another directory",
            )


def _stored_split(split: str) -> str:
    """Return the name of a split in the store, where TFDS's slice signs cannot stand: train[:10%] -> train_to10pct."""
    return split.translate(str.maketrans({"[": "_", "]": None, ":": "to", "%": "pct", "-": "minus", "+": "_and_"}))


def _open(directory: pathlib.Path):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory)


class TargetWriter:
    """Write one split of a store, record by record in example order, and publish it whole or not at all.

    Everything goes to a hidden directory beside `directory`; `close` moves it there. A killed writer leaves only
    that directory, which the next writer of the same split empties. A further split may join a published store
    of equal card and features. As a context manager, closes on success and discards on an exception.

    Args:
      directory: of the finished store.
      name: TFDS name of the set: lower case, digits, underscores.
      card: what the targets were computed from; anything JSON can hold.
      split: name of the split to write, as the source calls it; a TFDS slice is a split of its own.
      features: one entry, name -> (shape, dtype): `{"teacher_features": ((K, n, t), "float16")}` or
        `{"code_ids": ((K, n), code_id_dtype(codebook_size))}`, K the number of views.

    Raises:
      UserError: the split is there already, or the store there has another card or other features.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        name: str,
        card: dict[str, Any],
        split: str,
        features: dict[str, tuple[tuple[int, ...], str]],
    ):
        import tensorflow_datasets as tfds

        ((self.feature, (self._shape, dtype)),) = features.items()
        self._dtype = np.dtype(dtype)
        self._directory = pathlib.Path(directory)
        self._name, self._split = name, _stored_split(split)
        self._card = {"schema_version": SCHEMA_VERSION, **_plain(card)}
        self._published = self._published_splits()
        self._features = tfds.features.FeaturesDict(
            {self.feature: tfds.features.Tensor(shape=self._shape, dtype=self._dtype, encoding="bytes")}
        )
        self._unfinished = self._directory.parent / f".{self._directory.name}.{self._split}.unfinished"
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        self._shard_lengths: list[int] = []
        self._num_bytes = 0
        self._shard = None
        self._room = 0

    def _published_splits(self) -> list:
        if not self._directory.exists() or not any(self._directory.iterdir()):
            return []
        found = TargetReader(self._directory, None)
        found.check(self._card)
        if self._split in found.splits:
            raise UserError(
                f"The targets in {self._directory} have the split {self._split!r} already.",
                "this stage was finished before",
                f"use them, or delete {self._directory} to make them again",
            )
        if (found.feature, found.shape, found.dtype) != (self.feature, tuple(self._shape), self._dtype):
            raise UserError(
                f"The targets in {self._directory} are {found.feature} {found.shape} {found.dtype}, not "
                f"{self.feature} {tuple(self._shape)} {self._dtype}.",
                "the splits of one store must hold the same feature",
                "another directory",
            )
        return list(found.splits.values())

    @property
    def num_examples(self) -> int:
        """Number of records written so far, which is the next example id."""
        return sum(self._shard_lengths)

    def write(self, example_id: int, array: np.ndarray) -> None:
        """Append the views of one example.

        Raises:
          ValueError: not the next example id, another shape, or a value that the stored dtype cannot hold.
        """
        if example_id != self.num_examples:
            raise ValueError(f"records are written in order: expected example {self.num_examples}, got {example_id}")
        with np.errstate(over="ignore"):  # reported below
            stored = np.asarray(array).astype(self._dtype)
        if stored.shape != tuple(self._shape):
            raise ValueError(f"{self.feature} of one example must have the shape {self._shape}, got {stored.shape}")
        exact = np.array_equal(stored, array) if self._dtype.kind in "iu" else np.isfinite(stored).all()
        if not exact:
            raise ValueError(f"{self.feature} of example {example_id} does not fit {self._dtype}")
        record = self._features.serialize_example({self.feature: stored})
        if self._shard is None or self._room < len(record):
            self._next_shard()
        self._shard.write(record)
        self._shard_lengths[-1] += 1
        self._room -= len(record)
        self._num_bytes += len(record)

    def _shard_path(self, index: int) -> pathlib.Path:
        return self._unfinished / f"shard-{index}"

    def _next_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._end_shard()
        # one record a group, uncompressed: what random access wants, and floats hardly compress
        self._shard = ArrayRecordWriter(
            os.fspath(self._shard_path(len(self._shard_lengths))), "group_size:1,uncompressed"
        )
        self._shard_lengths.append(0)
        self._room = _SHARD_BYTES

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def close(self) -> None:
        """Finish the records, write the TFDS metadata and the card, and publish.

        Raises:
          ValueError: nothing was written.
        """
        if not self._shard_lengths:
            raise ValueError(f"no record was written to the split {self._split!r} of {self._directory}")
        self._end_shard()
        template = self._finish_shards()
        self._write_metadata(template)
        (self._unfinished / "card.json").write_text(json.dumps(self._card, indent=2) + "\n")
        if not self._published:
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self._unfinished, self._directory)
            return
        # the metadata names the new shards, so its move, the last one, is what publishes them
        for path in sorted(self._unfinished.iterdir(), key=lambda path: path.name == "dataset_info.json"):
            os.replace(path, self._directory / path.name)
        self._unfinished.rmdir()

    def _finish_shards(self):
        """Give the shards their TFDS names, which tell their number; return TFDS's template of these names."""
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            dataset_name=self._name,
            data_dir=self._unfinished,
            split=self._split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
        count = len(self._shard_lengths)
        for index in range(count):
            os.rename(self._shard_path(index), template.sharded_filepath(shard_index=index, num_shards=count))
        return template

    def _write_metadata(self, template) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info

        split = tfds.core.SplitInfo(
            name=self._split,
            shard_lengths=self._shard_lengths,
            num_bytes=self._num_bytes,
            filename_template=template,
        )
        info = tfds.core.DatasetInfo(
            builder=dataset_info.DatasetIdentity(
                name=self._name, version=tfds.core.Version("1.0.0"), data_dir=self._unfinished, module_name=""
            ),
            features=self._features,
            description=f"{self.feature} of fixed random views; record i belongs to example i. See card.json.",
        )
        info.set_file_format("array_record")
        info.set_splits(tfds.core.splits.SplitDict([*self._published, split]))
        info.write_to_directory(self._unfinished)

    def discard(self) -> None:
        """Remove what was written; the published store, if any, stays as it was."""
        self._end_shard()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def __enter__(self) -> "TargetWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class TargetReader:
    """Read a published store: `reader[example_id, view]` is the array of one view, in the stored dtype.

    Attributes:
      feature: "teacher_features" or "code_ids".
      shape, dtype: of one record, views first.
      num_views: number of views of each example.
      card: what the targets were computed from.
      splits: TFDS split infos by name.

    Args:
      directory: as given to the writer.
      split: to read; None opens the description alone.

    Raises:
      UserError: nothing there, no such split, or a schema of another version.
    """

    def __init__(self, directory: str | os.PathLike, split: str | None):
        self._directory, self._split = pathlib.Path(directory), split
        if not (self._directory / "card.json").is_file():
            raise UserError(
                f"There are no targets in {self._directory}.",
                "the stage that makes them (extract or tokenize) did not run or did not finish",
                "run that stage first, or correct the directory",
            )
        self.card = json.loads((self._directory / "card.json").read_text())
        _check_card(self.card, {"schema_version": SCHEMA_VERSION}, self._directory)
        builder = _open(self._directory)
        ((self.feature, tensor),) = builder.info.features.items()
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(tensor.np_dtype)
        self.num_views = self.shape[0]
        self.splits = dict(builder.info.splits)
        stored = split and _stored_split(split)
        if stored and stored not in self.splits:
            raise UserError(
                f"The targets in {self._directory} have no split {split!r}; they have {', '.join(self.splits)}.",
                "that split was never extracted or tokenized",
                "run the stage that makes them on this split too, with the same directory",
            )
        self._records = builder.as_data_source(stored) if stored else ()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._records)

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        """Return the array of (example id, view); only the record of that example is read."""
        example_id, view = key
        if not 0 <= view < self.num_views:
            raise IndexError(f"view {view} of {self.num_views}")
        # the record is a read-only buffer of all views: copy the one, let the rest go
        return self._records[example_id][self.feature][view].copy()

    def check(self, expected: dict[str, Any]) -> None:
        """Compare the card with what a run expects.

        Raises:
          UserError: names the first field that differs, with both values.
        """
        _check_card(self.card, expected, self._directory)

    def __reduce__(self):
        return TargetReader, (self._directory, self._split)
