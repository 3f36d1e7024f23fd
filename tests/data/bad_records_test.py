"""The list of unreadable records: each example once, across batches, resumes and processes, whatever a crash left."""

import json
import types

import numpy as np
import pytest

from beitv2_jax.data.bad_records import BadRecords, LeftOut, read_bad_records


def batch(*faulty, size=5, first=10):
    faults = np.array([f"file {i}: corrupt: at {i}" if i in faulty else "" for i in range(first, first + size)])
    return {"example_ids": np.arange(first, first + size), "faults": faults}


def record(i, split="train"):
    return {"split": split, "example_id": i, "where": f"file {i}", "cause": f"corrupt: at {i}"}


@pytest.fixture
def warnings(monkeypatch):
    shown = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *values: shown.append(text % values))
    return shown


def test_every_example_stands_there_once(tmp_path, warnings):
    records = BadRecords(tmp_path)
    assert records.path == tmp_path / "bad_records.jsonl"
    records.note(batch(), "train")
    records.note({"example_ids": np.arange(3)}, "train")  # a batch of views that cannot be unreadable
    assert not records.path.exists()
    records.note(batch(11, 13), "train")
    records.note(batch(11, 13), "train")
    records.note(batch(13, 14), "train")
    records.note(batch(13), "validation")
    assert read_bad_records(tmp_path) == [record(11), record(13), record(14), record(13, "validation")]
    again = BadRecords(tmp_path)  # a run that is continued
    again.note(batch(11, 12), "train")
    assert read_bad_records(tmp_path)[4:] == [record(12)]
    # one line for a batch with news
    assert [line.split(";")[0] for line in warnings] == [
        "2 unreadable records so far, the newest file 13: corrupt: at 13",
        "3 unreadable records so far, the newest file 14: corrupt: at 14",
        "4 unreadable records so far, the newest file 13: corrupt: at 13",
        "5 unreadable records so far, the newest file 12: corrupt: at 12",
    ]
    assert all(str(records.path) in line for line in warnings)


def test_an_example_twice_in_a_batch_stands_there_once(tmp_path):
    twice = batch(11)
    twice = {key: np.concatenate([value, value]) for key, value in twice.items()}
    BadRecords(tmp_path).note(twice, "train")
    assert read_bad_records(tmp_path) == [record(11)]


def test_processes_write_files_of_their_own_and_no_example_twice(tmp_path):
    first, second = BadRecords(tmp_path), BadRecords(tmp_path, process_index=1)
    first.note(batch(11), "train")
    second.note(batch(11, 12), "train")  # the next epoch gives example 11 to the other process
    first.note(batch(12, 13), "train")
    files = {path.name: [json.loads(line) for line in path.open()] for path in tmp_path.iterdir()}
    assert files == {"bad_records.jsonl": [record(11), record(13)], "bad_records-1.jsonl": [record(12)]}
    assert sorted(r["example_id"] for r in read_bad_records(tmp_path)) == [11, 12, 13]


@pytest.mark.parametrize("garbage", [b"\0" * 30, b"\xff\xfe{", b"12", b'"split"', b'{"split": "train"}', b"null"])
def test_what_a_power_cut_leaves_at_the_end_is_left_behind(tmp_path, garbage):
    records = BadRecords(tmp_path)
    records.note(batch(11), "train")
    with records.path.open("ab") as file:
        file.write(garbage)
    BadRecords(tmp_path).note(batch(11, 12), "train")
    assert read_bad_records(tmp_path) == [record(11), record(12)]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_line_cut_off_by_a_crash_costs_only_itself(tmp_path, cut):
    records = BadRecords(tmp_path)
    records.note(batch(11, 12), "train")
    records.path.write_bytes(records.path.read_bytes()[:-cut])
    again = BadRecords(tmp_path)
    again.note(batch(12, 14), "train")
    # without its line break the last line is whole still
    assert read_bad_records(tmp_path) == [record(11), record(12), record(14)]


def test_noted_batches_pass_unchanged(tmp_path):
    batches = [batch(10), batch(16, first=15)]
    passed = list(BadRecords(tmp_path / "new" / "folder").noted(batches, "validation"))
    assert all(new is old for new, old in zip(passed, batches, strict=True))
    assert read_bad_records(tmp_path / "new" / "folder") == [record(10, "validation"), record(16, "validation")]


def test_files_that_are_no_examples_stand_there_once_and_are_logged_by_cause(tmp_path, warnings):
    left_out = [LeftOut("a/1.heic", "odd"), LeftOut("a/2.heic", "odd"), LeftOut("@eaDir", "system")]
    source = types.SimpleNamespace(
        split="train", name="folder:x", left_out=left_out, empty_classes=("b", "d"), num_classes=4
    )
    BadRecords(tmp_path).note_left_out(source)
    BadRecords(tmp_path).note_left_out(source)  # a run that is continued
    expected = [{"split": "train", "example_id": None, **entry._asdict()} for entry in left_out]
    assert read_bad_records(tmp_path) == expected
    assert (
        len(warnings) == 6
        and "train of folder:x: 2 files or folders are left out, such as a/1.heic: odd; listed in" in warnings[0]
    )
    assert "1 files or folders are left out, such as @eaDir: system" in warnings[1]
    assert warnings[2] == "split train of folder:x: 2 of 4 classes have no images: b, d"


def test_what_cannot_be_written_is_written_with_the_next(tmp_path, monkeypatch, warnings):
    records = BadRecords(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(records, "_append", lambda records: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        records.note(batch(11), "train")
    assert warnings[0] == f"{records.path} is not written: No space left on device"
    records.note(batch(12), "train")
    records.note(batch(11, 12), "train")
    assert read_bad_records(tmp_path) == [record(11), record(12)]
