"""Every error about data: provoked, its advice followed, and then it is gone."""

import ast
import fcntl
import io
import json
import os
import re
import shutil
import signal
import types

import ilsvrc_archives
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from target_caches import CODE_MANIFEST, fill
from user_errors import check_all_provoked, flag, provoked

from beitv2_jax.config.train_labels import parse_train_labels
from beitv2_jax.data import array_files, augment, embedded, workers
from beitv2_jax.data.bad_records import refuse_too_many
from beitv2_jax.data.order import BatchRows
from beitv2_jax.data.pipeline import train_iterator
from beitv2_jax.data.prepare import imagenet
from beitv2_jax.data.segmentation.histogram import check_numbers
from beitv2_jax.data.segmentation.label_maps import LabelIds
from beitv2_jax.data.segmentation.sources import open_label_maps
from beitv2_jax.data.sources import open_source, open_splits
from beitv2_jax.data.sources.labels import few_labels
from beitv2_jax.data.target_cache.manifest import check_manifest, read_manifest
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.target_cache.writer import TargetCache
from beitv2_jax.data.transform import TrainTransform

NO_CASE = (
    # needs Apache Beam, or that it is installed: tests/beam
    'data/prepare/beam.py: UserError( "Apache Beam',
    "data/prepare/beam_images.py: UserError(",
)


def png(mode="RGB") -> bytes:
    """Return a picture of several colours or greys."""
    file = io.BytesIO()
    pixels = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(file, "PNG")
    return file.getvalue()


def images(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())


