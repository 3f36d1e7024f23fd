"""The protocol `beit` against AdamW in NumPy, a head for each block."""

import dataclasses

import jax
import numpy as np
import pytest

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.features import Features
from beitv2_jax.evaluation.protocols import beit
from beitv2_jax.evaluation.saved import SavedParts
from tests.evaluation.protocols.dinov3_test import SETTINGS, ignore


def two_blocks(rng, count):
    """Return features of two blocks, of which the first says less about the three labels."""
    labels = rng.integers(0, 3, count)
    signal = np.eye(3, 5)[labels][:, None] * np.array([[0.3], [1.5]])
    arrays = {name: (signal + rng.normal(size=(count, 2, 5))).astype(np.float32) for name in ("cls", "mean")}
    return Features(arrays, labels, (1, 2), 3)


def test_heads_of_all_blocks_train_by_adamw_with_a_rate_for_each_epoch(monkeypatch):
    monkeypatch.setattr(beit, "RATE", 1.6)
    monkeypatch.setattr(beit, "DECAY", 0.1)
    settings = dataclasses.replace(SETTINGS, num_steps=6)  # 3 epochs of 2
    rng = np.random.default_rng(5)
    train, test = two_blocks(rng, 17), two_blocks(rng, 60)
    result = beit.evaluate(train, test, settings, ignore, SavedParts())
    start = jax.tree.map(np.asarray, heads.initial_linear_heads(settings.seed, 2, 10, 3))
    expected = []
    for block in range(2):
        inputs, of_test = (
            np.concatenate([f.arrays[n][:, block] for n in ("cls", "mean")], axis=1) for f in (train, test)
        )
        params = [start[name][block].astype(np.float64) for name in ("kernel", "bias")]
        means, squares = ([np.zeros_like(param) for param in params] for _ in range(2))
        batch_of = heads.shuffled(np.arange(17), 8, settings.seed)
        for step in range(6):
            rows = batch_of(step)
            logits = inputs[rows] @ params[0] + params[1]
            errors = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            errors[np.arange(8), train.labels[rows]] -= 1
            rate = 1.6 * 8 / 256 * (1 + np.cos(np.pi * (step // 2) / 3)) / 2
            for number, gradient in enumerate((inputs[rows].T @ errors / 8, errors.mean(axis=0))):
                means[number] = 0.9 * means[number] + 0.1 * gradient
                squares[number] = 0.999 * squares[number] + 0.001 * gradient**2
                mean, square = means[number] / (1 - 0.9 ** (step + 1)), squares[number] / (1 - 0.999 ** (step + 1))
                params[number] = params[number] * (1 - rate * 0.1) - rate * mean / (np.sqrt(square) + 1e-8)
        expected.append(np.mean((of_test @ params[0] + params[1]).argmax(axis=1) == test.labels))
    assert expected[1] > expected[0] + 0.05
    found = [result.accuracies[f"cls_mean/linear_{layer}"] for layer in (1, 2)]
    assert found == pytest.approx(expected, abs=1e-9)
    assert result.accuracies["cls_mean/linear_best"] == found[1]
    assert result.chosen == {"cls_mean/linear_best_layer": 2}
