"""The masked image model: gathering, both heads, where they read, stochastic depth, sizes of the released models."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import drawn_variables

from beitv2_jax.models.layers import Block
from beitv2_jax.models.mim import MaskedImageModel, gather_masked

BATCH, NUM_MASKED, NUM_PATCHES, CODES = 5, 4, 9, 13
TINY = dict(
    image_size=21,
    patch_size=7,
    width=6,
    depth=3,
    num_heads=3,
    mlp_dim=11,
    codebook_size=CODES,
    early_layer=2,
    head_depth=2,
)
BASE = dict(image_size=224, patch_size=16, width=768, depth=12, num_heads=12, mlp_dim=3072, codebook_size=8192)


def build(arguments, **changes):
    return MaskedImageModel.from_arguments({**arguments, **changes})


def images(seed=0):
    return jax.random.normal(jax.random.key(seed), (BATCH, 21, 21, 3))


def exact_mask(seed=1, batch=BATCH, num_patches=NUM_PATCHES, num_masked=NUM_MASKED):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_patches) < num_masked for _ in range(batch)])


def visible(model):
    return drawn_variables(model, images(), exact_mask(), num_masked=NUM_MASKED)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), num_masked=st.integers(1, 11))
def test_gathering_equals_boolean_indexing(seed, num_masked):
    mask = exact_mask(seed, 3, 11, num_masked)
    values = np.arange(3 * 11 * 2).reshape(3, 11, 2)
    np.testing.assert_array_equal(gather_masked(values, mask, num_masked).reshape(-1, 2), values[mask])
    np.testing.assert_array_equal(gather_masked(values[..., 0], mask, num_masked).reshape(-1), values[mask][:, 0])


@pytest.mark.parametrize("shared", [True, False])
def test_logits_are_those_of_the_hidden_patches(shared):
    model = build(TINY, shared_head=shared)
    variables, mask = visible(model), exact_mask()
    gathered = jax.jit(functools.partial(model.apply, num_masked=NUM_MASKED))(variables, images(), mask)
    everywhere = jax.jit(functools.partial(model.apply, method="logits_everywhere"))(variables, images(), mask)
    for some, every in zip(gathered, everywhere, strict=True):
        chex.assert_shape(some, (BATCH, NUM_MASKED, CODES))
        chex.assert_shape(every, (BATCH, NUM_PATCHES, CODES))
        np.testing.assert_allclose(some.reshape(-1, CODES), every[mask], atol=1e-5)
    own = {"aggregation_norm", "aggregation_lm_head"}
    assert set(variables["params"]) == {"backbone", "norm", "lm_head", "aggregation_0", "aggregation_1"} | (
        set() if shared else own
    )


@pytest.mark.parametrize("early_layer", [1, 2, 3])
def test_the_aggregation_head_reads_the_patches_after_block_early_layer(early_layer):
    """Aggregation blocks that add nothing give the logits of a model that ends after block `early_layer`."""
    model = build(TINY, early_layer=early_layer)
    params = visible(model)["params"]
    nothing = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("aggregation_0", "aggregation_1")}
    shallow = build(TINY, depth=early_layer, patch_aggregation=False)
    found = model.apply({"params": {**params, **nothing}}, images(), exact_mask(), num_masked=NUM_MASKED)
    expected = shallow.apply({"params": params}, images(), exact_mask(), num_masked=NUM_MASKED)
    np.testing.assert_allclose(found.aggregation_logits, expected.logits, atol=1e-6)


def test_without_aggregation_there_is_one_head():
    model = build(TINY, early_layer=99, patch_aggregation=False)  # early_layer has no meaning here
    variables = visible(model)
    assert set(variables["params"]) == {"backbone", "norm", "lm_head"}
    assert model.apply(variables, images(), exact_mask(), num_masked=NUM_MASKED).aggregation_logits is None


def test_masked_pixels_have_exactly_no_gradient_on_any_output():
    model = build(TINY)
    variables, mask = visible(model), exact_mask()

    def outputs(pixels):
        return model.apply(variables, pixels, mask, method="logits_everywhere")

    def gradients(pixels):
        logits, pullback = jax.vjp(outputs, pixels)
        weights = jax.random.normal(jax.random.key(3), logits.logits.shape)
        nothing = jnp.zeros_like(weights)
        return pullback(logits._replace(logits=weights, aggregation_logits=nothing)) + pullback(
            logits._replace(logits=nothing, aggregation_logits=weights)
        )

    for gradient in jax.jit(gradients)(images()):
        per_patch = jnp.abs(gradient).reshape(BATCH, 3, 7, 3, 7, 3).max(axis=(2, 4, 5)).reshape(BATCH, NUM_PATCHES)
        np.testing.assert_array_equal(per_patch == 0, mask)


def test_each_head_trains_what_it_reads():
    model = build(TINY)
    variables = visible(model)

    def gradient(name):
        def loss(params):
            output = model.apply({"params": params}, images(), exact_mask(), num_masked=NUM_MASKED)
            return jnp.sum(jnp.sin(getattr(output, name)))

        return jax.grad(loss)(variables["params"])

    def both(_):
        return gradient("logits"), gradient("aggregation_logits")

    main, aggregated = jax.jit(both)(0)
    for name in ("aggregation_0", "aggregation_1"):
        assert not any(leaf.any() for leaf in jax.tree.leaves(main[name]))
        assert all(leaf.any() for leaf in jax.tree.leaves(aggregated[name]))
    # the last block lies above early_layer: the aggregation head reaches it through [CLS]
    assert all(leaf.any() for leaf in jax.tree.leaves(aggregated["backbone"]["blocks_2"]))


def test_stochastic_depth_of_the_released_base_model():
    model = build(BASE, width=12, num_heads=3, mlp_dim=5, codebook_size=7, drop_path_rate=0.1)
    rates = {}

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, Block):
            rates[context.module.path[-1]] = context.module.drop_path_rate
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(
            functools.partial(model.init, num_masked=75), jax.random.key(0), jnp.zeros((1, 224, 224, 3)), mask_196()
        )
    np.testing.assert_allclose([rates["aggregation_0"], rates["aggregation_1"]], [0.08182, 0.09091], atol=5e-6)
    np.testing.assert_allclose([rates[f"blocks_{i}"] for i in range(12)], np.arange(12) * 0.1 / 11)


def test_only_training_is_random():
    model = build(TINY, drop_path_rate=0.9)
    variables = visible(model)

    applied = {
        train: jax.jit(functools.partial(model.apply, num_masked=NUM_MASKED, train=train)) for train in (False, True)
    }

    def run(train, seed):
        return applied[train](variables, images(), exact_mask(), rngs={"drop_path": jax.random.key(seed)})

    chex.assert_trees_all_equal(run(False, 4), run(False, 5))
    chex.assert_trees_all_equal(run(True, 4), run(True, 4))
    for first, second in zip(run(True, 4), run(True, 5), strict=True):
        assert (first != second).any()


def test_init_of_both_parts():
    model = build(TINY, width=48, depth=2, mlp_dim=211, codebook_size=509, early_layer=1, head_depth=1)
    init = jax.jit(functools.partial(model.init, num_masked=NUM_MASKED))
    params = init(jax.random.key(6), images(), exact_mask())["params"]
    clipped = {"lm_head/kernel": 1, "backbone/patch_embed/kernel": 1, "backbone/blocks_1/mlp/fc1/kernel": 1}
    clipped |= {"backbone/blocks_1/mlp/fc2/kernel": 4**-0.5, "backbone/blocks_0/attn/proj/kernel": 2**-0.5}
    flat = traverse_util.flatten_dict(params, sep="/")
    for name, scale in clipped.items():
        np.testing.assert_allclose(jnp.std(flat[name]), 0.0108 * scale, rtol=0.03, err_msg=name)
        assert jnp.abs(flat[name]).max() <= 0.02 * scale * 1.0001, name
    # head blocks keep the framework's default; the first one is block early_layer + 1 = 2
    for name, bound in {"attn/qkv/kernel": 48**-0.5, "mlp/fc2/kernel": 211**-0.5 * 4**-0.5}.items():
        leaf = flat[f"aggregation_0/{name}"]
        np.testing.assert_allclose(jnp.std(leaf), bound / 3**0.5, rtol=0.03, err_msg=name)
        assert jnp.abs(leaf).max() <= bound * 1.0001, name
    zero = {name for name, leaf in flat.items() if not leaf.any()}
    assert {"lm_head/bias", "backbone/patch_embed/bias", "backbone/rel_pos_bias/table"} <= zero
    assert "aggregation_0/mlp/fc1/bias" not in zero and (flat["aggregation_0/gamma_2"] == 0.1).all()


def test_parameter_count_of_the_released_model_with_a_head_of_its_own():
    init = functools.partial(build(dict(BASE, shared_head=False)).init, num_masked=75)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)), mask_196())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 112_444_240


def mask_196():
    return jnp.arange(196)[None] < 75


def test_wrong_sizes_are_refused_at_construction():
    for early_layer in (0, 4):
        with pytest.raises(ValueError, match=f"early_layer {early_layer} .* 3 blocks"):
            build(TINY, early_layer=early_layer)
    with pytest.raises(ValueError, match="head_depth 0"):
        build(TINY, head_depth=0)