def records(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for entry in entries:
        writer.write(entry)
    writer.close()


def wanted(advice: str, name: str) -> str:
    """Return the source that an advice names, with what only the user knows in place of PATH, NAME, GLOB and DIR."""
    return flag(advice, "data.source").split(":")[0] + f":{name}"


# image folders


def test_a_folder_that_is_elsewhere(tmp_path):
    images(tmp_path / "here" / "1.png")
    with provoked("folder:PATH with the absolute path") as caught:
        open_source(f"folder:{tmp_path}/there", "train")
    assert len(open_source(wanted(caught.value.instead, tmp_path / "here"), "train")) == 1


def test_a_folder_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    with provoked(f"Put the images into {tmp_path}/<class>/, or into {tmp_path} itself"):
        open_source(f"folder:{tmp_path}", "train")
    images(tmp_path / "a" / "1.png")
    assert open_source(f"folder:{tmp_path}", "train").num_classes == 1
    shutil.rmtree(tmp_path / "a")
    images(tmp_path / "1.png")
    assert open_source(f"folder:{tmp_path}", "train").num_classes == 0


def test_few_labels_of_images_without_any(tmp_path):
    images(tmp_path / "flat/1.png", tmp_path / "classes/owl/1.png", tmp_path / "classes/wren/1.png")
    with provoked("--config.data.train_labels='' to use all images"):
        few_labels(open_source(f"folder:{tmp_path / 'flat'}", "train"), seed=0, shots=1)
    assert len(few_labels(open_source(f"folder:{tmp_path / 'classes'}", "train"), seed=0, shots=1)) == 2


def test_a_folder_without_splits_of_few_images(tmp_path):
    images(tmp_path / "a/1.png")
    with provoked(f"Put at least two images of one class into {tmp_path}, or images into {tmp_path}/train and"):
        open_splits(f"folder:{tmp_path}", "train", "validation")
    images(tmp_path / "a/2.png")
    assert [len(source) for source in open_splits(f"folder:{tmp_path}", "train", "validation")] == [1, 1]
    shutil.rmtree(tmp_path / "a")
    images(tmp_path / "train/a/1.png", tmp_path / "validation/a/1.png")
    assert [len(source) for source in open_splits(f"folder:{tmp_path}", "train", "validation")] == [1, 1]


def test_a_class_that_the_training_split_lacks(tmp_path):
    images(tmp_path / "train/a/1.png", tmp_path / "val/a/1.png", tmp_path / "val/b/1.png")
    with provoked(f"Make the folder {tmp_path}/train/b, or move {tmp_path}/val/b away") as caught:
        open_source(f"folder:{tmp_path}", "val")
    (tmp_path / "train/b").mkdir()
    assert len(open_source(f"folder:{tmp_path}", "val")) == 2
    (tmp_path / "train/b").rmdir()
    (tmp_path / "val/b").rename(tmp_path.parent / f"{tmp_path.name}-b")
    assert len(open_source(f"folder:{tmp_path}", "val")) == 1
    assert caught.value.meant.endswith("--config.data.train_split another one?")


def test_images_beside_the_classes(tmp_path):
    images(tmp_path / "train/a/1.png", tmp_path / "train/2.png")
    with provoked(f"Move these images out of {tmp_path}/train, or all images into one folder"):
        open_source(f"folder:{tmp_path}", "train")
    (tmp_path / "train/a/1.png").rename(tmp_path / "train/1.png")
    (tmp_path / "train/a").rmdir()
    assert open_source(f"folder:{tmp_path}", "train").num_classes == 0


@pytest.mark.parametrize(
    "name, text, happened",
    [
        ("labels.csv", "filename,ant,bee\n1.png,1,0\n", "Line 1 .* it is not file_name and the names of the classes"),
        ("labels.csv", "file_name,ant,ant\n1.png,1,0\n", "Line 1 .* it is not file_name and the names of the classes"),
        ("labels.csv", "file_name,ant\n1.png,1\n2.png,1,0\n", "Line 3 .* it has 2 values for 1 classes"),
        ("labels.csv", "file_name,ant,bee\n1.png,1,\n", "Line 2 .* the value '' is neither 0 nor 1"),
        ("labels.csv", "file_name,ant,bee\n1.png,1,0\n./1.png,1,0\n", "Line 3 .* the image ./1.png has a line already"),
        ("labels.csv", b"file_name,ant,b\xe9e\n", "Line 1 .* it is no text in UTF-8"),
        (
            "labels.jsonl",
            '{"file_name": "1.png", "labels": []}\n1.png',
            "Line 2 .* no JSON object with file_name and labels",
        ),
        ("labels.jsonl", '{"file_name": "1.png"}', "Line 1 .* it is no JSON object with file_name and labels"),
        ("labels.jsonl", '{"file_name": "1.png", "labels": "ant"}', "Line 1 .* or labels not a list of texts"),
    ],
)
def test_a_label_file_in_another_form(name, text, happened, tmp_path):
    images(tmp_path / "1.png", tmp_path / "2.png")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with provoked("its path below the folder of the file") as caught:
        open_source(f"folder:{tmp_path}", "train")
    assert re.search(happened, caught.value.happened), caught.value.happened
    if name == "labels.csv":
        assert "file_name,CLASS,CLASS,..." in caught.value.instead
        (tmp_path / name).write_text("file_name,ant,bee\n1.png,1,0\n2.png,0,0\n")
    else:
        (line,) = re.findall("{.*}", caught.value.instead)
        (tmp_path / name).write_text(line.replace("PATH", "2.png").replace('"CLASS", "CLASS"', '"ant", "bee"'))
    assert open_source(f"folder:{tmp_path}", "train").class_names == ("ant", "bee")


def test_label_files_of_splits_that_do_not_fit(tmp_path):
    images(tmp_path / "train" / "1.png", tmp_path / "val" / "2.png")
    for split, name in (("train", "labels.csv"), ("val", "labels.csv"), ("val", "labels.jsonl")):
        (tmp_path / split / name).write_text("file_name,ant\n1.png,1\n2.png,1\n")
    with provoked("Move one of the two files away"):
        open_source(f"folder:{tmp_path}", "validation")
    (tmp_path / "val" / "labels.jsonl").unlink()
    for split in ("train", "val"):
        (tmp_path / split / "labels.csv").rename(tmp_path / "aside.csv")
        with provoked(f"Put labels.csv or labels.jsonl into every split's folder, {tmp_path / split} too"):
            open_source(f"folder:{tmp_path}", "validation")
        (tmp_path / "aside.csv").rename(tmp_path / split / "labels.csv")
    (tmp_path / "val" / "labels.csv").write_text("file_name,bee\n2.png,1\n")
    with provoked("Write the name of labels.csv into"):
        open_source(f"folder:{tmp_path}", "validation")
    (tmp_path / "train" / "labels.csv").write_text("file_name,ant,bee\n1.png,1,0\n")
    source = open_source(f"folder:{tmp_path}", "validation")
    assert source[0]["label"].tolist() == [0, 1]
    with provoked("--config.data.train_labels=10%") as caught:
        few_labels(source, seed=0, shots=5)
    fraction = parse_train_labels(flag(caught.value.instead, "data.train_labels"))
    assert len(few_labels(source, seed=0, **fraction)) == 1


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    images(tmp_path / "1.png")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, provoked(f"Make {tmp_path} readable, or write another --config.data.source"):
        patch.setattr(os, "scandir", denied)
        open_source(f"folder:{tmp_path}", "train")
    assert len(open_source(f"folder:{tmp_path}", "train")) == 1


def test_splits_by_name(tmp_path):
    images(tmp_path / "train/1.png", tmp_path / "val/1.png")
    for split, meant in (("trial", "Did you mean 'train'?"), ("xyz", "None of the valid names is spelled like it.")):
        with provoked("Write --config.data.train_split=NAME and --config.data.eval_split=NAME") as caught:
            open_source(f"folder:{tmp_path}", split)
        assert caught.value.meant == meant and "it has train, val." in caught.value.happened
    for split in ("train", "val"):
        open_source(f"folder:{tmp_path}", split)
    with provoked("Write 'train' for the whole split"):
        open_source(f"folder:{tmp_path}", "train[:10%]")
    images(tmp_path / "flat" / "1.png")
    with provoked("--config.data.source=SOURCE of a data set with splits"):
        open_source(f"folder:{tmp_path}/flat", "val")


def test_a_kind_of_source(tmp_path):
    images(tmp_path / "1.png")
    with provoked() as caught:
        open_source(str(tmp_path), "train")
    assert len(open_source(wanted(caught.value.instead, tmp_path), "train")) == 1


# TFDS sets


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """TFDS directory of a small set with images, labels and label maps."""
    directory = tmp_path_factory.mktemp("tiny")
    write_set(directory, "small", image="RGB", label="", segmentation_mask="L")
    return directory


def write_set(data_dir, name, **features) -> None:
    """Write a TFDS set of four records with these features; those that are pictures have this mode."""
    image = tfds.features.Image(encoding_format="png")
    kinds = {
        "image": image,
        "label": tfds.features.ClassLabel(names=["a", "b"]),
        "segmentation_mask": image,
        "text": tfds.features.Text(),
    }
    kinds = {key: kinds[key] for key in features}
    pictures = {key: png(mode) for key, mode in features.items() if key in ("image", "segmentation_mask")}
    values = {"label": 1, "text": "words", **pictures}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, dl_manager):
            return {"train": iter([(number, {key: values[key] for key in kinds}) for number in range(4)])}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture
