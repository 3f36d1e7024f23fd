"""The loss of fine-tuning: weights of rows, what `augment` switches on, the keys of a config."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import CONFIGS
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from without_data import no_data

from beitv2_jax import config as config_lib
from beitv2_jax.data.augment import center_crop
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
    @jax.jit
    def loss(params, batch, key):
        total, parts = task.loss(params, {}, {}, batch, key, 0)
        return total / parts.weight, {name: metric / parts.weight for name, metric in parts.metrics.items()}

    return loss


def test_the_plain_loss_is_that_of_the_evaluation_but_for_the_smoothing(params):
    task, rows = built(), batch()
    value, metrics = compiled(task)(params, rows, jax.random.key(1))
    sums = jax.jit(lambda p, b: task.evaluate(p, {}, {}, b))(params, rows)
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


def test_balanced_class_weights_are_those_of_scikit_learn():
    labels = np.repeat([0, 2, 3], [90, 6, 4])
    weights = finetune.balanced_class_weights(np.bincount(labels, minlength=5))
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    np.testing.assert_allclose(weights[[0, 2, 3]], expected, rtol=1e-6)
    assert weights[1] == weights[4] == 0
    assert weights[labels].mean() == pytest.approx(1, rel=1e-6)


def weighted_loss(logits, rows, weights, **augment):
    """Return the mean loss of a model that gives these logits to any images."""
    off = {"mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0, "switch_probability": 0.5, "erasing": 0.0}
    loss = finetune.finetune_loss(
        types.SimpleNamespace(apply=lambda variables, images, **options: variables["params"]),
        num_classes=CLASSES,
        normalization="imagenet",
        label_smoothing=0.1,
        class_weights=weights,
        **(off | augment),
    )
    total, parts = jax.jit(loss)(jnp.asarray(logits), {}, {}, rows, jax.random.key(0), 0)
    return total / parts.weight


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_class_weights_by_hand(share, monkeypatch):
    """Image i is mixed with its partner B - 1 - i; row 1 is unreadable, so row 4 stays as it is."""
    rng, rows = np.random.default_rng(5), batch()
    rows["weight"][1] = 0.0
    weights, logits = rng.uniform(0.1, 3.0, CLASSES).astype(np.float32), rng.normal(size=(BATCH, CLASSES))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    one_hot = np.eye(CLASSES)[rows["labels"]]
    shares = np.full((BATCH, 1), share)
    shares[4] = 1.0
    mixed = shares * one_hot + (1 - shares) * one_hot[::-1]
    cross_entropy = -((0.9 * mixed + 0.1 / CLASSES) * log_probabilities).sum(axis=1)
    readable = rows["weight"] > 0
    expected = ((mixed @ weights) * cross_entropy)[readable].sum() / readable.sum()
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: share)
    augment = {"mixup": 0.8} if share < 1 else {}
    np.testing.assert_allclose(weighted_loss(logits, rows, weights, **augment), expected, rtol=1e-5)
    plain = cross_entropy[readable].mean()
    np.testing.assert_allclose(weighted_loss(logits, rows, None, **augment), plain, rtol=1e-5)
    np.testing.assert_allclose(weighted_loss(logits, rows, np.ones(CLASSES), **augment), plain, rtol=1e-5)


def labelled_folder(root, **counts):
    for path, count in counts.items():
        (root / path.replace("_", "/")).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (40, 30 + number), (90, 20 * number % 256, 7)).save(
                root / path.replace("_", "/") / f"{number}.png"
            )


def test_a_config_asks_for_few_labels_class_weights_and_a_crop(tmp_path, monkeypatch):
    labelled_folder(tmp_path, train_ant=8, train_bee=2, val_ant=3, val_bee=3)
    config = config_lib.load(f"{CONFIGS / 'finetune.py'}:smoke").unlock()
    config.data.update(source=f"folder:{tmp_path}", num_threads=0)
    config.views.image_size = 32
    config.model.update(width=8, depth=1, num_heads=2, mlp_dim=12, num_classes=2)
    config.run.batch_size = 6
    seen = {}
    make_task = finetune.make_task
    monkeypatch.setattr(
        finetune, "make_task", lambda config, opened: seen.update(opened=opened) or make_task(config, opened)
    )
    task = finetune.build(config)
    assert seen["opened"].class_weights is None and task.num_train_examples == 10
    config.update(class_weights="balanced")
    finetune.build(config)
    np.testing.assert_allclose(seen["opened"].class_weights, [10 / (2 * 8), 10 / (2 * 2)])
    config.data.train_labels, config.evaluation.crop_fraction = "4 shots", 0.5
    task = finetune.build(config)
    np.testing.assert_allclose(seen["opened"].class_weights, [6 / (2 * 4), 6 / (2 * 2)])
    assert (task.num_train_examples, task.num_eval_examples) == (6, 6)
    iterator = task.train_batches(0, 1)
    epochs = [next(iterator) for _ in range(2)]
    iterator.close()
    # both epochs have the same six images, which keep the ids that they have in the folder
    assert len(set(epochs[0]["example_ids"])) == 6
    assert set(epochs[0]["example_ids"]) == set(epochs[1]["example_ids"]) > {8, 9}
    evaluated = next(iter(task.eval_batches(0, 1)))
    image = np.asarray(Image.open(tmp_path / "val/ant/2.png"))
    np.testing.assert_array_equal(evaluated["images"][2], center_crop(image, 32, 0.5))
    config.seed = 1
    assert finetune.build(config).sources[0].name != task.sources[0].name
    assert np.bincount(finetune.build(config).sources[0].labels).tolist() == [4, 2]
