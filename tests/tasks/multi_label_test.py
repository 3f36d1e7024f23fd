"""Several classes an image: the loss by hand, the metrics against scikit-learn, and the stage that takes them."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from paths import CONFIGS
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.models import mixing
from beitv2_jax.report.key_metrics import key_metrics
from beitv2_jax.tasks import finetune, multi_label
from beitv2_jax.training import best, inference, sharding

BATCH, CLASSES = 6, 5
OFF = {"mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0, "switch_probability": 0.5, "erasing": 0.0}


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(BATCH, CLASSES)), rng.integers(0, 2, (BATCH, CLASSES)).astype(np.float32)
    weights = rng.uniform(0.2, 3.0, (2, CLASSES)).astype(np.float32)
    images = rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8)
    return logits, {"images": images, "labels": labels, "weight": np.ones(BATCH, np.float32)}, weights


def mean_loss(logits, batch, *, smoothing=0.0, class_weights=None, **augment):
    """Return loss and precision of a model that gives these logits to any images."""
    loss = multi_label.multi_label_loss(
        types.SimpleNamespace(apply=lambda variables, images, **options: variables["params"]),
        normalization="imagenet",
        label_smoothing=smoothing,
        class_weights=class_weights,
        **(OFF | augment),
    )
    total, parts = jax.jit(loss)(jnp.asarray(logits, jnp.float32), {}, {}, batch, jax.random.key(0), 0)
    return total / parts.weight, parts.metrics["precision_at_1"] / parts.weight


@pytest.mark.parametrize("share, smoothing, weighted", [(1.0, 0.0, False), (1.0, 0.2, True), (0.3, 0.1, True)])
def test_the_loss_by_hand(share, smoothing, weighted, monkeypatch):
    """Image i is mixed with its partner B - 1 - i; row 1 is unreadable, so row 4 stays as it is."""
    logits, batch, weights = drawn()
    batch["weight"][1], batch["labels"][1] = 0.0, np.nan
    kept = [0, 2, 3, 4, 5]
    shares = np.full((BATCH, 1), share)
    shares[4] = 1.0
    labels = batch["labels"].astype(np.float64)
    mixed = np.where(shares == 1, labels, shares * labels + (1 - shares) * labels[::-1])[kept]
    p = 1 / (1 + np.exp(-logits[kept]))
    y = (1 - smoothing) * mixed + smoothing / 2
    cross_entropy = -y * np.log(p) - (1 - y) * np.log(1 - p)
    if weighted:
        cross_entropy *= weights[0] * (1 - mixed) + weights[1] * mixed
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: share)
    augment = {"mixup": 0.8} if share < 1 else {}
    found, precision = mean_loss(
        logits, batch, smoothing=smoothing, class_weights=weights if weighted else None, **augment
    )
    np.testing.assert_allclose(found, cross_entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(precision, mixed[np.arange(5), p.argmax(axis=1)].mean(), rtol=1e-5)


def test_balanced_weights_are_those_of_scikit_learn_for_each_class(tmp_path, monkeypatch):
    config = config_on(tmp_path)
    config.class_weights = "balanced"
    seen = {}
    monkeypatch.setattr(finetune, "make_task", lambda config, opened: seen.update(opened=opened))
    finetune.build(config)
    labels, weights = LABELS["train"], seen["opened"].class_weights
    assert weights.shape == (2, 3)
    for label in (0, 1):
        expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels[:, label])
        np.testing.assert_allclose(weights[:, label], expected, rtol=1e-6)
        # the ratio is the weight of positives of PyTorch's BCEWithLogitsLoss
        negatives, positives = np.bincount(labels[:, label])
        assert weights[1, label] / weights[0, label] == pytest.approx(negatives / positives)
    assert weights[:, 2].tolist() == [1, 0]  # no image has this class


def test_the_settings_reach_their_functions(monkeypatch):
    seen = {}

    def mix(images, targets, weight, key, **settings):
        seen.update(settings, targets=targets.shape)
        return images, targets

    def erase(images, key, *, probability):
        return seen.update(erasing=probability) or images

    monkeypatch.setattr(mixing, "mix", mix)
    monkeypatch.setattr(mixing, "random_erasing", erase)
    logits, batch, _ = drawn()
    mean_loss(logits, batch, mixup=0.3, cutmix=0.7, mix_probability=0.9, switch_probability=0.2, erasing=0.1)
    assert seen.pop("targets") == (BATCH, CLASSES)
    assert seen == {"mixup": 0.3, "cutmix": 0.7, "probability": 0.9, "switch_probability": 0.2, "erasing": 0.1}


@pytest.mark.parametrize("seed, count, levels", [(0, 40, np.inf), (1, 40, 4), (2, 13, 0), (3, 1, np.inf), (4, 5, 4)])
def test_the_metrics_are_those_of_scikit_learn(seed, count, levels):
    """With any number of equal scores; a class without positives is in no mean."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, 4))
    logits = logits if levels == np.inf else np.round(logits * levels / 3)
    labels = rng.integers(0, 2, (count, 4)) * np.array([1, 1, 1, 0])
    found = multi_label.judge(logits, labels)
    predicted = logits >= 0
    has = labels.any(axis=0)
    assert found.positives.tolist() == labels.sum(axis=0).tolist()
    of_class = {
        "average_precision": lambda y, s, p: sklearn.metrics.average_precision_score(y, s),
        "precision": lambda y, s, p: sklearn.metrics.precision_score(y, p, zero_division=0),
        "recall": lambda y, s, p: sklearn.metrics.recall_score(y, p),
        "f1": lambda y, s, p: sklearn.metrics.f1_score(y, p, zero_division=0),
    }
    for name, function in of_class.items():
        values = getattr(found, name)
        assert np.isnan(values).tolist() == (~has).tolist()
        for label in np.flatnonzero(has):
            expected = function(labels[:, label], logits[:, label], predicted[:, label])
            assert values[label] == pytest.approx(expected, abs=1e-12), name
    means = found.means
    if has.any():
        arguments = labels[:, has], logits[:, has]
        expected = sklearn.metrics.average_precision_score(*arguments, average="macro")
        assert means["mean_average_precision"] == pytest.approx(expected)
        expected = sklearn.metrics.f1_score(labels[:, has], predicted[:, has], average="macro", zero_division=0)
        assert means["macro_f1"] == pytest.approx(expected)
        assert means["micro_f1"] == pytest.approx(
            sklearn.metrics.f1_score(labels, predicted, average="micro", zero_division=0)
        )
    else:
        assert np.isnan(means["mean_average_precision"]) and np.isnan(means["macro_f1"])


