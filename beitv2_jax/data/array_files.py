"""ArrayRecord files: opening and counting them, and what TFDS calls the files of a split.

Under the sources that read prepared data sets, the preparation that writes them, and the target cache.
"""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator:
    """Open an ArrayRecord file for reading, and close it.

    Raises:
        Exception: the file is not there or not whole; the library's own class, which it does not export.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path))
    try:
        yield reader
    finally:
        reader.close()


def num_records(path: str | os.PathLike) -> int:
    """Return the number of records in an ArrayRecord file; raises as `opened` does."""
    with opened(path) as reader:
        return reader.num_records()


def shard_template(name: str, split: str, directory: str | os.PathLike):
    """Return the TFDS template of the names that the shards of one split have in `directory`."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        dataset_name=name,
        data_dir=directory,
        split=split,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
