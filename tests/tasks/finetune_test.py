"""The loss of fine-tuning: weights of rows, what `augment` switches on, the keys of a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import CONFIGS
from testing import quick_jit
from without_data import no_data

from beitv2_jax import config as config_lib
from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.models import mixing
from beitv2_jax.tasks import finetune

BATCH, CLASSES = 6, 7


def built(**augment):
    config = config_lib.load(f"{CONFIGS / 'finetune.py'}:smoke").unlock()
    config.views.image_size = 32
    config.model.update(width=8, depth=1, num_heads=2, mlp_dim=12, num_classes=CLASSES, head_init_scale=1.0)
    config.model.drop_path_rate = 0.0
    off = {"randaugment_ops": 0, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}
    config.augment.update(off | augment)
    with no_data(0):
        return finetune.build(config)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8),
        "labels": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "weight": np.ones(BATCH, np.float32),
    }


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(0, 0.3, leaf.shape), jnp.float32),
        jax.eval_shape(built().init, jax.random.key(0))["params"],
    )


def compiled(task):
    @quick_jit
    def loss(params, batch, key):
        total, parts = task.loss(params, {}, {}, batch, key, 0)
        return total / parts.weight, {name: metric / parts.weight for name, metric in parts.metrics.items()}

    return loss


def test_the_plain_loss_is_that_of_the_evaluation_but_for_the_smoothing(params):
    task, rows = built(), batch()
    value, metrics = compiled(task)(params, rows, jax.random.key(1))
    sums = quick_jit(lambda p, b: task.evaluate(p, {}, {}, b))(params, rows)
    assert sums["examples"] == BATCH
    np.testing.assert_allclose(metrics["accuracy"], sums["hits"] / BATCH, rtol=1e-6)
    assert 0.01 < abs(value - sums["nll"] / BATCH) < 1.0


@pytest.mark.parametrize("augment", [{}, {"mixup": 0.8}])
def test_unreadable_rows_count_for_nothing(params, augment):
    loss, rows, key = compiled(built(**augment)), batch(), jax.random.key(2)
    rows["weight"][[1, 4]] = 0.0  # partners of each other, so the rest is mixed alike
    value, metrics = loss(params, rows, key)
    rows["images"][[1, 4]], rows["labels"][[1, 4]] = 128, 0
    other, other_metrics = loss(params, rows, key)
    assert (value, metrics["accuracy"]) == (other, other_metrics["accuracy"])
    full, _ = loss(params, {**rows, "weight": np.ones(BATCH, np.float32)}, key)
    assert full != value


def test_the_settings_change_the_loss_and_reach_their_functions(params, monkeypatch):
    seen = {}

    def mix(images, targets, weight, key, **settings):
        seen.update(settings, targets=targets.shape)
        return images, targets

    def erase(images, key, *, probability):
        seen["erasing"] = probability
        return images

    rows, key = batch(), jax.random.key(3)
    plain = compiled(built())(params, rows, key)[0]
    changed = compiled(built(mixup=0.8, cutmix=1.0, erasing=1.0))(params, rows, key)[0]
    assert abs(changed - plain) > 1e-4
    monkeypatch.setattr(mixing, "mix", mix)
    monkeypatch.setattr(mixing, "random_erasing", erase)
    augment = dict(mixup=0.3, cutmix=0.7, mix_probability=0.9, switch_probability=0.2, erasing=0.1)
    value, _ = compiled(built(**augment))(params, rows, key)
    # without a mixture, soft targets are smoothed labels
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    assert seen.pop("targets") == (BATCH, CLASSES)
    assert seen == {"mixup": 0.3, "cutmix": 0.7, "probability": 0.9, "switch_probability": 0.2, "erasing": 0.1}


def test_randaugment_of_a_config():
    config = config_lib.load(f"{CONFIGS / 'finetune.py'}")
    assert finetune.rand_augment(config) == RandAugment(2, 9.0, 0.5)
    config.augment.randaugment_ops = 0
    assert finetune.rand_augment(config) is None
