"""ArrayRecord files: opening, counting and reading them, and what TFDS calls the files of a split.

Under the sources that read prepared data sets, the preparation that writes them, and the target cache.
"""

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence

from absl import logging

from beitv2_jax.errors import UserError
from beitv2_jax.runtime import open_files
from beitv2_jax.runtime.buckets import as_path

_FILES_AT_ONCE = 32
_SHARE_OF_LIMIT = 4
"""Of the files that a process may open, one of so many is left to one `RecordFiles`; a run has several of them."""


class RecordError(Exception):
    """A record cannot be read; the text says why, in words for the list of unreadable records."""


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
    except BaseException:
        with contextlib.suppress(Exception):  # that of a damaged file fails too, without a text
            reader.close()
        raise
    reader.close()


def num_records(path: str | os.PathLike) -> int:
    """Return the number of records in an ArrayRecord file; raises as `opened` does."""
    with opened(path) as reader:
        count = reader.num_records()
        # a file that was cut off may open as one without records: its end, which has the options too, is missing then
        if not count and not _has_options(reader):
            raise RecordError("its end is missing")
        return count


def _has_options(reader) -> bool:
    try:
        return bool(reader.writer_options_string())
    except Exception:  # the library's own class, without a text
        return False


@dataclasses.dataclass(frozen=True)
class RecordRange:
    """`count` records of a file from record `first` on; the file holds `total`."""

    path: str
    first: int
    count: int
    total: int


class RecordFiles(Sequence[bytes]):
    """The records of many files under one numbering, from threads too.

    Files are opened when they are first read. A fixed fraction of the process's limit stays open; beyond that
    those that were not read for longest are closed.
    """

    def __init__(self, ranges: Sequence[RecordRange]):
        self._ranges = list(ranges)
        self._ends = list(itertools.accumulate(entry.count for entry in self._ranges))
        self._readers: collections.OrderedDict[int, object] = collections.OrderedDict()
        self._lock = threading.Lock()
        if len(self._ranges) > self._most_open() and multiprocessing.parent_process() is None:
            logging.log_first_n(
                logging.WARNING,
                "of %d record files %d stay open, as this process may open %d; reading is faster with `ulimit -n %d`",
                1,
                len(self._ranges),
                self._most_open(),
                open_files.limit(),
                _SHARE_OF_LIMIT * len(self._ranges),
            )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Return a record.

        Raises:
            RecordError: it is damaged, or its file is missing or damaged.
            UserError: the system lets this process open no more files.
        """
        file, record = self._place(index)
        try:
            content = self._reader(file).read([record])[0]
        except RecordError:
            raise
        except Exception as error:  # the library's own class, which it does not export
            with self._lock:
                self._readers.pop(file, None)
            if open_files.is_exhausted(error):
                raise open_files.too_many(error) from error
            raise RecordError(str(error)) from error
        if not content:
            raise RecordError("the record is empty")
        return content

    def where(self, index: int) -> str:
        """Return the words by which errors name a record."""
        file, record = self._place(index)
        return f"{self._ranges[file].path}, record {record}"

    def check(self) -> None:
        """Raise UserError unless every file is there and holds as many records as it should."""
        with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            faults = [fault for fault in pool.map(_fault_of, self._ranges) if fault]
        if faults:
            raise UserError(
                f"{len(faults)} of {len(self._ranges)} record files are missing or damaged: {'; '.join(faults[:3])}"
                f"{' ...' * (len(faults) > 3)}.",
                "Copying them may have broken off, or a disk may have been full or failed.",
                "Copy these files again, or prepare the data set again.",
            )

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect.bisect_right(self._ends, index)
        entry = self._ranges[file]
        return file, entry.first + int(index) - (self._ends[file] - entry.count)

    def _reader(self, file: int):
        with self._lock:
            if file in self._readers:
                self._readers.move_to_end(file)
                return self._readers[file]
        reader = _open_reader(self._ranges[file])
        with self._lock:
            self._readers[file] = reader
            # not closed here: another thread may be reading; a reader closes its file when it is garbage-collected
            while len(self._readers) > self._most_open():
                self._readers.popitem(last=False)
        return reader

    @staticmethod
    def _most_open() -> int:
        return max(1, open_files.limit() // _SHARE_OF_LIMIT)


def _open_reader(entry: RecordRange):
    from array_record.python.array_record_module import ArrayRecordReader

    # for random access, as Grain opens them
    reader = ArrayRecordReader(entry.path, options="readahead_buffer_size:0,", file_reader_buffer_size=32768)
    if (found := reader.num_records()) != entry.total:
        # one that could not be opened says so only now
        reader.read([0])
        raise RecordError(f"the file holds {found} of {entry.total} records")
    return reader


def _fault_of(entry: RecordRange) -> str:
    try:
        found = num_records(entry.path)
    except Exception as error:  # the library's own class, which it does not export
        if open_files.is_exhausted(error):
            raise open_files.too_many(error) from error
        return f"{entry.path}: {error if as_path(entry.path).exists() else 'there is no such file'}"
    return "" if found == entry.total else f"{entry.path}: it holds {found} of {entry.total} records"


def ranges_of_split(builder, split: str) -> list[RecordRange]:
    """Return which records of which files a split of a TFDS builder is, or a slice of one.

    Raises:
        ValueError: there is no such slice.
    """
    return [
        RecordRange(os.fspath(part.filename), part.skip, part.take, part.examples_in_shard)
        for part in builder.info.splits[split].file_instructions
    ]


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
