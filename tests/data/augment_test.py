"""Views: the law of the random resized crop, pixels of the resize, the published evaluation crop, jitter draws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from beitv2_jax.data import augment
from beitv2_jax.data.embedded.scenes import draw_scene
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


def _photo(height, width):
    """Return a generated scene with a little grain, resized by Pillow: edges and detail of every size."""
    scene = Image.fromarray(draw_scene(host_rng(3, "scene"), 3).image).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(2).normal(0, 4, (height, width, 3))
    return np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8)


def _pillow_resize(image, size, interpolation):
    """Resize along the rows, then along the columns: the order of every Pillow before version 13."""
    resample = augment.INTERPOLATIONS[interpolation]
    rows = Image.fromarray(image).resize((size, image.shape[0]), resample)
    return np.asarray(rows.resize((size, size), resample))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crop_resize_equals_pillow_s_crop_and_resize(interpolation):
    image, apart = _photo(375, 500), []
    boxes = [
        (7, 11, 361, 482),
        (30, 200, 97, 121),
        (0, 0, 224, 224),
        (40, 31, 333, 100),
        (3, 5, 100, 333),
        (0, 0, 8, 9),
    ]
    for top, left, height, width in boxes:
        view = augment.View(top, left, height, width, flip=False)
        expected = _pillow_resize(image[top : top + height, left : left + width], 224, interpolation)
        apart.append(np.abs(augment.crop_resize(image, view, 224, interpolation).astype(int) - expected))
    apart = np.stack(apart)
    # bilinear is Pillow's own resize, in whatever order the installed version takes
    limit = {"bilinear": 0.06, "bicubic": 0.02, "lanczos": 0.04}[interpolation]
    assert apart.mean() < limit, apart.mean()
    assert np.percentile(apart, 99.5) <= 1 and apart.max() <= 40
    assert apart[2].max() == 0  # nothing to resize


def test_crop_resize_without_the_order_of_the_passes_stays_near_pillow_s():
    image, apart = _photo(375, 500), []
    for index in range(40):
        view = augment.random_view(host_rng(1, "view", index), 375, 500, min_scale=0.08, flip_probability=0.0)
        box = Image.fromarray(image).crop((view.left, view.top, view.left + view.width, view.top + view.height))
        expected = np.asarray(box.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        apart.append(np.abs(augment.crop_resize(image, view, 224) - expected).mean())
    assert np.mean(apart) < 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_a_view_mirrors_after_the_resize_and_sees_nothing_outside_its_box(interpolation):
    image = _noise(53, 67)
    view = augment.View(top=7, left=11, height=31, width=41, flip=True)
    resized = augment.crop_resize(image, view, 17, interpolation)
    plain = augment.crop_resize(image, view._replace(flip=False), 17, interpolation)
    np.testing.assert_array_equal(resized, plain[:, ::-1])
    assert resized.flags.c_contiguous
    other = _noise(53, 68)[:, :67].copy()
    other[7:38, 11:52] = image[7:38, 11:52]
    np.testing.assert_array_equal(augment.crop_resize(other, view, 17, interpolation), resized)
    # what decoders return may be read-only
    image.flags.writeable = False
    np.testing.assert_array_equal(augment.crop_resize(image, view, 17, interpolation), resized)
    whole = augment.View(0, 0, 53, 67, False)
    assert augment.crop_resize(image, whole, 17, interpolation).shape == (17, 17, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_tiny_boxes_keep_their_colour(size):
    image = np.full((*size, 3), (10, 120, 250), np.uint8)
    for interpolation in augment.INTERPOLATIONS:
        resized = augment.crop_resize(image, augment.View(0, 0, *size, True), 32, interpolation)
        np.testing.assert_array_equal(resized, np.broadcast_to(image[0, 0], (32, 32, 3)))


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


def test_evaluation_keeps_all_from_384_pixels_on():
    assert [augment.eval_crop_fraction(size) for size in (224, 383, 384, 512)] == [0.875, 0.875, 1.0, 1.0]


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


ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _published_gray(pixels, factors, order):
    """Return the exact mean grey level, in Pillow's arithmetic, at the moment of the contrast."""
    image = Image.fromarray(pixels)
    for operation in order:
        if operation == 1:
            break
        image = ENHANCERS[operation](image).enhance(float(factors[operation]))
    return np.asarray(image.convert("L"), np.float64).mean()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 32), width=st.integers(1, 32), seed=st.integers(0, 2**31))
def test_gray_level_of_small_images_is_that_of_the_published_order(height, width, seed):
    factors, order = augment.jitter_draw(host_rng(seed, "jitter"), 0.8)
    gray = augment.jitter_gray(_noise(height, width), factors, order)
    assert gray.dtype == np.float32
    # rounding up or down differs where a product is a whole number to the last bit
    np.testing.assert_allclose(gray, _published_gray(_noise(height, width), factors, order), atol=0.1)


def test_gray_level_of_large_images_is_close():
    image, errors, spread = _photo(375, 500), [], []
    for index in range(24):
        factors, order = augment.jitter_draw(host_rng(index, "jitter"), 0.4)
        exact = _published_gray(image, factors, order)
        errors.append(abs(augment.jitter_gray(image, factors, order) - exact))
        spread.append(exact)
    assert max(errors) < 1.2 and np.std(spread) > 5
    # a stripe for each sample of a regular grid, which would see nothing but light
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, (np.arange(640) + 14) % 20 < 10] = 200
    for picture in (stripes, stripes.transpose(1, 0, 2).copy()):
        level = augment.jitter_gray(picture, np.ones(3, np.float32), np.array([1, 0, 2]))
        np.testing.assert_allclose(level, 100.0, atol=5)
