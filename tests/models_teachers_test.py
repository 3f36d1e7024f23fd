"""Teachers: the patch features of timm and of the released DINO teacher, and the contract of the class."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testing import quick_jit

from beitv2_jax.convert.timm import vit_from_timm
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize
from beitv2_jax.models.teachers import KINDS, Teacher, vit_teacher

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
    return state, arrays, json.loads(str(arrays["config"]))


def build(state, normalization, num_heads=3):
    arguments, params = vit_from_timm(state, num_heads)
    teacher = vit_teacher(name="golden", weights_hash="0" * 16, normalization=normalization, arguments=arguments)
    return teacher, params


def relative_error(ours, golden):
    chex.assert_equal_shape([ours, golden])
    return np.abs(ours - golden).max() / np.abs(golden).max()


def test_patch_features_equal_timm():
    state, arrays, config = load("timm_vit")
    teacher, params = build(state, "half", config["num_heads"])
    assert (teacher.image_size, teacher.grid, teacher.width) == (32, (4, 4), 48)
    features = quick_jit(teacher.features)(params, arrays["in/image"])
    assert features.dtype == jnp.float32
    assert relative_error(features, arrays["out/tokens"][:, 1:]) < 1e-5


def test_patch_features_equal_the_released_dino_teacher():
    state, arrays, _ = load("dino_teacher")
    teacher, params = build(state, "imagenet")
    images = 255.0 * arrays["in/image"].transpose(0, 2, 3, 1)
    normalised = normalize(images, *NORMALIZATIONS["imagenet"]).transpose(0, 3, 1, 2)
    assert relative_error(normalised, arrays["out/normalised_input"]) < 1e-5
    tokens = quick_jit(teacher.tokens)(params, normalize(images, *NORMALIZATIONS["imagenet"]))
    assert relative_error(tokens, arrays["out/all_tokens"]) < 1e-5
    assert relative_error(quick_jit(teacher.features)(params, images), arrays["out/target"]) < 1e-5


@pytest.mark.parametrize("normalization", sorted(NORMALIZATIONS))
def test_teacher_normalises_pixels_itself_and_drops_cls(normalization):
    teacher = Teacher("echo", 3, (1, 5), 9, "0" * 16, normalization, lambda params, images: params * images[:, 0])
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 3), dtype=np.uint8)
    mean, std = (np.array(numbers) for numbers in NORMALIZATIONS[normalization])
    expected = 2.0 * (pixels[:, 0, 1:] / 255.0 - mean) / std
    np.testing.assert_allclose(teacher.features(2.0, pixels), expected, atol=1e-5)


def test_no_gradient_passes_a_teacher():
    teacher = Teacher("echo", 3, (1, 2), 3, "0" * 16, "half", lambda params, images: params * images[:, 0])
    gradient = jax.grad(lambda params: teacher.features(params, np.full((1, 3, 3, 3), 200, np.uint8)).sum())(2.0)
    assert gradient == 0.0


def test_weights_are_arguments_and_never_constants_of_the_program():
    state, arrays, _ = load("timm_vit")
    teacher, params = build(state, "half")
    image = arrays["in/image"][:1]
    zeros = jax.tree.map(np.zeros_like, params)
    jaxpr = jax.make_jaxpr(teacher.features)(params, image)
    assert all(np.size(constant) <= 3 for constant in jaxpr.consts)
    assert np.all(quick_jit(teacher.features)(zeros, image) == 0.0)


def test_classifier_teacher_reads_the_tokens_in_front_of_the_head():
    arguments = dict(
        image_size=6, patch_size=2, width=10, depth=1, num_heads=2, mlp_dim=7, num_classes=5, position="absolute"
    )
    model = Classifier(**arguments)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    images = normalize(pixels, *NORMALIZATIONS["imagenet"])
    params = quick_jit(model.init)(jax.random.key(0), images)["params"]
    teacher = KINDS["classifier"](name="ours", weights_hash="1" * 16, normalization="imagenet", arguments=arguments)
    features = quick_jit(teacher.features)(params, pixels)
    assert (teacher.name, teacher.grid, teacher.width) == ("ours", (3, 3), 10)
    chex.assert_shape(features, (3, 9, 10))
    tokens = quick_jit(functools.partial(model.apply, method=Classifier.features))({"params": params}, images)
    np.testing.assert_allclose(features, tokens[:, 1:], atol=1e-6)
    np.testing.assert_allclose(np.mean(features, axis=-1), 0.0, atol=1e-5)


def test_images_of_another_size_are_refused():
    state, _, _ = load("timm_vit")
    teacher, params = build(state, "half")
    with pytest.raises(ValueError, match=r"48, 48.*32, 32"):
        teacher.features(params, np.zeros((1, 48, 48, 3), np.uint8))
