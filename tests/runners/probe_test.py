"""The probe against cases whose answer is known beforehand."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.data.sources import open_source
from beitv2_jax.evaluation import knn
from beitv2_jax.evaluation.features import Features, ProbeSettings, held_out
from beitv2_jax.evaluation.protocols import ours
from beitv2_jax.evaluation.saved import Saved, SavedParts
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
    """Return features 'count 2 7': layer 5 is noise, layer 8 holds 3 Gaussian clusters; and labels."""
    labels = rng.integers(0, 3, count)
    centres = separation * np.eye(3, 7)
    signal = centres[labels] + rng.normal(size=(count, 7))
    return np.stack([rng.normal(size=(count, 7)), signal], axis=1).astype(np.float32), labels


def probed(train, train_labels, test, test_labels):
    """Return what the protocol finds and what it chooses, by names without those of the features."""
    of_splits = (Features({"x": x}, y, (5, 8), 3) for x, y in ((train, train_labels), (test, test_labels)))
    result = ours.evaluate(*of_splits, SETTINGS, lambda phase: None, SavedParts())
    return {name.removeprefix("x/"): value for name, value in (result.accuracies | result.chosen).items()}


def test_separable_clusters_are_found_in_the_right_layer():
    rng = np.random.default_rng(0)
    metrics = probed(*clusters(rng, 300, 8.0), *clusters(rng, 151, 8.0))
    assert metrics["linear"] > 0.98 and metrics["knn"] > 0.98
    assert metrics["linear_layer"] == metrics["knn_layer"] == 8
    assert metrics["linear_rate"] == 3e-2


def test_labels_unrelated_to_the_features_stay_at_chance():
    rng = np.random.default_rng(1)
    (train, _), (test, _) = clusters(rng, 400, 8.0), clusters(rng, 600, 8.0)
    labels = rng.integers(0, 3, 1000)
    metrics = probed(train, labels[:400], test, labels[400:])
    # 600 fair draws at 1/3: standard error 0.019, so five of them
    assert abs(metrics["linear"] - 1 / 3) < 0.1 and abs(metrics["knn"] - 1 / 3) < 0.1


def test_the_evaluation_split_chooses_nothing():
    rng = np.random.default_rng(2)
    (train, train_labels), (test, test_labels) = clusters(rng, 120, 2.0), clusters(rng, 50, 2.0)
    chosen = [probed(train, train_labels, test, labels) for labels in (test_labels, 2 - test_labels)]
    for key in ("linear_layer", "linear_rate", "knn_layer"):
        assert chosen[0][key] == chosen[1][key]


def test_linear_classifiers_train_by_adamw_in_numpy():
    """Four steps of two rates on some rows of standardised features, against AdamW by hand in float64."""
    rng = np.random.default_rng(6)
    features, labels, rows = rng.normal(2, 3, size=(13, 4)), rng.integers(0, 3, 13), np.array([7, 2, 9, 4, 11])
    settings = dataclasses.replace(SETTINGS, num_steps=4, batch_size=2, learning_rates=(0.05, 0.5), weight_decay=0.1)
    state, step, batch_of = ours.linear_training(rows, 4, 3, settings)
    start = np.asarray(state[0]["kernel"], np.float64)
    np.testing.assert_array_equal(start[0], start[1])
    assert start.std() == pytest.approx(0.01, rel=0.5) and not np.asarray(state[0]["bias"]).any()
    batches = [batch_of(number) for number in range(4)]
    assert set(np.concatenate(batches)) <= set(rows) and len(set(map(tuple, batches))) > 1
    for batch in batches:
        state, _ = step(state, features[batch].astype(np.float32), labels[batch])
    for head, rate in enumerate(settings.learning_rates):
        params = [start[head], np.zeros(3)]
        means, squares = ([np.zeros_like(param) for param in params] for _ in range(2))
        for number, batch in enumerate(batches):
            logits = features[batch] @ params[0] + params[1]
            errors = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(3)[labels[batch]]
            now = rate * (1 + np.cos(np.pi * number / 4)) / 2
            for place, gradient in enumerate((features[batch].T @ errors / 2, errors.mean(axis=0))):
                means[place] = 0.9 * means[place] + 0.1 * gradient
                squares[place] = 0.999 * squares[place] + 0.001 * gradient**2
                mean = means[place] / (1 - 0.9 ** (number + 1))
                deviation = np.sqrt(squares[place] / (1 - 0.999 ** (number + 1))) + 1e-8
                params[place] = params[place] - now * (mean / deviation + 0.1 * params[place])
        np.testing.assert_allclose(state[0]["kernel"][head], params[0], atol=2e-5)
        np.testing.assert_allclose(state[0]["bias"][head], params[1], atol=2e-5)


def test_accuracies_are_those_of_standardised_features(monkeypatch):
    """Neighbours and their votes in NumPy; features of other scales would choose other neighbours."""
    rng = np.random.default_rng(4)
    scales = np.array([1.0, 100.0, 0.0, 5.0])
    labels = [rng.integers(0, 4, count) for count in (37, 23)]
    train, test = (
        (np.array([3.0, 5, 7, 0]) + scales * (rng.normal(size=(len(y), 4)) + 2 * np.eye(4)[y])).astype(np.float32)
        for y in labels
    )
    monkeypatch.setattr(knn, "BANK_ROWS", 16)
    fit, held = held_out(37, SETTINGS.validation_fraction, SETTINGS.seed)
    deviation = train[fit].astype(float).std(axis=0)
    bank, *queries = (
        (x - train[fit].astype(float).mean(axis=0)) / np.where(deviation > 1e-6, deviation, np.inf)
        for x in (train[fit], train[held], test)
    )
    expected = []
    for of_split, true in zip(queries, (labels[0][held], labels[1]), strict=True):
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        similarity = unit(of_split) @ unit(bank).T
        rows = np.argsort(-similarity, axis=1)[:, : SETTINGS.knn_neighbors]
        weights = np.exp(np.take_along_axis(similarity, rows, 1) / SETTINGS.knn_temperature)
        votes = np.einsum("qk,qkc->qc", weights, np.eye(4)[labels[0][fit][rows]])
        expected.append(np.mean(votes.argmax(axis=1) == true))
    features = (Features({"x": x[:, None]}, y, (1,), 4) for x, y in zip((train, test), labels, strict=True))
    assert ours.neighbor_accuracies("x", *features, SETTINGS, lambda phase: None, Saved()) == expected
    assert 0.4 < expected[1] < 1


def test_raw_pixels_are_averaged_to_at_most_32_a_side():
    images = np.random.default_rng(5).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    features = raw_pixels({}, {"images": jnp.asarray(images)})["pixels"]
    chex.assert_shape(features, (3, 1, 32 * 32 * 3))
    assert float(features.mean()) == pytest.approx(images.mean() / 255, abs=2e-3)
    small = raw_pixels({}, {"images": jnp.asarray(images[:, :19, :19])})["pixels"]
    np.testing.assert_allclose(small, images[:, :19, :19].reshape(3, 1, -1) / 255, atol=1e-6)


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
