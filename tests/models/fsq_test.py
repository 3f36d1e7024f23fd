"""Finite scalar quantization against NumPy: levels and ids, values, gradient, counts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models.fsq import FiniteScalarQuantizer
from beitv2_jax.models.quantizer import QuantizerOptions, updated_state

LEVELS = (5, 2, 4)
CODES, CODE_DIM = 40, 3


def start():
    options = QuantizerOptions(codebook_size=CODES, code_dim=CODE_DIM, quantizer="fsq", fsq_levels=LEVELS)
    module = FiniteScalarQuantizer(options)
    return module, module.init(jax.random.key(0), projections())


def projections():
    return jax.random.normal(jax.random.key(1), (4, 6, CODE_DIM)) * jnp.array([0.5, 1.0, 3.0])


def test_every_combination_of_levels_has_one_id():
    module, variables = start()
    codes = np.asarray(module.apply(variables, jnp.arange(CODES), method=module.codes_of))
    # the first dimension runs fastest
    grid = [code[::-1] for code in itertools.product(*(np.linspace(-1, 1, count) for count in reversed(LEVELS)))]
    np.testing.assert_allclose(codes, grid, atol=1e-6)
    # projections that lie on the levels: x = atanh(b) / 0.8, as 2 sigmoid(1.6 x) - 1 = tanh(0.8 x)
    back = np.arctanh(np.clip(codes, -0.999, 0.999)) / 0.8
    ids = module.apply(variables, jnp.float32(back)[None], method=module.code_ids)
    np.testing.assert_array_equal(ids[0], np.arange(CODES))


def test_values_ids_and_gradient_by_hand():
    module, variables = start()
    vectors, probe = projections(), jax.random.normal(jax.random.key(2), (4, 6, CODE_DIM))
    bounded = np.tanh(0.8 * np.asarray(vectors, np.float64))
    steps = np.array(LEVELS) - 1
    levels = np.floor((bounded + 1) / 2 * steps + 0.5)
    out, pull = jax.vjp(lambda vectors: module.apply(variables, vectors).codes, vectors)
    np.testing.assert_allclose(out, 2 * levels / steps - 1, atol=1e-6)
    np.testing.assert_allclose(pull(probe)[0], probe * 0.8 * (1 - bounded**2), atol=1e-6)
    found = module.apply(variables, vectors)
    np.testing.assert_array_equal(found.code_ids, levels @ [1, 5, 10])
    np.testing.assert_array_equal(found.code_ids, module.apply(variables, vectors, method=module.code_ids))
    np.testing.assert_allclose(found.unit, bounded, atol=1e-6)
    assert not np.any(found.commitment) and len(np.unique(found.code_ids)) > 8


def test_only_hits_are_counted_and_nothing_moves():
    module, variables = start()
    assert {name: set(tree) for name, tree in variables.items()} == {
        "codebook": {"cluster_counts", "window_counts", "last_window_counts"}
    }
    out = module.apply(variables, projections(), jnp.array([1.0, 0.0, 1.0, 1.0]))
    counts = np.bincount(np.asarray(out.code_ids)[[0, 2, 3]].ravel(), minlength=CODES)
    state = updated_state(variables["codebook"], out.statistics, module.options)
    np.testing.assert_array_equal(state["window_counts"], counts)
    np.testing.assert_allclose(state["cluster_counts"], 0.01 * counts, rtol=1e-5)


def test_bfloat16_projections_are_rounded_in_float32():
    module, variables = start()
    vectors = projections().astype(jnp.bfloat16)
    out, same = module.apply(variables, vectors), module.apply(variables, vectors.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, out, same)
    assert out.codes.dtype == jnp.float32


def test_levels_that_do_not_make_the_codebook_are_refused():
    with pytest.raises(ValueError, match="do not make 41 codes of 3 dimensions"):
        QuantizerOptions(codebook_size=41, code_dim=3, quantizer="fsq", fsq_levels=LEVELS)
