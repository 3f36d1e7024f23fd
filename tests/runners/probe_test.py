"""The probe against cases whose answer is known beforehand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paths import ROOT
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.data.sources import open_source
from beitv2_jax.evaluation.features import ProbeSettings
from beitv2_jax.evaluation.knn import knn_predict
from beitv2_jax.evaluation.linear import fit_linear, standardize
from beitv2_jax.evaluation.protocols.ours import probe_features
from beitv2_jax.runners import feature_cache, probe
from beitv2_jax.tasks.frozen import FeatureSet
from beitv2_jax.tasks.probe import raw_pixels

SETTINGS = ProbeSettings(
    num_steps=200,
    batch_size=64,
    learning_rates=(1e-4, 3e-2),
    weight_decay=1e-4,
    knn_neighbors=5,
    knn_temperature=0.07,
    validation_fraction=0.2,
    seed=0,
)


def clusters(rng, count, separation):
    """Return features 'count 2 7': layer 0 is noise, layer 1 holds 3 Gaussian clusters; and labels."""
    labels = rng.integers(0, 3, count)
    centres = separation * np.eye(3, 7)
    signal = centres[labels] + rng.normal(size=(count, 7))
    return np.stack([rng.normal(size=(count, 7)), signal], axis=1).astype(np.float32), labels.astype(np.int32)


def test_separable_clusters_are_found_in_the_right_layer():
    rng = np.random.default_rng(0)
    (train, train_labels), (test, test_labels) = clusters(rng, 300, 8.0), clusters(rng, 151, 8.0)
    metrics = probe_features(train, train_labels, test, test_labels, 3, SETTINGS)
    assert metrics["linear"] > 0.98 and metrics["knn"] > 0.98
    assert metrics["linear_layer"] == metrics["knn_layer"] == 1
    assert metrics["linear_rate"] == 3e-2


def test_labels_unrelated_to_the_features_stay_at_chance():
    rng = np.random.default_rng(1)
    (train, _), (test, _) = clusters(rng, 400, 8.0), clusters(rng, 600, 8.0)
    labels = rng.integers(0, 3, 1000).astype(np.int32)
    metrics = probe_features(train, labels[:400], test, labels[400:], 3, SETTINGS)
    # 600 fair draws at 1/3: standard error 0.019, so five of them
    assert abs(metrics["linear"] - 1 / 3) < 0.1 and abs(metrics["knn"] - 1 / 3) < 0.1


def test_the_evaluation_split_chooses_nothing():
    rng = np.random.default_rng(2)
    (train, train_labels), (test, test_labels) = clusters(rng, 120, 2.0), clusters(rng, 50, 2.0)
    chosen = [
        probe_features(train, train_labels, test, labels, 3, SETTINGS) for labels in (test_labels, 2 - test_labels)
    ]
    for key in ("linear_layer", "linear_rate", "knn_layer"):
        assert chosen[0][key] == chosen[1][key]


def test_fit_linear_one_step_by_hand():
    """AdamW's first step moves by the rate against the sign of the gradient, less the decay."""
    features, labels = jnp.array([[1.0, -2.0]]), jnp.array([0])
    start_key, _ = jax.random.split(jax.random.key(3))
    start = 0.01 * jax.random.normal(start_key, (2, 3))
    kernels, biases = fit_linear(
        features, labels, jnp.array([0.1]), 0.0, jax.random.key(3), num_classes=3, num_steps=1, batch_size=4
    )
    signs = np.sign(np.outer([1.0, -2.0], [-1.0, 1.0, 1.0]))
    np.testing.assert_allclose(kernels[0], start - 0.1 * signs, atol=1e-5)
    np.testing.assert_allclose(biases[0], [0.1, -0.1, -0.1], atol=1e-5)


def test_knn_matches_a_numpy_vote():
    rng = np.random.default_rng(4)
    bank, queries = rng.normal(size=(37, 5)).astype(np.float32), rng.normal(size=(11, 5)).astype(np.float32)
    labels = rng.integers(0, 4, 37)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    expected = []
    for query in unit(queries):
        similarity = unit(bank) @ query
        votes = np.zeros(4)
        for row in np.argsort(-similarity)[:6]:
            votes[labels[row]] += np.exp(similarity[row] / 0.1)
        expected.append(votes.argmax())
    predicted = knn_predict(
        jnp.asarray(bank),
        jnp.asarray(labels),
        jnp.asarray(queries),
        num_classes=4,
        neighbors=6,
        temperature=0.1,
        chunk_size=4,
    )
    np.testing.assert_array_equal(predicted, expected)


