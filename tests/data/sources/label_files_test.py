"""Folders whose images have several classes, named by labels.csv or labels.jsonl, and TFDS sets of that kind."""

import io
import json
import logging
import pickle
import unicodedata

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beitv2_jax.data import sources
from beitv2_jax.data.array_files import RecordError
from beitv2_jax.data.sources.image_features import NAMES_FILE, ImageFeatures
from beitv2_jax.data.sources.labels import class_counts, few_labels, labels_of, log_classes
from beitv2_jax.data.transform import EvalTransform

TABLE = "file_name,dog,cat\r\n a/2.png, 1,0\n./a/1.png,1,1.0\nb.png,False,TRUE\nc.png,0,0\n"
LINES = [("a/2.png", ["dog"]), ("a/1.png", ["cat", "dog", "cat"]), ("b.png", ["cat"]), ("c.png", [])]
EXPECTED = {"a/1.png": {"dog", "cat"}, "a/2.png": {"dog"}, "b.png": {"cat"}, "c.png": set()}


def fill(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"not decoded here")


def folder(root, splits=("train", "val"), table=TABLE):
    for split in splits:
        fill(root / split, *EXPECTED)
        (root / split / "labels.csv").write_text(table)
    return f"folder:{root}"


def named(source):
    """Return the names of the classes of every image, by its path below its split."""
    found = {}
    for number in range(len(source)):
        label = source[number]["label"]
        assert label.dtype == np.float32 and label.shape == (source.num_classes,) and set(label) <= {0, 1}
        path = str(source.path_of(number)).partition(f"/{source.split}/")[2]
        found[path] = {source.class_names[place] for place in np.flatnonzero(label)}
    return found


def test_a_table_and_json_lines_say_the_same(tmp_path):
    spec = folder(tmp_path)
    (tmp_path / "val" / "labels.csv").unlink()
    lines = "\n\n".join(json.dumps({"file_name": file, "labels": names, "split": "x"}) for file, names in LINES)
    (tmp_path / "val" / "labels.jsonl").write_text("\ufeff" + lines)
    train, evaluation = sources.open_splits(spec, "train", "validation")
    assert named(train) == named(evaluation) == EXPECTED
    # the columns of the training split in their order number the classes of both
    assert train.class_names == evaluation.class_names == sources.class_names(spec, "train") == ("dog", "cat")
    assert train.multi_label and train[0]["label"].tolist() == evaluation[0]["label"].tolist() == [1, 1]
    assert pickle.loads(pickle.dumps(evaluation))[1]["label"].tolist() == [1, 0]
    (tmp_path / "train" / "labels.csv").unlink()
    (tmp_path / "train" / "labels.jsonl").write_text(lines)
    assert sources.class_names(spec, "train") == ("cat", "dog")
    # without a label file the same images have none
    (tmp_path / "val" / "labels.jsonl").unlink()
    (tmp_path / "train" / "labels.jsonl").unlink()
    (tmp_path / "train" / "a").rename(tmp_path / "a")
    assert not sources.open_source(spec, "train").multi_label


def test_a_split_may_have_fewer_classes_in_another_order(tmp_path):
    spec = folder(tmp_path)
    (tmp_path / "train" / "labels.csv").write_text("file_name,dog,cat,owl\nb.png,1,0,0\nc.png,0,0,1\n")
    evaluation = sources.open_source(spec, "validation")
    assert named(evaluation) == EXPECTED and evaluation.class_names == ("dog", "cat", "owl")
    assert (evaluation.empty_classes, sources.open_source(spec, "train").empty_classes) == (("owl",), ("cat",))


def test_what_the_file_or_the_folder_lacks_is_left_out(tmp_path):
    spec = folder(tmp_path)
    fill(tmp_path / "train", "d.png", "notes.txt")
    (tmp_path / "train" / "b.png").unlink()
    source = sources.open_source(spec, "train")
    assert named(source) == {path: names for path, names in EXPECTED.items() if path != "b.png"}
    assert {entry.where.removeprefix(f"{tmp_path}/train/"): entry.cause for entry in source.left_out} == {
        "d.png": "labels.csv has no line for it",
        "b.png": "labels.csv has a line for it, and there is no such image",
        "notes.txt": "its name ends in .txt, which is no image format that is read",
    }


def test_both_spellings_of_an_accent_are_one_name(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "épée") for form in ("NFC", "NFD"))
    fill(tmp_path, f"train/{decomposed}.png", f"val/{composed}.png")
    for split, name in (("train", composed), ("val", decomposed)):
        (tmp_path / split / "labels.csv").write_text(f"file_name,{name},x\n{name}.png,1,0\n")
        assert sources.open_source(f"folder:{tmp_path}", split)[0]["label"].tolist() == [1, 0]


def test_the_labels_are_part_of_the_data_but_not_of_the_name_of_the_images(tmp_path):
    spec = folder(tmp_path)
    before = sources.open_source(spec, "train")
    (tmp_path / "train" / "labels.csv").write_text(TABLE.replace("c.png,0,0", "c.png,0,1"))
    after = sources.open_source(spec, "train")
    assert before.name == after.name and before.digest != after.digest


def test_a_folder_without_splits_is_divided(tmp_path):
    names = [f"images/{number:02d}.png" for number in range(23)]
    fill(tmp_path, *names)
    rows = "".join(f"{name},{number % 2},{number // 10 % 2}\n" for number, name in enumerate(names))
    (tmp_path / "labels.csv").write_text(f"file_name,odd,tens\n{rows}")
    train, evaluation = sources.open_splits(f"folder:{tmp_path}", "train", "validation")
    assert [evaluation[number]["label"].tolist() for number in range(3)] == [[1, 0], [1, 1], [1, 0]]
    assert class_counts(train).tolist() == [11 - 3, 10 - 1] and len(train) == 20