def copied(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "sets")
    return tmp_path / "sets"


def test_a_set_that_is_not_prepared(copied):
    with provoked() as caught:
        open_source("tfds:small:3.0.0", "train", str(copied))
    assert len(open_source(flag(caught.value.instead, "data.source"), "train", str(copied))) == 4
    with provoked("--config.data.data_dir=DIR of the directory that holds it, or prepare it by") as caught:
        open_source("tfds:small", "train", str(copied.parent))
    assert f"data_dir='{copied.parent}', file_format='array_record'" in caught.value.instead
    assert len(open_source("tfds:small", "train", str(copied))) == 4


def test_a_set_that_cannot_be_looked_up(copied):
    with provoked("tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG:VERSION (1.2.3 or 1.*.*)"):
        open_source("tfds:small:1.0", "train", str(copied))
    for spec in ("tfds:small", "tfds:small:1.0.0", "tfds:small:1.*.*"):
        assert len(open_source(spec, "train", str(copied))) == 4


def test_damaged_metadata_and_shards(copied, tiny):
    directory = copied / "small" / "1.0.0"
    for name in ("features.json", "small-train.array_record-00000-of-00001"):
        (directory / name).write_bytes(b"{")
        with provoked("again"):
            open_source("tfds:small", "train", str(copied))
        shutil.copy(tiny / "small" / "1.0.0" / name, directory)
        assert len(open_source("tfds:small", "train", str(copied))) == 4


