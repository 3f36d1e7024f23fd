"""Label maps: numbers to classes, decoding, what is refused, and the sources that bring them."""

import io
import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.data.decode import CorruptImageError
from beitv2_jax.data.segmentation.label_maps import LabelIds, decode_label_map, label_map_size
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.segmentation.sources import TfdsLabelMaps, open_label_maps
from beitv2_jax.data.sources import open_source
from beitv2_jax.errors import UserError


def png(pixels, mode=None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels, np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([(7 * index) % 256 for index in range(768)])
    image.save(file, "PNG")
    return file.getvalue()


def test_ade20k_numbers():
    ids = LabelIds(num_classes=150, offset=1, ignored=(0, 255))
    numbers = np.array([[0, 1, 150], [255, 2, 77]], np.uint8)
    np.testing.assert_array_equal(ids.classes(numbers, "here"), [[IGNORED, 0, 149], [IGNORED, 1, 76]])
    with pytest.raises(CorruptImageError, match=r"here .*number 151, neither a class nor ignored"):
        ids.classes(np.array([[3, 151]], np.uint8), "here")


def test_numbers_that_start_at_zero():
    ids = LabelIds(num_classes=11, ignored=(11,))  # CamVid
    np.testing.assert_array_equal(ids.classes(np.array([[0, 10, 11]], np.uint8), ""), [[0, 10, IGNORED]])


def test_any_number_can_be_any_class():
    ids = LabelIds(num_classes=2, ignored=(1,), mapping=((255, 1), (0, 0), (7, 1)))
    numbers = np.array([[0, 1, 7, 255]], np.uint8)
    np.testing.assert_array_equal(ids.classes(numbers, ""), [[0, IGNORED, 1, 1]])
    with pytest.raises(CorruptImageError, match="number 2, neither a class nor ignored"):
        ids.classes(np.array([[2]], np.uint8), "")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_classes=12, ignored=(11,)), r"labels.ignored has 11, which is class 11"),
        (dict(num_classes=12, ignored=(-1,)), r"labels.ignored has -1, which is no number of 8 bits"),
        (dict(num_classes=2, ignored=(9,), mapping=((9, 1),)), r"labels.ignored has 9, which is class 1\.\n"),
        (dict(num_classes=2, mapping=((0, 0), (255, 2))), r"the pair \(255, 2\), .* a class from 0 to 1\."),
        (dict(num_classes=2, mapping=((256, 0),)), r"the pair \(256, 0\)"),
        (dict(num_classes=256), "256 classes is not possible"),
        (dict(num_classes=1), "1 classes is not possible"),
        (dict(num_classes=150, offset=120), "do not fit"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        LabelIds(**settings)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_one_number_a_pixel_is_read_as_it_is(mode):
    numbers = np.random.default_rng(0).integers(0, 151, (5, 7)).astype(np.uint8)
    encoded = png(np.repeat(numbers[..., None], 3, 2) if mode == "RGB" else numbers, mode)
    np.testing.assert_array_equal(decode_label_map(encoded), numbers)
    assert label_map_size(encoded) == (5, 7)


def test_what_is_no_label_map_is_refused_by_name():
    numbers = np.random.default_rng(0).integers(0, 256, (50, 70)).astype(np.uint8)
    colors = np.stack([numbers, numbers // 2, numbers], axis=-1)
    jpeg = io.BytesIO()
    Image.fromarray(numbers).save(jpeg, "JPEG")
    for encoded, text in (
        (png(colors), "has colours"),
        (png(numbers, "I;16"), "mode I;16, not of 8 bits"),
        (png(numbers)[:-500], "label map is damaged: image file is truncated"),
        (jpeg.getvalue(), "none of PNG, TIFF, BMP, GIF, PPM"),
        (b"", "none of PNG"),
    ):
        with pytest.raises(CorruptImageError, match=f"one.png .*{text}"):
            decode_label_map(encoded, "one.png")
    assert label_map_size(b"") is None


def write_pairs(root, split, stems):
    for index, stem in enumerate(stems):
        for folder, suffix, pixels in (
            ("images", "jpg", np.full((4, 6, 3), 10 * index, np.uint8)),
            ("annotations", "png", np.full((4, 6), index, np.uint8)),
        ):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / folder / split / f"{stem}.{suffix}")


def test_the_published_folders(tmp_path):
    write_pairs(tmp_path, "training", ["b", "a"])
    write_pairs(tmp_path, "validation", ["c"])
    train = open_label_maps(f"folder:{tmp_path}", "train")
    assert (train.split, len(train)) == ("training", 2)
    record = pickle.loads(pickle.dumps(train))[0]
    assert record["where"].endswith("training/a.jpg (example 0)") and record["example_id"] == 0
    assert decode_label_map(record["label_map"])[0, 0] == 1
    assert open_label_maps(f"folder:{tmp_path}", "val").split == "validation"
    assert train.name != open_label_maps(f"folder:{tmp_path}", "val").name
    (tmp_path / "annotations" / "training" / "b.png").unlink()
    gone = train[1]
    assert (gone["image"], gone["label_map"], gone["fault"]) == (b"", b"", "No such file or directory")
    assert gone["where"].endswith("training/b.jpg (example 1)")
    with pytest.raises(UserError, match=r"1 of 2 images .* no label map, b.jpg"):
        open_label_maps(f"folder:{tmp_path}", "train")
    with pytest.raises(UserError, match="no split 'other'"):
        open_label_maps(f"folder:{tmp_path}", "other")
    with pytest.raises(UserError, match="no folders images and annotations"):
        open_label_maps(f"folder:{tmp_path / 'images'}", "train")
    with pytest.raises(UserError, match="no source of label maps 'arrayrecord:x'"):
        open_label_maps("arrayrecord:x", "train")


def test_pairs_of_every_format_in_sub_folders_and_what_is_left_out(tmp_path):
    images, maps = tmp_path / "images" / "train" / "city", tmp_path / "annotations" / "train" / "city"
    images.mkdir(parents=True), maps.mkdir(parents=True)
    numbers = np.arange(20, dtype=np.uint8).reshape(4, 5)
    names = [unicodedata.normalize("NFC", "é"), "b", "c", "d", "e"]
    suffixes = ("tif", "png"), ("gif", "tif"), ("png", "bmp"), ("jpg", "gif"), ("ppm", "pgm")
    for stem, (suffix, map_suffix) in zip(names, suffixes, strict=True):
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(images / f"{stem}.{suffix}")
        Image.fromarray(numbers).save(maps / f"{unicodedata.normalize('NFD', stem)}.{map_suffix}")
    (maps / "alone.png").write_bytes(png(numbers)), (images / "x.heic").write_bytes(b"?")
    source = open_label_maps(f"folder:{tmp_path}", "train")
    assert len(source) == 5
    for index in range(5):
        np.testing.assert_array_equal(decode_label_map(source[index]["label_map"]), numbers)
    assert {left_out.where: left_out.cause for left_out in source.left_out} == {
        str(images / "x.heic"): "its name ends in .heic, which is no image format that is read",
        str(maps / "alone.png"): f"no image in {images.parent} has this label map",
    }
    (maps / "b.tif").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images .* no label map, city/b.gif one"):
        open_label_maps(f"folder:{tmp_path}", "train")


def test_drawn_scenes_bring_their_maps():
    source, plain = open_label_maps("embedded/tiny", "test"), open_source("embedded/tiny", "test")
    assert (len(source), source.name, source.split) == (len(plain), plain.name, "test")
    for index in (0, 13):
        record, expected = source[index], plain[index]
        assert [record[key] for key in ("image", "example_id", "where")] == [
            expected[key] for key in ("image", "example_id", "where")
        ]
        assert set(np.unique(decode_label_map(record["label_map"]))) == {0, expected["label"] + 1}
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def prepared(directory, features, example):
    """Return the directory of a TFDS set of one example."""
    import tensorflow_datasets as tfds

    class Maps(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": iter([(0, example)])}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Maps(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_tfds_sets_as_scene_parse150_names_them(tmp_path):
    import tensorflow_datasets as tfds

    image = tfds.features.Image(encoding_format="png")
    features = {"image": image, "annotation": tfds.features.Image(encoding_format="png")}
    pixels, numbers = np.zeros((4, 6, 3), np.uint8), np.arange(24, dtype=np.uint8).reshape(4, 6)
    record = {"image": png(pixels), "annotation": png(numbers)}
    source = TfdsLabelMaps(prepared(str(tmp_path / "a"), features, record), "train")
    np.testing.assert_array_equal(decode_label_map(source[0]["label_map"]), numbers)
    instances = np.stack([numbers, 0 * numbers, 0 * numbers], axis=-1)
    directory = prepared(str(tmp_path / "b"), features, record | {"annotation": png(instances)})
    with pytest.raises(UserError, match=r"cannot be used: its label map has colours") as caught:
        TfdsLabelMaps(directory, "train")
    assert "instance maps" in caught.value.meant and "ADEChallengeData2016" in caught.value.instead
    directory = prepared(str(tmp_path / "c"), {"image": image}, {"image": png(pixels)})
    with pytest.raises(UserError, match="has no label maps; its images are image"):
        TfdsLabelMaps(directory, "train")
