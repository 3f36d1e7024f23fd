"""Pixel work: normalisations by hand, colour jitter against Pillow's own enhancers."""

import colorsys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from beitv2_jax.data import augment
from beitv2_jax.models import preprocess
from beitv2_jax.rng import host_rng

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
jitter = jax.jit(preprocess.color_jitter)


def random_images(seed, shape=(6, 11, 13, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def jittered(images, factors, order):
    """Jitter whole images: their own grey levels are those that contrast needs."""
    gray = [augment.jitter_gray(*row) for row in zip(images, factors, order, strict=True)]
    return np.asarray(jitter(images, factors, order, np.array(gray, np.float32)))


def with_pillow(images, factors, order):
    results = []
    for pixels, strengths, sequence in zip(images, factors, order, strict=True):
        image = Image.fromarray(pixels)
        for operation in sequence:
            image = ENHANCERS[operation](image).enhance(float(strengths[operation]))
        results.append(np.asarray(image))
    return np.stack(results)


def test_normalize_and_unit_range_by_hand():
    images = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
    mean, std = preprocess.NORMALIZATIONS["imagenet"]
    expected = [-0.485 / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    np.testing.assert_allclose(preprocess.normalize(images, mean, std)[0, 0, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(preprocess.to_unit_range(images)[0, 0, 0], [-1, 1, -0.6], rtol=1e-6)
    half = preprocess.normalize(images, *preprocess.NORMALIZATIONS["half"])
    np.testing.assert_allclose(half, preprocess.to_unit_range(images), atol=1e-6)
    np.testing.assert_allclose(
        preprocess.normalize(images, *preprocess.NORMALIZATIONS["clip"])[0, 0, 0, 1], (1 - 0.4578275) / 0.26130258
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), strength=st.floats(0.1, 1.0))
def test_color_jitter_equals_pillow(seed, strength):
    rng = np.random.default_rng(seed)
    images = random_images(seed)
    factors = rng.uniform(1 - strength, 1 + strength, (6, 3)).astype(np.float32)
    order = np.stack([rng.permutation(3) for _ in range(6)]).astype(np.int32)
    difference = np.abs(jittered(images, factors, order) - with_pillow(images, factors, order))
    # Pillow works in 8 bits and so do we. A fused multiply-add may fall on the other side of a whole number, one level
    # off, which the following operations can at most enlarge by their factors.
    assert (difference > 0).mean() < 0.002
    assert difference.max() <= np.ceil((1 + strength) ** 2)


@pytest.mark.parametrize("operation", [0, 1, 2])
def test_single_enhancers_equal_pillow(operation):
    images = random_images(7)
    factors = np.ones((6, 3), np.float32)
    factors[:, operation] = [0.0, 0.25, 0.617, 1.0, 1.383, 2.0]
    order = np.tile(np.arange(3, dtype=np.int32), (6, 1))
    difference = jittered(images, factors, order) - with_pillow(images, factors, order)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.001
    np.testing.assert_array_equal(difference[3], 0)  # factor 1
    assert (jittered(images, factors, order)[[0, 1, 5]] != images[[0, 1, 5]]).any()


def test_order_matters_and_is_per_image():
    images = np.repeat(random_images(8)[:1], 2, axis=0)
    factors = np.full((2, 3), 1.8, np.float32)
    first, second = jittered(images, factors, np.array([[0, 1, 2], [2, 1, 0]], np.int32))
    assert np.abs(first - second).max() > 5


def test_contrast_of_a_crop_blends_with_the_whole_image_as_published():
    """The published order, jitter of the whole image and then the crop, against ours, a crop jittered on its own."""
    whole = (20 + 200 * np.linspace(0, 1, 67)[None, :, None] ** 2 * np.array([1.0, 0.8, 0.5])).astype(np.uint8)
    whole = np.broadcast_to(whole, (53, 67, 3)) + np.random.default_rng(1).integers(0, 20, (53, 67, 3), np.uint8)
    apart = {"whole": [], "crop": []}
    for index in range(30):
        factors, order = augment.jitter_draw(host_rng(index, "jitter"), 0.4)
        view = augment.View(5, 3 + index, 31, 31, False)
        box = (slice(view.top, view.top + 31), slice(view.left, view.left + 31))
        published = with_pillow(whole[None], factors[None], order[None])[0][box]
        crop = augment.crop_resize(whole, view, 31)
        for name, seen in (("whole", whole), ("crop", crop)):
            gray = np.array([augment.jitter_gray(seen, factors, order)])
            ours = np.asarray(jitter(crop[None], factors[None], order[None], gray))[0]
            apart[name].append(np.abs(ours - published).mean())
    assert np.mean(apart["whole"]) < 0.1 < 1.0 < np.mean(apart["crop"])


@pytest.mark.parametrize("size", [9, 14, 31, 40])
def test_resize_is_pillow_s_bicubic_before_rounding(size):
    images = 80 + random_images(3, (2, 31, 31, 3)) // 3  # Pillow cuts at 0 and 255 after each of its two passes
    resized = np.asarray(jax.jit(preprocess.resize, static_argnums=1)(images, size))
    expected = [np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC)) for image in images]
    assert resized.dtype == np.float32 and resized.min() >= 0.0 and resized.max() <= 255.0
    # it rounds after each of them
    assert np.abs(resized - np.stack(expected)).max() < 1.5
    assert np.abs(np.round(resized) - np.stack(expected)).mean() < 0.3
    if size == 31:
        np.testing.assert_array_equal(resized, images)


def test_resize_stays_within_the_levels():
    images = 255 * (np.indices((8, 8)).sum(axis=0) % 8 > 3).astype(np.uint8)[None, :, :, None].repeat(3, axis=-1)
    resized = np.asarray(preprocess.resize(images, 20))
    assert resized.min() == 0.0 and resized.max() == 255.0


def distorted_pixel(pixel, drawn):
    """Return one pixel after the distortion, by the standard library's HSV; rounding as documented."""
    brightness, contrast, saturation, hue, contrast_last = (float(value) for value in drawn)
    pixel = np.floor(np.clip(pixel + np.float32(brightness), 0, 255))
    if not contrast_last:
        pixel = np.floor(np.clip(pixel * np.float32(contrast), 0, 255))
    turn, share, value = colorsys.rgb_to_hsv(*pixel)
    pixel = np.round(colorsys.hsv_to_rgb(turn, min(1.0, share * saturation), value))
    turn, share, value = colorsys.rgb_to_hsv(*pixel)
    pixel = np.round(colorsys.hsv_to_rgb((turn + hue) % 1.0, share, value))
    return np.floor(np.clip(pixel * np.float32(contrast), 0, 255)) if contrast_last else pixel


def test_photometric_distortion_equals_the_standard_library_s_hsv():
    images = random_images(9)
    images[:, :3] = np.array([[0, 0, 0], [255, 255, 255], [77, 77, 77]])[:, None]
    images[:, 3, :, 2] = images[:, 3, :, 0]  # ties among the channels
    rng = np.random.default_rng(2)
    drawn = rng.uniform([-32, 0.5, 0.5, -0.1], [32, 1.5, 1.5, 0.1], (6, 4))
    drawn = np.concatenate([drawn, np.arange(6)[:, None] % 2], axis=1)
    drawn[0, :4] = 0, 1, 1, 0
    drawn[1, 3] = drawn[2, 0] = 0
    drawn = drawn.astype(np.float32)
    distort = jax.jit(preprocess.photometric_distortion)
    found = np.asarray(distort(images, drawn))
    np.testing.assert_array_equal(found[0], images[0])
    expected = [
        [distorted_pixel(pixel, one) for pixel in image.reshape(-1, 3)]
        for image, one in zip(images, drawn, strict=True)
    ]
    difference = np.abs(found - np.reshape(expected, found.shape))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01  # a tie of rounding, and contrast after it
    for column in range(4):
        alone = np.tile(np.float32([0, 1, 1, 0, 0]), (6, 1))
        alone[:, column] = drawn[:, column]
        changed = np.asarray(distort(images, alone))
        assert (changed[3:] != images[3:]).mean() > 0.2