def test_a_set_in_another_format(copied):
    info = copied / "small" / "1.0.0" / "dataset_info.json"
    former = info.read_text()
    info.write_text(former.replace("array_record", "tfrecord"))
    with provoked("Remove it and prepare it again by") as caught:
        open_source("tfds:small", "train", str(copied))
    assert "file_format='array_record'" in caught.value.instead
    info.write_text(former)
    open_source("tfds:small", "train", str(copied))


def test_a_slice(copied):
    with provoked("as in train[:10%] or train[100:200]"):
        open_source("tfds:small", "train[:200%]", str(copied))
    assert len(open_source("tfds:small", "train[:50%]", str(copied))) == 2


def test_sets_of_other_things(tmp_path, tiny):
    write_set(tmp_path, "texts", text="")
    with provoked("--config.data.source=tfds:NAME of a set for image classification"):
        open_source("tfds:texts", "train", str(tmp_path))
    write_set(tmp_path, "pictures", image="RGB")
    with provoked("an image feature 'annotation' or 'segmentation_mask', or folder:PATH"):
        open_label_maps("tfds:pictures", "train", str(tmp_path))
    write_set(tmp_path, "coloured", image="RGB", segmentation_mask="RGB")
    with provoked("folder:PATH of ADEChallengeData2016 as published, or tfds:NAME of a set prepared from it"):
        open_label_maps("tfds:coloured", "train", str(tmp_path))
    assert len(open_source("tfds:pictures", "train", str(tmp_path))) == 4
    assert len(open_label_maps("tfds:small", "train", str(tiny))) == 4


# the embedded set


def test_the_embedded_set(tmp_path, monkeypatch):
    with provoked() as caught:
        embedded.prepare(str(tmp_path), "tny")
    assert caught.value.meant == "Did you mean 'tiny'?"
    generate = embedded.generate
    monkeypatch.setattr(embedded, "generate", lambda seed, split, count, processes: generate(seed, split, 2))
    assert "embedded/tiny" in caught.value.instead
    with monkeypatch.context() as patch, provoked("Set HOME, or write --config.data.data_dir=PATH"):
        patch.chdir(tmp_path)
        patch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and without an entry of the user
        embedded.prepare("~/sets", "tiny")
    (tmp_path / "file").touch()
    with provoked("--config.data.data_dir=DIR of a folder that you may write to"):
        embedded.prepare(str(tmp_path / "file" / "x"), "tiny")
    assert embedded.prepare(str(tmp_path / "there"), "tiny").is_dir()


# ArrayRecord files


def test_globs(tmp_path, tiny):
    image = png()
    records(tmp_path / "train-0.array_record", [image, image])
    records(tmp_path / "empty.array_record", [])
    with provoked("in quotes and with the absolute path DIR") as caught:
        open_source(f"arrayrecord:{tmp_path}/nothing*", "train")
    pattern = flag(caught.value.instead, "data.source").replace("DIR", str(tmp_path))
    assert len(open_source(pattern, "train")) == 2
    with provoked("Write {split} in the glob"):
        open_source(pattern, "val")
    assert len(open_source(f"arrayrecord:{tmp_path}/{{split}}*", "train")) == 2
    with provoked("Write these files again, or write another glob"):
        open_source(f"arrayrecord:{tmp_path}/empty*", "train")
    shutil.copytree(tiny / "small" / "1.0.0", tmp_path / "sets")
    with provoked("a glob of one folder"):
        open_source(f"arrayrecord:{tmp_path}/**/*train*", "train")
    assert len(open_source(f"arrayrecord:{tmp_path}/sets/*", "train")) == 4


def test_files_that_are_damaged_or_hold_something_else(tmp_path):
    image = png()
    records(tmp_path / "whole", [image])
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:100])
    with provoked("Copy the file again, or write a glob that takes ArrayRecord files alone"):
        open_source(f"arrayrecord:{tmp_path}/[cw]*", "train")
    shutil.copy(tmp_path / "whole", tmp_path / "cut")
    assert len(open_source(f"arrayrecord:{tmp_path}/[cw]*", "train")) == 2
    records(tmp_path / "numbers", [b"123"])
    with provoked("Write records that are encoded images"):
        open_source(f"arrayrecord:{tmp_path}/numbers", "train")
    records(tmp_path / "numbers", [image])
    assert len(open_source(f"arrayrecord:{tmp_path}/numbers", "train")) == 1


