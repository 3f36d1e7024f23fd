"""Compare augmentations with timm and torchvision: operations exactly, random draws by their distribution."""

import teacher_oracles  # noqa: F401 - makes torchvision importable  # isort: skip

import jax
import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import torch
from PIL import Image
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as vision

from beitv2_jax.data import augment, randaugment
from beitv2_jax.data.embedded.scenes import draw_scene
from beitv2_jax.models import mixing, preprocess
from beitv2_jax.rng import host_rng

NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
HPARAMS = {"translate_pct": 0.45, "img_mean": randaugment.FILL, "interpolation": Image.BICUBIC}


def scene(index: int, size: tuple[int, int] = (224, 224)) -> Image.Image:
    return Image.fromarray(draw_scene(host_rng(1, "scene", index), index % 10).image).resize(size, Image.BICUBIC)


def test_the_fifteen_operations_are_those_of_timm():
    transform = timm_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", dict(HPARAMS))
    assert sorted(op.name for op in transform.ops) == sorted(NAMES.values())
    assert set(NAMES) == set(randaugment.OPERATIONS)
    assert (transform.num_layers, {op.prob for op in transform.ops}) == (2, {0.5})
    assert {(op.magnitude, op.magnitude_std) for op in transform.ops} == {(9, 0.5)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [0.0, 3.7, 9.0, 9.99])
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_equal_those_of_timm(name, magnitude, sign, monkeypatch):
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: sign * value)
    operation = timm_augment.AugmentOp(NAMES[name], prob=1.0, magnitude=magnitude, hparams=HPARAMS)
    for index in range(3):
        image = scene(index)
        expected = np.asarray(operation(image))
        ours = randaugment.apply(np.asarray(image), randaugment.Operation(name, magnitude, sign))
        np.testing.assert_array_equal(ours, expected)


def test_cutmix_fractions_are_distributed_as_in_timm():
    np.random.seed(0)
    count = 4000
    theirs = [cutmix_bbox_and_lam((2, 3, 32, 32), np.random.beta(1.0, 1.0))[1] for _ in range(count)]
    images, targets, weight = np.zeros((2, 32, 32, 3), np.float32), np.eye(2, dtype=np.float32), np.ones(2)
    settings = {"mixup": 0.0, "cutmix": 1.0, "probability": 1.0, "switch_probability": 0.5}
    shares = jax.jit(jax.vmap(lambda key: mixing.mix(images, targets, weight, key, **settings)[1][0, 0]))
    ours = shares(jax.random.split(jax.random.key(0), count))
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(theirs, quantiles), atol=0.03)


def test_erased_boxes_are_distributed_as_in_timm():
    torch.manual_seed(0)
    count, size = 4000, 32
    erase = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    theirs = erase(torch.full((count, 3, size, size), 50.0)).permute(0, 2, 3, 1).numpy()
    ours = mixing.random_erasing(np.full((count, size, size, 3), 50.0, np.float32), jax.random.key(0), probability=0.25)
    metrics = []
    for pixels in (theirs, np.asarray(ours)):
        erased = (pixels != 50.0).any(-1)
        hit = erased.any((1, 2))
        heights, widths = erased.any(2).sum(1)[hit], erased.any(1).sum(1)[hit]
        noise = pixels[erased]
        quantiles = np.linspace(0.1, 0.9, 5)
        area = np.quantile(heights * widths / size**2, quantiles)
        ratio = np.quantile(np.log(heights / widths), quantiles)
        metrics.append([hit.mean(), *area, *ratio, noise.mean(), noise.std(), *erased.mean((0, 2))[::8]])
    np.testing.assert_allclose(*metrics, atol=0.08)
    np.testing.assert_allclose(metrics[0][:6], metrics[1][:6], atol=0.025)


def test_views_are_distributed_as_in_torchvision():
    torch.manual_seed(0)
    image, count = Image.new("RGB", (500, 333)), 4000
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    views = [augment.random_view(host_rng(0, "view", i), 333, 500, min_scale=0.08) for i in range(count)]
    ours = np.array([view[:4] for view in views])
    quantiles = np.linspace(0.05, 0.95, 10)
    for column in range(4):
        apart = np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)
        assert np.abs(apart).max() < 15


def test_jitter_factors_and_order_are_distributed_as_in_torchvision():
    torch.manual_seed(0)
    jitter, count = ColorJitter(0.4, 0.4, 0.4), 3000
    theirs = [ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(count)]
    ours = [augment.jitter_draw(host_rng(0, "jitter", i), 0.4) for i in range(count)]
    quantiles = np.linspace(0.05, 0.95, 10)
    for index in range(3):
        expected = np.quantile([draw[1 + index] for draw in theirs], quantiles)
        np.testing.assert_allclose(np.quantile([factors[index] for factors, _ in ours], quantiles), expected, atol=0.04)
    first = [next(operation for operation in draw[0].tolist() if operation != 3) for draw in theirs]
    np.testing.assert_allclose(
        np.bincount([order[0] for _, order in ours]) / count, np.bincount(first) / count, atol=0.04
    )


def test_the_jitter_of_a_whole_image_equals_torchvision():
    adjust = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)
    for index in range(12):
        image = scene(index, (31, 32))  # small enough for an exact grey level
        factors, order = augment.jitter_draw(host_rng(0, "jitter", index), 0.4)
        pixels, expected = np.asarray(image), image
        for operation in order:
            expected = adjust[operation](expected, float(factors[operation]))
        gray = np.array([augment.jitter_gray(pixels, factors, order)])
        ours = np.asarray(preprocess.color_jitter(pixels[None], factors[None], order[None], gray))[0]
        apart = np.abs(ours - np.asarray(expected))
        assert apart.mean() < 0.1 and apart.max() <= 3


def test_the_jitter_of_a_crop_is_close_to_torchvision_before_cropping():
    adjust = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)
    apart = []
    for index in range(20):
        image = scene(index, (500, 375))
        factors, order = augment.jitter_draw(host_rng(0, "jitter", index), 0.4)
        view = augment.random_view(host_rng(0, "view", index), 375, 500, min_scale=0.2, flip_probability=0.0)
        expected = image
        for operation in order:
            expected = adjust[operation](expected, float(factors[operation]))
        box = (view.top, view.left, view.height, view.width)
        expected = vision.resized_crop(expected, *box, [224, 224], vision.InterpolationMode.BICUBIC)
        pixels = np.asarray(image)
        gray = np.array([augment.jitter_gray(pixels, factors, order)])
        crop = augment.crop_resize(pixels, view, 224)
        ours = np.asarray(preprocess.color_jitter(crop[None], factors[None], order[None], gray))[0]
        apart.append(np.abs(ours - np.asarray(expected)).mean())
    assert np.mean(apart) < 1.0
