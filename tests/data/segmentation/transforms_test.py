"""Crops to train on and windows to evaluate: pixels and labels stay together, draws are repeatable, faults are rows."""

import io

import numpy as np
import pytest
from PIL import Image

from beitv2_jax.data.segmentation import transforms, windows
from beitv2_jax.data.segmentation.label_maps import LabelIds
from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.data.transform import GREY
from beitv2_jax.rng import host_rng

DISTORTION = {"brightness": 32.0, "contrast": 0.5, "saturation": 0.4, "hue": 0.1, "probability": 0.5}


def encoded(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def example(height, width, example_id=5, seed=0):
    """Return a picture of blocks whose red level is 10 times the number in the label map."""
    rng = np.random.default_rng(seed)
    numbers = np.kron(rng.integers(0, 11, (height // 8 + 1, width // 8 + 1)), np.ones((8, 8), int))[:height, :width]
    numbers = numbers.astype(np.uint8)
    image = np.stack([10 * numbers, 0 * numbers, 0 * numbers], axis=-1)
    return {"image": encoded(image), "label_map": encoded(numbers), "example_id": example_id, "where": "blocks.png"}


def crops(**changes):
    settings = dict(image_size=40, long_side=400, short_side=40, min_ratio=0.5, max_ratio=2.0, max_class_fraction=0.75)
    ids = LabelIds(num_classes=10, offset=1, ignored=(0,))
    return transforms.CropTransform(seed=3, ids=ids, distortion=DISTORTION, **(settings | changes))


def test_bilinear_resizing_is_that_between_pixel_centres():
    image = np.random.default_rng(1).integers(0, 256, (17, 23, 3)).astype(np.uint8)
    for size in ((31, 29), (11, 40), (5, 7), (17, 23), (1, 9)):
        expected = image.astype(np.float64)
        for axis, length in enumerate(size):
            source = image.shape[axis]
            places = np.clip((np.arange(length) + 0.5) * source / length - 0.5, 0, source - 1)
            low = np.floor(places).astype(int)
            share = (places - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
            high = np.minimum(low + 1, source - 1)
            expected = expected.take(low, axis) * (1 - share) + expected.take(high, axis) * share
        found = transforms.resize_image(image, size)
        assert found.shape == (*size, 3)
        assert np.abs(found - expected).max() <= 0.51  # rounded once
    np.testing.assert_array_equal(
        transforms.resize_image(image[:1, :1], (4, 3)), np.broadcast_to(image[0, 0], (4, 3, 3))
    )


def test_nearest_labels_by_hand():
    numbers = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    np.testing.assert_array_equal(
        transforms.resize_label_map(numbers, (3, 5)), [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    )
    np.testing.assert_array_equal(transforms.resize_label_map(numbers, (1, 2)), [[1, 2]])


def test_pixels_and_labels_stay_together():
    transform, padded, flipped = crops(), 0, 0
    for example_id in range(12):
        source = example(50, 70, example_id)
        row = transform(source, epoch=2)
        again = transform(source, epoch=2)
        for name, array in row.items():
            np.testing.assert_array_equal(array, again[name])
        assert (row["images"].shape, row["label_maps"].shape) == ((40, 40, 3), (40, 40))
        height, width = row["sizes"]
        padded += (height, width) != (40, 40)
        assert (row["images"][height:] == GREY).all() and (row["label_maps"][:, width:] == IGNORED).all()
        red, labels = row["images"][:height, :width, 0].astype(int), row["label_maps"][:height, :width]
        flat = red % 10 == 0  # away from the blocks' edges, where resizing mixes levels
        agree = np.where(labels == IGNORED, 0, labels + 1) == red // 10
        assert agree[flat].mean() > 0.85
        flipped += row["images"][:height, :width].tobytes() != transform(source, epoch=3)["images"].tobytes()
    assert 0 < padded < 12
    assert (row["weight"], row["faults"]) == (1, "")


def test_the_draws_follow_example_epoch_and_seed():
    rows = [crops()(example(50, 70, example_id), epoch) for example_id, epoch in ((1, 0), (1, 1), (2, 0))]
    assert len({row["images"].tobytes() for row in rows}) == 3
    assert len({row["distortion"].tobytes() for row in rows}) == 3


def test_half_of_the_crops_are_mirrored():
    numbers = np.tile(np.arange(1, 11, dtype=np.uint8).repeat(4), (40, 1))
    source = {"image": encoded(np.repeat(numbers[..., None], 3, 2)), "label_map": encoded(numbers)}
    transform = crops(min_ratio=1.0, max_ratio=1.0)
    mirrored = 0
    for example_id in range(60):
        labels = transform(source | {"example_id": example_id}, 0)["label_maps"]
        ahead = np.array_equal(labels, numbers - 1)
        assert ahead or np.array_equal(labels, numbers[:, ::-1] - 1)
        mirrored += not ahead
    assert 20 <= mirrored <= 40


def test_crops_of_one_class_are_drawn_anew():
    label_map = np.full((8, 100), 4, np.uint8)
    label_map[:, 90:95], label_map[:, 95:] = 7, IGNORED
    shares = []
    for limit in (1.0, 0.75):
        corners = [transforms.crop_corner(host_rng(0, "crop", index), label_map, 8, limit) for index in range(300)]
        assert {top for top, _ in corners} == {0} and max(left for _, left in corners) <= 92
        shares.append(np.mean([84 <= left <= 92 for _, left in corners]))
    # with two classes and less than 75 % of either: 84 <= left < 90 but for the ends
    assert shares[0] < 0.15 and shares[1] > 0.4
    uniform = np.full((30, 20), 4, np.uint8)
    corners = {transforms.crop_corner(host_rng(0, "crop", index), uniform, 13, 0.75) for index in range(400)}
    assert {top for top, _ in corners} == set(range(18)) and {left for _, left in corners} == set(range(8))


def test_distortions_are_drawn_within_their_reach():
    drawn = np.stack([transforms.distortion_draw(host_rng(0, "d", index), **DISTORTION) for index in range(2000)])
    neutral, reach = np.array([0, 1, 1, 0]), np.array([32, 0.5, 0.4, 0.1])
    moved = drawn[:, :4] - neutral
    assert (np.abs(moved) <= reach + 1e-6).all() and (np.abs(moved).max(0) > 0.98 * reach).all()
    np.testing.assert_allclose((moved != 0).mean(0), 0.5, atol=0.05)
    np.testing.assert_allclose(drawn[:, 4].mean(), 0.5, atol=0.05)
    assert set(drawn[:, 4]) == {0, 1}
    assert not np.allclose(np.corrcoef(np.abs(moved).T > 0)[0, 1], 1)


SLIDING = windows.Sliding(crop=40, stride=30, long_side=200, short_side=50, scales=(1.0, 0.5), flip=True)


def window_rows(sources):
    ids = LabelIds(num_classes=10, offset=1, ignored=(0,))
    return transforms.window_row(sources, ids, SLIDING)


def test_windows_are_cut_out_of_the_views():
    source = example(60, 100)
    row = window_rows([source])(0)
    assert row["windows"].shape == (4, 6, 40, 40, 3)
    np.testing.assert_array_equal(row["view_sizes"], [[50, 83], [50, 83], [25, 42], [25, 42]])
    np.testing.assert_array_equal(row["num_windows"], [6, 6, 2, 2])
    np.testing.assert_array_equal(row["corners"][0], [[0, 0], [0, 30], [0, 43], [10, 0], [10, 30], [10, 43]])
    image = np.asarray(Image.open(io.BytesIO(source["image"])))
    for view, (size, mirrored) in enumerate((((50, 83), 0), ((50, 83), 1), ((25, 42), 0), ((25, 42), 1))):
        pixels = transforms.resize_image(image, size)
        pixels = pixels[:, ::-1] if mirrored else pixels
        for place in range(row["num_windows"][view]):
            top, left = row["corners"][view, place]
            expected = pixels[top : top + 40, left : left + 40]
            np.testing.assert_array_equal(row["windows"][view, place, : len(expected), : expected.shape[1]], expected)
    labels = np.asarray(Image.open(io.BytesIO(source["label_map"])))
    np.testing.assert_array_equal(row["label_maps"][:60, :100], labels - np.uint8(1))
    assert (row["label_maps"][60:] == IGNORED).all() and tuple(row["sizes"]) == (60, 100)


@pytest.mark.parametrize("broken", ["image", "label_map", "size", "number", "gone"])
def test_what_cannot_be_read_is_a_row_that_does_not_count(broken):
    source = example(60, 100)
    if broken == "size":
        source["label_map"] = example(60, 90)["label_map"]
    elif broken == "number":
        source["label_map"] = encoded(np.full((60, 100), 99, np.uint8))
    elif broken == "gone":
        source |= {"image": b"", "label_map": b"", "fault": "No such file"}
    else:
        source[broken] = source[broken][:100]
    cause = {
        "gone": "No such file",
        "size": "90 x 60 pixels, the image 100 x 60",
        "number": "the number 99",
        "label_map": "label map is damaged",
    }
    good = example(60, 100)
    for row, whole in ((crops()(source, 0), crops()(good, 0)), (window_rows([source])(0), window_rows([good])(0))):
        assert row["weight"] == 0 and row["example_ids"] == 5
        assert str(row["faults"]).startswith("blocks.png: ") and cause.get(broken, "") in str(row["faults"])
        assert (row["label_maps"] == IGNORED).all()
        assert row.keys() == whole.keys()
    assert crops()(source, 0)["images"].shape == (40, 40, 3)
    rows = window_rows([good, source])
    assert {name: array.shape for name, array in rows(0).items()} == {
        name: array.shape for name, array in rows(1).items()
    }