def test_records_none_of_which_can_be_read(tmp_path, monkeypatch):
    records(tmp_path / "a", [png()])

    def damaged(*_):
        raise array_files.RecordError("flipped")

    with monkeypatch.context() as patch, provoked("Copy them again"):
        patch.setattr(array_files.RecordFiles, "__getitem__", damaged)
        open_source(f"arrayrecord:{tmp_path}/a", "train")
    assert len(open_source(f"arrayrecord:{tmp_path}/a", "train")) == 1


# segmentation


def pairs(root, *stems, maps=True):
    for stem in stems:
        images(root / "images/train" / f"{stem}.png")
        if maps:
            (root / "annotations/train").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 6), np.uint8)).save(root / "annotations/train" / f"{stem}.png")


def test_folders_of_label_maps(tmp_path):
    with provoked("folder:PATH with the folder of images/<split>/ and annotations/<split>/"):
        open_label_maps(f"folder:{tmp_path}", "train")
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "annotations/train").mkdir(parents=True)
    with provoked(f"Put the images into {tmp_path}/images/train"):
        open_label_maps(f"folder:{tmp_path}", "train")
    pairs(tmp_path, "a")
    pairs(tmp_path, "b", maps=False)
    with provoked(f"Give b.png the label map {tmp_path}/annotations/train/b.png"):
        open_label_maps(f"folder:{tmp_path}", "train")
    shutil.copy(tmp_path / "annotations/train/a.png", tmp_path / "annotations/train/b.png")
    assert len(open_label_maps(f"folder:{tmp_path}", "train")) == 2
    with provoked("Write 'train' for the whole split"):
        open_label_maps(f"folder:{tmp_path}", "train[:1]")
    with provoked() as caught:
        open_label_maps(str(tmp_path), "train")
    assert len(open_label_maps(wanted(caught.value.instead, tmp_path), "train")) == 2


class Maps:
    """A source of label maps of one row each."""

    name, split = "rows", "train"

    def __init__(self, folder, *rows):
        self.folder, self.rows = folder, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if self.rows[index] is None:
            return {"label_map": b"", "where": "row"}
        Image.fromarray(np.array([self.rows[index]], np.uint8)).save(self.folder / "map.png")
        return {"label_map": (self.folder / "map.png").read_bytes(), "where": "row"}


def advised_ids(advice: str, ids: LabelIds) -> list[LabelIds]:
    """Return the ids of each alternative of an advice."""
    found = []
    for part in advice.split(", or "):
        settings = {
            "num_classes": ids.num_classes,
            "offset": ids.offset,
            "ignored": ids.ignored,
            "mapping": ids.mapping,
        }
        for key, name in (
            ("model.num_classes", "num_classes"),
            *((f"labels.{name}", name) for name in list(settings)[1:]),
        ):
            if f"--config.{key}=" in part:
                settings[name] = ast.literal_eval(flag(part, key))
        found.append(LabelIds(**settings))
    return found


@pytest.mark.parametrize(
    "ids, rows", [(LabelIds(2), [[0, 1, 9]]), (LabelIds(2, offset=1, ignored=(0, 255)), [[0, 255]])]
)
def test_numbers_that_the_config_does_not_map(ids, rows, tmp_path):
    source = Maps(tmp_path, *rows)
    with provoked("to make each number a class") as caught:
        check_numbers(source, ids, max_bad_fraction=0.0, is_training=True)
    for advised in advised_ids(caught.value.instead, ids):
        check_numbers(source, advised, max_bad_fraction=0.0, is_training=True)


def test_label_maps_without_two_classes_or_unreadable(tmp_path):
    for rows, advice in (([[5, 5]], "whose label maps hold at least two classes"), ([None], "Write label maps as PNG")):
        with provoked(advice):
            check_numbers(Maps(tmp_path, *rows), LabelIds(2), max_bad_fraction=0.0, is_training=True)
    check_numbers(Maps(tmp_path, [0, 1]), LabelIds(2), max_bad_fraction=0.0, is_training=True)


