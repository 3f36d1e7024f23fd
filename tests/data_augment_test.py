"""Views: the law of the random resized crop, pixels of the resize, the published evaluation crop, jitter draws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beitv2_jax.data import augment
from beitv2_jax.errors import UserError
from beitv2_jax.rng import host_rng


def _noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    min_scale=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
def test_view_lies_in_the_image_with_lawful_area_and_ratio(height, width, min_scale, seed):
    view = augment.random_view(host_rng(seed, "view", 1), height, width, min_scale=min_scale)
    assert view.height > 0 and view.width > 0
    assert view.top >= 0 and view.top + view.height <= height
    assert view.left >= 0 and view.left + view.width <= width
    # rounding moves each side by half a pixel; the fallback box obeys the ratio, not the area
    assert (view.width - 0.5) / (view.height + 0.5) <= 4 / 3 + 1e-9
    assert (view.width + 0.5) / (view.height - 0.5 or 1e-9) >= 3 / 4 - 1e-9
    if min_scale < 0.3 and 3 / 4 <= width / height <= 4 / 3:
        assert (view.height + 0.5) * (view.width + 0.5) >= min_scale * height * width


def test_view_distribution():
    height, width, count = 613, 709, 4000
    views = [augment.random_view(host_rng(5, "view", i), height, width, min_scale=0.08) for i in range(count)]
    share = np.array([view.height * view.width / (height * width) for view in views])
    log_ratio = np.log([view.width / view.height for view in views])
    flips = np.mean([view.flip for view in views])
    # boxes that stick out are refused, which happens to large ones only: below 0.5 the area is uniform
    inner = np.sort(share[(share > 0.08) & (share < 0.5)])
    edges = np.interp([0.25, 0.5, 0.75], np.linspace(0, 1, inner.size), inner)
    np.testing.assert_allclose(edges, [0.185, 0.29, 0.395], atol=4 * 0.42 * 0.5 / math.sqrt(inner.size))
    assert share.min() >= 0.079 and share.max() > 0.95
    # small boxes are never refused: their log ratio is uniform, with variance (2 ln 4/3)^2 / 12
    small = log_ratio[share < 0.5]
    assert abs(small.mean()) < 4 * small.std() / math.sqrt(small.size)
    np.testing.assert_allclose(small.std(), 2 * math.log(4 / 3) / math.sqrt(12), rtol=0.06)
    assert abs(flips - 0.5) < 4 * 0.5 / math.sqrt(count)
    # the box has every place: corners are reached
    slack = np.array([(view.top, view.left) for view in views])
    room = np.array([(height - view.height, width - view.width) for view in views])
    place = slack / np.maximum(room, 1)
    np.testing.assert_allclose(place[share < 0.3].mean(0), 0.5, atol=0.04)
    np.testing.assert_allclose(place[share < 0.3].std(0), 1 / math.sqrt(12), atol=0.03)


@pytest.mark.parametrize(
    ("height", "width", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10)), (30, 30, (0, 0, 30, 30))]
)
def test_impossible_boxes_fall_back_to_the_centre(height, width, box):
    # areas above the image never fit
    view = augment.random_view(host_rng(0, "view"), height, width, min_scale=8.0, max_scale=9.0)
    assert tuple(view[:4]) == box


def test_flip_probability_zero_and_one():
    for probability in (0.0, 1.0):
        flips = {
            augment.random_view(host_rng(1, "v", i), 9, 9, min_scale=0.5, flip_probability=probability).flip
            for i in range(20)
        }
        assert flips == {bool(probability)}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crop_resize_equals_crop_then_resize_then_mirror(interpolation):
    image = _noise(53, 67)
    view = augment.View(top=7, left=11, height=31, width=41, flip=True)
    expected = (
        Image.fromarray(image)
        .crop((11, 7, 11 + 41, 7 + 31))
        .resize((17, 17), augment.INTERPOLATIONS[interpolation])
        .transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    )
    resized = augment.crop_resize(image, view, 17, interpolation)
    np.testing.assert_array_equal(resized, np.asarray(expected))
    # nothing outside the box has influence
    other = _noise(53, 68)[:, :67].copy()
    other[7:38, 11:52] = image[7:38, 11:52]
    np.testing.assert_array_equal(augment.crop_resize(other, view, 17, interpolation), resized)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (41, 61), (61, 40), (61, 41), (29, 29), (300, 97)])
def test_center_crop_is_the_published_one(height, width):
    image = _noise(height, width)
    # shorter side to int(28 / 0.875) = 32, longer in proportion (truncated), then the central 28 x 28
    size = (int(32 * width / height), 32) if height < width else (32, int(32 * height / width))
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = round((size[1] - 28) / 2), round((size[0] - 28) / 2)
    np.testing.assert_array_equal(augment.center_crop(image, 28), whole[top : top + 28, left : left + 28])


def test_center_crop_without_a_margin_keeps_the_square():
    image = _noise(23, 23)
    np.testing.assert_array_equal(augment.center_crop(image, 23, crop_fraction=1.0), image)
    with pytest.raises(ValueError, match="crop_fraction"):
        augment.center_crop(image, 23, crop_fraction=1.5)


def test_unknown_interpolation_is_a_user_error():
    with pytest.raises(UserError, match="bicubic, bilinear, lanczos"):
        augment.crop_resize(_noise(5, 7), augment.View(0, 0, 5, 7, False), 3, "cubic")


@settings(max_examples=30, deadline=None)
@given(strength=st.floats(0.0, 3.0), seed=st.integers(0, 2**31))
def test_jitter_factors_and_order(strength, seed):
    factors, order = augment.jitter_draw(host_rng(seed, "jitter"), strength)
    assert factors.dtype == np.float32 and order.dtype == np.int32
    assert sorted(order) == [0, 1, 2]
    assert (factors >= np.float32(max(0, 1 - strength))).all() and (factors <= np.float32(1 + strength)).all()


def test_jitter_is_uniform():
    draws = [augment.jitter_draw(host_rng(2, "jitter", i), 0.4) for i in range(3000)]
    factors = np.stack([factor for factor, _ in draws])
    np.testing.assert_allclose(factors.mean(0), 1.0, atol=0.02)
    np.testing.assert_allclose(factors.std(0), 0.8 / math.sqrt(12), rtol=0.06)
    _, counts = np.unique([tuple(order) for _, order in draws], axis=0, return_counts=True)
    assert counts.size == 6 and np.abs(counts - 500).max() < 4 * math.sqrt(3000 * 5 / 36)
