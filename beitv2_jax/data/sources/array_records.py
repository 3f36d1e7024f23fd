"""ArrayRecord files named by a glob, with or without TFDS's description beside them: a source of `data.sources`.

What the records hold follows from the first of them, or from `features.json` beside the files:

- files of a TFDS data set, all or some of its shards: its features, its class names;
- encoded images (JPEG, PNG, ...) and nothing else: no labels;
- tf.train.Example with the image in `image` or `image/encoded`, and maybe a label in `label` or `image/class/label`.
  Labels are taken as they are; `labels.txt` beside the files, one name a line, says how many classes there are.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from absl import logging

from beitv2_jax.data import array_files
from beitv2_jax.data.bad_records import LeftOut
from beitv2_jax.data.sources.examples import image_and_label
from beitv2_jax.data.sources.image_features import ImageFeatures, label_fault, listed_class_names
from beitv2_jax.data.sources.splits import EVALUATION_SPLITS, candidates, refuse_slice, resolve_split
from beitv2_jax.data.sources.unreadable import unreadable
from beitv2_jax.errors import UserError
from beitv2_jax.runtime import buckets, open_files

_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")
_FILES_AT_ONCE = 32


class ArrayRecordSource:
    """Records of the files that match a glob, in the order of their names.

    `{split}` in the glob is replaced by the split (validation, val and test are tried for each other). Without it the
    files of a TFDS data set are chosen by the split in their names; any others are taken for the split that is asked
    for, unless that is one to evaluate on. The name is a digest of the files' names below the folder they share, their
    sizes and their numbers of records: it follows the data when they are moved and changes when they do.

    Files without records are left out.

    Raises:
      UserError: no file matches, one is no ArrayRecord file, or the records hold no images.
    """

    empty_classes = ()

    def __init__(self, pattern: str, split: str):
        self._pattern, self._asked = pattern, split
        refuse_slice(split, f"The files {pattern}")
        self.split, files = _matching(pattern, split)
        features = _tfds_features(files)
        if features is not None:
            self.split, files = _files_of_split(files, split, pattern)
        elif "{split}" not in pattern and split in EVALUATION_SPLITS:
            raise UserError(
                f"The address {pattern} does not say which records are the split {split!r}.",
                "Did you mean to train and to evaluate on the same images, which this glob would give?",
                "Write {split} in the glob where the names of the files or folders hold the split.",
            )
        _log_missing_shards(files)
        self._files, counts = _counted(files, pattern)
        self.left_out = tuple(LeftOut(file, "it has no records") for file in files if file not in set(self._files))
        self._records = array_files.RecordFiles(
            [array_files.RecordRange(file, 0, count, count) for file, count in zip(self._files, counts, strict=True)]
        )
        self._read = _reader(features, self._records, self._files[0])
        folder = os.path.dirname(self._files[0])
        self.class_names = listed_class_names(folder) if features is None else features.class_names
        self.num_classes = len(self.class_names)
        self.multi_label = features is not None and features.multi_label
        self.name = f"arrayrecord:{_digest(self._files, counts)}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        where = f"{self._records.where(example_id)} (example {example_id})"
        try:
            image, label = self._read(self._records[example_id])
        except array_files.RecordError as error:
            return unreadable(example_id, where, error, self.num_classes if self.multi_label else 0)
        return {
            "image": image,
            "label": label,
            "fault": label_fault(label, self.num_classes),
            "example_id": int(example_id),
            "where": where,
        }

    def __reduce__(self):
        return ArrayRecordSource, (self._pattern, self._asked)


def _matching(pattern: str, split: str) -> tuple[str, list[str]]:
    """Return the split's name and the files that match the glob."""
    for name in candidates(split):
        if files := buckets.matching_files(pattern.replace("{split}", name)):
            return name if "{split}" in pattern else split, files
        if "{split}" not in pattern:
            break
    raise UserError(
        f"No file matches {pattern} for the split {split!r}.",
        f"Did you mistype the glob, mean another folder than {pathlib.Path.cwd()}, or did the shell expand the glob?",
        "Write --config.data.source='arrayrecord:DIR/train*.array_record*', in quotes and with the absolute path DIR.",
    )


