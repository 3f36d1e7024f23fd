"""Sources: image folders and TFDS sets give the same kind of example; every mistake has words for it."""

import io
import pathlib
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

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
    with pytest.raises(UserError, match="it has train, val"):
        open_source(f"folder:{split_folder}", "trial")
    with pytest.raises(UserError, match="TFDS sets only"):
        open_source(f"folder:{split_folder}", "train[:50%]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_source(f"folder:{tmp_path}/empty", "train")
    for spec in ("birds", "tfds:", "zip:x", "folder:", ""):
        with pytest.raises(UserError, match=r"tfds:NAME.*folder:PATH.*embedded"):
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


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_sources_survive_pickling(kind, split_folder, tfds_directory):
    spec = f"folder:{split_folder}" if kind == "folder" else "tfds:prime_images"
    source = open_source(spec, "train", tfds_directory)
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.name, copy.split, len(copy)) == (source.name, source.split, len(source))
    assert copy[2] == source[2]
