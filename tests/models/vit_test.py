"""The transformer: shapes, names, positions, masking, determinism, wrong arguments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from testing import drawn_variables

from beitv2_jax.models.backbone import Backbone, Compute
from beitv2_jax.models.vit import ConvStem, PatchEmbed, VisionTransformer

BATCH, SIZE, PATCH, WIDTH, DEPTH, HEADS, MLP_DIM = 5, 21, 7, 6, 2, 3, 11
NUM_PATCHES = 9


SIZES = dict(image_size=SIZE, patch_size=PATCH, width=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_dim=MLP_DIM)


def build(**changes):
    how = {name: changes.pop(name) for name in ("dtype", "remat") if name in changes}
    return VisionTransformer(Backbone(**{**SIZES, **changes}), Compute(**how))


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, SIZE, SIZE, 3))


def random_mask(seed=1):
    return jax.random.bernoulli(jax.random.key(seed), 0.4, (BATCH, NUM_PATCHES))


def names(variables):
    return {name for name in traverse_util.flatten_dict(variables["params"], sep="/") if not name.startswith("blocks")}


@pytest.mark.parametrize("position", ["absolute", "relative_shared", "relative", "none"])
def test_shapes_and_names(position):
    model = build(position=position, mask_token=True, pre_norm=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), images())
    output = jax.eval_shape(model.apply, variables, images(), random_mask())
    assert model.backbone.grid == (3, 3) and model.backbone.num_patches == NUM_PATCHES
    chex.assert_shape([output.tokens, *output.hidden], (BATCH, 1 + NUM_PATCHES, WIDTH))
    assert len(output.hidden) == DEPTH and (output.bias is not None) == (position == "relative_shared")
    top = {"cls_token", "mask_token", "patch_embed/kernel", "patch_embed/bias", "pre_norm/scale", "pre_norm/bias"}
    extra = {"absolute": {"pos_embed"}, "relative_shared": {"rel_pos_bias/table"}}.get(position, set())
    assert names(variables) == top | extra
    own_table = "rel_pos_bias" in variables["params"]["blocks_1"]["attn"]
    assert own_table == (position == "relative")


def test_patch_embedding_is_a_row_major_strided_convolution():
    module = PatchEmbed(Backbone(**SIZES))
    variables = drawn_variables(module, images())
    params = variables["params"]
    convolved = jax.lax.conv_general_dilated(
        images(), params["kernel"], (PATCH, PATCH), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = convolved.reshape(BATCH, NUM_PATCHES, WIDTH) + params["bias"]
    np.testing.assert_allclose(module.apply(variables, images()), expected, atol=1e-4)


@pytest.mark.parametrize("scheme", ["normal", "clipped"])
def test_patch_embedding_init(scheme):
    channels, fan_in = 32, 32 * PATCH**2
    model = PatchEmbed(Backbone(**{**SIZES, "width": 31}, param_init=scheme))
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, SIZE, SIZE, channels)))["params"]
    if scheme == "clipped":
        assert (params["bias"] == 0).all()
        np.testing.assert_allclose(jnp.std(params["kernel"]), 0.0108, rtol=0.02)
    else:
        bound = fan_in**-0.5
        for leaf in params.values():
            assert 0.8 * bound < jnp.abs(leaf).max() <= bound
        np.testing.assert_allclose(jnp.std(params["kernel"]), bound / 3**0.5, rtol=0.02)
    assert "bias" not in PatchEmbed(Backbone(**SIZES, patch_bias=False)).init(jax.random.key(3), images())["params"]


def test_special_tokens_follow_the_init():
    model = build(image_size=14, width=1009, depth=0, mask_token=True, param_init="clipped")
    params = model.init(jax.random.key(4), jnp.zeros((1, 14, 14, 3)))["params"]
    for name in ("cls_token", "mask_token", "pos_embed"):
        np.testing.assert_allclose(jnp.std(params[name]), 0.0108, rtol=0.05)
        assert jnp.abs(params[name]).max() <= 0.02


def test_every_parameter_matters():
    model = build(position="relative_shared", mask_token=True, pre_norm=True, layer_scale_init=0.1)
    variables = drawn_variables(model, images())
    gradients = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, images(), random_mask()).tokens ** 2)))(variables)
    silent = [name for name, g in traverse_util.flatten_dict(gradients["params"], sep="/").items() if not g.any()]
    assert not silent


def test_masked_pixels_have_exactly_no_influence_and_visible_ones_have():
    model = build(position="relative_shared", mask_token=True)
    variables = drawn_variables(model, images())
    mask = random_mask()

    def summary(pixels, weights):
        output = model.apply(variables, pixels, mask)
        return sum(jnp.sum(weights * jnp.tanh(tokens)) for tokens in output.hidden)

    gradient = jax.jit(jax.grad(summary))(images(), jax.random.normal(jax.random.key(5), (BATCH, 10, WIDTH)))
    per_patch = jnp.abs(gradient).reshape(BATCH, 3, PATCH, 3, PATCH, 3).max(axis=(2, 4, 5)).reshape(BATCH, NUM_PATCHES)
    np.testing.assert_array_equal(per_patch == 0, mask)


def test_cls_token_comes_first():
    model = build(position="none", mask_token=True)
    variables = drawn_variables(model, images())
    everything = jnp.ones((BATCH, NUM_PATCHES), bool)
    tokens = jax.jit(model.apply)(variables, images(), everything).tokens
    # with every patch hidden and no positions all patch tokens are equal, and only the first token differs
    np.testing.assert_allclose(tokens[:, 1:], jnp.broadcast_to(tokens[:1, 1:2], tokens[:, 1:].shape), atol=1e-5)
    assert jnp.abs(tokens[:, 0] - tokens[:, 1]).max() > 0.1


def test_registers_stand_between_cls_and_patches_and_have_no_position():
    model = build(depth=0, num_registers=2)  # no block: the embedded tokens
    params = drawn_variables(model, images())["params"]
    assert model.backbone.num_prefix_tokens == 3
    chex.assert_shape(params["register_tokens"], (1, 2, WIDTH))
    chex.assert_shape(params["pos_embed"], (1, 1 + NUM_PATCHES, WIDTH))

    tokens = model.apply({"params": params}, images()).tokens
    chex.assert_shape(tokens, (BATCH, 3 + NUM_PATCHES, WIDTH))
    np.testing.assert_array_equal(tokens[:, 1:3], jnp.broadcast_to(params["register_tokens"], (BATCH, 2, WIDTH)))
    plain = build(depth=0).apply({"params": params}, images()).tokens
    np.testing.assert_array_equal(jnp.delete(tokens, jnp.array([1, 2]), axis=1), plain)


def test_without_a_class_token_only_patches_are_left():
    model = build(class_token=False)
    params = drawn_variables(model, images())["params"]
    assert model.backbone.num_prefix_tokens == 0 and "cls_token" not in params
    chex.assert_shape(params["pos_embed"], (1, NUM_PATCHES, WIDTH))
    chex.assert_shape(jax.jit(model.apply)({"params": params}, images()).tokens, (BATCH, NUM_PATCHES, WIDTH))


@pytest.mark.parametrize("other", [{"class_token": False}, {"num_registers": 1}])
@pytest.mark.parametrize("position", ["relative", "relative_shared"])
def test_relative_positions_know_cls_and_patches_only(position, other):
    with pytest.raises(ValueError, match=position):
        build(position=position, **other)


def test_only_training_is_random():
    model = build(drop_path_rate=0.9)
    variables = drawn_variables(model, images())

    applied = {train: jax.jit(functools.partial(model.apply, train=train)) for train in (False, True)}

    def run(train, seed):
        return applied[train](variables, images(), rngs={"drop_path": jax.random.key(seed)}).tokens

    chex.assert_trees_all_equal(run(False, 6), run(False, 7))
    chex.assert_trees_all_equal(run(True, 6), run(True, 6))
    assert (run(True, 6) != run(True, 7)).any()


def loss_of(model):
    def loss(variables):
        output = model.apply(variables, images(), train=True, rngs={"drop_path": jax.random.key(8)})
        return jnp.sum(output.tokens**2) + sum(jnp.sum(jnp.sin(tokens)) for tokens in output.hidden)

    return loss


@pytest.mark.long
def test_remat_keeps_names_and_gradients():
    models = {remat: build(drop_path_rate=0.9, remat=remat) for remat in ("none", "dots", "full")}
    variables = drawn_variables(models["none"], images())
    expected = jax.jit(jax.grad(loss_of(models["none"])))(variables)
    bound = 1e-6 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for model in models.values():
        chex.assert_trees_all_equal(variables, drawn_variables(model, images()))
        chex.assert_trees_all_close(jax.jit(jax.grad(loss_of(model)))(variables), expected, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_computes_again_what_it_does_not_keep(dtype):
    variables = drawn_variables(build(), images())

    def products(remat):
        model = build(remat=remat, dtype=dtype, layer_scale_init=0.0)
        return str(jax.make_jaxpr(jax.grad(loss_of(model)))(variables)).count("dot_general")

    # of the six products of a block: none; those of two activations; all but the last, whose output is not needed again
    assert products("dots") == products("none") + 2 * DEPTH
    assert products("full") == products("none") + 5 * DEPTH


def test_activations_are_constrained_once_after_the_embedding_and_after_each_block():
    variables = drawn_variables(build(), images())
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "x"),)):
        program = str(jax.make_jaxpr(lambda v: build().apply(v, jnp.zeros((8, SIZE, SIZE, 3))))(variables))
    assert program.count("sharding_constraint") == 1 + DEPTH


def test_bfloat16_is_close_and_hands_out_float32():
    variables = drawn_variables(build(), images())
    exact, rounded = (
        build().apply(variables, images()).tokens,
        build(dtype="bfloat16").apply(variables, images()).tokens,
    )
    assert rounded.dtype == jnp.float32
    assert 0 < jnp.abs(exact - rounded).max() < 0.1 * jnp.abs(exact).max()


def test_wrong_arguments_name_the_sizes():
    with pytest.raises(ValueError, match=r"image_size 20 .* patch_size 7"):
        build(image_size=20)
    with pytest.raises(ValueError, match="'sinusoidal'"):
        build(position="sinusoidal")
    with pytest.raises(ValueError, match=r"\(5, 28, 21, 3\).*\(batch, 21, 21, channels\)"):
        build().init(jax.random.key(0), jnp.zeros((BATCH, 28, 21, 3)))


def test_the_conv_stem_sees_one_patch_at_a_time():
    """Nothing crosses a patch border: a hidden patch must not leak into its neighbours' tokens."""
    model = ConvStem(patch_size=8, width=24)
    images = jax.random.normal(jax.random.key(0), (2, 16, 24, 3))
    params = model.init(jax.random.key(1), images)
    tokens = model.apply(params, images)
    assert tokens.shape == (2, 6, 24)
    changed = model.apply(params, images.at[:, 8:16, 8:16].add(1.0))  # row 1, column 1: patch 4
    moved = jnp.abs(changed - tokens).max(axis=(0, 2))
    assert moved[4] > 0.01
    np.testing.assert_array_equal(moved[jnp.array([0, 1, 2, 3, 5])], 0.0)


def test_the_conv_stem_gives_every_patch_the_same_function():
    model = ConvStem(patch_size=4, width=8)
    patch = jax.random.normal(jax.random.key(2), (1, 4, 4, 3))
    params = model.init(jax.random.key(3), patch)
    alone = model.apply(params, patch)
    tiled = model.apply(params, jnp.tile(patch, (1, 2, 3, 1)))
    np.testing.assert_allclose(tiled, jnp.broadcast_to(alone, (1, 6, 8)), atol=1e-6)


@pytest.mark.parametrize("arguments", [{"stem": "cnn"}, {"stem": "conv", "patch_size": 12, "image_size": 24}])
def test_a_stem_that_cannot_be_built_is_refused(arguments):
    with pytest.raises(ValueError, match="stem"):
        build(**arguments)
