"""The arithmetic of the dense evaluation, against NumPy by hand and scikit-learn."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from beitv2_jax.evaluation import dense, standardization
from beitv2_jax.tasks import segment


def test_patches_by_hand():
    maps = np.array([[[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]], np.uint8)
    patches = dense.to_patches(maps, 2)
    np.testing.assert_array_equal(patches[0], [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]])
    np.testing.assert_array_equal(dense.from_patches(patches), maps)
    colours = np.stack([maps, maps + 100], axis=-1)
    np.testing.assert_array_equal(dense.to_patches(colours, 2)[0, 1], [[3, 103], [4, 104], [7, 107], [8, 108]])


def most_frequent(labels):
    counts = collections.Counter(labels.tolist())
    return min(label for label, count in counts.items() if count == max(counts.values()))


def test_votes_and_majorities_take_the_lowest_of_several_most_frequent_labels():
    labels = np.random.default_rng(0).choice([0, 1, 2, 255], (50, 4, 6)).astype(np.uint8)
    expected = np.apply_along_axis(most_frequent, 1, labels)
    np.testing.assert_array_equal(dense.vote(jnp.asarray(labels)), expected)
    np.testing.assert_array_equal(dense.majority(labels[:, :, 0]), expected[:, 0])
    assert (expected == 255).any()


@pytest.mark.parametrize("cosine, metric", [(True, "cosine"), (False, "euclidean")])
def test_neighbors_are_those_of_scikit_learn_however_the_bank_is_cut(cosine, metric):
    rng = np.random.default_rng(1)
    bank, queries = (rng.normal(size=(count, 5)).astype(np.float32) for count in (23, 9))
    expected = NearestNeighbors(n_neighbors=6, metric=metric).fit(bank).kneighbors(queries, return_distance=False)
    for rows in (23, 10):
        found = None
        for first in range(0, 23, rows):
            part = np.zeros((rows, 5), np.float32)
            counted = np.arange(first, first + rows) < 23
            part[counted] = bank[first : first + rows]
            of_part = dense.nearest_in_part(
                jnp.asarray(queries), jnp.asarray(part), jnp.asarray(counted), num_neighbors=6, cosine=cosine
            )
            found = dense.merged(found, dense.Neighbors(*map(np.asarray, of_part)), first, 6)
        np.testing.assert_array_equal(found.rows, expected)


def test_standardization_is_that_of_scikit_learn(monkeypatch):
    features = np.random.default_rng(2).normal(3, 2, (4, 5, 6)).astype(np.float16)
    features[..., 2] = 7
    monkeypatch.setattr(standardization, "PIECE_ROWS", 2)  # three rows in two pieces
    phases = []
    found = standardization.standardization(features, np.array([3, 0, 1]), phases.append)(features.reshape(-1, 6))
    scaler = StandardScaler().fit(features[[0, 1, 3]].reshape(-1, 6).astype(np.float64))
    expected = scaler.transform(features.reshape(-1, 6).astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(phases) == 4  # both pieces for the mean, and again for the variance


def test_logistic_regression_is_that_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(dense, "_ROWS_AT_ONCE", 32)  # 60 rows in two parts, the second one padded
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 60).astype(np.uint8)
    features = (rng.normal(size=(60, 4)) + np.eye(3, 4)[labels]).astype(np.float16)
    standard = standardization.standardization(features, np.arange(60), lambda phase: None)
    scaled = np.asarray(standard(features), np.float64)
    for strength in (0.01, 1.0):
        kernel, bias = dense.fit_logistic(
            features, labels, standard, num_classes=3, strength=strength, max_iterations=200
        )
        peer = LogisticRegression(C=strength, tol=1e-10, max_iter=1000).fit(scaled, labels)
        np.testing.assert_allclose(kernel, peer.coef_.T, atol=2e-4)
        # scikit-learn leaves the sum of the biases open, which changes nothing
        np.testing.assert_allclose(bias - bias.mean(), peer.intercept_ - peer.intercept_.mean(), atol=2e-4)


def test_loss_of_the_logistic_regression_by_hand():
    rng = np.random.default_rng(4)
    features, labels = rng.normal(size=(6, 3)), np.array([0, 1, 1, 2, 0, 2])
    kernel, bias = rng.normal(size=(3, 3)), rng.normal(size=3)
    counted = np.array([1, 1, 1, 1, 1, 0.0])
    standard = dense.Standardization(np.float32([0.5, 0, 1]), np.float32([2, 1, 0]))
    logits = (features - [0.5, 0, 1]) * [2, 1, 0] @ kernel + bias
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), labels]
    expected = (nll[:5].sum() + 0.5 * (kernel**2).sum() / 4.0) / 5
    cut = [jnp.asarray(array).reshape(2, 3, *array.shape[1:]) for array in (features, labels, counted)]
    loss, grad = jax.value_and_grad(dense.logistic_loss)((kernel, bias), *cut, standard, 4.0)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(3)[labels]
    scaled = (features - [0.5, 0, 1]) * [2, 1, 0]
    np.testing.assert_allclose(grad[0], (scaled[:5].T @ shares[:5] + kernel / 4.0) / 5, atol=1e-5)
    np.testing.assert_allclose(grad[1], shares[:5].sum(axis=0) / 5, atol=1e-5)


def test_scores_of_two_small_label_maps_by_hand():
    true = np.array([[[0, 0], [1, 255]], [[2, 1], [1, 1]]], np.uint8)
    predicted = np.array([[[0, 1], [1, 2]], [[255, 1], [1, 0]]], np.uint8)
    confusion = dense.pixel_confusion(true, predicted, 4)
    expected = [[1, 1, 0, 0, 0], [1, 3, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(confusion, expected)
    metrics = segment.summarize({"confusion": confusion})
    # the pixel of class 2 is given no class; class 3 is neither there nor predicted and left out
    assert metrics["mean_iou"] == pytest.approx(np.mean([1 / 3, 3 / 5, 0]))
    assert metrics["mean_accuracy"] == pytest.approx(np.mean([1 / 2, 3 / 4, 0]))
    assert metrics["pixel_accuracy"] == pytest.approx(4 / 7)
    assert {name for name in metrics if name.startswith("iou/")} == {"iou/0", "iou/1", "iou/2"}
