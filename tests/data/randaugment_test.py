"""RandAugment: every operation by arithmetic of its own, the law of the draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from beitv2_jax.data import randaugment
from beitv2_jax.data.randaugment import OPERATIONS, Operation, RandAugment, apply
from beitv2_jax.rng import host_rng

SIDE = 40


def _image(seed=0, side=SIDE):
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC))


def test_there_are_fifteen():
    assert len(set(OPERATIONS)) == len(OPERATIONS) == 15


@pytest.mark.parametrize("magnitude", [0.0, 2.6, 7.5, 10.0])
def test_operations_on_levels_by_hand(magnitude):
    image, level = _image(), magnitude / 10

    def run(name):
        return apply(image, Operation(name, magnitude, 1)).astype(int)

    pixels = image.astype(int)
    np.testing.assert_array_equal(run("invert"), 255 - pixels)
    kept = 4 - int(4 * level)
    np.testing.assert_array_equal(run("posterize"), pixels // 2 ** (8 - kept) * 2 ** (8 - kept))
    threshold = 256 - int(256 * level)
    np.testing.assert_array_equal(run("solarize"), np.where(pixels < threshold, pixels, 255 - pixels))
    added = np.minimum(pixels + int(110 * level), 255)
    np.testing.assert_array_equal(run("solarize_add"), np.where(pixels < 128, added, pixels))


def test_auto_contrast_and_equalize_by_hand():
    image = 60 + _image() // 4
    stretched = apply(image, Operation("auto_contrast", 5.0, 1)).astype(float)
    low, high = image.min((0, 1)).astype(float), image.max((0, 1))
    np.testing.assert_allclose(stretched, (image - low) * 255 / (high - low), atol=1.01)
    equal = apply(image, Operation("equalize", 5.0, 1))
    for channel in range(3):
        _, ranks = np.unique(image[..., channel], return_inverse=True)
        share = np.cumsum(np.bincount(ranks.ravel()))[ranks] / image[..., channel].size
        # every level goes to about the share of pixels below it
        assert np.abs(equal[..., channel].reshape(-1) / 255 - share.reshape(-1)).max() < 0.15
        assert equal[..., channel].max() > 240 and equal[..., channel].min() < 15


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [0.0, 4.0, 10.0])
def test_enhancements_scale_by_their_factor(magnitude, sign):
    image, factor = _image(), 1 + sign * 0.9 * magnitude / 10
    for name, enhancer in (
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("color", ImageEnhance.Color),
        ("sharpness", ImageEnhance.Sharpness),
    ):
        expected = np.asarray(enhancer(Image.fromarray(image)).enhance(factor))
        np.testing.assert_array_equal(apply(image, Operation(name, magnitude, sign)), expected)
    bright = np.clip(np.floor(image * np.float32(factor)), 0, 255)
    np.testing.assert_allclose(apply(image, Operation("brightness", magnitude, sign)), bright, atol=1)
    gray = image.astype(float) @ [0.299, 0.587, 0.114]
    colored = np.clip(gray[..., None] + factor * (image - gray[..., None]), 0, 255)
    np.testing.assert_allclose(apply(image, Operation("color", magnitude, sign)), colored, atol=2)
    contrasted = np.clip(gray.mean() + factor * (image - gray.mean()), 0, 255)
    np.testing.assert_allclose(apply(image, Operation("contrast", magnitude, sign)), contrasted, atol=2)


def test_shifts_by_hand():
    # 0.45 * 40 pixels * 5 / 9 is 10 whole pixels, so no interpolation enters
    image, magnitude = _image(), 50 / 9
    fill = np.array(randaugment.FILL, np.uint8)
    right = apply(image, Operation("translate_x", magnitude, 1))
    np.testing.assert_array_equal(right[:, :30], image[:, 10:])
    np.testing.assert_array_equal(right[:, 30:], np.broadcast_to(fill, (40, 10, 3)))
    down = apply(image, Operation("translate_y", magnitude, -1))
    np.testing.assert_array_equal(down[10:], image[:30])
    np.testing.assert_array_equal(down[:10], np.broadcast_to(fill, (10, 40, 3)))
    assert tuple(round(255 * mean) for mean in (0.485, 0.456, 0.406)) == randaugment.FILL


@pytest.mark.parametrize("sign", [-1, 1])
def test_shears_and_turns_by_where_a_spot_goes(sign):
    """A bright spot at (x, y) moves to where the inverse of the published matrix puts it."""

    def center(pixels):
        bright = pixels[..., 0].astype(float) - randaugment.FILL[0]
        bright[bright < 60] = 0
        y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
        return np.array([(bright * x).sum(), (bright * y).sum()]) / bright.sum() + 0.5

    image = np.broadcast_to(np.array(randaugment.FILL, np.uint8), (101, 101, 3)).copy()
    image[28:33, 68:73] = 255  # centre (70.5, 30.5)
    x, y, magnitude = 70.5, 30.5, 8.0
    shear = sign * 0.3 * 0.8
    np.testing.assert_allclose(
        center(apply(image, Operation("shear_x", magnitude, sign))), [x - shear * y, y], atol=0.2
    )
    np.testing.assert_allclose(
        center(apply(image, Operation("shear_y", magnitude, sign))), [x, y - shear * x], atol=0.2
    )
    angle = np.deg2rad(sign * 30 * 0.8)  # against the clock, about the middle
    dx, dy = x - 50.5, y - 50.5
    turned = [
        50.5 + np.cos(angle) * dx + np.sin(angle) * dy,
        50.5 - np.sin(angle) * dx + np.cos(angle) * dy,
    ]
    np.testing.assert_allclose(center(apply(image, Operation("rotate", magnitude, sign))), turned, atol=0.2)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(OPERATIONS), magnitude=st.floats(0, 10), sign=st.sampled_from([-1, 1]), side=st.integers(2, 41)
)
def test_every_operation_keeps_shape_and_type(name, magnitude, sign, side):
    image = _image(side=side)
    before = image.copy()
    changed = apply(image, Operation(name, magnitude, sign))
    assert changed.shape == image.shape and changed.dtype == np.uint8
    np.testing.assert_array_equal(image, before)


def test_draws_follow_their_law():
    augmenting, count = RandAugment(), 6000
    draws = [augmenting.draw(host_rng(7, "randaugment", index)) for index in range(count)]
    lengths = np.bincount([len(operations) for operations in draws], minlength=3) / count
    np.testing.assert_allclose(lengths, [0.25, 0.5, 0.25], atol=0.025)
    drawn = [operation for operations in draws for operation in operations]
    names, counts = np.unique([operation.name for operation in drawn], return_counts=True)
    assert set(names) == set(OPERATIONS)
    expected = len(drawn) / 15
    assert np.abs(counts - expected).max() < 4.5 * np.sqrt(expected)
    # with replacement: among pairs one in fifteen names the same operation twice
    twice = np.mean([pair[0].name == pair[1].name for pair in draws if len(pair) == 2])
    assert abs(twice - 1 / 15) < 4 * np.sqrt(1 / 15 / (count / 4))
    magnitudes = np.array([operation.magnitude for operation in drawn])
    assert magnitudes.max() == 10.0  # N(9, 0.5) beyond it is cut: 2.3 %
    np.testing.assert_allclose(np.mean(magnitudes == 10.0), 0.0228, atol=0.008)
    np.testing.assert_allclose([np.median(magnitudes), magnitudes.std()], [9.0, 0.49], atol=0.02)
    np.testing.assert_allclose(np.mean([operation.sign for operation in drawn]), 0.0, atol=0.05)


def test_settings_reach_the_draws():
    for operation in RandAugment(ops=50, magnitude=3.0, std=0.0).draw(host_rng(0, "a")):
        assert operation.magnitude == 3.0
    assert 10 < len(RandAugment(ops=50).draw(host_rng(0, "a"))) < 40
    assert RandAugment(ops=0).draw(host_rng(0, "a")) == []


def test_a_call_applies_its_draws_in_order_and_depends_on_its_generator_alone():
    image, augmenting, changed = _image(), RandAugment(), 0
    for index in range(20):
        expected = image
        for operation in augmenting.draw(host_rng(2, "randaugment", index)):
            expected = apply(expected, operation)
        result = augmenting(image, host_rng(2, "randaugment", index))
        np.testing.assert_array_equal(result, expected)
        changed += bool((result != image).any())
    assert 9 <= changed < 20
