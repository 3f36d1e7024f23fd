"""The clusters of the cluster tokenizer: rounds of k-means and components against scikit-learn and by hand."""

import jax.numpy as jnp
import numpy as np
import sklearn.cluster
import sklearn.decomposition

from beitv2_jax.models.cluster import centred_directions, lloyd_step, principal_components


def unit_vectors(rng, shape):
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_a_round_by_hand():
    """Two vectors near each axis: the means are their bisectors; the empty third centroid takes the farthest one."""
    angles = np.radians([-20.0, 20.0, 75.0, 95.0])
    unit = np.float32(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    start = np.float32([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    centroids, ids, counts = lloyd_step(unit, start)
    np.testing.assert_array_equal(ids, [0, 0, 1, 1])
    np.testing.assert_array_equal(counts, [2, 2, 0])
    bisector = np.radians(85.0)
    # 20 degrees is the largest angle, which two have: the first one
    expected = [[1.0, 0.0], [np.cos(bisector), np.sin(bisector)], unit[0]]
    np.testing.assert_allclose(centroids, expected, atol=1e-6)


def test_rounds_without_empty_clusters_are_those_of_scikit_learn_on_well_apart_groups():
    """Groups so tight that a mean and its direction have the same nearest vectors."""
    rng = np.random.default_rng(0)
    middles = unit_vectors(rng, (7, 24))
    unit = middles[rng.integers(7, size=600)] + 0.08 * rng.normal(size=(600, 24))
    unit = np.float32(unit / np.linalg.norm(unit, axis=1, keepdims=True))
    centroids = jnp.asarray(np.float32(middles + 0.1 * rng.normal(size=middles.shape)))
    centroids = start = centroids / jnp.linalg.norm(centroids, axis=1, keepdims=True)
    for _ in range(10):
        centroids, ids, _ = lloyd_step(unit, centroids)
    theirs = sklearn.cluster.KMeans(7, init=np.asarray(start), n_init=1, max_iter=10).fit(unit)
    np.testing.assert_array_equal(ids, theirs.labels_)
    directions = theirs.cluster_centers_ / np.linalg.norm(theirs.cluster_centers_, axis=1, keepdims=True)
    np.testing.assert_allclose(centroids, directions, atol=1e-5)


def test_all_codes_find_tokens_where_the_start_has_copies():
    rng = np.random.default_rng(1)
    unit = np.float32(unit_vectors(rng, (300, 6)))
    centroids = jnp.asarray(np.repeat(unit[:1], 40, axis=0))
    for _ in range(4):
        centroids, _, counts = lloyd_step(unit, centroids)
    assert (np.asarray(counts) > 0).mean() > 0.9
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1.0, atol=1e-5)


def test_components_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    features = np.float32(rng.normal(size=(500, 9)) @ rng.normal(size=(9, 9)) + 5.0)
    mean = features.mean(axis=0)
    found = principal_components(features - mean, 4)
    theirs = sklearn.decomposition.PCA(4).fit(features)
    np.testing.assert_allclose(np.abs(found.T @ theirs.components_.T), np.eye(4), atol=1e-4)
    projected = theirs.transform(features) * np.sign(np.diagonal(found.T @ theirs.components_.T))
    directions = centred_directions({"mean": mean, "projection": found}, features)
    np.testing.assert_allclose(
        directions, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=1e-4, rtol=1e-3
    )