def test_standardize_uses_the_first_array_and_survives_constant_features():
    train = np.array([[1.0, 5.0], [3.0, 5.0]])
    ours, other = standardize(train, np.array([[5.0, 9.0]]))
    np.testing.assert_allclose(ours, [[-1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(other, [[3.0, 0.0]])


def test_raw_pixels_are_averaged_to_at_most_32_a_side():
    images = np.random.default_rng(5).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    features = raw_pixels({}, {"images": jnp.asarray(images)})["pixels"]
    chex.assert_shape(features, (3, 1, 32 * 32 * 3))
    assert float(features.mean()) == pytest.approx(images.mean() / 255, abs=2e-3)
    small = raw_pixels({}, {"images": jnp.asarray(images[:, :19, :19])})["pixels"]
    np.testing.assert_allclose(small, images[:, :19, :19].reshape(3, 1, -1) / 255, atol=1e-6)


def test_optax_is_what_it_is_compared_with():
    """`fit_linear` with one row per batch equals plain optax over the same rows."""
    rng = np.random.default_rng(6)
    features, labels = rng.normal(size=(13, 4)).astype(np.float32), rng.integers(0, 3, 13)
    key = jax.random.key(7)
    kernels, _ = fit_linear(
        jnp.asarray(features),
        jnp.asarray(labels),
        jnp.array([0.05]),
        0.1,
        key,
        num_classes=3,
        num_steps=4,
        batch_size=2,
    )
    start_key, batch_key = jax.random.split(key)
    params = (0.01 * jax.random.normal(start_key, (4, 3)), jnp.zeros(3))
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.05, 4), weight_decay=0.1)
    state = optimizer.init(params)
    for step in range(4):
        rows = np.asarray(jax.random.randint(jax.random.fold_in(batch_key, step), (2,), 0, 13))
        x, y = features[rows], labels[rows]
        logits = x @ np.asarray(params[0]) + np.asarray(params[1])
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        error = (shares - np.eye(3)[y]) / 2
        updates, state = optimizer.update((jnp.asarray(x.T @ error), jnp.asarray(error.sum(0))), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(kernels[0], params[0], atol=2e-5)


def test_cached_features_are_those_of_the_network_that_is_asked_for(tmp_path):
    """A backbone that trained on between two starts, or other data under the same split, gives other features."""
    for count in (3, 4):
        for name in ("a", "b"):
            folder = tmp_path / f"images{count}" / "train" / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 40), (10 * index, 0, 0)).save(folder / f"{index}.png")
    config = config_lib.load(f"{ROOT / 'configs/probe.py'}:smoke").unlock()
    config.views.image_size, config.run.batch_size = 32, 8
    computed = []

    def features(factor, count):
        apply = lambda frozen, batch: {"red": frozen["factor"] * batch["images"][:, 0, 0, :1].astype(np.float32)}  # noqa: E731
        feature_set = FeatureSet("pretrained", apply, {"factor": np.float32(factor)})
        source = open_source(f"folder:{tmp_path / f'images{count}'}", "train")
        cached = probe.cached_features(feature_set, source, config, str(tmp_path), computed.append)
        return cached.arrays["red"][:, 0].tolist()

    assert features(1, 3) == [0, 10, 20] * 2
    assert features(2, 3) == [0, 20, 40] * 2
    assert features(1, 4) == [0, 10, 20, 30] * 2
    assert computed.count("computing features") == 3
    assert features(2, 3) == [0, 20, 40] * 2 and computed.count("computing features") == 3
    assert len(list((tmp_path / "features").iterdir())) == 3


def test_an_interrupted_pass_goes_on_after_its_last_part(tmp_path, monkeypatch):
    folder = tmp_path / "images" / "train"
    for index in range(20):
        (folder / "ab"[index // 10]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (10 * index, 0, 0)).save(folder / "ab"[index // 10] / f"{index:02d}.png")
    config = config_lib.load(f"{ROOT / 'configs/probe.py'}:smoke").unlock()
    config.views.image_size, config.run.batch_size = 32, 8
    monkeypatch.setattr(feature_cache, "PART_BYTES", 1)
    feature_set = FeatureSet("pretrained", lambda frozen, batch: {"red": batch["images"][:, 0, 0, :1] * 1.0}, {}, (3,))
    source = open_source(f"folder:{tmp_path / 'images'}", "train")
    moves = []

    def stop_at_the_second_batch(phase):
        moves.append(phase)
        if moves == ["computing features"] * 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        probe.cached_features(feature_set, source, config, str(tmp_path), stop_at_the_second_batch)
    (cache,) = (tmp_path / "features").iterdir()
    assert [path.name for path in cache.iterdir()] == ["part.0-of-1.batches_of_8.0-1.npz"]
    del moves[:]
    features = probe.cached_features(feature_set, source, config, str(tmp_path), moves.append)
    assert moves.count("computing features") == 2
    assert features.arrays["red"][:, 0].tolist() == [10 * index for index in range(20)]
    assert isinstance(features.arrays["red"], np.memmap)
    assert features.labels.tolist() == [0] * 10 + [1] * 10 and features.layers == (3,)
    assert sorted(path.name for path in cache.iterdir()) == ["example_ids.npy", "labels.npy", "red.npy"]
