"""Schedules and AdamW against the published values and an independent NumPy oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_jax.errors import UserError
from beitv2_jax.training import optim


@pytest.mark.parametrize(
    ("settings_", "checks"),
    [
        (
            dict(peak_lr=2e-4, min_lr=1e-5, warmup_steps=25_020, num_steps=250_200),
            {0: 0.0, 1: 7.993924617e-9, 25_019: 2e-4, 25_020: 2e-4, 125_100: 1.214966e-4, 250_199: 1.0000000009e-5},
        ),
        (
            dict(peak_lr=1.5e-3, min_lr=1e-5, warmup_steps=6250, num_steps=187_500),
            {1: 2.400384e-7, 6249: 1.5e-3, 6250: 1.5e-3, 93_750: 7.953335e-4},
        ),
        (dict(peak_lr=1.5e-3, min_lr=1e-5, warmup_steps=6250, num_steps=1_000_000), {500_000: 7.623599e-4}),
    ],
)
def test_schedule_hits_the_published_values(settings_, checks):
    for step, value in checks.items():
        # The published values are printed with 7 to 11 digits; the absolute bound is half a unit of the last one.
        np.testing.assert_allclose(optim.learning_rate(step, **settings_), value, rtol=1e-9, atol=5e-11)
    single = optim.learning_rate(jnp.arange(0, settings_["num_steps"], 997), **settings_, xp=jnp)
    double = optim.learning_rate(np.arange(0, settings_["num_steps"], 997), **settings_)
    np.testing.assert_allclose(single, double, rtol=0, atol=3e-7 * settings_["peak_lr"])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 90), st.floats(1e-5, 1.0), st.floats(0.0, 1.0))
def test_schedule_peaks_starts_at_zero_and_never_leaves_its_bounds(warmup_steps, after, peak_lr, share):
    min_lr = peak_lr * share
    rates = optim.learning_rate(
        np.arange(warmup_steps + after + 3),
        peak_lr=peak_lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
        num_steps=warmup_steps + after,
    )
    # the cosine form reaches the peak as min + (peak - min), which may round by one unit in the last place
    assert rates[warmup_steps] == pytest.approx(rates.max(), rel=1e-15) == pytest.approx(peak_lr, rel=1e-15)
    if warmup_steps:
        assert rates[0] == 0.0
    assert (np.diff(rates[:warmup_steps]) > 0).all() and (np.diff(rates[warmup_steps:]) <= 0).all()
    np.testing.assert_allclose(rates[-3:], min_lr, rtol=1e-12)


def test_the_straight_rate_of_segmentation():
    published = dict(peak_lr=5e-5, min_lr=0.0, warmup_steps=1500, num_steps=160_000)
    by_hand = {
        0: 5e-5 * 1e-6,
        750: 5e-5 * (1 - 750 / 160_000) * (1 - 0.5 * (1 - 1e-6)),
        1500: 5e-5 * (1 - 1500 / 160_000),
        80_000: 2.5e-5,
        159_999: 5e-5 / 160_000,
    }
    for step, value in by_hand.items():
        np.testing.assert_allclose(optim.linear_rate(step, **published), value, rtol=1e-9)
    rates = optim.linear_rate(np.arange(12), peak_lr=3.0, min_lr=1.0, warmup_steps=0, num_steps=10)
    np.testing.assert_allclose(rates, [3, 2.8, 2.6, 2.4, 2.2, 2, 1.8, 1.6, 1.4, 1.2, 1, 1])
    steps = np.arange(0, 160_000, 997)
    single = optim.linear_rate(jnp.asarray(steps), **published, xp=jnp)
    np.testing.assert_allclose(single, optim.linear_rate(steps, **published), rtol=0, atol=3e-7 * 5e-5)


def test_a_constant_weight_decay_is_a_number_too():
    params, step = {"kernel": jnp.float32(3.0)}, 4
    for weight_decay in (0.25, lambda step: jnp.float32(0.0625) * step):
        optimizer = optim.make_optimizer(
            schedule=lambda step: 0.5, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, no_decay=lambda _: False
        )
        updates, _ = optimizer.update({"kernel": jnp.float32(0.0)}, optimizer.init(params), params, step=step)
        assert float(updates["kernel"]) == -0.5 * 0.25 * 3.0


def test_layer_scale_equals_the_published_ends():
    assert optim.layer_scale(0, layer_decay=0.6, num_layers=12) == pytest.approx(0.00131, abs=5e-6)
    assert optim.layer_scale(12, layer_decay=0.6, num_layers=12) == pytest.approx(0.6)
    assert optim.layer_scale(0, layer_decay=0.8, num_layers=24) == pytest.approx(0.00378, abs=5e-6)
    assert optim.layer_scale(25, layer_decay=0.8, num_layers=24) == 1.0
    assert optim.layer_scale(None, layer_decay=0.8, num_layers=24) == 1.0


def adamw_oracle(params, gradients, rates, decays, scales, decayed, *, betas, eps, clip_norm):
    """Follow torch.optim.AdamW in float64: decay first, `p *= 1 - lr * wd`, then `lr * m_hat / (sqrt(v_hat) + eps)`."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for count, (gradient, rate, decay) in enumerate(zip(gradients, rates, decays, strict=True), 1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient.values()))
        for name, value in params.items():
            g = gradient[name].astype(np.float64) * min(1.0, clip_norm / norm)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g * g
            denominator = np.sqrt(second[name]) / np.sqrt(1 - betas[1] ** count) + eps
            lr = rate * scales[name]
            kept = 1 - lr * decay * decayed[name]
            params[name] = value * kept - lr / (1 - betas[0] ** count) * first[name] / denominator
    return params


