"""Implementations of cross entropy against logits in memory: losses, hits, all gradients and memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testing import drawn_variables

from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.layers import Linear
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.models.ops.cross_entropy import head_cross_entropy, rounded_cross_entropy
from beitv2_jax.tasks.losses import masked_cross_entropy
from beitv2_jax.tasks.mim import code_losses

BATCH, MASKED, WIDTH, CLASSES = 3, 5, 7, 23


def arrays(classes=CLASSES, width=WIDTH):
    keys = jax.random.split(jax.random.key(0), 5)
    features = jax.random.normal(keys[0], (BATCH, MASKED, width))
    params = {"kernel": jax.random.normal(keys[1], (width, classes)), "bias": jax.random.normal(keys[2], (classes,))}
    labels = jax.random.randint(keys[3], (BATCH, MASKED), 0, classes)
    labels = labels.at[1].set(jnp.argmax(features[1] @ params["kernel"] + params["bias"], axis=-1))  # some are hit
    return features, params, labels, jax.random.uniform(keys[4], (BATCH, MASKED))


def reference(features, params, labels, *, dtype):
    linear = Linear(len(params["bias"]), compute=Compute(dtype=jnp.dtype(dtype).name), out_dtype=jnp.float32)
    logits = linear.apply({"params": params}, features)
    return masked_cross_entropy(logits, labels), jnp.argmax(logits, axis=-1) == labels


def tiled(features, params, labels, **kwargs):
    return head_cross_entropy(features, **params, labels=labels, **kwargs)


def rounded(features, params, labels, *, dtype):
    linear = Linear(len(params["bias"]), compute=Compute(dtype=jnp.dtype(dtype).name), out_dtype=jnp.float32)
    logits = linear.apply({"params": params}, features)
    return rounded_cross_entropy(logits, labels, dtype), jnp.argmax(logits, axis=-1) == labels


def with_gradients(function, features, params, labels, cotangent):
    @jax.jit
    def run(features, params, labels, cotangent):
        losses, pull, hits = jax.vjp(lambda *a: function(*a, labels), features, params, has_aux=True)
        return [losses, *jax.tree.leaves(pull(cotangent))], hits

    return run(features, params, labels, cotangent)


def distances(found, expected):
    return [jnp.abs(have - want).max() / jnp.abs(want).max() for have, want in zip(found, expected, strict=True)]


IMPLEMENTATIONS = {  # 4 leaves a tile that is not full
    "rounded": rounded,
    "tiles of 4": functools.partial(tiled, tile=4),
    "tiles of 8": functools.partial(tiled, tile=8),
    "one tile": tiled,
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_losses_hits_and_gradients_equal_those_of_whole_logits(name):
    expected, expected_hits = with_gradients(functools.partial(reference, dtype=jnp.float32), *arrays())
    found, hits = with_gradients(functools.partial(IMPLEMENTATIONS[name], dtype=jnp.float32), *arrays())
    assert max(distances(found, expected)) < 2e-6
    np.testing.assert_array_equal(hits, expected_hits)
    assert 0 < hits.sum() < hits.size


@pytest.mark.parametrize("name", ["rounded", "tiles of 8"])
def test_in_bfloat16_it_is_as_near_the_exact_result(name):
    exact, _ = with_gradients(functools.partial(reference, dtype=jnp.float32), *arrays(width=67))
    usual, hits = with_gradients(functools.partial(reference, dtype=jnp.bfloat16), *arrays(width=67))
    found, found_hits = with_gradients(functools.partial(IMPLEMENTATIONS[name], dtype=jnp.bfloat16), *arrays(width=67))
    np.testing.assert_array_equal(found_hits, hits)
    assert max(distances(found, exact)) < 1e-2
    # by default a kernel's gradient leaves its product in float32
    assert all(ours < 2 * theirs for ours, theirs in zip(distances(found, exact), distances(usual, exact), strict=True))


def test_the_lowest_of_equal_logits_is_the_guess():
    features, params, _, _ = arrays()
    params = jax.tree.map(jnp.zeros_like, params)
    for label in (0, 1, CLASSES - 1):
        labels = jnp.full((BATCH, MASKED), label)
        losses, hits = tiled(features, params, labels, dtype=jnp.float32, tile=4)
        np.testing.assert_allclose(losses, np.log(CLASSES), rtol=1e-6)
        assert (hits == (label == 0)).all()


def test_no_array_of_all_logits_is_held():
    features, params, labels, _ = arrays(classes=4096)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((64, *leaf.shape[1:]), leaf.dtype), (features, labels))
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)

    def memory(function):
        def loss(features, params, labels):
            return function(features, params, labels, dtype=jnp.float32)[0].sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(shapes[0], weights, shapes[1]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * MASKED * 4096
    assert memory(reference) >= logits > 2 * memory(functools.partial(tiled, tile=128))


@pytest.mark.parametrize("shared_head", [True, False])
def test_both_branches_of_the_masked_image_model_have_the_same_losses(shared_head):
    sizes = dict(image_size=8, patch_size=4, width=8, depth=2, num_heads=2, mlp_dim=8, codebook_size=CLASSES)
    sizes |= dict(early_layer=1, head_depth=1, shared_head=shared_head)
    model = MaskedImageModel.from_arguments(sizes)
    images = jax.random.normal(jax.random.key(6), (3, 8, 8, 3))
    mask = jnp.array([[True, False, True, False], [True, True, False, False], [False, False, True, True]])
    params = drawn_variables(model, images, mask, num_masked=2)["params"]
    targets = jnp.array([[3, 22], [0, 7], [11, 3]])

    def found(implementation):
        losses = functools.partial(
            code_losses, model.clone(compute=Compute(cross_entropy=implementation)), num_masked=2, train=False
        )
        return jax.jit(losses)(params, images, mask, targets)

    plain_losses, tiled_losses, rounded_losses = found("reference"), found("tiled"), found("rounded")
    assert set(plain_losses) == {"final", "aggregation"}
    chex.assert_trees_all_close(tiled_losses, plain_losses, rtol=1e-5)
    chex.assert_trees_all_close(rounded_losses, plain_losses, rtol=1e-5)
    assert np.abs(plain_losses["final"][0] - plain_losses["aggregation"][0]).min() > 1e-3
