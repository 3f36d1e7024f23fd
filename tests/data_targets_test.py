"""Target store: what is written is read, TFDS opens it, nothing half-written is ever seen, cards guard it."""

import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from beitv2_jax.data import targets
from beitv2_jax.data.targets import TargetReader, TargetWriter, code_id_dtype
from beitv2_jax.errors import UserError

CARD = {"data": "folder:birds@12", "seed": 5, "image_size": 32, "ratio": (0.75, 1.25)}
FEATURES = {"teacher_features": ((3, 7, 5), "float16")}


def _array(example_id, split="train"):
    draw = np.random.default_rng([example_id, len(split)])
    return draw.normal(size=(3, 7, 5)).astype(np.float16)


def _write(directory, split="train", count=11, card=None, features=None):
    with TargetWriter(directory, name="store", card=card or CARD, split=split, features=features or FEATURES) as writer:
        for example_id in range(count):
            writer.write(example_id, _array(example_id, split))


@pytest.mark.parametrize("shard_bytes", [2**30, 500])
def test_written_and_read_are_equal(tmp_path, monkeypatch, shard_bytes):
    monkeypatch.setattr(targets, "_SHARD_BYTES", shard_bytes)
    _write(tmp_path / "store")
    assert (len(list((tmp_path / "store").glob("*array_record*"))) > 1) == (shard_bytes == 500)
    reader = TargetReader(tmp_path / "store", "train")
    assert (len(reader), reader.num_views, reader.feature) == (11, 3, "teacher_features")
    for example_id in (10, 0, 7, 3):
        for view in range(3):
            found = reader[example_id, view]
            assert found.dtype == np.float16 and found.flags.writeable
            np.testing.assert_array_equal(found, _array(example_id)[view])
    for view in (-1, 3):
        with pytest.raises(IndexError):
            reader[0, view]


def test_tfds_opens_the_store_without_tensorflow(tmp_path):
    _write(tmp_path / "store")
    builder = tfds.builder_from_directory(tmp_path / "store")
    records = builder.as_data_source("train")
    assert builder.name == "store" and builder.info.splits["train"].num_examples == len(records) == 11
    np.testing.assert_array_equal(records[6]["teacher_features"], _array(6))
    assert "tensorflow" not in sys.modules


def test_code_ids_are_compact(tmp_path):
    assert (code_id_dtype(8192), code_id_dtype(65536), code_id_dtype(65537)) == ("uint16", "uint16", "uint32")
    features = {"code_ids": ((2, 7), code_id_dtype(65536))}
    with TargetWriter(tmp_path / "codes", name="codes", card=CARD, split="train", features=features) as writer:
        writer.write(0, np.full((2, 7), 65535, np.int32))
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(1, np.full((2, 7), 65536, np.int32))
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(1, np.full((2, 7), -1, np.int32))
    assert TargetReader(tmp_path / "codes", "train")[0, 1].tolist() == [65535] * 7


def test_wrong_records_are_refused(tmp_path):
    with TargetWriter(tmp_path / "store", name="store", card=CARD, split="train", features=FEATURES) as writer:
        writer.write(0, _array(0))
        with pytest.raises(ValueError, match="expected example 1, got 2"):
            writer.write(2, _array(2))
        with pytest.raises(ValueError, match="shape"):
            writer.write(1, _array(1)[:2])
        with pytest.raises(ValueError, match="does not fit"):
            writer.write(1, np.full((3, 7, 5), 1e6))
    assert len(TargetReader(tmp_path / "store", "train")) == 1


def test_splits_join_one_after_the_other(tmp_path):
    _write(tmp_path / "store")
    _write(tmp_path / "store", split="validation", count=5)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    for split, count in (("train", 11), ("validation", 5)):
        reader = TargetReader(tmp_path / "store", split)
        assert len(reader) == count
        np.testing.assert_array_equal(reader[count - 1, 2], _array(count - 1, split)[2])
    with pytest.raises(UserError, match="the split 'train' already"):
        _write(tmp_path / "store")
    with pytest.raises(UserError, match="seed = 5, this run has 6"):
        _write(tmp_path / "store", split="test", card={**CARD, "seed": 6})
    with pytest.raises(UserError, match="float32"):
        _write(tmp_path / "store", split="test", features={"teacher_features": ((3, 7, 5), "float32")})
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_slices_of_a_source_are_splits_of_their_own(tmp_path):
    for split, count in (("train[:50%]", 2), ("train[50%:]", 3), ("train[:-1]", 5)):
        _write(tmp_path / "store", split=split, count=count)
    for split, count in (("train[:50%]", 2), ("train[50%:]", 3), ("train[:-1]", 5)):
        reader = TargetReader(tmp_path / "store", split)
        assert len(reader) == count
        np.testing.assert_array_equal(reader[1, 1], _array(1, split)[1])


def test_failed_writer_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        TargetWriter(tmp_path / "store", name="store", card=CARD, split="train", features=FEATURES) as writer,
    ):
        writer.write(0, _array(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_publishes_nothing_and_does_not_disturb_the_next(tmp_path):
    code = f"""
        import os, signal
        import numpy as np
        from beitv2_jax.data.targets import TargetWriter
        writer = TargetWriter({str(tmp_path / "store")!r}, name="store", card={CARD!r}, split="train",
                              features={FEATURES!r})
        for i in range(6):
            writer.write(i, np.zeros((3, 7, 5), np.float16))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert killed.returncode == -9
    assert not (tmp_path / "store").exists()
    with pytest.raises(UserError, match="did not finish"):
        TargetReader(tmp_path / "store", "train")
    _write(tmp_path / "store")
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    np.testing.assert_array_equal(TargetReader(tmp_path / "store", "train")[3, 1], _array(3)[1])


@pytest.mark.parametrize("moved", ["card.json", "array_record", "dataset_info.json"])
def test_split_killed_while_joining_is_invisible(tmp_path, monkeypatch, moved):
    _write(tmp_path / "store")
    replace = targets.os.replace

    def killed(source, target):
        if moved in target.name:
            raise OSError("killed here")
        replace(source, target)

    monkeypatch.setattr(targets.os, "replace", killed)
    with pytest.raises(OSError, match="killed here"):
        _write(tmp_path / "store", split="validation", count=5)
    monkeypatch.undo()
    assert len(TargetReader(tmp_path / "store", "train")) == 11
    with pytest.raises(UserError, match="no split 'validation'"):
        TargetReader(tmp_path / "store", "validation")
    _write(tmp_path / "store", split="validation", count=2)
    assert len(TargetReader(tmp_path / "store", "validation")) == 2


def test_card_names_the_first_difference(tmp_path):
    _write(tmp_path / "store")
    reader = TargetReader(tmp_path / "store", "train")
    reader.check({})
    reader.check(CARD)
    with pytest.raises(UserError, match="image_size = 32, this run has 48") as caught:
        reader.check({"seed": 5, "image_size": 48, "data": "folder:cats"})
    assert "cats" not in str(caught.value)
    with pytest.raises(UserError, match="teacher = None, this run has 'clip'"):
        reader.check({"teacher": "clip"})


def test_reader_survives_pickling(tmp_path):
    _write(tmp_path / "store")
    copy = pickle.loads(pickle.dumps(TargetReader(tmp_path / "store", "train")))
    np.testing.assert_array_equal(copy[4, 2], _array(4)[2])
