"""Sources: folders, ArrayRecord files and TFDS sets give the same kind of example; every mistake has words for it."""

import hashlib
import io
import os
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from beitv2_jax.data import array_files
from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _fill(directory, names):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(_png(sum(map(ord, f"{directory.name}/{name}")) % 256))


@pytest.fixture
def split_folder(tmp_path):
    root = tmp_path / "birds"
    _fill(root / "train" / "owl", ["b.png", "a.JPG", "notes.txt", ".hidden.png"])
    _fill(root / "train" / "crow", ["c.webp", "d.bmp", "e.jpeg"])
    _fill(root / "train" / ".cache", ["f.png"])
    _fill(root / "val" / "owl", ["v.png"])
    return root


def test_folder_order_labels_and_bytes(split_folder):
    source = open_source(f"folder:{split_folder}", "train")
    assert (len(source), source.split, source.num_classes, source.class_names) == (5, "train", 2, ("crow", "owl"))
    examples = [source[i] for i in range(5)]
    assert [e["label"] for e in examples] == [0, 0, 0, 1, 1]
    assert [e["example_id"] for e in examples] == [0, 1, 2, 3, 4]
    names = ["crow/c.webp", "crow/d.bmp", "crow/e.jpeg", "owl/a.JPG", "owl/b.png"]
    assert [e["image"] for e in examples] == [(split_folder / "train" / name).read_bytes() for name in names]
    assert all(name in e["where"] for name, e in zip(names, examples, strict=True))


def test_folder_labels_of_a_split_follow_train(split_folder):
    # val lacks the class crow: owl must keep label 1
    source = open_source(f"folder:{split_folder}", "validation")
    assert (source.split, source[0]["label"], source.class_names) == ("val", 1, ("crow", "owl"))
    _fill(split_folder / "val" / "wren", ["w.png"])
    with pytest.raises(UserError, match="wren"):
        open_source(f"folder:{split_folder}", "val")


def test_folder_without_splits_is_train(tmp_path):
    _fill(tmp_path / "x", ["1.png"])
    _fill(tmp_path / "y", ["2.png", "3.png"])
    source = open_source(f"folder:{tmp_path}", "train")
    assert (len(source), source.class_names) == (3, ("x", "y"))
    with pytest.raises(UserError, match="no split 'test'"):
        open_source(f"folder:{tmp_path}", "test")


def test_folder_identity_follows_the_files(split_folder, tmp_path):
    name = open_source(f"folder:{split_folder}", "train").name
    moved = tmp_path / "elsewhere" / "birds"
    moved.parent.mkdir()
    split_folder.rename(moved)
    assert open_source(f"folder:{moved}", "train").name == name
    (moved / "train" / "owl" / "b.png").rename(moved / "train" / "owl" / "z.png")
    assert open_source(f"folder:{moved}", "train").name != name


