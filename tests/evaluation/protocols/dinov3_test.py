"""The protocol `dinov3` against scikit-learn, and its heads against SGD in NumPy."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as ScikitLearn
from sklearn.neighbors import KNeighborsClassifier

from beitv2_jax.evaluation import heads, knn
from beitv2_jax.evaluation.features import Features, ProbeSettings, held_out
from beitv2_jax.evaluation.knn import knn_accuracies
from beitv2_jax.evaluation.logistic import LogisticRegression
from beitv2_jax.evaluation.protocols import dinov3
from beitv2_jax.evaluation.saved import Saved

SETTINGS = ProbeSettings(
    num_steps=5,
    batch_size=8,
    learning_rates=(),
    weight_decay=0.0,
    knn_neighbors=0,
    knn_temperature=0.0,
    validation_fraction=0.0,
    seed=3,
)


def clusters(rng, count, classes=3, width=5):
    """Return features and labels of classes that overlap."""
    labels = rng.integers(0, classes, count)
    return (np.eye(classes, width)[labels] * 1.5 + rng.normal(size=(count, width))).astype(np.float32), labels


def as_features(rng, count, classes=3):
    arrays, labels = {}, rng.integers(0, classes, count)
    for name in ("cls", "cls_normed", "mean_normed"):
        arrays[name] = (np.eye(classes, 5)[labels] * 1.5 + rng.normal(size=(count, 5)))[:, None].astype(np.float32)
    return Features(arrays, labels, (4,), classes)


def ignore(phase):
    pass


@pytest.mark.parametrize("bank_rows", [1000, 16])
def test_neighbours_vote_as_in_scikit_learn(monkeypatch, bank_rows):
    """With the bank as a whole and in pieces, of which the first hold fewer rows than neighbours are asked for."""
    monkeypatch.setattr(knn, "BANK_ROWS", bank_rows)
    monkeypatch.setattr(knn, "QUERY_ROWS", 13)
    rng = np.random.default_rng(0)
    (bank, bank_labels), (queries, labels) = clusters(rng, 60), clusters(rng, 41)
    found = knn_accuracies(
        bank.astype(np.float16),
        bank_labels,
        queries,
        labels,
        num_classes=3,
        neighbors=(1, 10, 20, 200),
        temperature=0.07,
        on_move=ignore,
    )
    assert list(found) == [1, 10, 20, 60]  # 200 neighbours are all there are
    for count, accuracy in found.items():
        reference = KNeighborsClassifier(
            count, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07), algorithm="brute"
        )
        reference.fit(bank.astype(np.float16).astype(np.float64), bank_labels)
        assert accuracy == pytest.approx(reference.score(queries.astype(np.float64), labels), abs=1e-9)
    assert len(set(found.values())) > 1


def test_every_row_is_in_every_epoch_once():
    batches = list(map(heads.shuffled(np.arange(10), 4, seed=0), range(6)))
    assert [len(batch) for batch in batches] == [4] * 6
    rows = np.concatenate(batches)
    # 2 1/2 batches are an epoch, so the third one holds two rows of each of the first two
    assert set(rows[:8]) | set(batches[2]) >= set(range(10))
    assert sorted(np.bincount(rows, minlength=10)) == [2] * 6 + [3] * 4
    assert not np.array_equal(rows[:4], heads.shuffled(np.arange(10), 4, seed=1)(0))


def test_the_sweep_is_sgd_for_each_rate(monkeypatch):
    """Five steps of three rates by hand: v = 0.9 v + g, w = w - rate (1 + cos(pi t / 5)) / 2 v."""
    monkeypatch.setattr(dinov3, "RATES", (0.01, 0.3, 8.0))
    rng = np.random.default_rng(1)
    train, test = as_features(rng, 20), as_features(rng, 50)
    found = dinov3.sgd_accuracies(train, test, SETTINGS, ignore, Saved())
    start = jax.tree.map(np.asarray, heads.initial_linear_heads(SETTINGS.seed, 3, 10, 3))
    assert start["kernel"].std() == pytest.approx(0.01, rel=0.3) and not start["bias"].any()
    inputs, of_test = (np.concatenate([f.last("cls_normed"), f.last("mean_normed")], axis=1) for f in (train, test))
    for head, rate in enumerate(dinov3.RATES):
        kernel, bias = (start[name][head].astype(np.float64) for name in ("kernel", "bias"))
        speeds = [np.zeros_like(kernel), np.zeros_like(bias)]
        batch_of = heads.shuffled(np.arange(20), 8, SETTINGS.seed)
        for step in range(5):
            rows = batch_of(step)
            logits = inputs[rows] @ kernel + bias
            errors = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            errors[np.arange(8), train.labels[rows]] -= 1
            speeds[0] = 0.9 * speeds[0] + inputs[rows].T @ errors / 8
            speeds[1] = 0.9 * speeds[1] + errors.mean(axis=0)
            now = rate * 8 / 256 * (1 + np.cos(np.pi * step / 5)) / 2
            kernel, bias = kernel - now * speeds[0], bias - now * speeds[1]
        right = (of_test @ kernel + bias).argmax(axis=1) == test.labels
        assert found[head] == pytest.approx(right.mean(), abs=1e-9)
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_that_of_scikit_learn(classes):
    rng = np.random.default_rng(2)
    features, labels = clusters(rng, 70, classes)
    labels = labels + 4  # classes without examples come before
    rows = np.arange(0, 70, 2)
    regression = LogisticRegression(features, labels, rows, max_steps=1000, tolerance=1e-12, on_move=ignore)
    for strength in (1e-3, 1.0, 1e3):
        reference = ScikitLearn(C=strength, tol=1e-12, max_iter=1000).fit(features[rows].astype(float), labels[rows])
        params = regression.fit(strength)
        kernel = params[:-1, 1:] - params[:-1, :1]
        expected = reference.coef_.T if classes == 2 else (reference.coef_[1:] - reference.coef_[:1]).T
        np.testing.assert_allclose(kernel, expected, rtol=1e-3, atol=1e-4)
        score = reference.score(features.astype(float), labels)
        assert regression.accuracy(params, features, labels) == pytest.approx(score, abs=1e-9)


def test_logistic_regression_finds_the_minimum_in_few_steps_however_its_features_are_scaled():
    rng = np.random.default_rng(3)
    features, labels = clusters(rng, 300, 3)
    features = np.concatenate([features, features + 0.01 * rng.standard_normal(features.shape)], axis=1)  # correlated
    features = (features * 10 ** np.linspace(0, -3, features.shape[1])).astype(np.float32)
    inverse_strength, rows = 1e5, np.arange(300)
    regression = LogisticRegression(features, labels, rows, max_steps=150, tolerance=1e-12, on_move=ignore)
    params = regression.fit(inverse_strength)
    inputs = np.concatenate([features.astype(float), np.ones((300, 1))], axis=1)
    probabilities = np.exp(inputs @ params)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    gradient = inputs.T @ (probabilities - np.eye(3)[labels]) / 300
    gradient[:-1] += params[:-1] / (inverse_strength * 300)
    relative = np.abs(gradient) / np.sqrt(np.square(inputs).mean(axis=0))[:, None]  # whatever the scale of a feature
    assert relative.max() < 1e-6


def test_c_is_chosen_on_held_out_images_and_all_are_fitted(monkeypatch):
    monkeypatch.setattr(dinov3, "INVERSE_STRENGTHS", np.array([1e-6, 1e-2, 1e2]))
    rng = np.random.default_rng(4)
    train, test = as_features(rng, 90), as_features(rng, 200)
    x, y = train.last("cls_normed").astype(float), train.labels
    fit, held = held_out(90, 0.1, SETTINGS.seed)
    assert len(held) == 9 and sorted([*fit, *held]) == list(range(90))
    scores = [ScikitLearn(C=c, tol=1e-12).fit(x[fit], y[fit]).score(x[held], y[held]) for c in (1e-6, 1e-2, 1e2)]
    best = (1e-6, 1e-2, 1e2)[int(np.argmax(scores))]
    expected = ScikitLearn(C=best, tol=1e-12).fit(x, y).score(test.last("cls_normed").astype(float), test.labels)
    found = dinov3.logistic(train, test, SETTINGS, ignore, Saved())
    assert found == {"strength": best, "accuracy": pytest.approx(expected, abs=1e-9)}
    assert len(set(scores)) > 1