def test_adamw_equals_an_oracle_with_torch_semantics():
    rng = np.random.default_rng(0)
    params = {"a/kernel": rng.normal(size=(3, 5)).astype(np.float32), "b/bias": rng.normal(size=7).astype(np.float32)}
    gradients = [
        {
            name: (10.0 ** rng.integers(-3, 1) * rng.normal(size=p.shape)).astype(np.float32)
            for name, p in params.items()
        }
        for _ in range(11)
    ]
    settings_ = dict(peak_lr=0.05, min_lr=0.01, warmup_steps=3, num_steps=11)
    optimizer = optim.make_optimizer(
        schedule=lambda step: optim.learning_rate(step, **settings_, xp=jnp),
        betas=(0.9, 0.98),
        eps=1e-2,
        weight_decay=lambda step: optim.cosine(step, start=0.3, end=0.7, num_steps=11, xp=jnp),
        no_decay=lambda path: path.endswith("bias"),
        clip_norm=0.5,
        layer_decay=0.5,
        layer_of=lambda path: {"a/kernel": 1, "b/bias": None}[path],
        num_layers=2,
    )
    found, opt_state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    for step, gradient in enumerate(gradients):
        updates, opt_state = jax.jit(optimizer.update)(gradient, opt_state, found, step=step)
        found = optax.apply_updates(found, updates)
        if step == 0:
            chex.assert_trees_all_equal(found, params)  # rate exactly 0, yet Adam has counted the step
            assert int(optax.tree.get(opt_state, "count")) == 1
    expected = adamw_oracle(
        params,
        gradients,
        [optim.learning_rate(step, **settings_) for step in range(11)],
        [0.7 + 0.2 * (-1) * (1 + np.cos(np.pi * step / 11)) for step in range(11)],
        {"a/kernel": 0.25, "b/bias": 1.0},
        {"a/kernel": 1.0, "b/bias": 0.0},
        betas=(0.9, 0.98),
        eps=1e-2,
        clip_norm=0.5,
    )
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=5e-7)


def test_layer_decay_without_layers_is_refused():
    with pytest.raises(UserError, match=r"layer_decay is 0\.5"):
        optim.make_optimizer(
            schedule=lambda step: 1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, no_decay=bool, layer_decay=0.5
        )