def test_an_evaluation_is_of_every_readable_image_once_on_any_mesh(caplog):
    """Batches of 8 of 21 images, two of which cannot be read; the rows that fill up the last one count for nothing."""
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=(21, 3)).astype(np.float32), rng.integers(0, 2, (21, 3)).astype(np.float32)
    labels[:, 1] = 0
    places = np.minimum(np.arange(24), 20)
    weight = (np.arange(24) < 21).astype(np.float32)
    weight[[3, 11]] = 0
    batches = [
        {"logits": logits[places[part]], "labels": labels[places[part]], "weight": weight[part]}
        for part in np.split(np.arange(24), 3)
    ]
    evaluate = multi_label.multi_label_evaluation(lambda params, batch: params * batch["logits"])
    kept = np.delete(np.arange(21), [3, 11])
    for sizes in ((2, 2, 2), (1, 1, 1)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        compiled = jax.jit(
            lambda weights, batch: {"eval": evaluate(weights, {}, {}, batch), "count": batch["weight"].sum()},
            out_shardings=sharding.replicated(mesh),
        )
        totals = inference.sum_batches(compiled, np.float32(1), batches, mesh)
        assert totals["count"] == 19
        np.testing.assert_array_equal(totals["eval"]["rows"].values["logits"], logits[kept])
        with caplog.at_level(logging.WARNING, logger="absl"):
            found = multi_label.summarize(("a", "b", "c"), totals["eval"])
    assert caplog.text.count("no image of the evaluation has these classes, which no mean counts: b") == 1
    precisions = [sklearn.metrics.average_precision_score(labels[kept, k], logits[kept, k]) for k in (0, 2)]
    assert found["mean_average_precision"] == pytest.approx(np.mean(precisions))
    p = 1 / (1 + np.exp(-logits[kept].astype(np.float64)))
    expected = np.mean([sklearn.metrics.log_loss(labels[kept, k], p[:, k], labels=[0, 1]) for k in range(3)])
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


# the stage

LABELS = {
    "train": np.array([[number % 2, number % 4 == 0, 0] for number in range(9)], int),
    "val": np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]]),
}


def config_on(root):
    """Return a config of finetune on a folder of images with the labels `LABELS`."""
    for split, labels in LABELS.items():
        (root / split).mkdir(exist_ok=True)
        for number in range(len(labels)):
            Image.new("RGB", (20, 20 + number), (90, 20 * number, 7)).save(root / split / f"{number}.png")
        rows = "".join(f"{number}.png,{','.join(map(str, row))}\n" for number, row in enumerate(labels))
        (root / split / "labels.csv").write_text(f"file_name,ant,bee,cat\n{rows}")
    config = config_lib.load(f"{CONFIGS / 'finetune.py'}:smoke").unlock()
    config.data.update(source=f"folder:{root}", num_threads=0)
    config.views.image_size = 16
    config.model.update(width=8, depth=1, num_heads=2, mlp_dim=12, num_classes=3)
    config.run.batch_size = 4
    return config


def test_the_data_set_decides_loss_and_metrics(tmp_path):
    task = finetune.build(config_on(tmp_path))
    iterator = task.train_batches(0, 1)
    batch = next(iterator)
    iterator.close()
    assert batch["labels"].dtype == np.float32
    np.testing.assert_array_equal(batch["labels"], LABELS["train"][batch["example_ids"]])
    state = jax.eval_shape(task.init, jax.random.key(0))
    batch.pop("faults")
    _, parts = jax.eval_shape(task.loss, state["params"], {}, {}, batch, jax.random.key(0), 0)
    assert set(parts.metrics) == {"precision_at_1"}
    assert best.check_metric(task, "eval/mean_average_precision", False, (0, 1)) is None
    with pytest.raises(UserError, match="names no metric") as caught:
        best.check_metric(task, "eval/accuracy", False, (0, 1))
    assert "eval/mean_average_precision, eval/macro_f1, eval/micro_f1, eval/loss" in caught.value.instead


def test_the_last_line_of_a_run_has_the_metrics():
    config = config_lib.load(str(CONFIGS / "finetune.py"))
    metrics = {"eval/mean_average_precision": 0.8125, "eval/micro_f1": 0.75, "eval/macro_f1": 0.5, "loss": 0.25}
    assert key_metrics({"stage": "finetune", "metrics": metrics}, config) == [
        "mAP 81.2%, F1 75.0% of all decisions, 50.0% in the mean over the classes, on validation (train loss 0.250)"
    ]
