"""Losses against numbers worked out by hand."""

import functools
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


def test_weighted_sum_by_hand():
    values = jnp.array([[1.0, 3.0], [10.0, 30.0], [5.0, 7.0]])
    np.testing.assert_allclose(losses.weighted_sum(values, jnp.ones(3)), 2.0 + 20.0 + 6.0)
    np.testing.assert_allclose(losses.weighted_sum(values, jnp.array([1.0, 0.0, 1.0])), 8.0)
    np.testing.assert_allclose(losses.weighted_sum(values[:, 0], jnp.array([3.0, 1.0, 0.0])), 13.0)
    assert losses.weighted_sum(values, jnp.zeros(3)) == 0.0
    hits = jnp.array([[True, False], [True, True], [False, False]])
    np.testing.assert_allclose(losses.weighted_sum(hits, jnp.array([1.0, 1.0, 0.0])), 1.5)


def test_rows_of_weight_zero_do_not_reach_the_sum_whatever_they_hold():
    weight = jnp.array([1.0, 0.0, 1.0])

    def total(values):
        return losses.weighted_sum(jnp.log(values), weight)

    value, gradient = jax.value_and_grad(total)(jnp.array([math.e, 0.0, math.e]))
    assert value == 2.0 and gradient[0] > 0
    assert losses.weighted_sum(jnp.array([1.0, jnp.nan, 3.0]), weight) == 4.0


def segmentation_loss(*arrays, **options):
    return jax.jit(functools.partial(losses.segmentation_loss, **options))(*arrays)


def test_segmentation_loss_by_hand():
    """Logits as large as the label map, so that no resize blurs the arithmetic."""
    probabilities = np.array([[[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]], [[[0.6, 0.2, 0.2], [0.25, 0.25, 0.5]]]])
    auxiliary = np.array([[[[0.2, 0.4, 0.4], [0.1, 0.1, 0.8]]], [[[0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]]])
    labels = jnp.array([[[0, 255]], [[2, 1]]])
    maps = [jnp.log(jnp.asarray(values, jnp.float32)) for values in (probabilities, auxiliary)]
    total, pixels, sums = segmentation_loss(*maps, labels, jnp.ones(2))
    decode = -math.log(0.5) - math.log(0.2) - math.log(0.25)
    extra = -0.4 * (math.log(0.2) + math.log(0.1) + math.log(0.2))
    assert pixels == 4  # the ignored one counts, as released
    np.testing.assert_allclose(total, decode + extra, rtol=1e-5)
    np.testing.assert_allclose(sums["decode_loss"], decode, rtol=1e-5)
    np.testing.assert_allclose(sums["auxiliary_loss"], extra, rtol=1e-5)
    assert (sums["decode_accuracy"], sums["auxiliary_accuracy"]) == (1, 0)
    total, pixels, _ = segmentation_loss(*maps, labels, jnp.ones(2), count_unlabelled=False, auxiliary_weight=0.0)
    assert pixels == 3
    np.testing.assert_allclose(total, decode, rtol=1e-5)
    total, pixels, sums = segmentation_loss(*maps, labels, jnp.array([1.0, 0.0]), count_unlabelled=False)
    assert (pixels, sums["decode_accuracy"]) == (1, 1)
    np.testing.assert_allclose(total, -math.log(0.5) - 0.4 * math.log(0.2), rtol=1e-5)


def test_rows_and_pixels_that_do_not_count_have_no_gradient():
    labels, weight = jnp.array([[[0, 255]], [[2, 1]]]), jnp.array([1.0, 0.0])

    def loss(maps):
        return losses.segmentation_loss(maps, maps, labels, weight)[0]

    gradient_of = jax.jit(jax.grad(loss))
    gradient = gradient_of(jnp.zeros((2, 1, 2, 3)))
    assert np.any(gradient[0, 0, 0]) and not np.any(gradient[0, 0, 1]) and not np.any(gradient[1])
    assert np.isfinite(gradient_of(jnp.zeros((2, 1, 2, 3)).at[1].set(jnp.nan))[0]).all()