def test_an_unreadable_image_has_a_label_of_the_same_shape(tmp_path):
    spec = folder(tmp_path)
    source = sources.LabelledSource(sources.open_source(spec, "train"))
    (tmp_path / "train" / "b.png").unlink()
    file = io.BytesIO()
    Image.new("RGB", (5, 5)).save(file, "PNG")
    (tmp_path / "train" / "c.png").write_bytes(file.getvalue())
    rows = [EvalTransform(4)(source[number]) for number in range(4)]
    assert [row["weight"] for row in rows] == [0, 0, 0, 1]
    labels = np.stack([row["labels"] for row in rows])
    assert labels.dtype == np.float32 and labels.tolist() == [[1, 1], [1, 0], [0, 0], [0, 0]]


def test_a_part_of_the_images_is_drawn_by_the_seed(tmp_path):
    names = [f"{number:03d}.png" for number in range(200)]
    fill(tmp_path, *names)
    rows = "".join(f"{name},{number % 2},{number % 5 == 0:d}\n" for number, name in enumerate(names))
    (tmp_path / "labels.csv").write_text(f"file_name,odd,five\n{rows}")
    source = sources.open_source(f"folder:{tmp_path}", "train")
    tenth, half = (few_labels(source, seed=1, fraction=fraction) for fraction in (0.1, 0.5))
    ids = [{part[number]["example_id"] for number in range(len(part))} for part in (tenth, half)]
    assert [len(part) for part in ids] == [20, 100] and ids[0] < ids[1]
    assert class_counts(half).tolist() == [sum(i % 2 for i in ids[1]), sum(i % 5 == 0 for i in ids[1])]
    assert half.multi_label and few_labels(source, seed=2, fraction=0.5).name != half.name


def test_the_classes_of_the_images_are_logged(tmp_path, caplog):
    spec = folder(tmp_path)
    (tmp_path / "train" / "labels.csv").write_text("file_name,dog,cat,owl\na/1.png,1,1,0\nb.png,1,0,0\nc.png,1,0,0\n")
    with caplog.at_level(logging.INFO, logger="absl"):
        log_classes(*sources.open_splits(spec, "train", "validation"))
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert found == [
        ("INFO", "split train: 3 images in 3 classes; smallest class owl with 0, median 1, largest dog with 3"),
        ("INFO", "split train: 4 labels, 1.33 an image"),
        ("INFO", "split val: 4 images in 3 classes; smallest class owl with 0, median 2, largest dog with 2"),
        ("INFO", "split val: 4 labels, 1 an image"),
    ]


# TFDS sets


def features(**entries):
    return tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="png"), **entries})


def labels_read(entries, examples, directory):
    """Return the class names and the label of each example, which is written and read again."""
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    reader = ImageFeatures(described := features(**entries), "The set", directory)
    records = [described.serialize_example({"image": io.BytesIO(image.getvalue()), **example}) for example in examples]
    assert reader.multi_label
    return reader.class_names, [reader.read(record)[1].tolist() for record in records]


def test_sequences_objects_and_vectors_of_tfds(tmp_path):
    label = tfds.features.ClassLabel(names=["a", "b", "c"])
    for key in ("label", "labels"):
        entries = {key: tfds.features.Sequence(label), "objects": tfds.features.Sequence({"label": label})}
        examples = [{key: values, "objects": [{"label": 1}]} for values in (["a", "c", "a"], [])]
        assert labels_read(entries, examples, tmp_path) == (("a", "b", "c"), [[1, 0, 1], [0, 0, 0]])
    objects = {
        "objects": tfds.features.Sequence({"label": label, "area": tfds.features.Tensor(shape=(), dtype=np.int64)})
    }
    examples = [{"objects": [{"label": number, "area": 3} for number in numbers]} for numbers in ([2, 2, 1], [])]
    assert labels_read(objects, examples, tmp_path) == (("a", "b", "c"), [[0, 1, 1], [0, 0, 0]])
    (tmp_path / NAMES_FILE).write_text("x\ny\n")
    vector = {"labels": tfds.features.Tensor(shape=(2,), dtype=np.int64)}
    assert labels_read(vector, [{"labels": [0, 1]}], tmp_path) == (("x", "y"), [[0, 1]])
    with pytest.raises(RecordError, match="neither 0 nor 1"):
        labels_read(vector, [{"labels": [0, -1]}], tmp_path)
    with pytest.raises(RecordError, match="none of the 3 classes"):
        labels_read({"labels": tfds.features.Sequence(label)}, [{"labels": [0, -1]}], tmp_path)
    # a single label goes before, and a vector of another length is none
    both = features(label=label, labels=tfds.features.Sequence(label))
    assert not ImageFeatures(both, "The set", tmp_path).multi_label
    longer = features(labels=tfds.features.Tensor(shape=(3,), dtype=np.int64))
    assert ImageFeatures(longer, "The set", tmp_path).class_names == ()


class Records:
    """Records of a multi-label set that does not list its labels; the second one cannot be read."""

    name, split, class_names, num_classes, multi_label = "records", "train", ("a", "b"), 2, True
    rows = ((1, 1), (0, 0), (0, 1))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"label": np.array(self.rows[index], np.float32), "fault": "damaged" if index == 1 else ""}


def test_records_are_read_for_their_labels():
    source = Records()
    assert class_counts(source).tolist() == [1, 2]
    assert [tuple(labels_of(source)[number]) for number in range(3)] == list(Records.rows)
    assert len(few_labels(source, seed=0, fraction=0.67)) == 2
