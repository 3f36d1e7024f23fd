"""ImageNet-1k from archives to the official layout: TFDS's records in TFDS's order, complete or not at all."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys

import ilsvrc_archives as made
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beitv2_jax.data.prepare import __main__ as prepare
from beitv2_jax.data.prepare import imagenet
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return made.make(tmp_path_factory.mktemp("archives"))


@pytest.fixture(scope="module")
def directory(archives, tmp_path_factory):
    return imagenet.prepare(archives, tmp_path_factory.mktemp("tfds"))


def records(directory, split):
    builder = tfds.builder_from_directory(str(directory))
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [{**record, "file_name": record["file_name"].decode()} for record in source]


def in_hash_order(split, names):
    # what TFDS promises: records in the order of MD5(split name + key)
    return sorted(names, key=lambda name: hashlib.md5(f"{split}{name}".encode()).hexdigest())


def test_it_is_the_stock_data_set(directory):
    assert (directory.parent.name, directory.name) == ("imagenet2012", str(tfds.builder_cls("imagenet2012").VERSION))
    info = tfds.builder_from_directory(str(directory)).info
    assert info.supervised_keys == ("image", "label")
    assert info.features["label"].names == tfds.builder("imagenet2012", data_dir="nowhere").info.features["label"].names
    assert info.features["label"].num_classes == 1000
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 12,
        "validation": 7,
        "test": 3,
    }
    assert "tensorflow" not in sys.modules


def test_train_records(directory):
    images = {name: image for files in made.train_files().values() for name, image in files.items()}
    found = records(directory, "train")
    assert [record["file_name"] for record in found] == in_hash_order("train", images)
    names = tfds.builder_from_directory(str(directory)).info.features["label"].names
    for record in found:
        name = record["file_name"]
        assert names[record["label"]] == name.partition("_")[0]
        assert (record["image"] == images[name]) == (name not in made.MARKED)


def test_validation_and_test_records(directory):
    names = tfds.builder_from_directory(str(directory)).info.features["label"].names
    images, found = made.validation_files(), records(directory, "validation")
    assert [record["file_name"] for record in found] == in_hash_order("validation", images)
    for record in found:
        number = int(record["file_name"][15:23])
        assert names[record["label"]] == made.TRUTH[number - 1]
        assert record["image"] == images[record["file_name"]]
    found = records(directory, "test")
    assert {record["label"] for record in found} == {-1}
    assert {record["file_name"] for record in found} == {f"test/ILSVRC2012_test_0000000{i}.JPEG" for i in (1, 2, 3)}


@pytest.mark.parametrize("name", made.MARKED)
def test_disguised_images_become_rgb_jpegs(directory, name):
    (record,) = [record for record in records(directory, "train") if record["file_name"] == name]
    original = next(files[name] for files in made.train_files().values() if name in files)
    with Image.open(io.BytesIO(record["image"])) as converted, Image.open(io.BytesIO(original)) as image:
        assert (converted.format, converted.mode, converted.size) == ("JPEG", "RGB", image.size)
        difference = np.abs(np.asarray(converted, int) - np.asarray(image.convert("RGB"), int))
    # quality 100 with half the colour resolution
    assert difference.mean() < 3


def test_what_is_re_encoded():
    plain, grey = made.encode(1), made.encode(2, mode="L")
    assert imagenet.as_plain_jpeg(plain, "any.JPEG") is plain
    assert imagenet.as_plain_jpeg(grey, "any.JPEG") is grey
    # TFDS encodes those it knows by name whatever they are
    assert imagenet.as_plain_jpeg(plain, made.CMYK) != plain
    for kind, mode in (("PNG", "RGB"), ("JPEG", "CMYK"), ("PNG", "L"), ("WEBP", "RGB")):
        with Image.open(io.BytesIO(imagenet.as_plain_jpeg(made.encode(3, kind, mode), "unheard of.JPEG"))) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")


def test_reads_as_a_source(directory):
    source = open_source("tfds:imagenet2012", "val", str(directory.parents[1]))
    assert (source.name, source.split, len(source)) == (f"tfds:imagenet2012/{directory.name}", "validation", 7)


def test_the_cut_into_files_and_their_reading_back(archives, tmp_path, monkeypatch, directory):
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(shard_utils.ShardConfig, "calculate_number_shards", lambda size, count: 5 if count == 12 else 1)
    cut = imagenet.prepare(archives, tmp_path)
    info = json.loads((cut / "dataset_info.json").read_text())
    assert info["splits"][0]["shardLengths"] == ["2", "3", "2", "3", "2"]  # as 12 / 5 is rounded
    assert len(list(cut.glob("imagenet2012-train.array_record-*-of-00005"))) == 5
    assert records(cut, "train") == records(directory, "train")


def test_an_unreadable_image_stays_and_is_named(tmp_path, caplog):
    archives = made.make(tmp_path / "in", test=False)
    files = made.train_files()
    files["n01440764"]["n01440764_37.JPEG"] = b"no image at all"
    (archives / TRAIN).write_bytes(made.pack({f"{synset}.tar": made.pack(inner) for synset, inner in files.items()}))
    directory = imagenet.prepare(archives, tmp_path / "out")
    found = {record["file_name"]: record["image"] for record in records(directory, "train")}
    assert len(found) == 12 and found["n01440764_37.JPEG"] == b"no image at all"
    assert "n01440764_37.JPEG" in caplog.text and "n01440764_74.JPEG" not in caplog.text
    assert list(tfds.builder_from_directory(str(directory)).info.splits) == ["train", "validation"]


def _train_without(what):
    files = made.train_files()
    if what in files:
        del files[what]
    else:
        del files[what.partition("_")[0]][what]
    return made.pack({f"{synset}.tar": made.pack(inner) for synset, inner in files.items()})


def _val_without(number):
    files = made.validation_files()
    del files[f"ILSVRC2012_val_{number:08d}.JPEG"]
    return made.pack(files)


def _inner_cut():
    files = {f"{synset}.tar": made.pack(inner) for synset, inner in made.train_files().items()}
    files["n01440764.tar"] = files["n01440764.tar"][:1000]
    return made.pack(files)


DAMAGE = {
    "train missing": (TRAIN, lambda old: None, r"(?s)There is no .*img_train.tar.*--archives"),
    "devkit missing": (DEVKIT, lambda old: None, r"There is no .*devkit_t12"),
    "train cut in a class": (TRAIN, lambda old: old[: len(old) // 2], r"img_train.tar is damaged"),
    "train cut between classes": (TRAIN, lambda old: old[:20992], r"img_train.tar is damaged"),
    "a class cut": (TRAIN, lambda old: _inner_cut(), r"img_train.tar is damaged: n01440764.tar: "),
    "val cut in an image": (VAL, lambda old: old[:1700], r"img_val.tar is damaged"),
    "val cut at the end mark": (VAL, lambda old: old.rstrip(b"\0") + bytes(200), r"img_val.tar is damaged"),
    "val is no tar": (VAL, lambda old: b"<html>Please log in</html>" * 99, r"img_val.tar is damaged"),
    "devkit cut": (DEVKIT, lambda old: old[: len(old) // 2], r"devkit_t12.tar.gz is damaged"),
    "devkit is no archive": (DEVKIT, lambda old: b"<html></html>", r"devkit_t12.tar.gz is damaged"),
    "devkit without labels": (DEVKIT, lambda old: made.pack({"a/data/meta.mat": b""}, "w:gz"), r"has no data/ILSVRC"),
    "swapped": (TRAIN, lambda old: made.pack(made.validation_files()), r"where only \*.tar belongs"),
    "lacks a class": (TRAIN, lambda old: _train_without("n02105855"), r"lacks 1 of the 3 classes.*n02105855"),
    "lacks an image": (TRAIN, lambda old: _train_without("n01440764_74.JPEG"), r"4 images of n01440764.*says 5"),
    "lacks a validation image": (VAL, lambda old: _val_without(3), r"lacks 1 of 7 images.*00000003"),
    "too many validation images": (DEVKIT, lambda old: made.devkit(truth=made.TRUTH[:5]), r"holds ILSVRC2012_val_0+\d"),
    "other devkit": (DEVKIT, lambda old: made.devkit({"n00000001": 1}, ("n00000001",)), r"none of ImageNet-1k"),
    "class without a name": (DEVKIT, lambda old: _unnamed_class(), r"class 9, which data/meta.mat does not have"),
}


def _unnamed_class():
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(made.devkit()), mode="r:gz") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    (truth,) = [name for name in files if name.endswith(".txt") and "truth" in name]
    return made.pack({**files, truth: files[truth] + b"9\n"}, "w:gz")


@pytest.mark.parametrize("case", DAMAGE)
def test_wrong_archives_have_words_and_leave_nothing(case, archives, tmp_path):
    name, damage, words = DAMAGE[case]
    for path in archives.iterdir():
        os.link(path, tmp_path / path.name)
    (tmp_path / name).unlink()
    if (content := damage((archives / name).read_bytes())) is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        imagenet.prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_seen_before_writing(archives, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**5})
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has space for 0.00 GB"):
        imagenet.prepare(archives, tmp_path)
    assert [path.name for path in tmp_path.glob("imagenet2012/*") if path.is_dir()] == []


def test_the_estimate_of_room_covers_the_files(directory, archives):
    splits = imagenet._splits(archives, tfds.builder_from_directory(str(directory)).info.features["label"].names)
    for images in splits.values():
        sizes = sum(map(len, (record for record in _raw(directory, images))))
        assert sizes <= imagenet._num_bytes(images) + 4000  # a re-encoded image may be larger


def _raw(directory, images):
    from array_record.python.array_record_module import ArrayRecordReader

    split = {12: "train", 7: "validation", 3: "test"}[len(images.names)]
    (path,) = directory.glob(f"*-{split}.*")
    return ArrayRecordReader(str(path)).read_all()


KILLED = """
import os, signal, sys
from beitv2_jax.data.prepare import imagenet
write, calls = imagenet._write_shard, []
def dying(path, records, count):
    calls.append(path)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, records, count)
