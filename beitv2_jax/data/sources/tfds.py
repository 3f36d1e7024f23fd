"""Prepared TFDS sets in ArrayRecord form, found by name and read without TensorFlow: a source of `data.sources`."""

import functools
import hashlib
import json
import multiprocessing
import os
import re
from typing import Any

from beitv2_jax.data.array_files import RecordError, RecordFiles, ranges_of_split
from beitv2_jax.data.sources.folders import digest_of_sizes
from beitv2_jax.data.sources.image_features import ImageFeatures, label_fault
from beitv2_jax.data.sources.splits import resolve_split
from beitv2_jax.data.sources.unreadable import unreadable
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.buckets import as_path


class TfdsSource:
    """A prepared TFDS directory in a random-access format, read without TensorFlow.

    Needs a feature `image`; labels are used if they are there (`ImageFeatures`). `digest` stands for what the metadata
    say of the split's files, because data sets of one name and version may differ.
    """

    left_out = empty_classes = ()

    def __init__(self, directory: str | os.PathLike, split: str):
        self._directory, self._asked = os.fspath(directory), split
        builder = opened_builder(self._directory)
        self.name = f"tfds:{builder.info.full_name}"
        where = f"The TFDS set {builder.info.full_name}"
        self.split = resolve_split(split, builder.info.splits, where)
        split_info = builder.info.splits[self.split.partition("[")[0]]
        self.digest, self._paths = _digest(split_info), split_info.filepaths
        self._features = ImageFeatures(builder.info.features, where, directory)
        if builder.info.file_format.value != "array_record":
            raise UserError(
                f"The TFDS set in {self._directory} has the format {builder.info.file_format.value}, which has no "
                "random access.",
                "Was it prepared by TFDS with its default format?",
                f"Remove it and prepare it again by {_preparation(builder.name)}.",
            )
        try:
            self._records = RecordFiles(ranges_of_split(builder, self.split))
        except ValueError as error:
            raise UserError(
                f"The split {split!r} cannot be cut: {str(error).rstrip('.')}.",
                "Did you mistype the slice?",
                "Write it as in train[:10%] or train[100:200].",
            ) from error
        if multiprocessing.parent_process() is None:  # once, not in every worker process
            self._records.check()
        self.class_names = self._features.class_names
        self.num_classes, self.multi_label = len(self.class_names), self._features.multi_label

    @property
    def image_features(self) -> tuple[str, ...]:
        """Names of the features that are images."""
        return tuple(self._features.decoders)

    @functools.cached_property
    def sizes(self) -> str:
        """Digest of the sizes of the split's files, which are looked up when it is asked for."""
        return digest_of_sizes(self._paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, example_id: int) -> dict[str, Any]:
        where = f"{self._records.where(example_id)} (example {example_id})"
        try:
            image, label = self._features.read(self._records[example_id])
        except RecordError as error:
            return unreadable(example_id, where, error, self.num_classes if self.multi_label else 0)
        return {
            "image": image,
            "label": label,
            "fault": label_fault(label, self.num_classes),
            "example_id": int(example_id),
            "where": where,
        }

    def __reduce__(self):
        return TfdsSource, (self._directory, self._asked)


def _digest(split_info) -> str:
    sizes = f"{split_info.num_bytes} {list(split_info.shard_lengths)}"
    return hashlib.blake2b(sizes.encode(), digest_size=6).hexdigest()


def opened_builder(directory: str | os.PathLike):
    """Return the TFDS builder of the data set in `directory`.

    Raises:
      UserError: its metadata are damaged.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(os.fspath(directory))
    except Exception as error:  # TFDS, protobuf and the file system each have their own ways to fail here
        raise _damaged_metadata(f"in {directory}", error) from error


def _damaged_metadata(where: str, error: Exception) -> UserError:
    return UserError(
        f"The TFDS metadata {where} cannot be read: {(str(error).splitlines() or [repr(error)])[0].rstrip('.')}.",
        "The files dataset_info.json or features.json may have been damaged, by a full disk or when they were copied.",
        "Copy the whole folder again, or prepare or compute it again in another directory.",
    )


def _preparation(name: str, data_dir: str = "") -> str:
    if name.partition(":")[0] == "imagenet2012":
        place = f" --data_dir={data_dir}" if data_dir else ""
        return f"python -m beitv2_jax.data.prepare imagenet2012 --archives=DIR{place}"
    place = f", data_dir='{data_dir}'" if data_dir else ""
    return (
        f'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}'{place}, file_format='array_record').download_and_prepare()\" "
        "(some sets need TensorFlow installed for this one step)"
    )


def find_tfds(name: str, data_dir: str) -> str:
    """Return the directory of a prepared TFDS set: of the version asked for, else the newest.

    A config that is not named is the data set's default one. TFDS is searched for that, nothing is generated.
    """
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except registered.DatasetNotFoundError as error:
        prepared = _prepared(name, data_dir)
        raise UserError(
            f"The TFDS set {name!r} is not prepared in {data_dir or 'the TFDS default directory'}"
            + (f", which has {', '.join(prepared)}." if prepared else "."),
            f"Did you mean 'tfds:{prepared[-1]}'?" if prepared else "Does it lie in another directory?",
            f"Write --config.data.source=tfds:{prepared[-1]}."
            if prepared
            else f"Write --config.data.data_dir=DIR of the directory that holds it, or prepare it by "
            f"{_preparation(name, data_dir)}.",
        ) from error
    except Exception as error:
        # TFDS reads the metadata to look up a set; protobuf and json each have their own errors for damaged ones
        if not isinstance(error, ValueError) or isinstance(error, json.JSONDecodeError):
            raise _damaged_metadata(f"of {name!r} in {data_dir or 'the TFDS default directory'}", error) from error
        raise UserError(
            f"The TFDS set {name!r} cannot be looked up: {str(error).splitlines()[0].rstrip('.')}.",
            "Did you mistype the name, does the set lie in several TFDS directories, or is its dataset_info.json or "
            "features.json damaged?",
            "Write --config.data.source=tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION (1.2.3 or 1.*.*), and "
            "--config.data.data_dir=DIR.",
        ) from error
    return os.fspath(builder.data_dir)


def _prepared(name: str, data_dir: str) -> list[str]:
    """Return every config and version of the set that is there, as `tfds:` takes it."""
    from tensorflow_datasets.core.utils import file_utils

    stem = re.split("[/:]", name)[0]
    found = []
    for root in file_utils.list_data_dirs(given_data_dir=data_dir or None):
        for depth in ("*", "*/*"):
            for features in as_path(os.path.expanduser(root)).glob(f"{stem}/{depth}/features.json"):
                config, version = features.parts[-3], features.parts[-2]
                found.append(f"{stem}:{version}" if config == stem else f"{stem}/{config}:{version}")
    return sorted(found)