@pytest.mark.parametrize(
    "wrong, right",
    [
        (dict(num_classes=1), dict(num_classes=2)),
        (dict(num_classes=256), dict(num_classes=255)),
        (dict(num_classes=2, mapping=((0, 1), (1, 2))), dict(num_classes=2, mapping=((0, 0), (1, 1)))),
        (dict(num_classes=2, mapping=((0, 1), (1, 2))), dict(num_classes=3, mapping=((0, 1), (1, 2)))),
    ],
)
def test_label_ids(wrong, right):
    with provoked("--config.model.num_classes"):
        LabelIds(**wrong)
    LabelIds(**right)


def test_label_ids_whose_advice_has_the_numbers():
    with provoked() as caught:
        LabelIds(150, offset=120)
    highest = int(caught.value.instead.partition(" to ")[2].partition(",")[0])
    LabelIds(150, offset=highest)
    with provoked():
        LabelIds(150, offset=highest + 1)
    with provoked() as caught:
        LabelIds(12, ignored=(11, 255))
    LabelIds(12, ignored=ast.literal_eval(flag(caught.value.instead, "labels.ignored")))


# views, batches, workers


def test_interpolations():
    image = np.zeros((4, 4, 3), np.uint8)
    with provoked() as caught:
        augment.center_crop(image, 2, interpolation="bicubc")
    assert caught.value.meant == "Did you mean 'bicubic'?"
    for name in caught.value.instead.partition("one of ")[2].strip(".").split(", "):
        augment.center_crop(image, 2, interpolation=name)


def test_unreadable_images():
    with provoked("Repair or replace the files listed in F, or leave them out with") as caught:
        refuse_too_many(2, 7, 0.1, of="of split train", listed="listed in F")
    fraction = float(flag(caught.value.instead, "data.max_bad_fraction"))
    refuse_too_many(2, 7, fraction, of="of split train", listed="listed in F")
    refuse_too_many(0, 7, 0.1, of="of split train", listed="listed in F")
    with provoked("Repair or replace the files listed in F."):
        refuse_too_many(7, 7, 1.0, of="of split train", listed="listed in F")


def test_batches(tmp_path):
    with provoked("Write a multiple of 2 as --config.run.batch_size"):
        BatchRows(9, 0, 2)
    BatchRows(10, 0, 2)
    images(tmp_path / "1.png", tmp_path / "2.png")
    source = open_source(f"folder:{tmp_path}", "train")
    transform = types.SimpleNamespace()
    with provoked("with a number up to 2"):
        train_iterator(source, transform, batch_size=3, seed=0)
    train_iterator(source, transform, batch_size=2, seed=0)
    transform.targets = range(3)
    with provoked("Make the targets again from these data"):
        train_iterator(source, transform, batch_size=2, seed=0)
    transform.targets = range(2)
    train_iterator(source, transform, batch_size=2, seed=0)


def test_views_that_are_not_stored():
    targets = types.SimpleNamespace(num_views=3)
    for asked in (0, 4):
        with provoked() as caught:
            TrainTransform(seed=0, image_size=8, min_scale=0.5, num_views=asked, targets=targets)
        num_views = int(flag(caught.value.instead, "views.num_views"))
        TrainTransform(seed=0, image_size=8, min_scale=0.5, num_views=num_views, targets=targets)


def test_a_small_shared_memory():
    # that 0 workers need no shared memory is shown by every run without them
    error = workers._death(signal.SIGBUS)
    assert "--config.data.num_workers=0" in error.instead


# target caches


def ids(example_id, view):
    return np.random.default_rng([example_id, view]).integers(0, 13, 21)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "views"
    fill(directory, CODE_MANIFEST, ids)
    return directory


@pytest.fixture
def cache(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "views")
    return tmp_path / "views"


def damage_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "damage, advice",
    [
        (lambda cache: (cache / "manifest.json").write_text("{"), "Copy the whole folder again"),
        (lambda cache: damage_json(cache / "manifest.json", num_views="3"), "Copy the whole folder again"),
        (lambda cache: damage_json(cache / "manifest.json", num_views=2, schema_version=1), "another directory"),
        (lambda cache: damage_json(cache / "manifest.json", num_views=4), "Copy the whole folder again"),
        (lambda cache: next(cache.glob("*_v1*00002*")).unlink(), "Copy the whole folder again"),
        (lambda cache: (cache / "dataset_info.json").write_text("{"), "Copy the whole folder again"),
    ],
)
def test_a_damaged_cache_is_copied_or_computed_again(damage, advice, cache, finished, tmp_path):
    damage(cache)
    with provoked(advice):
        TargetReader(cache, "train")
    shutil.copytree(finished, cache, dirs_exist_ok=True)
    assert len(TargetReader(cache, "train")) == 23
    fill(tmp_path / "again", CODE_MANIFEST, ids)
    assert len(TargetReader(tmp_path / "again", "train")) == 23


