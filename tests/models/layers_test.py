"""Layers: position table arithmetic, initialisations, attention against a plain NumPy one, stochastic depth."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import drawn_variables

from beitv2_jax.models import layers
from beitv2_jax.models.backbone import Backbone, Compute

BATCH, LENGTH, WIDTH, HEADS, MLP_DIM = 5, 7, 12, 3, 17


def block(width=WIDTH, heads=HEADS, mlp_dim=MLP_DIM, *, dtype="float32", attention="reference", **changes):
    own = {name: changes.pop(name) for name in ("layer_index", "drop_path_rate", "param_init") if name in changes}
    sizes = dict(image_size=1, patch_size=1, width=width, depth=1, num_heads=heads, mlp_dim=mlp_dim)
    return layers.Block(Backbone(**sizes, **changes), Compute(dtype=dtype, attention=attention), **own)


def tokens(seed=0, shape=(BATCH, LENGTH, WIDTH)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_relative_position_index_by_hand():
    expected = [  # 2 by 3 patches: 15 offsets, then [CLS] to all, all to [CLS], [CLS] to [CLS]
        [17, 15, 15, 15, 15, 15, 15],
        [16, 7, 6, 5, 2, 1, 0],
        [16, 8, 7, 6, 3, 2, 1],
        [16, 9, 8, 7, 4, 3, 2],
        [16, 12, 11, 10, 7, 6, 5],
        [16, 13, 12, 11, 8, 7, 6],
        [16, 14, 13, 12, 9, 8, 7],
    ]
    np.testing.assert_array_equal(layers.relative_position_index((2, 3)), expected)


def test_relative_position_index_of_the_released_grid():
    index = layers.relative_position_index((14, 14))
    chex.assert_shape(index, (197, 197))
    assert (np.diag(index)[1:] == 364).all()
    assert (index[0, 1:] == 729).all() and (index[1:, 0] == 730).all() and index[0, 0] == 731
    assert index[1:, 1:].min() == 0 and index[1:, 1:].max() == 728


def test_rotary_positions_by_hand():
    """Centres at -1/2 and 1/2 of a 2 by 2 grid, frequencies 1 and 100^(-1/2); pairs of features as complex numbers."""
    y, x = np.array([-1, -1, 1, 1]) / 2, np.array([-1, 1, -1, 1]) / 2
    angles = 2 * np.pi * np.stack([y, y / 10, x, x / 10], axis=1)
    np.testing.assert_allclose(layers.rotary_angles((2, 2), 8), angles, atol=1e-12)
    qkv = np.random.default_rng(0).normal(size=(2, 7, 3, 3, 2, 4)).astype(np.float32)  # [CLS], a register, padding
    turned = np.asarray(layers.rotate(qkv.reshape(2, 7, 72), 3, (2, 2), 2)).reshape(qkv.shape)
    expected = qkv.copy()
    pairs = (qkv[..., 0, :] + 1j * qkv[..., 1, :])[:, 2:6, :2] * np.exp(1j * angles)[:, None, None]
    expected[:, 2:6, :2] = np.stack([pairs.real, pairs.imag], axis=-2)
    np.testing.assert_allclose(turned, expected, atol=1e-6)
    assert np.abs(turned - qkv).max() > 0.1


@settings(max_examples=20, deadline=None)
@given(gh=st.integers(1, 6), gw=st.integers(1, 6), data=st.data())
def test_relative_position_index_depends_on_the_offset_only(gh, gw, data):
    index = layers.relative_position_index((gh, gw))[1:, 1:]
    n = gh * gw
    query, key = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    rows, columns = divmod(np.arange(n), gw)
    same = (rows[:, None] - rows == rows[query] - rows[key]) & (
        columns[:, None] - columns == columns[query] - columns[key]
    )
    np.testing.assert_array_equal(index == index[query, key], same)


def test_relative_position_bias_reads_its_table():
    grid = (2, 3)
    module = layers.RelativePositionBias(grid, HEADS)
    variables = module.init(jax.random.key(0))
    chex.assert_trees_all_equal(variables, {"params": {"table": jnp.zeros((18, HEADS))}})
    table = jnp.arange(18.0 * HEADS).reshape(18, HEADS)
    bias = module.apply({"params": {"table": table}})
    chex.assert_shape(bias, (HEADS, 7, 7))
    assert bias[2, 1, 4] == table[2, 2] and bias[0, 3, 0] == table[16, 0] and bias[1, 0, 5] == table[15, 1]


@pytest.mark.parametrize("qkv_bias", layers.QKV_BIASES)
def test_attention_equals_plain_numpy(qkv_bias):
    module = layers.Attention(HEADS, qkv_bias)
    bias = np.asarray(tokens(1, (HEADS, LENGTH, LENGTH)))
    params = drawn_variables(module, tokens())["params"]
    x, head_dim = np.asarray(tokens(), np.float64), WIDTH // HEADS
    qkv = x @ np.asarray(params["qkv"]["kernel"], np.float64)
    if qkv_bias == "full":
        qkv += np.asarray(params["qkv"]["bias"])
    elif qkv_bias == "qv":
        qkv[..., :WIDTH] += np.asarray(params["q_bias"])
        qkv[..., 2 * WIDTH :] += np.asarray(params["v_bias"])
    mixed = np.empty_like(x)
    for head in range(HEADS):
        queries, keys, values = (
            qkv[..., part * WIDTH + head * head_dim : part * WIDTH + (head + 1) * head_dim] for part in range(3)
        )
        logits = queries @ keys.transpose(0, 2, 1) / math.sqrt(head_dim) + bias[head]
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        mixed[..., head * head_dim : (head + 1) * head_dim] = weights / weights.sum(-1, keepdims=True) @ values
    expected = mixed @ np.asarray(params["proj"]["kernel"]) + np.asarray(params["proj"]["bias"])
    actual = module.apply({"params": params}, tokens(), bias)
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_attention_refuses_impossible_arguments():
    with pytest.raises(ValueError, match="12 is not divisible by num_heads 5"):
        layers.Attention(5).init(jax.random.key(0), tokens())
    with pytest.raises(ValueError, match="'q'"):
        layers.Attention(3, "q").init(jax.random.key(0), tokens())


def test_activations_are_the_exact_ones():
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    np.testing.assert_allclose(layers.ACTIVATIONS["gelu"](x), erf, atol=1e-6)  # the tanh form is 5e-4 off
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(layers.ACTIVATIONS["gelu_tanh"](x), tanh, atol=1e-6)
    np.testing.assert_allclose(layers.ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def test_a_gated_mlp_multiplies_values_by_the_silu_of_the_gate():
    inputs = np.asarray(tokens(shape=(2, 3, 5)))
    module = layers.Mlp(7, "swiglu")
    params = drawn_variables(module, inputs)["params"]
    assert params["fc1"]["kernel"].shape == (5, 14) and params["fc2"]["kernel"].shape == (7, 5)
    expanded = inputs @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    gate, values = expanded[..., :7], expanded[..., 7:]
    expected = (gate / (1 + np.exp(-gate)) * values) @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, inputs), expected, atol=1e-4)


def test_layer_norm_uses_its_epsilon_and_float32():
    x = 1e-3 * np.asarray(tokens(), np.float64)  # variance near epsilon
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    module = layers.LayerNorm()
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_allclose(module.apply(variables, jnp.asarray(x, jnp.float32)), expected, atol=1e-5)
    assert module.apply(variables, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("biased", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_block_padded_for_cudnn_computes_the_same(monkeypatch, biased):
    """13 tokens become 16; cuDNN itself is stood in for by what jax calls its reference."""
    reference = jax.nn.dot_product_attention
    lengths = []

    def without_cudnn(query, key, value, *, bias, implementation):
        lengths.append((implementation, query.shape[1], key.shape[1]))
        return reference(query, key, value, bias=bias, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    x, cotangent = tokens(0, (2, 13, 16)), tokens(1, (2, 13, 16))
    bias = tokens(2, (2, 13, 13)) if biased else None

    def run(form, dtype):
        module = block(16, 2, 32, layer_scale_init=0.5, dtype=dtype, attention=form)
        params = drawn_variables(block(16, 2, 32, layer_scale_init=0.5), x)["params"]
        arguments = (x, params, bias)

        def apply_and_pull(*arguments):
            outputs, pull = jax.vjp(lambda x, params, bias: module.apply({"params": params}, x, bias), *arguments)
            return outputs, pull(cotangent)

        return jax.tree.leaves(jax.jit(apply_and_pull)(*arguments))

    exact, plain, found = run("reference", "float32"), run("reference", "bfloat16"), run("cudnn", "bfloat16")
    assert lengths == [("cudnn", 16, 16)]
    for have, rounded, want in zip(found, plain, exact, strict=True):
        assert have.shape == want.shape
        assert np.abs(have - want).max() < 2 * np.abs(rounded - want).max() + 1e-3 * np.abs(want).max()


@pytest.mark.parametrize(("scheme", "std", "bound"), [("normal", 0.02, None), ("clipped", 0.0108, 0.02)])
def test_kernel_statistics(scheme, std, bound):
    kernel = layers.normal_init(scheme)(jax.random.key(3), (211, 307))
    np.testing.assert_allclose(jnp.std(kernel), std, rtol=0.01)
    np.testing.assert_allclose(jnp.mean(kernel), 0.0, atol=4e-4)
    largest = jnp.abs(kernel).max()
    assert largest > 0.06 if bound is None else 0.99 * bound < largest <= bound


def test_framework_default_statistics():
    fan_in = 769
    params = layers.Linear(211, param_init="torch").init(jax.random.key(4), jnp.zeros((1, fan_in)))["params"]
    bound = fan_in**-0.5
    for leaf in params.values():
        assert 0.95 * bound < jnp.abs(leaf).max() <= bound
    np.testing.assert_allclose(jnp.std(params["kernel"]), bound / math.sqrt(3), rtol=0.01)
    with pytest.raises(ValueError, match="'xavier'"):
        layers.normal_init("xavier")


@pytest.mark.parametrize("scheme", ["normal", "torch"])
def test_residual_outputs_start_divided_by_depth(scheme):
    def params(layer_index):
        module = block(layer_scale_init=0.3, layer_index=layer_index, param_init=scheme)
        return jax.jit(module.init)(jax.random.key(5), tokens())["params"]

    first, fifth = params(1), params(5)
    std = 0.02 if scheme == "normal" else WIDTH**-0.5 / math.sqrt(3)
    np.testing.assert_allclose(jnp.std(first["attn"]["proj"]["kernel"]), std / math.sqrt(2), rtol=0.2)
    for name in ("attn/proj", "mlp/fc2"):
        group, layer = name.split("/")
        np.testing.assert_allclose(
            fifth[group][layer]["kernel"], first[group][layer]["kernel"] * math.sqrt(2 / 10), rtol=1e-6
        )
    chex.assert_trees_all_equal(fifth["mlp"]["fc1"], first["mlp"]["fc1"])
    chex.assert_trees_all_equal(fifth["attn"]["qkv"], first["attn"]["qkv"])
    assert (fifth["gamma_1"] == 0.3).all() and (fifth["attn"]["q_bias"] == 0).all()


def test_block_branches_are_scaled_and_added():
    module = block(layer_scale_init=0.1)
    params = drawn_variables(module, tokens())["params"]
    silent = {**params, "gamma_1": jnp.zeros(WIDTH), "gamma_2": jnp.zeros(WIDTH)}
    chex.assert_trees_all_equal(module.apply({"params": silent}, tokens()), tokens())
    for without in (None, 0.0):
        bare = drawn_variables(block(layer_scale_init=without), tokens())
        assert set(bare["params"]) == {"norm1", "norm2", "attn", "mlp"}


def test_bfloat16_keeps_the_residual_stream_in_float32():
    module = block(layer_scale_init=1e-3, dtype="bfloat16")
    x = tokens().astype(jnp.bfloat16).astype(jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(9), x)
    outputs = module.apply(variables, x)
    assert outputs.dtype == jnp.float32
    assert (outputs != x).mean() > 0.9  # a bfloat16 sum would round nearly every update of this size away
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_drop_path_drops_samples_and_keeps_the_mean():
    rate, samples = 0.3, 20011
    branch = jnp.broadcast_to(tokens(shape=(1, 2, 3)), (samples, 2, 3))
    dropped = layers.drop_path(branch, rate, jax.random.key(10))
    kept = np.asarray(jnp.all(dropped != 0, axis=(1, 2)))
    np.testing.assert_array_equal(kept, jnp.any(dropped != 0, axis=(1, 2)))
    np.testing.assert_allclose(kept.mean(), 1 - rate, atol=4 * math.sqrt(rate * (1 - rate) / samples))
    np.testing.assert_allclose(dropped[kept][0], branch[0] / (1 - rate), rtol=1e-6)
    chex.assert_trees_all_equal(layers.drop_path(branch, 0.0, jax.random.key(10)), branch)


def test_the_two_branches_of_a_block_are_dropped_independently():
    samples = 997
    module = block(3, 1, 2, drop_path_rate=0.5, qkv_bias="none")
    x = jnp.broadcast_to(tokens(shape=(1, 2, 3)), (samples, 2, 3))
    params = drawn_variables(module, x)["params"]
    params["attn"]["proj"] = {"kernel": jnp.zeros((3, 3)), "bias": jnp.ones(3)}
    params["mlp"]["fc2"] = {"kernel": jnp.zeros((2, 3)), "bias": 10 * jnp.ones(3)}
    outputs = module.apply({"params": params}, x, train=True, rngs={"drop_path": jax.random.key(12)})
    added = np.rint(np.asarray(outputs - x)[:, 0, 0]).astype(int)
    values, counts = np.unique(added, return_counts=True)
    np.testing.assert_array_equal(values, [0, 2, 20, 22])  # every combination of 1/0.5 and 10/0.5 occurs
    np.testing.assert_allclose(counts / samples, 0.25, atol=0.06)


def factors(jaxpr):
    """Yield the dtypes of the factors of every product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (str(factor.aval.dtype) for factor in equation.invars)
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr"):
                yield from factors(inner.jaxpr)


