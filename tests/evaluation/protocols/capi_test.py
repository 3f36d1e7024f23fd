"""The heads of the protocol `capi` against the same arithmetic in NumPy, and their choice on cases known beforehand."""

import jax
import numpy as np

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.features import Features, ProbeSettings
from beitv2_jax.evaluation.protocols import capi
from beitv2_jax.evaluation.saved import Saved

SETTINGS = ProbeSettings(
    num_steps=40,
    batch_size=32,
    learning_rates=(),
    weight_decay=0.0,
    knn_neighbors=1,
    knn_temperature=1.0,
    validation_fraction=0.5,
    seed=0,
)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_the_grid_is_the_published_one():
    assert len(capi.GRID) == 30 and capi.GRID[0] == (1e-5, 5e-4) and capi.GRID[-1] == (1e-2, 5e-2)


def test_the_schedule_by_hand():
    """Of twenty steps two are the warm-up, at 0 and 1, and 18 the half cosine from 1 to 0."""
    expected = [0, 1] + [(1 + np.cos(np.pi * step / 17)) / 2 for step in range(18)]
    np.testing.assert_allclose(capi.schedule(20), expected, atol=1e-6)
    assert len(capi.schedule(3)) == 3


def test_two_classifiers_take_the_steps_of_numpy():
    """AdamW with another rate and decay for each; the bias does not decay."""
    rng = np.random.default_rng(0)
    rates, decays = np.array([0.1, 0.02]), np.array([0.0, 0.5])
    params = capi.initial_heads(jax.random.key(0), 2, 4, 3, attentive=False)
    hand = [{name: np.asarray(param[number], np.float64) for name, param in params.items()} for number in range(2)]
    first = [{name: np.zeros_like(param) for name, param in one.items()} for one in hand]
    second = [{name: np.zeros_like(param) for name, param in one.items()} for one in hand]
    optimizer = capi.adamw(rates.astype(np.float32), decays.astype(np.float32), 20)
    step = heads.gradient_step(
        lambda params, inputs, labels: heads.sum_of_cross_entropies(capi.logits(params, inputs), labels), optimizer
    )
    state = params, optimizer.init(params)
    # two steps of warm-up, then the peak
    for number_of_step, fraction in enumerate((0.0, 1.0, 1.0), 1):
        features, labels = rng.normal(size=(5, 4)), rng.integers(0, 3, 5)
        state, _ = step(state, features.astype(np.float32), labels)
        for number in range(2):
            error = softmax(features @ hand[number]["kernel"] + hand[number]["bias"]) - np.eye(3)[labels]
            gradients = {"kernel": features.T @ error / 5, "bias": error.mean(axis=0)}
            for name, gradient in gradients.items():
                # the gradient of the mean over 120 classifiers
                gradient = gradient / 120
                first[number][name] = 0.9 * first[number][name] + 0.1 * gradient
                second[number][name] = 0.95 * second[number][name] + 0.05 * gradient**2
                update = first[number][name] / (1 - 0.9**number_of_step)
                update = update / (np.sqrt(second[number][name] / (1 - 0.95**number_of_step)) + 1e-8)
                decay = decays[number] * hand[number][name] if name == "kernel" else 0.0
                hand[number][name] = hand[number][name] - fraction * rates[number] * (update + decay)
    for number in range(2):
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(state[0][name][number], hand[number][name], atol=2e-5)


def test_the_held_out_tenth_chooses():
    """Among a rate that learns nothing, one that learns, and a decay that diverges."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 260)
    vectors = 3 * np.eye(3, 8)[labels] + rng.normal(size=(260, 8))
    tokens = (vectors[:, None] + 0.1 * rng.normal(size=(260, 3, 8)))[:, None].astype(np.float16)
    grid = ((1e-7, 5e-4), (0.3, 5e-4), (0.3, 1e3))
    train = Features({"tokens": tokens[:200]}, labels[:200], (1,), 3)
    tests = (Features({"tokens": tokens[200:]}, of_test, (1,), 3) for of_test in (labels[200:], 2 - labels[200:]))
    found, other = (
        capi.fit_and_choose(("tokens",), train, test, SETTINGS, lambda phase: None, Saved(), grid) for test in tests
    )
    assert found["rate"] == 0.3 and found["weight_decay"] == 5e-4 and found["held_out"] in np.arange(21) / 20
    # other labels of the evaluation split change the accuracy and nothing else
    assert other.pop("accuracy") < 0.6 < 0.9 < found.pop("accuracy")
    assert other == found
