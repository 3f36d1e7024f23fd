"""The heads of the protocol `ep` against the same arithmetic in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beitv2_jax.evaluation import ep


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def gradient_of_normalised(gradient, features, normed):
    """Return the gradient of the features from that of (features - mean) / sqrt(variance + 1e-6), both of the batch."""
    deviation = np.sqrt(features.var(axis=0) + 1e-6)
    return (gradient - gradient.mean(axis=0) - normed * (gradient * normed).mean(axis=0)) / deviation


def test_lars_is_the_sum_by_hand():
    """Two steps of different rates, of a matrix, a zero matrix, and a vector, which has no trust ratio."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "zero": np.zeros((2, 2)), "bias": rng.normal(size=2)}
    momenta = {name: np.zeros_like(param) for name, param in params.items()}
    ours = {name: jnp.asarray(param, jnp.float32) for name, param in params.items()}
    state = ep.LARS.init(ours)
    for rate in (1.6, 0.3):
        gradients = {name: rng.normal(size=param.shape) for name, param in params.items()}
        updates, state = ep.LARS.update(jax.tree.map(jnp.float32, gradients), state, ours)
        ours = jax.tree.map(lambda param, update, rate=rate: param - rate * update, ours, updates)
        for name, gradient in gradients.items():
            norm = np.sqrt((params[name] ** 2).sum())
            ratio = 0.001 * norm / np.sqrt((gradient**2).sum()) if name != "bias" and norm > 0 else 1.0
            momenta[name] = 0.9 * momenta[name] + ratio * gradient
            params[name] = params[name] - rate * momenta[name]
    for name, param in params.items():
        np.testing.assert_allclose(ours[name], param, atol=1e-6, err_msg=name)


def test_the_rate_is_a_line_and_half_a_cosine():
    rates = [
        ep.learning_rate(epoch, peak=1.6, warmup_epochs=10, num_epochs=90) for epoch in (0, 2.5, 10, 30, 50, 70, 90)
    ]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(rates, [0, 0.4, 1.6, 0.8 + 0.8 * half, 0.8, 0.8 - 0.8 * half, 0], atol=1e-12)


def test_a_linear_head_takes_the_steps_of_numpy_and_predicts_by_running_statistics():
    rng = np.random.default_rng(1)
    width, classes = 4, 3
    head = ep.initial_head(jax.random.key(0), width, classes, pooled=False)
    kernel, bias = (np.asarray(head.params[name], np.float64) for name in ("kernel", "bias"))
    assert np.abs(kernel).max() <= 0.5 and np.abs(bias).max() <= 0.5
    momenta, mean, variance = [0.0, 0.0], np.zeros(width), np.ones(width)
    for rate in (40.0, 10.0):
        features, labels = rng.normal(2, 3, size=(6, width)), rng.integers(0, classes, 6)
        head = ep.train_step(head, features.astype(np.float16), labels, rate)
        features = features.astype(np.float16).astype(np.float64)
        normed = (features - features.mean(axis=0)) / np.sqrt(features.var(axis=0) + 1e-6)
        error = (softmax(normed @ kernel + bias) - np.eye(classes)[labels]) / 6
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
    head = ep.initial_head(jax.random.key(0), width, classes, pooled=True)
    assert head.params["queries"].shape == (6, width) and head.params["values"].shape == (width, width)
    start = {name: np.asarray(param, np.float64) for name, param in head.params.items()}
    tokens, labels = rng.normal(size=(5, 7, width)), rng.integers(0, classes, 5)
    moved = ep.train_step(head, tokens.astype(np.float32), labels, 1.6).params
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
        ratio = 0.001 * np.linalg.norm(start[name]) / np.linalg.norm(gradient)
        step = 1.6 * ratio * gradient
        np.testing.assert_allclose(moved[name], start[name] - step, atol=1e-3 * np.abs(step).max(), err_msg=name)
    np.testing.assert_allclose(moved["bias"], start["bias"] - 1.6 * error.sum(axis=0), atol=1e-6)


def test_fit_learns_classes_from_vectors_and_from_one_token_among_many():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 150)
    vectors = 4 * np.eye(3, 8)[labels] + rng.normal(size=(150, 8))
    tokens = rng.normal(size=(150, 6, 8))
    tokens[np.arange(150), rng.integers(0, 6, 150)] += 12 * np.eye(3, 8)[labels]
    for features in (vectors, tokens):
        features = features.astype(np.float16)
        train, test = (features[:100], labels[:100]), (features[100:], labels[100:])
        # the published rate moves the weights by a hundred-thousandth in such a small batch
        result = ep.fit(*train, *test, num_classes=3, num_epochs=27, batch_size=32, seed=0, base_rate=100.0)
        assert result["accuracy"] > 0.9
        assert result["best_on_validation"] >= result["accuracy"] and 1 <= result["best_epoch"] <= 27


def test_fit_reports_the_last_epoch_and_the_best_beside_it(monkeypatch):
    """Of four epochs with 1, 3, 2 and 2 hits of 4."""
    hits = iter([1, 3, 2, 2])
    monkeypatch.setattr(ep, "count_hits", lambda *args: np.array(next(hits)))
    features, labels = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])
    result = ep.fit(features, labels, features, labels, num_classes=2, num_epochs=4, batch_size=4, seed=0)
    assert result == {"accuracy": 0.5, "best_on_validation": 0.75, "best_epoch": 2}
    with pytest.raises(StopIteration):
        next(hits)
