"""ImageNet-1k from its official archives, written as TFDS's own builder `imagenet2012` writes it, without TensorFlow.

`python -m beitv2_jax.data.prepare imagenet2012` calls it, once; afterwards `data.sources` opens `tfds:imagenet2012`.
Name, version, features, class numbers, splits, order of the records and their cut into files are TFDS's: it describes
the data set and hashes the keys. Its writer cannot be used: above 1 GB it sorts in files that it opens by TensorFlow.
Here the order is known before an image is read, because it depends on the names alone; so every file is written once,
from the images that belong into it, and no more than one file's images are in memory.
"""

import contextlib
import fcntl
import io
import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
from absl import logging
from PIL import Image

from beitv2_jax.data import array_files
from beitv2_jax.data.decode import CorruptImageError, decode_image
from beitv2_jax.data.prepare import imagenet_archives as archives
from beitv2_jax.data.prepare.progress import progress
from beitv2_jax.data.sources.examples import in_fixed_order
from beitv2_jax.errors import UserError

NAME = "imagenet2012"
JPEG_QUALITY = 100
"""Of re-encoded images, as in TFDS."""
_UNKNOWN_LABEL = -1
# bytes of a record beside its image: label, file name, and the names of the features
_RECORD_BYTES = 80
_FILE_BLOCK = 2**16


def prepare(archive_dir: str | os.PathLike, data_dir: str | os.PathLike = "") -> pathlib.Path:
    """Write the archives in `archive_dir` as <data_dir>/imagenet2012/<version>; return that directory.

    Training and validation images and the devkit must be there; test images are taken if they are. The directory
    appears complete or not at all, and an existing one is left as it is. `data_dir` is the TFDS directory
    ("" = TFDS's default). Images that are not RGB or grey JPEGs are re-encoded (`as_plain_jpeg`); unreadable ones stay
    as they are, as TFDS does, and named in a warning.

    Raises:
      UserError: an archive is missing, damaged or not the official one; too little space on the disk; or another
        process is writing it.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(NAME, data_dir=os.fspath(data_dir) or None, file_format="array_record")
    directory = pathlib.Path(builder.data_path)
    if not directory.exists():
        splits = _splits(pathlib.Path(archive_dir).expanduser(), builder.info.features["label"].names)
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The directory {directory.parent} cannot be made: {error.strerror}.",
                "May this user not write there (by default it lies below the home directory)?",
                "Write --data_dir=DIR of a folder that you may write to.",
            ) from error
        with _alone(directory):
            _write(directory, builder.info, splits)
    return directory


def _splits(archive_dir: pathlib.Path, class_names: list[str]) -> dict[str, archives.Images]:
    devkit = archives.read_devkit(archive_dir / archives.DEVKIT)
    if unknown := sorted(set(devkit.synset_of_id.values()) - set(class_names)):
        raise UserError(
            f"{archive_dir / archives.DEVKIT} has the class {unknown[0]}, which is none of ImageNet-1k.",
            "Is it the devkit of another challenge?",
            f"Put {archives.DEVKIT} of ILSVRC 2012, tasks 1 and 2, into --archives.",
        )
    splits = {
        "train": archives.train_images(archive_dir / archives.TRAIN, devkit),
        "validation": archives.validation_images(archive_dir / archives.VALIDATION, devkit),
    }
    if tests := [archive_dir / name for name in archives.TESTS if (archive_dir / name).exists()]:
        splits["test"] = archives.test_images(tests[0])
    return splits


@contextlib.contextmanager
def _alone(directory: pathlib.Path) -> Iterator[None]:
    """Keep other processes from preparing `directory`; the kernel drops the lock of a killed one."""
    with open(directory.parent / f".{directory.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another process is preparing {directory}.",
                "Did you start the command twice?",
                "Wait until the first one has ended.",
            ) from error
        yield


def _write(directory: pathlib.Path, info, splits: dict[str, archives.Images]) -> None:
    """Write all splits and TFDS's description of them to a hidden directory, then give it its name."""
    from tensorflow_datasets.core import splits as tfds_splits

    unfinished = directory.parent / f".{directory.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    _check_space(directory.parent, splits)
    unfinished.mkdir()
    try:
        infos = [_write_split(unfinished, info.features, split, images) for split, images in splits.items()]
        info.set_splits(tfds_splits.SplitDict(infos))
        info.write_to_directory(unfinished)
        os.rename(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_space(directory: pathlib.Path, splits: dict[str, archives.Images]) -> None:
    files = sum(len(_shard_bounds(images)) for images in splits.values())
    needed = sum(_num_bytes(images) for images in splits.values()) + 2 * _FILE_BLOCK * files
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory} has space for {free / 1e9:.2f} GB, the records need {needed / 1e9:.2f} GB.",
            "Is the disk too small, or does it hold something else?",
            "Write --data_dir=DIR on another disk, or delete what is not needed on this one.",
        )