def test_a_cache_that_is_not_there_or_of_another_config(cache):
    with provoked("Run that stage, which also resumes an unfinished one, or correct the directory"):
        read_manifest(cache / "missing")
    manifest = read_manifest(cache)
    with provoked("Give this run what the targets are made with (seed = 11)"):
        check_manifest(manifest, {"seed": 12}, cache)
    check_manifest(manifest, {"seed": 11}, cache)


def begin(directory):
    return TargetCache(directory, name="cache", manifest=CODE_MANIFEST, shard_examples=7)


def write_shards(cache):
    """Write what remains as codes 0."""
    for shard in cache.remaining():
        writer = cache.open_shard(shard)
        packed = np.zeros((len(cache.shards[shard]), 11), np.uint8)
        for view in cache.views:
            writer.write(view, {"packed_code_ids": packed})
        writer.close([])


def test_a_damaged_plan_is_deleted(tmp_path):
    cache = begin(tmp_path / "views")
    write_shards(cache)
    (cache.work / "plan.json").write_text("{")
    with provoked(f"Delete {cache.work} and run the stage again"):
        begin(tmp_path / "views")
    shutil.rmtree(cache.work)
    write_shards(begin(tmp_path / "views"))


def test_shards_that_are_written_again(tmp_path):
    cache = begin(tmp_path / "views")
    write_shards(cache)
    cache.done_path(1).write_text("{")
    with provoked("Run this stage again, which writes this shard again"):
        cache.finish()
    write_shards(begin(tmp_path / "views"))
    cache.shard_path(2, 1).unlink()
    with provoked("Run this stage again, which writes this shard again"):
        begin(tmp_path / "views").finish()
    again = begin(tmp_path / "views")
    assert again.remaining() == [2]
    write_shards(again)
    again.finish()
    assert len(TargetReader(tmp_path / "views", "train")) == 23


# ImageNet from its archives


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return ilsvrc_archives.make(tmp_path_factory.mktemp("archives"))


def another_devkit() -> bytes:
    return ilsvrc_archives.devkit({"n00000001": 1}, ("n00000001",))


@pytest.mark.parametrize(
    "name, content, advice",
    [
        ("ILSVRC2012_img_train.tar", None, "into one directory, without unpacking them, and write --archives=DIR"),
        ("ILSVRC2012_img_val.tar", b"<html></html>" * 99, "Download it again and compare its MD5 sum"),
        ("ILSVRC2012_img_val.tar", ilsvrc_archives.pack({}), "as image-net.org offers them for ILSVRC 2012"),
        ("ILSVRC2012_devkit_t12.tar.gz", another_devkit(), "of ILSVRC 2012, tasks 1 and 2, into --archives"),
    ],
)
def test_archives(name, content, advice, archives, tmp_path):
    wrong = tmp_path / "archives"
    shutil.copytree(archives, wrong)
    (wrong / name).unlink()
    if content is not None:
        (wrong / name).write_bytes(content)
    with provoked(advice):
        imagenet.prepare(wrong, tmp_path / "out")
    shutil.copy(archives / name, wrong)
    assert imagenet.prepare(wrong, tmp_path / "out").is_dir()


def test_the_place_of_the_records(archives, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with provoked("Write --data_dir=DIR of a folder that you may write to"):
        imagenet.prepare(archives, tmp_path / "file" / "x")
    with monkeypatch.context() as patch, provoked("--data_dir=DIR on another disk"):
        patch.setattr(imagenet.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**5))
        imagenet.prepare(archives, tmp_path / "out")
    (lock_path,) = (tmp_path / "out" / "imagenet2012").glob(".*.lock")
    with open(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with provoked("Wait until the first one has ended"):
            imagenet.prepare(archives, tmp_path / "out")
    assert imagenet.prepare(archives, tmp_path / "out").is_dir()


def test_every_error_about_data_was_provoked(request):
    check_all_provoked(request, "data", except_for=NO_CASE)
