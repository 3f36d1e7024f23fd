"""SimVQ against NumPy: its codes, its loss, and what learns from which part of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.models.quantizer import QuantizerOptions, updated_state
from beitv2_jax.models.simvq import SimVQ

CODES, CODE_DIM = 23, 4


@pytest.fixture(scope="module", params=["straight_through", "rotation"])
def drawn(request):
    """A quantizer, its variables with a basis that is not the identity, and projections."""
    options = dict(codebook_size=CODES, code_dim=CODE_DIM, quantizer="simvq", quantizer_gradient=request.param)
    module = SimVQ(QuantizerOptions(**options, commitment_weight=0.5))
    vectors = 2.0 * jax.random.normal(jax.random.key(0), (3, 5, CODE_DIM))
    variables = module.init(jax.random.key(1), vectors)
    np.testing.assert_array_equal(variables["params"]["basis"], np.eye(CODE_DIM))
    variables["params"]["basis"] = jax.random.normal(jax.random.key(2), (CODE_DIM, CODE_DIM))
    return module, variables, vectors


def unit_rows(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def by_hand(variables, vectors):
    """Return unit projections, codes and ids in float64."""
    coefficients = np.asarray(variables["codebook"]["coefficients"], np.float64)
    unit = unit_rows(np.asarray(vectors, np.float64))
    codes = unit_rows(coefficients @ np.asarray(variables["params"]["basis"], np.float64))
    return unit, codes, np.argmax(unit @ codes.T, axis=-1)


def test_codes_ids_and_loss_by_hand(drawn):
    module, variables, vectors = drawn
    out = module.apply(variables, vectors)
    unit, codes, ids = by_hand(variables, vectors)
    np.testing.assert_array_equal(out.code_ids, ids)
    np.testing.assert_array_equal(module.apply(variables, vectors, method=module.code_ids), ids)
    np.testing.assert_allclose(out.codes, codes[ids], atol=1e-6)
    np.testing.assert_allclose(out.commitment, 0.5 * 1.25 * np.mean((codes[ids] - unit) ** 2, axis=(1, 2)), rtol=1e-5)
    found = module.apply(variables, jnp.arange(CODES), method=module.codes_of)
    np.testing.assert_allclose(found, codes, atol=1e-6)
    assert len(np.unique(ids)) > 5


def test_the_basis_learns_from_the_distance_alone(drawn):
    """Its gradient is that of 0.5 mean((z - e)^2), which is 0.5 (2 - 2 z.e) / c, by differences in float64."""
    module, variables, vectors = drawn
    probe = jax.random.normal(jax.random.key(3), vectors.shape)

    def loss(params):
        out = module.apply({**variables, "params": params}, vectors)
        return jnp.sum(out.commitment) + jnp.sum(out.codes * probe)

    found = jax.grad(loss)(variables["params"])["basis"]
    unit, _, ids = by_hand(variables, vectors)
    rows = np.asarray(variables["codebook"]["coefficients"], np.float64)[ids]

    def distance(basis):
        return 0.5 * np.sum(np.mean((unit - unit_rows(rows @ basis)) ** 2, axis=(1, 2)))

    basis, expected = np.asarray(variables["params"]["basis"], np.float64), np.zeros((CODE_DIM, CODE_DIM))
    for place in np.ndindex(basis.shape):
        step = np.zeros_like(basis)
        step[place] = 1e-5
        expected[place] = (distance(basis + step) - distance(basis - step)) / 2e-5
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected).max() > 0.01


def test_a_quarter_of_the_distance_reaches_the_projections(drawn):
    module, variables, vectors = drawn
    found = jax.grad(lambda vectors: jnp.sum(module.apply(variables, vectors).commitment))(vectors)
    unit, codes, ids = by_hand(variables, vectors)
    # of 0.5 / 4 mean((z - e)^2) over 5 x 4 elements, and on through l2norm
    through = 0.5 * 0.25 * 2.0 * (unit - codes[ids]) / (5 * CODE_DIM)
    through -= unit * np.sum(unit * through, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, through / np.linalg.norm(vectors, axis=-1, keepdims=True), atol=1e-7)


def test_the_drawn_vectors_are_kept_and_scaled_by_their_dimensions():
    options = QuantizerOptions(codebook_size=4000, code_dim=16, quantizer="simvq")
    module, vectors = SimVQ(options), jnp.ones((2, 3, 16))
    state = module.init(jax.random.key(0), vectors)
    coefficients = np.asarray(state["codebook"]["coefficients"])
    assert abs(coefficients.std() - 0.25) < 0.005 and abs(coefficients.mean()) < 0.005
    out = module.apply(state, vectors, jnp.array([1.0, 0.0]))
    after = updated_state(state["codebook"], out.statistics, options)
    np.testing.assert_array_equal(after["coefficients"], coefficients)
    assert after["window_counts"].sum() == 3
