"""Compare our ImageNet-1k builder with the one of TFDS: the same archives give the same records."""

import io
import json
import pathlib

import ilsvrc_archives as made
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from beitv2_jax.data.prepare import imagenet


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Return the output directories of both builders."""
    archives = made.make(tmp_path_factory.mktemp("archives"))
    (archives / "ILSVRC2012_img_test_v10102019.tar").rename(archives / "ILSVRC2012_img_test.tar")
    # TFDS has its own list of validation labels; its first entries are used here
    names = pathlib.Path(tfds.__path__[0], "datasets/imagenet2012/validation_labels.txt")
    truth = names.read_text().split()[: len(made.TRUTH)]
    train = made.train_files()
    for seed, synset in enumerate(sorted(set(truth) - set(train))):
        train[synset] = {f"{synset}_7.JPEG": made.encode(500 + seed)}
    packed = {f"{synset}.tar": made.pack(files) for synset, files in train.items()}
    (archives / "ILSVRC2012_img_train.tar").write_bytes(made.pack(packed))
    class_ids = {synset: number for number, synset in enumerate(sorted(train, reverse=True), 1)}
    counts = {synset: len(files) for synset, files in train.items()}
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(made.devkit(class_ids, truth, counts))
    stock = tfds.builder("imagenet2012", data_dir=tmp_path_factory.mktemp("stock"), file_format="array_record")
    stock.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=archives))
    return pathlib.Path(stock.data_path), imagenet.prepare(archives, tmp_path_factory.mktemp("ours"))


def _records(directory, split):
    builder = tfds.builder_from_directory(str(directory))
    return list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


def test_descriptions_are_the_same(directories):
    stock, ours = directories
    assert sorted(path.name for path in stock.iterdir()) == sorted(path.name for path in ours.iterdir())
    for name in ("features.json", "label.labels.txt"):
        assert (stock / name).read_bytes() == (ours / name).read_bytes()
    described = [json.loads((directory / "dataset_info.json").read_text()) for directory in directories]
    for info in described:
        for split in info["splits"]:
            split.pop("numBytes")  # re-encoded images differ in size
    assert described[0] == described[1]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_records_are_the_same_in_the_same_order(directories, split):
    stock, ours = (_records(directory, split) for directory in directories)
    assert len(stock) == len(ours)
    for theirs, mine in zip(stock, ours, strict=True):
        assert (theirs["file_name"], theirs["label"]) == (mine["file_name"], mine["label"])
        if (theirs["file_name"].decode()) not in made.MARKED:
            assert theirs["image"] == mine["image"]
            continue
        pixels = [np.asarray(Image.open(io.BytesIO(record["image"])), int) for record in (theirs, mine)]
        # the two libraries convert CMYK to RGB and encode at quality 100 differently
        assert pixels[0].shape == pixels[1].shape and np.abs(pixels[0] - pixels[1]).mean() < 2
