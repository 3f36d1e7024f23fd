"""Losses against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.tasks import losses


def test_cosine_distillation_by_hand():
    reconstruction = jnp.array([[[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]])
    teacher = jnp.array([[[4.0, 3.0], [0.0, 5.0], [-7.0, 0.0]]])
    # cosines 24/25, 0, -1
    np.testing.assert_allclose(losses.cosine_distillation(reconstruction, teacher), [[1 / 25, 1.0, 2.0]], rtol=1e-6)


def test_cosine_distillation_is_float32_for_bfloat16_inputs():
    value = losses.cosine_distillation(jnp.ones((1, 1, 3), jnp.bfloat16), jnp.ones((1, 1, 3), jnp.bfloat16))
    assert value.dtype == jnp.float32


def test_masked_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]]))
    np.testing.assert_allclose(
        losses.masked_cross_entropy(logits, jnp.array([[2, 0]])), [[math.log(8 / 5), math.log(4)]], rtol=1e-6
    )


def test_uniform_logits_cost_the_log_of_the_codebook_size():
    value = losses.masked_cross_entropy(jnp.zeros((1, 1, 8192)), jnp.array([[17]]))
    assert float(value[0, 0]) == pytest.approx(9.0109, abs=1e-4)


def test_smoothed_cross_entropy_is_the_mixture_of_the_facts():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    nll, mean = math.log(2), (math.log(2) + 2 * math.log(4)) / 3
    np.testing.assert_allclose(
        losses.smoothed_cross_entropy(logits, jnp.array([0]), 0.1), [0.9 * nll + 0.1 * mean], rtol=1e-6
    )


def test_accuracy_counts_arg_max_hits():
    logits = jnp.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    assert float(losses.accuracy(logits, jnp.array([[1, 1], [1, 0]]))) == 0.5


def test_smoothed_targets_and_soft_cross_entropy_are_smoothed_cross_entropy():
    rng = np.random.default_rng(4)
    logits, labels = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32), jnp.asarray(rng.integers(0, 5, 7))
    targets = losses.smoothed_targets(labels, 5, 0.1)
    np.testing.assert_allclose(targets.sum(1), 1.0, rtol=1e-6)
    # off = s / k, on = 1 - s + s / k
    np.testing.assert_allclose(np.sort(targets, axis=1), [[0.02] * 4 + [0.92]] * 7, rtol=1e-5)
    np.testing.assert_allclose(
        losses.soft_cross_entropy(logits, targets), losses.smoothed_cross_entropy(logits, labels, 0.1), rtol=1e-5
    )
    by_hand = losses.soft_cross_entropy(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([[0.2, 0.8, 0.0]]))
    np.testing.assert_allclose(by_hand, [0.2 * math.log(2) + 0.8 * math.log(4)], rtol=1e-6)


def test_weighted_mean_by_hand():
    values = jnp.array([[1.0, 3.0], [10.0, 30.0], [5.0, 7.0]])
    np.testing.assert_allclose(losses.weighted_mean(values, jnp.ones(3)), values.mean(), rtol=1e-6)
    np.testing.assert_allclose(losses.weighted_mean(values, jnp.array([1.0, 0.0, 1.0])), 4.0)
    np.testing.assert_allclose(losses.weighted_mean(values[:, 0], jnp.array([3.0, 1.0, 0.0])), 13 / 4)
    assert losses.weighted_mean(values, jnp.zeros(3)) == 0.0
    hits = jnp.array([[True, False], [True, True], [False, False]])
    np.testing.assert_allclose(losses.weighted_mean(hits, jnp.array([1.0, 1.0, 0.0])), 0.75)


def test_rows_of_weight_zero_do_not_reach_the_mean_whatever_they_hold():
    weight = jnp.array([1.0, 0.0, 1.0])

    def mean(values):
        return losses.weighted_mean(jnp.log(values), weight)

    value, gradient = jax.value_and_grad(mean)(jnp.array([math.e, 0.0, math.e]))
    assert value == 1.0 and gradient[0] > 0
    assert losses.weighted_mean(jnp.array([1.0, jnp.nan, 3.0]), weight) == 2.0
