"""Read a target cache: the teacher features or code ids of every fixed view, as TFDS data sets.

Written by the stages extract and tokenize (`data.target_cache.writer`), read by the data pipeline of later stages.
A part of a target cache is one TFDS data set, which `tfds.builder_from_directory(directory)` opens, with one split per
view (`train_v0`, `train_v1` ...), so that reading a view touches no other. Record i of every split belongs to example i
of the source. `manifest.json` beside the records says what they were computed from, and `bad_records.jsonl` which
examples could not be read: their records are zeros.
"""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from beitv2_jax.data import array_files
from beitv2_jax.data.sources.tfds import opened_builder
from beitv2_jax.data.target_cache.encoding import zero_entries
from beitv2_jax.data.target_cache.manifest import check_views, encoding_of, read_manifest
from beitv2_jax.errors import UserError

BAD_RECORDS_FILE = "bad_records.jsonl"
OPEN_VIEWS = 2
"""Views whose files a reader keeps open: an epoch reads one, and the next one's first batches come before its last."""


def view_split(split: str, view: int) -> str:
    """Return the name of a view's split, without the signs of TFDS slices: train[:10%] -> train_to10pct_v0."""
    name = split.translate(str.maketrans({"[": "_", "]": None, ":": "to", "%": "pct", "-": "minus", "+": "_and_"}))
    return f"{name}_v{view}"


class TargetReader:
    """Read a finished part of a target cache: `reader[example_id, view]` are the decoded targets of one view.

    Pickles as its arguments, so that it can go to worker processes.

    Attributes:
      feature: "teacher_features" or "code_ids".
      manifest: what the targets were computed from.
      encoding: how they are stored.
      num_views: number of views of each example.
      unreadable: ids of the examples whose images could not be read; their targets are zeros and mean nothing.

    Args:
      directory: of the part: the stage's workdir, then "views" or "centre".
      split: of the source, as the source calls it.

    Raises:
      UserError: nothing finished there, a damaged manifest or damaged metadata, or another split.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        self._directory, self._split = pathlib.Path(directory), split
        self.manifest = read_manifest(self._directory)
        self.check({"split": split})
        self.encoding = encoding_of(self.manifest)
        self.feature, self.num_views = self.encoding.target, self.manifest["num_views"]
        self._builder = opened_builder(self._directory)
        self._check_metadata()
        self._check_files()
        self._views = functools.lru_cache(maxsize=OPEN_VIEWS)(self._open_view)
        self.unreadable = self._read_unreadable()

    def _check_metadata(self) -> None:
        splits = self._builder.info.splits
        counts = [splits[name].num_examples if name in splits else 0 for name in map(self._name, range(self.num_views))]
        fields = {name: (tuple(t.shape), np.dtype(t.np_dtype).name) for name, t in self._builder.info.features.items()}
        if set(counts) != {len(self)} or fields != self.encoding.fields:
            raise UserError(
                f"Manifest and TFDS metadata in {self._directory} disagree: {self.num_views} views of {len(self)} "
                f"examples as {self.encoding.fields} in the manifest, {counts} examples per view as {fields} in "
                "dataset_info.json.",
                "Files of two target caches may have been mixed.",
                "Copy the whole folder again, or compute the targets again in another directory.",
            )

    def _check_files(self) -> None:
        there = set(os.listdir(self._directory))
        views = (array_files.ranges_of_split(self._builder, self._name(view)) for view in range(self.num_views))
        names = [os.path.basename(entry.path) for entry in itertools.chain.from_iterable(views)]
        if missing := [name for name in names if name not in there]:
            raise self._unusable(f"{len(missing)} of {len(names)} shards are missing, such as {missing[0]}")

    def _read_unreadable(self) -> frozenset[int]:
        path = self._directory / BAD_RECORDS_FILE
        try:
            ids = frozenset(int(json.loads(line)["example_id"]) for line in path.read_text().splitlines())
        except FileNotFoundError:
            ids = frozenset()
        except (ValueError, KeyError, TypeError) as error:
            raise self._unusable(f"{path} is damaged ({error!r})") from error
        if len(ids) != self.manifest["unreadable"]:
            raise self._unusable(f"{path} names {len(ids)} examples, the manifest counts {self.manifest['unreadable']}")
        return ids

    def _name(self, view: int) -> str:
        return view_split(self._split, view)

    def _open_view(self, view: int):
        return array_files.RecordFiles(array_files.ranges_of_split(self._builder, self._name(view)))

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.manifest["num_examples"]

    def entries(self, example_id: int, view: int) -> dict[str, np.ndarray]:
        """Return what a batch carries of (example id, view): the numbers as stored, code ids as int32.

        Raises:
          IndexError: no such example or view.
          UserError: the record is damaged.
        """
        entries, fault = self._read(example_id, view)
        if fault:
            raise self._unusable(f"view {view} of example {example_id} cannot be read ({fault})")
        return entries

    def readable(self, example_id: int, view: int) -> tuple[dict[str, np.ndarray], str]:
        """Return `entries` and "", or placeholders and the reason: the image was unreadable, the record is damaged."""
        entries, fault = self._read(example_id, view)
        return entries, "unreadable when the stored targets were made" if example_id in self.unreadable else fault

    def _read(self, example_id: int, view: int) -> tuple[dict[str, np.ndarray], str]:
        if not (0 <= view < self.num_views and 0 <= example_id < len(self)):
            raise IndexError(f"example {example_id}, view {view}: {len(self)} examples of {self.num_views} views")
        records = self._views(view)
        try:
            record = records[int(example_id)]
            return self.encoding.unpack(self._builder.info.features.deserialize_example_np(record)), ""
        except UserError:
            raise
        except Exception as error:  # what protobuf raises on unknown bytes is not documented
            fault = f"its stored targets are damaged, {records.where(int(example_id))}: {error}"
            return zero_entries(self.encoding), fault

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        """Return the features (float32 'n t') or ids (int32 'n') of (example id, view); only that record is read."""
        return self.encoding.decode(self.entries(*key))

    def check(self, expected: Mapping[str, Any], flags: Mapping[str, str] | None = None) -> None:
        """Compare the manifest with what a run expects; arguments and errors as `manifest.check_views`."""
        check_views(self.manifest, expected, self._directory, flags)

    def _unusable(self, why: str) -> UserError:
        return UserError(
            f"The targets in {self._directory} cannot be used: {why}.",
            "A file may have been damaged or changed after the stage that wrote it had finished.",
            "Copy the whole folder again, or compute the targets again in another directory.",
        )

    def __reduce__(self):
        return TargetReader, (self._directory, self._split)