def _num_bytes(images: archives.Images) -> int:
    return int(images.sizes.sum()) + _RECORD_BYTES * len(images.names)


def _shard_bounds(images: archives.Images) -> list[int]:
    """Return the record after the last of every file; TFDS decides how many files a split of that size has."""
    from tensorflow_datasets.core.utils import shard_utils

    count = len(images.names)
    num_shards = shard_utils.ShardConfig.calculate_number_shards(_num_bytes(images), count)
    return list(shard_utils.get_shard_boundaries(count, num_shards))


def _write_split(directory: pathlib.Path, features, split: str, images: archives.Images):
    """Write the records of one split in TFDS's order; return its TFDS description."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    keys = [hasher.hash_key(name) for name in images.names]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    stops = _shard_bounds(images)
    shards = np.split(order, stops[:-1])
    template = array_files.shard_template(NAME, split, directory)
    unreadable: list[str] = []
    records = _records(features, images, shards, unreadable)
    records = progress(records, f"writing {split}", len(order), "images")
    num_bytes = sum(
        _write_shard(os.fspath(template.sharded_filepath(shard_index=i, num_shards=len(shards))), records, len(shard))
        for i, shard in enumerate(shards)
    )
    next(records, None)  # there is none; this lets the progress end
    if unreadable:
        logging.warning(
            "%d images of %s cannot be read and were kept as they are: %s",
            *(len(unreadable), images.archive, ", ".join(sorted(unreadable)[:20])),
        )
    lengths = [len(shard) for shard in shards]
    return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)


def as_plain_jpeg(encoded: bytes, name: str) -> bytes:
    """Return an image as an RGB or grey JPEG: the same bytes if it is one, else decoded and encoded anew.

    Of the official images, 22 are CMYK and one is a PNG; TFDS knows them by their names, and so they are found here
    even if they should look plain. Anything else that is no plain JPEG is found by its header.

    Raises:
      CorruptImageError: no image.
    """
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as stock

    if _is_plain(encoded) and name not in stock.CMYK_IMAGES and name not in stock.PNG_IMAGES:
        return encoded
    encoded_again = io.BytesIO()
    Image.fromarray(decode_image(encoded, name)).save(encoded_again, "JPEG", quality=JPEG_QUALITY)
    return encoded_again.getvalue()


def _is_plain(encoded: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            # MPO: a JPEG that is followed by another one
            return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    except Exception:  # decode_image will say what is wrong
        return False


def _records(features, images: archives.Images, shards: list[np.ndarray], unreadable: list[str]) -> Iterator[bytes]:
    """Yield the records file by file; names of images that cannot be read are appended to `unreadable`."""
    with open(images.archive, "rb") as archive:
        for shard in shards:
            encoded = {}
            # in the order of the archive, which spares a spinning disk most of its seeks
            for row in shard[np.argsort(images.offsets[shard])]:
                archive.seek(images.offsets[row])
                encoded[row] = archive.read(images.sizes[row])
            for row in shard:
                name, image = images.names[row], encoded.pop(row)
                try:
                    image = as_plain_jpeg(image, name)
                except CorruptImageError:
                    unreadable.append(name)
                label = images.synsets[row] or _UNKNOWN_LABEL
                yield in_fixed_order(features.serialize_example({"image": image, "label": label, "file_name": name}))


def _write_shard(path: str, records: Iterator[bytes], count: int) -> int:
    """Write the next `count` records to a file, check how many it holds, and return their bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(path, "group_size:1")
    num_bytes = 0
    for record in itertools.islice(records, count):
        writer.write(record)
        num_bytes += len(record)
    writer.close()
    if (held := array_files.num_records(path)) != count:
        raise OSError(f"{path} holds {held} records after {count} were written")
    return num_bytes