def test_folder_mistakes_have_words(tmp_path, split_folder):
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"folder:{tmp_path}/nowhere", "train")
    with pytest.raises(UserError, match=r"it has train, val\.\n.*mean 'train'"):
        open_source(f"folder:{split_folder}", "trial")
    with pytest.raises(UserError, match="TFDS sets only"):
        open_source(f"folder:{split_folder}", "train[:50%]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_source(f"folder:{tmp_path}/empty", "train")
    for spec in ("birds", "tfds:", "zip:x", "folder:", ""):
        with pytest.raises(UserError, match=r"folder:PATH.*tfds:NAME.*embedded"):
            open_source(spec, "train")


class PrimeImages(tfds.core.GeneratorBasedBuilder):
    """Seven labelled images with a mask, and three for testing."""

    VERSION = tfds.core.Version("2.3.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=["odd", "even"]),
                "segmentation_mask": tfds.features.LabeledImage(labels=3, shape=(None, None, 1)),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

    def _generate_examples(self, count=0):
        mask = io.BytesIO()
        Image.fromarray(np.zeros((5, 7), np.uint8)).save(mask, "PNG")
        for value in range(count):
            yield value, {"image": _png(value), "label": 1 - value % 2, "segmentation_mask": mask.getvalue()}


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    PrimeImages(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


def test_tfds_set_gives_encoded_bytes_and_labels(tfds_directory):
    source = open_source("tfds:prime_images", "train", tfds_directory)
    assert (source.name, len(source), source.class_names) == ("tfds:prime_images/2.3.0", 7, ("odd", "even"))
    values = []
    for i in range(7):
        example = source[i]
        assert isinstance(example["image"], bytes) and example["example_id"] == i
        values.append(int(decode_image(example["image"])[0, 0, 0]))
        assert example["label"] == 1 - values[-1] % 2
    assert sorted(values) == list(range(7))
    assert "tensorflow" not in sys.modules


def test_tfds_splits_slices_and_versions(tfds_directory):
    assert open_source("tfds:prime_images:2.3.0", "validation", tfds_directory).split == "test"
    assert len(open_source("tfds:prime_images", "train[2:5]", tfds_directory)) == 3
    with pytest.raises(UserError, match="it has test, train"):
        open_source("tfds:prime_images", "extra", tfds_directory)


class OtherLabels(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Six images whose labels are no class labels."""

    VERSION = tfds.core.Version("1.0.0")
    label: tfds.features.FeatureConnector
    values: tuple

    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="png"), "label": self.label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, value in enumerate(self.values):
            yield number, {"image": _png(number), "label": value}


@pytest.mark.parametrize(
    ("label", "values"),
    [
        (tfds.features.Scalar(np.int64), (0, 1, 2, 2, 1, 3)),
        (tfds.features.Tensor(shape=(), dtype=np.uint8), (0, 1, 2, 2, 1, 3)),
        (tfds.features.Text(), ("owl", "crow", "wrén", "wrén", "crow", "newt")),
    ],
)
def test_labels_that_are_numbers_or_texts_are_used_where_the_classes_are_listed(label, values, tmp_path):
    kind = type("Builder", (OtherLabels,), dict(name="others", label=label, values=values), skip_registration=True)
    kind(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    directory = tmp_path / "others" / "1.0.0"
    for spec in ("tfds:others", f"arrayrecord:{directory}/*train*"):
        plain = open_source(spec, "train", str(tmp_path))
        assert (plain.num_classes, {plain[i]["label"] for i in range(6)}) == (0, {-1})
    (directory / "labels.txt").write_text("owl\ncrow\nwrén", encoding="utf-8")  # the last line may lack its end
    for spec in ("tfds:others", f"arrayrecord:{directory}/*train*"):
        source = open_source(spec, "train", str(tmp_path))
        assert source.class_names == ("owl", "crow", "wrén")
        examples = {int(decode_image(source[i]["image"])[0, 0, 0]): source[i] for i in range(6)}
        assert [examples[i]["label"] for i in range(5)] == [0, 1, 2, 2, 1]
        assert [examples[i]["fault"] for i in range(6)] == [""] * 5 + ["its label is none of the 3 classes"]


def test_missing_tfds_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(UserError, match=r"(?s)imagenette.*not prepared.*download_and_prepare"):
        open_source("tfds:imagenette", "train", str(tmp_path))


def test_tfds_mistakes_have_words(tfds_directory, tmp_path):
    with pytest.raises(UserError, match="cannot be cut"):
        open_source("tfds:prime_images", "train[:200%]", tfds_directory)
    with pytest.raises(UserError, match="cannot be looked up"):
        open_source("tfds:Prime Images", "train", tfds_directory)
    # a set in TFDS's default format
    stream = tmp_path / "prime_images" / "2.3.0"
    shutil.copytree(pathlib.Path(tfds_directory) / "prime_images" / "2.3.0", stream)
    for path in stream.glob("*array_record*"):
        path.rename(str(path).replace("array_record", "tfrecord"))
    info = stream / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"(?s)has the format tfrecord.*file_format='array_record'"):
        open_source("tfds:prime_images", "train", str(tmp_path))


def _version(directory, version):
    """Make another version of the set in `directory` and return its directory."""
    other = directory.with_name(version)
    shutil.copytree(directory, other)
    info = other / "dataset_info.json"
    info.write_text(info.read_text().replace(f'"{directory.name}"', f'"{version}"'))
    return other


def test_of_several_versions_the_newest_unless_one_is_named(tfds_directory, tmp_path):
    first = tmp_path / "prime_images" / "2.3.0"
    shutil.copytree(pathlib.Path(tfds_directory) / "prime_images" / "2.3.0", first)
    _version(first, "2.10.0"), _version(first, "2.9.0")
    for asked, found in {"": "2.10.0", ":2.9.0": "2.9.0", ":2.*.*": "2.10.0", ":2.3.*": "2.3.0"}.items():
        assert open_source(f"tfds:prime_images{asked}", "train", str(tmp_path)).name == f"tfds:prime_images/{found}"
    with pytest.raises(UserError, match=r"which has prime_images:2.10.0, prime_images:2.3.0, prime_images:2.9.0"):
        open_source("tfds:prime_images:3.0.0", "train", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)cannot be looked up.*NAME/CONFIG:VERSION"):
        open_source("tfds:prime_images:2.9", "train", str(tmp_path))


def test_a_config_is_looked_up_and_its_slip_shows_the_others(tmp_path):
    class SizedImages(PrimeImages):
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("small", "large")]  # noqa: RUF012

    for name in ("small", "large"):
        SizedImages(data_dir=tmp_path, config=name, file_format="array_record").download_and_prepare()
    for asked, found in {"": "small", "/large": "large", "/large:2.3.0": "large"}.items():
        assert (
            open_source(f"tfds:sized_images{asked}", "train", str(tmp_path)).name == f"tfds:sized_images/{found}/2.3.0"
        )
    with pytest.raises(UserError, match=r"which has sized_images/large:2.3.0, sized_images/small:2.3.0"):
        open_source("tfds:sized_images/medium", "train", str(tmp_path))


def test_imagenet_is_prepared_by_our_own_command(tmp_path):
    with pytest.raises(UserError, match=r"beitv2_jax.data.prepare imagenet2012 --archives=DIR --data_dir="):
        open_source("tfds:imagenet2012", "train", str(tmp_path))


def test_flat_folders_have_no_labels(tmp_path):
    _fill(tmp_path / "flat", ["b.png", "a.jpeg", "c.txt"])
    source = open_source(f"folder:{tmp_path}/flat", "train")
    assert (len(source), source.num_classes, source.class_names) == (2, 0, ())
    assert [(source[i]["label"], source[i]["where"].split("/")[-1]) for i in range(2)] == [
        (-1, "a.jpeg (example 0)"),
        (-1, "b.png (example 1)"),
    ]
    assert source[1]["image"] == (tmp_path / "flat" / "b.png").read_bytes()
    _fill(tmp_path / "cut" / "train", ["1.png", "2.png", "3.png"])
    _fill(tmp_path / "cut" / "test", ["4.png"])
    assert [len(open_source(f"folder:{tmp_path}/cut", split)) for split in ("train", "validation")] == [3, 1]
    _fill(tmp_path / "cut" / "train" / "owl", ["5.png"])
    with pytest.raises(UserError, match=r"class folders and, beside them, 3 images such as 1.png"):
        open_source(f"folder:{tmp_path}/cut", "train")


def test_folder_names_are_kept_compactly(tmp_path):
    # any bytes that a file system takes, and empty classes
    names = ["a\u00e9.png", os.fsdecode(b"\xff.png"), "z.png"]
    for name in names:
        _fill(tmp_path / "x", [name])
    (tmp_path / "w").mkdir()
    _fill(tmp_path / "y", ["1.png", "2.png"])
    source = open_source(f"folder:{tmp_path}", "train")
    found = [(source[i]["label"], source[i]["where"].rpartition(" (")[0]) for i in range(len(source))]
    wanted = [(1, f"{tmp_path}/x/{name}") for name in sorted(names)] + [(2, f"{tmp_path}/y/{n}.png") for n in (1, 2)]
    assert found == wanted
    with pytest.raises(IndexError):
        source[5]


def test_folder_identity_of_before(split_folder):
    # caches carry it in their manifest
    digest = hashlib.blake2b(b"crow/c.webp\ncrow/d.bmp\ncrow/e.jpeg\nowl/a.JPG\nowl/b.png", digest_size=6).hexdigest()
    assert open_source(f"folder:{split_folder}", "train").name == f"folder:birds@{digest}"


def _array_record(path, records, options="group_size:1"):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def _example(**features):
    kinds = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
    example = tf_example_pb2.Example()
    for key, value in features.items():
        getattr(example.features.feature[key.replace("__", "/")], kinds[type(value)]).value.append(value)
    return example.SerializeToString()


@pytest.fixture
def record_files(tmp_path):
    _array_record(tmp_path / "in" / "b-train-1.array_record", [_png(3), _png(4)])
    _array_record(tmp_path / "in" / "a-train-2.array_record", [_png(0), _png(1), _png(2)])
    _array_record(tmp_path / "in" / "c-train-3.array_record", [])
    _array_record(tmp_path / "in" / "a-val-1.array_record", [_png(5)])
    return tmp_path / "in"


def test_array_records_of_plain_images(record_files):
    source = open_source(f"arrayrecord:{record_files}/*-{{split}}-*", "train")
    assert (len(source), source.split, source.num_classes, source.class_names) == (5, "train", 0, ())
    examples = [source[i] for i in range(5)]
    assert [e["image"] for e in examples] == [_png(value) for value in range(5)]
    assert {e["label"] for e in examples} == {-1} and [e["example_id"] for e in examples] == [0, 1, 2, 3, 4]
    files = ["a-train-2", "a-train-2", "a-train-2", "b-train-1", "b-train-1"]
    for i, (file, record) in enumerate(zip(files, [0, 1, 2, 0, 1], strict=True)):
        assert examples[i]["where"] == f"{record_files}/{file}.array_record, record {record} (example {i})"
    assert source.left_out == ((f"{record_files}/c-train-3.array_record", "it has no records"),)
    held_out = open_source(f"arrayrecord:{record_files}/*-{{split}}-*", "test")
    assert (len(held_out), held_out.split) == (1, "val")
    assert len(open_source(f"arrayrecord:{record_files}/*-train-*", "anything")) == 5


def test_array_record_identity_follows_the_files(record_files, tmp_path):
    name = open_source(f"arrayrecord:{record_files}/*train*", "train").name
    assert open_source(f"arrayrecord:{record_files}/?-train-[123].*", "train").name == name
    assert open_source(f"arrayrecord:{record_files}/a-train*", "train").name != name
    moved = record_files.rename(tmp_path / "moved")
    assert open_source(f"arrayrecord:{moved}/*train*", "train").name == name
    _array_record(moved / "b-train-1.array_record", [_png(3)])
    assert open_source(f"arrayrecord:{moved}/*train*", "train").name != name


@pytest.mark.parametrize("image_key, label_key", [("image", "label"), ("image__encoded", "image__class__label")])
def test_array_records_of_examples(tmp_path, image_key, label_key):
    records = [_example(**{image_key: _png(i), label_key: i + 1, "height": 2.5}) for i in range(3)]
    records += [_example(**{image_key: _png(3)}), _example(other=7), b"\xff\xff", _example(**{image_key: 5})]
    _array_record(tmp_path / "x.array_record", records)
    source = open_source(f"arrayrecord:{tmp_path}/x*", "train")
    examples = [source[i] for i in range(7)]
    assert [e["image"] for e in examples] == [*(_png(i) for i in range(4)), b"", b"", b""]
    assert [e["label"] for e in examples] == [1, 2, 3, -1, -1, -1, -1]
    assert source.num_classes == 0
    (tmp_path / "labels.txt").write_text("none\nowl\ncrow\nwren\n")
    assert open_source(f"arrayrecord:{tmp_path}/x*", "train").class_names == ("none", "owl", "crow", "wren")
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def cut_directory(tmp_path_factory):
    """The set of seven images in three shards."""
    from tensorflow_datasets.core.utils import shard_utils

    directory = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_utils.ShardConfig, "calculate_number_shards", lambda *_: 3)
        PrimeImages(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory / "prime_images" / "2.3.0"


def test_array_records_of_a_tfds_set_and_some_of_its_shards(cut_directory, tmp_path, caplog):
    whole = open_source("tfds:prime_images", "train", str(cut_directory.parents[1]))
    source = open_source(f"arrayrecord:{cut_directory}/*", "train")
    assert (len(source), source.split, source.class_names) == (7, "train", ("odd", "even"))
    for i in range(7):
        assert {**source[i], "where": ""} == {**whole[i], "where": ""}
    assert len(open_source(f"arrayrecord:{cut_directory}/*", "validation")) == 3
    # 7 records in 3 shards: 2, 3, 2
    assert "not among" not in caplog.text
    middle = open_source(f"arrayrecord:{cut_directory}/*-00001-of-00003", "train")
    assert f"{cut_directory}/prime_images-train.array_record: 2 of 00003 shards are not among" in caplog.text
    assert [middle[i]["image"] for i in range(len(middle))] == [whole[i]["image"] for i in (2, 3, 4)]
    assert middle[0]["label"] == whole[2]["label"]
    with pytest.raises(UserError, match="it has train"):
        open_source(f"arrayrecord:{cut_directory}/*train*", "test")
    # the description of the features is enough
    for pattern in ("features.json", "label.labels.txt", "*train*00002*"):
        (path,) = cut_directory.glob(pattern)
        shutil.copy(path, tmp_path)
    last = open_source(f"arrayrecord:{tmp_path}/*", "train")
    assert [last[i]["label"] for i in range(len(last))] == [whole[i]["label"] for i in (5, 6)]


def test_array_record_mistakes_have_words(record_files, tmp_path, cut_directory):
    for glob, split, words in (
        (f"{tmp_path}/nothing*", "train", "(?s)No file matches.*quotes"),
        (f"{record_files}/*", "val", r"(?s)which records.*\{split\} in the glob"),
        (f"{record_files}/*", "train[:10%]", "TFDS sets only"),
        (f"{record_files}/c-*", "train", "hold no records"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(f"arrayrecord:{glob}", split)
    with pytest.raises(UserError, match="takes files of a TFDS data set"):
        shutil.copy(record_files / "a-val-1.array_record", cut_directory.parent / "beside")
        open_source(f"arrayrecord:{cut_directory.parent}/**/*", "train")
    (record_files / "broken-train").write_bytes((record_files / "a-train-2.array_record").read_bytes()[:70000])
    (record_files / "text-train").write_text("words " * 99)
    for name in ("broken-train", "text-train"):
        with pytest.raises(UserError, match=f"{name} is no whole ArrayRecord file"):
            open_source(f"arrayrecord:{record_files}/*train*", "train")
        (record_files / name).unlink()
    _array_record(tmp_path / "numbers", [b"123", b"456"])
    with pytest.raises(UserError, match=r"neither images nor examples.*b'123'"):
        open_source(f"arrayrecord:{tmp_path}/numbers", "train")


@pytest.mark.parametrize("kind", ["folder", "tfds", "arrayrecord"])
def test_sources_survive_pickling(kind, split_folder, tfds_directory, record_files):
    specs = {"folder": f"folder:{split_folder}", "tfds": "tfds:prime_images"}
    spec = specs.get(kind, f"arrayrecord:{record_files}/*train*")
    source = open_source(spec, "train", tfds_directory)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.name, copy.split, len(copy)) == (source.name, source.split, len(source))
    assert copy[2] == source[2]


def _flip_a_byte(directory, pattern, record):
    """Change one byte inside `record` in the file that matches, which is written anew for that; return its path."""
    (path,) = directory.glob(pattern)
    _array_record(path, list(array_files.RecordFiles(_whole(path))), "group_size:1,uncompressed")
    raw = bytearray(path.read_bytes())
    raw[raw.index(record) + len(record) // 2] ^= 1
    path.write_bytes(raw)
    return path


def _whole(path):
    count = array_files.num_records(path)
    return [array_files.RecordRange(str(path), 0, count, count)]


def _faults(source):
    """Return example id -> (where, fault, what the transform makes of it) of the examples that cannot be read."""
    from beitv2_jax.data.transform import EvalTransform

    found = {}
    for example in (source[i] for i in range(len(source))):
        row = EvalTransform(8)(example)
        assert (row["weight"] == 0) == bool(example.get("fault")) == bool(row["faults"])
        if example.get("fault"):
            assert (example["image"], example["label"]) == (b"", -1)
            found[example["example_id"]] = (example["where"], example["fault"], str(row["faults"]))
    return found


def test_a_damaged_record_is_named_with_its_file_and_number(tmp_path, cut_directory, record_files):
    copy = tmp_path / "prime_images" / "2.3.0"
    shutil.copytree(cut_directory, copy)
    whole = open_source("tfds:prime_images", "train", str(tmp_path))
    path = _flip_a_byte(copy, "*train*00001-of-00003", whole[3]["image"])
    [(example_id, (where, fault, listed))] = _faults(open_source("tfds:prime_images", "train", str(tmp_path))).items()
    assert (example_id, where) == (3, f"{path}, record 1 (example 3)")
    assert "Corrupted" in fault and listed == f"{where}: {fault}"
    path = _flip_a_byte(record_files, "b-train*", _png(4))
    [(example_id, (where, _, _))] = _faults(open_source(f"arrayrecord:{record_files}/*train*", "train")).items()
    assert (example_id, where) == (4, f"{path}, record 1 (example 4)")


def test_a_record_of_another_set_is_a_damaged_one(tmp_path, tfds_directory):
    copy = tmp_path / "prime_images" / "2.3.0"
    shutil.copytree(pathlib.Path(tfds_directory) / "prime_images" / "2.3.0", copy)
    (path,) = copy.glob("*train*")
    _array_record(path, [b"\xff\xff", *[_example(other=7)] * 6])
    faults = _faults(open_source("tfds:prime_images", "train", str(tmp_path)))
    assert list(faults) == list(range(7)) and "none of this data set" in faults[0][1]


def test_a_file_that_vanished_is_an_unreadable_image(split_folder):
    source = open_source(f"folder:{split_folder}", "train")
    (split_folder / "train" / "owl" / "a.JPG").unlink()
    [(example_id, (where, fault, _))] = _faults(source).items()
    assert (example_id, fault) == (3, "No such file or directory") and "owl/a.JPG" in where


def test_missing_shards_are_found_at_the_start(tmp_path, cut_directory):
    copy = tmp_path / "prime_images" / "2.3.0"
    shutil.copytree(cut_directory, copy)
    (path,) = copy.glob("*train*00002-of-00003")
    path.unlink()
    with pytest.raises(
        UserError, match=r"1 of 3 record files are missing or damaged.*00002-of-00003: there is no such"
    ):
        open_source("tfds:prime_images", "train", str(tmp_path))
    assert len(open_source("tfds:prime_images", "validation", str(tmp_path))) == 3
    # a slice that does not need it
    assert len(open_source("tfds:prime_images", "train[:2]", str(tmp_path))) == 2


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", '{"a"', "{}"])
def test_damaged_metadata_of_a_tfds_set_are_named(tmp_path, tfds_directory, name, content):
    copy = tmp_path / "prime_images" / "2.3.0"
    shutil.copytree(pathlib.Path(tfds_directory) / "prime_images" / "2.3.0", copy)
    (copy / name).write_text(content)
    with pytest.raises(UserError, match=r"(metadata .* cannot be read)|(cannot be looked up)") as caught:
        open_source("tfds:prime_images", "train", str(tmp_path))
    assert "dataset_info.json" in caught.value.meant
