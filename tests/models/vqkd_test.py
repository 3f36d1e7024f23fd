"""The tokenizer's contract: shapes, parameter tree, dtypes, and that training and encoding see the same codes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.quantizer import l2_normalise, updated_state
from beitv2_jax.models.vqkd import VQKD

BATCH, IMAGE_SIZE, PATCHES = 2, 15, 9
CODES, CODE_DIM, TEACHER = 17, 7, 13


def build(**changes):
    arguments = dict(
        image_size=IMAGE_SIZE,
        encoder=dict(patch_size=5, width=22, depth=1, num_heads=2, mlp_dim=19),
        decoder=dict(width=33, depth=1, num_heads=3, mlp_dim=23),
        codebook_size=CODES,
        code_dim=CODE_DIM,
        teacher_width=TEACHER,
    )
    how = {name: changes.pop(name) for name in ("dtype", "remat") if name in changes}
    return VQKD.from_arguments({**arguments, **changes}, Compute(**how))


def apply(model, variables, images, **kwargs):
    return jax.jit(lambda variables, images: model.apply(variables, images, **kwargs))(variables, images)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(0), (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), minval=-1.0)


@pytest.fixture(scope="module")
def variables(images):
    variables = jax.jit(functools.partial(build().init, train=True))(jax.random.key(1), images)
    # initial projections are almost parallel; larger task weights spread the batch over several codes
    variables["params"]["encode_task"]["fc1"]["kernel"] *= 20.0
    return variables


def test_output_shapes(images, variables):
    out = apply(build(), variables, images, train=False)
    chex.assert_shape(out.reconstruction, (BATCH, PATCHES, TEACHER))
    chex.assert_shape(out.code_ids, (BATCH, PATCHES))
    chex.assert_shape([out.codes, out.unit, out.projections], (BATCH, PATCHES, CODE_DIM))
    chex.assert_shape(out.encoder_features, (BATCH, PATCHES, 22))
    chex.assert_shape(out.decoder_features, (BATCH, PATCHES, 33))
    assert out.statistics.counts.sum() == BATCH * PATCHES


def test_parameter_tree_names_and_codebook_is_state(variables):
    assert set(variables) == {"params", "codebook"}
    params = variables["params"]
    assert set(params) == {"encoder", "encoder_norm", "encode_task", "decoder", "decoder_norm", "decode_task"}
    assert set(params["encode_task"]) == {"fc1", "fc2"}
    assert set(variables["codebook"]) == {"quantizer"}
    chex.assert_shape(params["encoder"]["patch_embed"]["kernel"], (5, 5, 3, 22))
    chex.assert_shape(params["decoder"]["patch_embed"]["kernel"], (1, 1, CODE_DIM, 33))
    chex.assert_shape(params["decoder"]["pos_embed"], (1, PATCHES + 1, 33))
    chex.assert_shape(params["decode_task"]["fc2"]["kernel"], (33, TEACHER))


def test_the_published_tokenizer_of_a_wider_teacher_has_the_published_parameter_count():
    transformer = dict(width=768, num_heads=12, mlp_dim=3072)
    model = build(
        image_size=224,
        encoder=dict(patch_size=16, depth=12, **transformer),
        decoder=dict(depth=1, **transformer),
        codebook_size=8192,
        code_dim=32,
        teacher_width=768,
    )
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 94_851_872
    chex.assert_shape(shapes["codebook"]["quantizer"]["codebook"], (8192, 32))


def test_encode_and_project_agree_with_the_full_forward(images, variables):
    model = build()
    out = apply(model, variables, images, train=False)
    np.testing.assert_array_equal(apply(model, variables, images, method=model.encode), out.code_ids)
    projections = apply(model, variables, images, method=model.project)
    np.testing.assert_allclose(projections, out.projections, atol=1e-6)
    np.testing.assert_allclose(l2_normalise(projections), out.unit, atol=1e-6)
    assert len(np.unique(out.code_ids)) > 2


def test_code_ids_are_row_major_and_the_decoder_sees_positions(images, variables):
    """Without attention and positions, an id depends on its own patch: permuted patches give permuted ids."""
    model = build(encoder=dict(patch_size=5, width=22, depth=0, num_heads=2, mlp_dim=19))
    params = {**variables["params"], "encoder": {**variables["params"]["encoder"]}}
    params["encoder"]["pos_embed"] = jnp.zeros_like(params["encoder"]["pos_embed"])
    frozen = {**variables, "params": params}
    patches = images.reshape(BATCH, 3, 5, 3, 5, 3).transpose(0, 1, 3, 2, 4, 5).reshape(BATCH, PATCHES, 5, 5, 3)
    order = np.array([4, 0, 8, 2, 6, 1, 3, 7, 5])
    moved = patches[:, order].reshape(BATCH, 3, 3, 5, 5, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    ids = apply(model, frozen, images, method=model.encode)
    moved_ids = apply(model, frozen, moved, method=model.encode)
    np.testing.assert_array_equal(moved_ids, ids[:, order])
    assert np.any(np.asarray(ids) != np.asarray(moved_ids))


def test_training_moves_codebook_and_gradients_reach_every_parameter(images, variables):
    model = build()
    target = jax.random.normal(jax.random.key(3), (BATCH, PATCHES, TEACHER))

    def loss(params):
        out = model.apply({**variables, "params": params}, images, train=True)
        return jnp.mean((out.reconstruction - target) ** 2) + out.commitment.mean(), out.statistics

    gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)
    state = variables["codebook"]["quantizer"]
    moved = updated_state(state, statistics, model.quantizer)
    assert np.abs(moved["codebook"] - state["codebook"]).max() > 1e-4


def test_bfloat16_keeps_the_quantizer_in_float32(images, variables):
    model = build(dtype="bfloat16")
    out = apply(model, variables, images, train=False)
    chex.assert_type([out.projections, out.codes, out.unit, out.commitment, out.reconstruction], jnp.float32)
    full = apply(build(), variables, images, train=False)
    np.testing.assert_allclose(out.reconstruction, full.reconstruction, atol=0.05 * np.abs(full.reconstruction).max())
    assert np.abs(out.reconstruction - full.reconstruction).max() > 0
    # projections come from bfloat16 features but are no bfloat16 numbers themselves
    assert np.any(np.asarray(out.projections) != np.asarray(out.projections.astype(jnp.bfloat16), np.float32))


def test_remat_changes_no_value(images, variables):
    out = apply(build(), variables, images, train=False)
    again = apply(build(remat="full"), variables, images, train=False)
    chex.assert_trees_all_close(again, out, atol=1e-6)


def test_wrong_sizes_are_refused(images, variables):
    with pytest.raises(ValueError, match="15"):
        build().apply(variables, images[:, :10, :10], train=False)
    with pytest.raises(ValueError, match="multiple"):
        build(image_size=16).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)
    with pytest.raises(TypeError, match="heads"):
        build(decoder=dict(width=33, depth=1, heads=3, mlp_dim=23)).init(jax.random.key(0), images, train=False)