def _tfds_features(files: list[str]) -> ImageFeatures | None:
    """Return the features of the TFDS data set whose files these are; None if they are of none."""
    folders = {os.path.dirname(file) for file in files}
    described = {folder for folder in folders if (buckets.as_path(folder) / "features.json").is_file()}
    if not described:
        return None
    if len(folders) > 1:
        raise UserError(
            f"The glob takes files of a TFDS data set in {min(described)} and others beside them.",
            "Do two data sets, or two versions of one, match the same glob?",
            "Write --config.data.source=arrayrecord:GLOB with a glob of one folder.",
        )
    import tensorflow_datasets as tfds

    folder = described.pop()
    return ImageFeatures(tfds.features.FeaturesDict.from_config(folder), f"The TFDS set in {folder}", folder)


def _files_of_split(files: list[str], split: str, pattern: str) -> tuple[str, list[str]]:
    """Return the split's name in the TFDS data set, and those of `files` that belong to it."""
    from tensorflow_datasets.core import naming

    files_of: dict[str, list[str]] = {}
    for file in files:
        # other files that a glob may match, such as features.json, are not shards
        if naming.FilenameInfo.is_valid(name := os.path.basename(file)):
            files_of.setdefault(naming.FilenameInfo.from_str(name).split, []).append(file)
    found = resolve_split(split, files_of, f"What matches {pattern}")
    return found, files_of[found]


def _log_missing_shards(files: list[str]) -> None:
    """Warn of files named as shards, -00003-of-00064, of which others do not match: they may be missing."""
    shards: dict[tuple[str, str], set[int]] = {}
    for file in files:
        if found := re.fullmatch(r"(.*)-(\d+)-of-(\d+)", file):
            shards.setdefault((found[1], found[3]), set()).add(int(found[2]))
    for (stem, total), there in shards.items():
        if missing := sorted(set(range(int(total))) - there):
            logging.warning(
                "%s: %d of %s shards are not among the files that are read, shard %d is the first of these",
                stem,
                len(missing),
                total,
                missing[0],
            )


def _counted(files: list[str], pattern: str) -> tuple[list[str], list[int]]:
    """Return the files that have records, and how many."""
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        counts = list(pool.map(_num_records, files))
    kept = [(file, count) for file, count in zip(files, counts, strict=True) if count]
    if not kept:
        raise UserError(
            f"The files that match {pattern} hold no records.",
            "Was the program that wrote them stopped before they were finished?",
            "Write these files again, or write another glob as --config.data.source=arrayrecord:GLOB.",
        )
    return [file for file, _ in kept], [count for _, count in kept]


def _num_records(file: str) -> int:
    try:
        return array_files.num_records(file)
    except Exception as error:  # its own class, which it does not export
        if open_files.is_exhausted(error):
            raise open_files.too_many(error) from error
        raise UserError(
            f"{file} is no whole ArrayRecord file: {error}.",
            "Did the copying of it break off, or does the glob take files of another kind?",
            "Copy the file again, or write a glob that takes ArrayRecord files alone.",
        ) from error


def _reader(features, records: array_files.RecordFiles, file: str) -> Callable[[bytes], tuple[bytes, Any]]:
    """Return the function record -> (encoded image, label); an image that a record lacks is empty."""
    if features is not None:
        return features.read
    first = _first_readable(records)
    if first.startswith(_IMAGE_STARTS):
        return _plain_image
    if image_and_label(first) is not None:
        return _example
    raise UserError(
        f"The records of {file} are neither images nor examples with one: the first begins with {first[:16]!r}.",
        "Do they hold something else, or do their features have other names?",
        "Write records that are encoded images or tf.train.Example with the feature 'image' or 'image/encoded', or use "
        "the files of a TFDS data set.",
    )


def _first_readable(records: array_files.RecordFiles) -> bytes:
    for number in range(len(records)):
        with contextlib.suppress(array_files.RecordError):
            return records[number]
    raise UserError(
        f"None of the {len(records)} records can be read; the first is {records.where(0)}.",
        "The files may have been damaged when they were copied.",
        "Copy them again.",
    )


def _plain_image(record: bytes) -> tuple[bytes, int]:
    return record, -1


def _example(record: bytes) -> tuple[bytes, int]:
    # what has no image is found out where it is decoded, and counted there
    return image_and_label(record) or (b"", -1)


def _digest(files: list[str], counts: list[int]) -> str:
    absolute = [buckets.absolute(file) for file in files]
    shared = os.path.commonpath([os.path.dirname(file) for file in absolute])
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        sizes = list(pool.map(buckets.size, files))
    lines = [
        f"{os.path.relpath(file, shared)} {size} {count}"
        for file, size, count in zip(absolute, sizes, counts, strict=True)
    ]
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
