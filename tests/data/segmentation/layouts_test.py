"""Folders in the layouts of published data sets: which image has which label map, in which split."""

import io

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.data.segmentation.label_maps import LabelIds, decode_label_map
from beitv2_jax.data.segmentation.sources import open_label_maps
from beitv2_jax.data.segmentation.transforms import SquareTransform
from beitv2_jax.errors import UserError

TREES = {
    "ade": ("images/{split}/{stem}.jpg", "annotations/{split}/{stem}.png", ("training", "validation")),
    "cityscapes": (
        "leftImg8bit/{split}/bonn/{stem}_leftImg8bit.png",
        "gtFine/{split}/bonn/{stem}_gtFine_labelIds.png",
        ("train", "val"),
    ),
    "voc": ("JPEGImages/{stem}.jpg", "SegmentationClass/{stem}.png", ("train", "val")),
    "camvid": ("{split}/{stem}.png", "{split}annot/{stem}.png", ("train", "val")),
}


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(params=TREES)
def tree(request, tmp_path):
    """Return a folder of two training pairs and one for evaluation; number in the map = 10 times that of the image."""
    image, label_map, splits = TREES[request.param]
    for number, (stem, split) in enumerate(zip("bac", (splits[0], splits[0], splits[1]), strict=True)):
        save(np.full((4, 6, 3), number, np.uint8), tmp_path / image.format(split=split, stem=stem))
        save(np.full((4, 6), 10 * number, np.uint8), tmp_path / label_map.format(split=split, stem=stem))
    if request.param == "cityscapes":  # other pictures of the same annotation
        save(np.zeros((4, 6, 3), np.uint8), tmp_path / "gtFine/train/bonn/a_gtFine_color.png")
        save(np.zeros((4, 6), np.uint8), tmp_path / "gtFine/train/bonn/a_gtFine_instanceIds.png")
    if request.param == "voc":
        save(np.zeros((4, 6, 3), np.uint8), tmp_path / "JPEGImages/of_no_list.jpg")
        lists = tmp_path / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("b\na\n"), (lists / "val.txt").write_text("c\n")
    return tmp_path


def test_images_find_their_label_maps(tree):
    train, test = (open_label_maps(f"folder:{tree}", split) for split in ("train", "validation"))
    assert (len(train), len(test)) == (2, 1)
    numbers = [
        int(decode_label_map(source[index]["label_map"])[0, 0]) for source, index in ((train, 0), (train, 1), (test, 0))
    ]
    assert numbers == [10, 0, 20]  # a, b, c
    assert train.left_out == test.left_out == ()
    with pytest.raises(UserError, match="no split 'other'"):
        open_label_maps(f"folder:{tree}", "other")


def test_an_image_and_its_label_map_as_a_square():
    """Labels are those of the nearest pixel, at the middle of each cell; what has no class stays without one."""
    numbers = np.array([[1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 0, 0]], np.uint8)
    image = np.repeat(numbers[:, :, None] * 50, 3, axis=2)
    encoded = {}
    for name, array in (("image", image), ("label_map", numbers)):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        encoded[name] = file.getvalue()
    example = {**encoded, "example_id": 7}
    row = SquareTransform(ids=LabelIds(3, offset=1, ignored=(0,)), image_size=4)(example)
    np.testing.assert_array_equal(row["label_maps"], [[0, 1, 1, 2]] * 2 + [[255, 0, 0, 255]] * 2)
    expected = np.asarray(Image.fromarray(image).resize((4, 4), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(row["images"], expected)
    assert row["weight"] == 1 and row["example_ids"] == 7