def test_all_products_of_a_bfloat16_block_and_head_are_of_bfloat16():
    module = block(layer_scale_init=0.1, dtype="bfloat16")
    head = layers.Linear(29, compute=Compute(dtype="bfloat16"), out_dtype=jnp.float32)
    bias, key = jnp.zeros((HEADS, LENGTH, LENGTH)), jax.random.key(0)
    params = module.init(key, tokens(), bias), head.init(key, tokens())

    def loss(params, tokens, bias):
        return jnp.sum(head.apply(params[1], module.apply(params[0], tokens, bias)) ** 2)

    found = list(factors(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(params, tokens(), bias).jaxpr))
    assert len(found) == 2 * 3 * 7 and set(found) == {"bfloat16"}


def test_drop_path_rates_rise_linearly():
    np.testing.assert_allclose(layers.drop_path_rates(0.3, 4), [0.0, 0.1, 0.2, 0.3])
    assert layers.drop_path_rates(0.3, 1) == [0.0]


def test_a_given_parameter_is_not_drawn_and_must_have_its_shape():
    class Scaled(layers.Module):
        @nn.compact
        def __call__(self, inputs):
            return inputs * self.param("scale", draw, (3,))

    calls = []

    def draw(key, shape):
        calls.append(shape)
        return jnp.full(shape, 2.0)

    variables = Scaled().init(jax.random.key(0), jnp.ones(3))
    np.testing.assert_array_equal(variables["params"]["scale"], [2.0] * 3)
    np.testing.assert_array_equal(Scaled().apply({"params": {"scale": jnp.arange(3.0)}}, jnp.ones(3)), [0, 1, 2])
    assert calls == [(3,)]
    with pytest.raises(ScopeParamShapeError, match="scale"):
        Scaled().apply({"params": {"scale": jnp.ones(1)}}, jnp.ones(3))
