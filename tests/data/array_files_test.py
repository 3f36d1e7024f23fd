"""Record files: checked whole, read record by record; damage is named by file and number, few are open at a time."""

import os
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from beitv2_jax.data import array_files
from beitv2_jax.data.array_files import RecordError, RecordFiles, RecordRange
from beitv2_jax.errors import UserError
from beitv2_jax.runtime import open_files


def content(file, record):
    return np.random.default_rng([file, record]).bytes(3000)


@pytest.fixture
def paths(tmp_path):
    """Five files of 40 records, two blocks of 64 KB each."""
    found = [str(tmp_path / f"{file}.array_record") for file in range(5)]
    for file, path in enumerate(found):
        writer = ArrayRecordWriter(path, "group_size:1")
        for record in range(40):
            writer.write(content(file, record))
        writer.close()
    return found


def all_of(paths):
    return RecordFiles([RecordRange(path, 0, 40, 40) for path in paths])


def test_records_of_slices_are_numbered_through(paths):
    records = RecordFiles([RecordRange(paths[0], 38, 2, 40), RecordRange(paths[3], 5, 3, 40)])
    records.check()
    expected = [(0, 38), (0, 39), (3, 5), (3, 6), (3, 7)]
    assert [records[i] for i in range(len(records))] == [content(*place) for place in expected]
    assert records[np.int64(4)] == content(3, 7)
    assert records.where(2) == f"{paths[3]}, record 5"
    for index in (-1, 5):
        with pytest.raises(IndexError):
            records[index]


def test_a_flipped_byte_costs_one_record(paths):
    raw = bytearray(Path(paths[1]).read_bytes())
    raw[raw.index(content(1, 7)) + 100] ^= 1
    Path(paths[1]).write_bytes(raw)
    records, damaged = all_of(paths), []
    for index in range(len(records)):
        try:
            assert records[index] == content(*divmod(index, 40))
        except RecordError as error:
            damaged.append((index, str(error)))
    [(index, cause)] = damaged
    assert index == 47 and "Corrupted" in cause


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (os.remove, "there is no such file"),
        (lambda path: cut(path, 65536), "its end is missing"),  # opens as a file without records
        (lambda path: cut(path, 100_000), "2.array_record: "),
        (lambda path: cut(path, 0), "2.array_record: "),
    ],
)
def test_missing_and_cut_files_are_found_at_the_start_and_when_they_are_read(paths, damage, words):
    damage(paths[2])
    records = all_of(paths)
    with pytest.raises(UserError, match=r"1 of 5 record files are missing or damaged: .*2.array_record") as caught:
        records.check()
    assert words in caught.value.happened
    assert records[79] == content(1, 39) and records[120] == content(3, 0)
    with pytest.raises(RecordError):
        records[80]


def test_a_file_with_other_records_than_it_should_have_is_damaged(paths):
    records = RecordFiles([RecordRange(paths[0], 0, 39, 39)])
    with pytest.raises(UserError, match="it holds 40 of 39 records"):
        records.check()
    with pytest.raises(RecordError, match="holds 40 of 39 records"):
        records[3]


def test_a_file_without_records_is_whole(tmp_path):
    ArrayRecordWriter(str(tmp_path / "empty"), "group_size:1").close()
    assert array_files.num_records(tmp_path / "empty") == 0


def test_no_more_files_stay_open_than_the_limit_leaves(paths, monkeypatch):
    monkeypatch.setattr(open_files, "limit", lambda: 8)

    def num_open():
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") in paths for fd in os.listdir("/proc/self/fd"))

    records = all_of(paths)
    for index in (0, 40, 80, 120, 160, 1, 41):
        assert records[index] == content(*divmod(index, 40))
        assert num_open() <= 2
    assert num_open() == 2


def test_a_full_table_of_open_files_is_no_damage(paths, monkeypatch):
    def refuse(entry):
        raise RuntimeError(f"open() failed: Too many open files; opening {entry.path}")

    monkeypatch.setattr(array_files, "_open_reader", refuse)
    with pytest.raises(UserError, match="No more files can be opened") as caught:
        all_of(paths)[0]
    assert "ulimit -n" in caught.value.instead
