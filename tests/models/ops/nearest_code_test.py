"""Nearest codes: every implementation gives the ids of the exact argmin, ties included, and the right sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_jax import choices
from beitv2_jax.models.ops import nearest_code, nearest_code_pallas
from beitv2_jax.training import sharding

IMPLEMENTATIONS = {
    "scan": functools.partial(nearest_code.nearest_rows, implementation="scan"),
    "tpu": functools.partial(nearest_code.nearest_rows, implementation="pallas"),  # interpreted
    "gpu": functools.partial(nearest_code_pallas.gpu_kernel, interpret=True),
}


def reference(unit, codebook, offsets):
    scores = np.asarray(offsets, np.float64) - 2.0 * np.asarray(unit, np.float64) @ np.asarray(codebook, np.float64).T
    return np.argmin(scores, axis=1)


def integers(seed, num_rows, num_codes, code_dim):
    """Draw rows of few different small integers: products are exact, ties are everywhere, many codes are equal."""
    rng = np.random.default_rng(seed)
    unit = rng.integers(-2, 3, (num_rows, code_dim)).astype(np.float32)
    codebook = rng.integers(-1, 2, (num_codes, code_dim)).astype(np.float32)
    codebook[rng.integers(0, num_codes, num_codes // 3)] = codebook[num_codes // 2]
    return unit, codebook, np.sum(codebook**2, axis=1)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    size=st.sampled_from([(1, 1, 1), (37, 53, 5), (131, 257, 3), (130, 1031, 32)]),
)
def test_ids_are_those_of_the_exact_argmin_ties_included(name, seed, size):
    unit, codebook, offsets = integers(seed, *size)
    ids = IMPLEMENTATIONS[name](unit, codebook, offsets)
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, reference(unit, codebook, offsets))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_ids_of_directions_are_those_of_the_reference(name):
    unit = jax.random.normal(jax.random.key(0), (211, 17))
    codebook = jax.random.normal(jax.random.key(1), (601, 17)).at[400].set(0.0)
    offsets = jnp.sum(codebook**2, axis=1)
    expected_ids = nearest_code.nearest_rows(unit, codebook, offsets, implementation="reference")
    np.testing.assert_array_equal(IMPLEMENTATIONS[name](unit, codebook, offsets), expected_ids)
    assert len(set(np.asarray(expected_ids).tolist())) > 100


def test_more_than_one_tile_and_block_are_passed():
    assert nearest_code.SCAN_TILE < 601 and nearest_code_pallas.GPU_TILE < 601 and nearest_code_pallas.GPU_BLOCK < 211
    unit, codebook, offsets = integers(3, 1100, 1031, 7)  # of the TPU kernel, whose blocks are larger
    assert nearest_code_pallas.TPU_BLOCK < 1100 and nearest_code_pallas.TPU_TILE < 1031
    np.testing.assert_array_equal(IMPLEMENTATIONS["tpu"](unit, codebook, offsets), reference(unit, codebook, offsets))


def test_no_form_but_the_plain_one_holds_the_matrix():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 32), (8192, 32), (8192,))]
    sizes = {
        name: jax.jit(functools.partial(nearest_code.nearest_rows, implementation=name))
        .lower(*shapes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for name in ("reference", "scan")
    }
    assert sizes["reference"] >= 4 * 2048 * 8192 > 10 * sizes["scan"]


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'fast'"):
        nearest_code.nearest_rows(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones(1), implementation="fast")


@pytest.mark.parametrize("num_codes", [1, 53, 2500])
def test_sums_of_tokens_by_code(num_codes):
    rng = np.random.default_rng(4)
    unit, ids = rng.normal(size=(307, 5)).astype(np.float32), rng.integers(0, num_codes, 307, dtype=np.int32)
    weight = rng.integers(0, 2, 307).astype(np.float32)
    sums, counts = np.zeros((num_codes, 5)), np.zeros(num_codes)
    np.add.at(sums, ids, weight[:, None] * unit.astype(np.float64))
    np.add.at(counts, ids, weight)
    found_sums, found_counts = nearest_code.cluster_sums(unit, ids, weight, num_codes)
    np.testing.assert_allclose(found_sums, sums, atol=2e-6 * np.abs(sums).max())
    np.testing.assert_array_equal(found_counts, counts)
    rows = np.concatenate([unit * weight[:, None], weight[:, None]], axis=1)
    tiled = nearest_code.one_hot_sums(rows, ids, codebook_size=num_codes)
    np.testing.assert_allclose(tiled, np.concatenate([sums, counts[:, None]], axis=1), atol=2e-6 * np.abs(sums).max())


@pytest.mark.parametrize("implementation", choices.NEAREST_CODE)
def test_every_device_searches_for_its_own_rows(implementation):
    unit, codebook, offsets = integers(5, 8 * 13, 29, 4)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    search = jax.jit(functools.partial(nearest_code.nearest_rows, implementation=implementation))
    with sharding.activation_rules(mesh):
        compiled = search.lower(jax.device_put(unit, sharding.batch_sharding(mesh)), codebook, offsets).compile()
        ids = compiled(jax.device_put(unit, sharding.batch_sharding(mesh)), codebook, offsets)
    np.testing.assert_array_equal(ids, reference(unit, codebook, offsets))
    assert ids.sharding.shard_shape(ids.shape) == (2 * 13,)
    assert "all-gather" not in compiled.as_text()
