"""Teachers: the patch features of timm and of the released DINO teacher, and the contract of the class."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import GOLDEN
from teacher_cases import SIZES
from testing import drawn_variables

from beitv2_jax.convert.teachers.weights import from_state
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.layers import LayerNorm
from beitv2_jax.models.preprocess import NORMALIZATIONS
from beitv2_jax.models.teachers import NormalisedViT, Teacher, classifier_tokens, vit_tokens
from beitv2_jax.models.vit import VisionTransformer


def echo(normalization="half", **changes):
    """Return a teacher whose tokens are the pixels of the first row, times its only parameter."""
    teacher = Teacher(
        name="echo",
        weights_hash="0" * 16,
        choices={},
        normalization=normalization,
        image_size=6,
        input_size=6,
        network_grid=(1, 5),
        grid=(1, 5),
        width=3,
        num_prefix_tokens=1,
        tokens=lambda params, images: params * images[:, 0],
    )
    return dataclasses.replace(teacher, **changes)


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
    return state, arrays, json.loads(str(arrays["config"]))


def build(state, normalization, num_heads=3):
    weights = from_state(state, num_heads=num_heads)
    teacher = echo(
        normalization,
        image_size=32,
        input_size=32,
        network_grid=(4, 4),
        grid=(4, 4),
        width=48,
        tokens=vit_tokens(NormalisedViT(Backbone(**weights.arguments))),
    )
    return teacher, weights.params


def relative_error(ours, golden):
    chex.assert_equal_shape([ours, golden])
    return np.abs(ours - golden).max() / np.abs(golden).max()


def test_patch_features_equal_timm():
    state, arrays, config = load("timm_vit")
    teacher, params = build(state, "half", config["num_heads"])
    features = jax.jit(teacher.features)(params, arrays["in/image"])
    assert features.dtype == jnp.float32
    assert relative_error(features, arrays["out/tokens"][:, 1:]) < 1e-5


@pytest.mark.parametrize("normalization", sorted(NORMALIZATIONS))
def test_teacher_normalises_pixels_itself_and_drops_what_precedes_the_patches(normalization):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    mean, std = (np.array(numbers) for numbers in NORMALIZATIONS[normalization])
    expected = 2.0 * (pixels[:, 0] / 255.0 - mean) / std
    np.testing.assert_allclose(echo(normalization).features(2.0, pixels), expected[:, 1:], atol=1e-5)
    for prefix in (0, 2):
        teacher = echo(normalization, num_prefix_tokens=prefix)
        np.testing.assert_allclose(teacher.features(2.0, pixels), expected[:, prefix:], atol=1e-5)


def test_a_teacher_of_another_input_size_sees_resized_images():
    pixels = np.full((2, 12, 12, 3), 51, np.uint8)
    seen = echo(image_size=12).features(1.0, pixels)
    np.testing.assert_allclose(seen, np.full((2, 5, 3), 51 / 127.5 - 1), atol=1e-6)


def test_features_of_another_grid_are_resampled_in_place():
    """A map that rises along the rows and falls along the columns does so on the smaller grid."""
    rows, columns = np.indices((12, 12))
    features = np.stack([rows, 11 - columns, 0 * rows], axis=-1).reshape(1, 144, 3).astype(np.float32)
    tokens = np.concatenate([np.full((1, 1, 3), 1e6, np.float32), features], axis=1)
    teacher = echo(network_grid=(12, 12), grid=(4, 4), tokens=lambda params, images: params * tokens)
    resampled = np.asarray(teacher.features(1.0, np.zeros((1, 6, 6, 3), np.uint8))).reshape(4, 4, 3)
    expected = np.broadcast_to(np.array([4.0, 7.0])[:, None], (2, 2))
    np.testing.assert_allclose(resampled[1:3, 1:3, 0], expected, atol=0.1)
    np.testing.assert_allclose(resampled[1:3, 1:3, 1], 11 - expected.T, atol=0.1)
    np.testing.assert_allclose(resampled[..., 2], 0.0, atol=1e-6)


def test_no_gradient_passes_a_teacher():
    gradient = jax.grad(lambda params: echo().features(params, np.full((1, 6, 6, 3), 200, np.uint8)).sum())(2.0)
    assert gradient == 0.0


def test_weights_are_arguments_and_never_constants_of_the_program():
    state, arrays, _ = load("timm_vit")
    teacher, params = build(state, "half")
    image = arrays["in/image"][:1]
    zeros = jax.tree.map(np.zeros_like, params)
    jaxpr = jax.make_jaxpr(teacher.features)(params, image)
    assert all(np.size(constant) <= 3 for constant in jaxpr.consts)
    assert np.all(jax.jit(teacher.features)(zeros, image) == 0.0)


def test_the_projection_comes_after_the_norm_and_reads_every_token():
    backbone = Backbone(image_size=6, patch_size=2, width=10, depth=1, num_heads=2, mlp_dim=7, norm_eps=0.1)
    images = np.random.default_rng(1).normal(size=(3, 6, 6, 3)).astype(np.float32)
    model = NormalisedViT(backbone, 4)
    params = drawn_variables(model, images)["params"]
    projected = jax.jit(vit_tokens(model))(params, images)
    tokens = jax.jit(VisionTransformer(backbone).apply)({"params": params["backbone"]}, images).tokens
    normalised = LayerNorm(0.1).apply({"params": params["norm"]}, tokens)
    chex.assert_shape(projected, (3, 10, 4))
    np.testing.assert_allclose(projected, normalised @ params["projection"]["kernel"], atol=1e-4)


def test_classifier_tokens_are_those_in_front_of_the_head():
    arguments = dict(
        image_size=6, patch_size=2, width=10, depth=1, num_heads=2, mlp_dim=7, num_classes=5, position="absolute"
    )
    model = Classifier.from_arguments(arguments)
    images = np.random.default_rng(1).normal(size=(3, 6, 6, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    tokens = jax.jit(classifier_tokens(model))(params, images)
    expected = jax.jit(functools.partial(model.apply, method=Classifier.features))({"params": params}, images)
    np.testing.assert_allclose(tokens, expected, atol=1e-6)
    np.testing.assert_allclose(np.mean(tokens, axis=-1), 0.0, atol=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"48, 48.*6, 6"):
        echo().features(1.0, np.zeros((1, 48, 48, 3), np.uint8))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(name):
    arguments, projection_dim, expected = SIZES[name]
    size = arguments["image_size"]
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)

    def count(depth):
        model = NormalisedViT(Backbone(**{**arguments, "depth": depth}), projection_dim)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), images)))

    # all blocks have the same structure, so two of them are enough
    one, two = count(1), count(2)
    assert one + (arguments["depth"] - 1) * (two - one) == expected