imagenet._write_shard = dying
imagenet.prepare(sys.argv[1], sys.argv[2])
"""


def test_killed_and_started_again(archives, directory, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, archives, tmp_path], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with pytest.raises(UserError, match="not prepared"):
        open_source("tfds:imagenet2012", "train", str(tmp_path))
    again = imagenet.prepare(archives, tmp_path)
    visible = [path.name for path in again.parent.iterdir() if not path.name.startswith(".")]
    assert visible == [again.name] and not list(again.parent.glob("*unfinished*"))
    for path in directory.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_failed_writing_leaves_nothing_and_two_do_not_meet(archives, tmp_path, monkeypatch):
    def failing(path, records, count):
        with pytest.raises(UserError, match="Another process"):
            imagenet.prepare(archives, tmp_path)
        raise OSError("disk full")

    monkeypatch.setattr(imagenet, "_write_shard", failing)
    with pytest.raises(OSError, match="disk full"):
        imagenet.prepare(archives, tmp_path)
    assert [path.name for path in (tmp_path / "imagenet2012").iterdir() if not path.name.startswith(".")] == []
    assert not list((tmp_path / "imagenet2012").glob(".*unfinished"))


def test_the_command(archives, directory, tmp_path, capsys):
    arguments = ["imagenet2012", f"--archives={archives}", f"--data_dir={tmp_path}"]
    assert prepare.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"--config.data.source=tfds:imagenet2012 --config.data.data_dir={tmp_path}" in printed.out
    assert "writing train: 12/12 images" in printed.err
    assert prepare.main(arguments) == 0  # it is there: nothing to do
    assert "writing" not in capsys.readouterr().err
    assert prepare.main(["imagenet2012", f"--archives={tmp_path}", f"--data_dir={tmp_path}/other"]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
