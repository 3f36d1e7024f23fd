"""The heads of the protocol `ep` against the same arithmetic in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.evaluation.features import Features
from beitv2_jax.evaluation.protocols import ep
from beitv2_jax.evaluation.saved import Saved
from tests.evaluation.protocols.dinov3_test import SETTINGS, ignore


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def gradient_of_normalised(gradient, features, normed):
    """Return the gradient of the features from that of (features - mean) / sqrt(variance + 1e-6), both of the batch."""
    deviation = np.sqrt(features.var(axis=0) + 1e-6)
    return (gradient - gradient.mean(axis=0) - normed * (gradient * normed).mean(axis=0)) / deviation


def test_lars_is_the_sum_by_hand():
    """Three steps of different rates, of a matrix, a zero matrix, and a vector, which has no trust ratio."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "zero": np.zeros((2, 2)), "bias": rng.normal(size=2)}
    momenta = {name: np.zeros_like(param) for name, param in params.items()}
    ours = {name: jnp.asarray(param, jnp.float32) for name, param in params.items()}
    optimizer = ep.lars(1.6, 18)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    # two steps of warm-up, then the peak
    for rate in (0.0, 0.8, 1.6):
        gradients = {name: rng.normal(size=param.shape) for name, param in params.items()}
        updates, state = update({name: np.float32(gradient) for name, gradient in gradients.items()}, state, ours)
        ours = {name: ours[name] + updates[name] for name in ours}
        for name, gradient in gradients.items():
            norm = np.sqrt((params[name] ** 2).sum())
            ratio = 0.001 * norm / np.sqrt((gradient**2).sum()) if name != "bias" and norm > 0 else 1.0
            momenta[name] = 0.9 * momenta[name] + ratio * gradient
            params[name] = params[name] - rate * momenta[name]
    for name, param in params.items():
        np.testing.assert_allclose(ours[name], param, atol=1e-6, err_msg=name)


def test_the_rate_is_a_line_and_half_a_cosine():
    """Ninety epochs of 4 steps, of which ten are the warm-up."""
    rates = [float(ep.learning_rate(4 * epoch, peak=1.6, num_steps=360)) for epoch in (0, 2.5, 10, 30, 50, 70, 90)]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(rates, [0, 0.4, 1.6, 0.8 + 0.8 * half, 0.8, 0.8 - 0.8 * half, 0], atol=1e-6)


def test_a_linear_head_takes_the_steps_of_numpy_and_predicts_by_running_statistics():
    rng = np.random.default_rng(1)
    width, classes = 4, 3
    optimizer = ep.lars(40.0, 18)
    params = ep.initial_params(jax.random.key(0), width, classes, pooled=False)
    head = ep.initial_head(params, optimizer)
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    assert np.abs(kernel).max() <= 0.5 and np.abs(bias).max() <= 0.5
    momenta, mean, variance = [0.0, 0.0], np.zeros(width), np.ones(width)
    # two steps of warm-up, then the peak
    for rate in (0.0, 20.0, 40.0):
        features, labels = rng.normal(2, 3, size=(6, width)).astype(np.float16), rng.integers(0, classes, 6)
        head, loss = ep.train_step(optimizer, head, features, labels)
        features = features.astype(np.float64)
        normed = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-6)
        probabilities = softmax(normed @ kernel + bias)
        np.testing.assert_allclose(loss, -np.log(probabilities[np.arange(6), labels]).mean(), rtol=1e-5)
        error = (probabilities - np.eye(classes)[labels]) / 6
        gradient = normed.T @ error
        momenta[0] = 0.9 * momenta[0] + 0.001 * np.linalg.norm(kernel) / np.linalg.norm(gradient) * gradient
        momenta[1] = 0.9 * momenta[1] + error.sum(axis=0)
        kernel, bias = kernel - rate * momenta[0], bias - rate * momenta[1]
        mean = 0.9 * mean + 0.1 * features.mean(axis=0)
        variance = 0.9 * variance + 0.1 * features.var(axis=0, ddof=1)
    np.testing.assert_allclose(head.params["kernel"], kernel, atol=1e-5)
    np.testing.assert_allclose(head.params["bias"], bias, atol=1e-5 * np.abs(bias).max())
    np.testing.assert_allclose(head.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(head.variance, variance, rtol=1e-5)
    queries = rng.normal(2, 3, size=(50, width))
    expected = ((queries - mean) / np.sqrt(variance + 1e-6)) @ kernel + bias
    np.testing.assert_array_equal(ep.predict(head, queries.astype(np.float32)), expected.argmax(axis=-1))


def test_a_pooled_head_takes_the_step_of_numpy():
    """The gradient goes through pool and batch norm, and all queries together have one trust ratio."""
    rng = np.random.default_rng(2)
    width, classes = 6, 3
    optimizer = ep.lars(3.2, 18)
    params = ep.initial_params(jax.random.key(0), width, classes, pooled=True)
    assert params["queries"].shape == (6, width) and params["values"].shape == (width, width)
    start = {name: np.asarray(param, np.float64) for name, param in params.items()}
    head = ep.initial_head(params, optimizer)
    tokens, labels = rng.normal(size=(5, 7, width)), rng.integers(0, classes, 5)
    # the first step has rate 0 and moves the momentum alone, the second half the peak
    for _ in range(2):
        head, _ = ep.train_step(optimizer, head, tokens.astype(np.float32), labels)
    rate = 1.6 * 1.9
    weights = softmax(np.einsum("bnd,qd->bqn", tokens, start["queries"]) / np.sqrt(width))
    projected = tokens @ start["values"]
    pooled = np.einsum("bqn,bnq->bq", weights, projected)  # a part is one number wide
    normed = (pooled - pooled.mean(axis=0)) / np.sqrt(pooled.var(axis=0) + 1e-6)
    error = (softmax(normed @ start["kernel"] + start["bias"]) - np.eye(classes)[labels]) / 5
    of_pooled = gradient_of_normalised(error @ start["kernel"].T, pooled, normed)
    of_values = np.einsum("bq,bqn,bnd->dq", of_pooled, weights, tokens)
    of_weights = of_pooled[:, :, None] * np.swapaxes(projected, 1, 2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(axis=-1, keepdims=True))
    of_queries = np.einsum("bqn,bnd->qd", of_scores, tokens) / np.sqrt(width)
    gradients = {"kernel": normed.T @ error, "queries": of_queries, "values": of_values}
    for name, gradient in gradients.items():
        step = rate * 0.001 * np.linalg.norm(start[name]) / np.linalg.norm(gradient) * gradient
        moved = np.asarray(head.params[name]) - start[name]
        np.testing.assert_allclose(moved, -step, atol=1e-3 * np.abs(step).max(), err_msg=name)
    np.testing.assert_allclose(head.params["bias"], start["bias"] - rate * error.sum(axis=0), atol=1e-5)


def test_fit_finds_the_one_token_among_many_that_has_the_class():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 150)
    tokens = rng.normal(size=(150, 6, 8))
    tokens[np.arange(150), rng.integers(0, 6, 150)] += 12 * np.eye(3, 8)[labels]
    tokens = tokens.astype(np.float16)[:, None]
    train, test = (Features({"x": tokens[part]}, labels[part], (1,), 3) for part in (slice(100), slice(100, 150)))
    # the published rate moves the weights by a hundred-thousandth in such a small batch
    settings = dataclasses.replace(SETTINGS, num_steps=50, batch_size=32, seed=0)
    accuracies = ep.fit("x", train, test, settings, ignore, Saved(), base_rate=100.0)
    # three steps an epoch, and two in the last one
    assert len(accuracies) == 17 and accuracies[-1] > 0.9
