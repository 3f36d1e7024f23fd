"""The dense evaluation on a small folder, from command to picture, against arithmetic by hand on what it cached."""

import json

import numpy as np
import pytest
from convert_states import drawn_weights
from paths import CONFIGS
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.convert.writing import write
from beitv2_jax.evaluation.features import divided
from beitv2_jax.rng import host_rng
from beitv2_jax.runners import dense, stages
from beitv2_jax.tasks import dense as tasks_dense

SIDE, PATCH = 12, 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder and the config of a run on eleven training pairs and three others, of two classes by colour."""
    root = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 3)):
        for folder in (root / "data" / split, root / "data" / f"{split}annot"):
            folder.mkdir(parents=True)
        for index in range(count):
            numbers = np.kron(rng.choice([0, 1, 11], (4, 5), p=[0.45, 0.45, 0.1]), np.ones((4, 4))).astype(np.uint8)
            colours = np.array([[200, 30, 30], [30, 30, 200], *[[90, 90, 90]] * 10], np.uint8)[numbers]
            noisy = np.clip(colours + rng.normal(0, 12, colours.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / "data" / split / f"{index}.png")
            Image.fromarray(numbers).save(root / "data" / f"{split}annot" / f"{index}.png")
    (root / "data" / "labels.txt").write_text("red\nblue\n")
    write(drawn_weights("mim", patch_size=PATCH), str(root / "mim"), "run")
    config = config_lib.load(f"{CONFIGS / 'dense.py'}:smoke").unlock()
    config.data.source = f"folder:{root / 'data'}"
    config.labels.ignored = (11,)
    config.views.image_size = SIDE
    config.backbone.run = str(root / "mim")
    config.dense.update(neighbors=(3,), strengths=(1.0,), max_patches=0)
    config.model.num_classes = 2
    stages.run_stage(config, str(root / "run"))
    return root, config


def cached(root, name, split):
    return {path.stem: np.load(path) for path in (root / "run" / "features").glob(f"{name}_{split}.*/*.npy")}


@pytest.mark.long
def test_metrics_are_those_of_arithmetic_by_hand(finished):
    root, _ = finished
    metrics = json.loads((root / "run" / "summary.json").read_text())["metrics"]
    assert (metrics["train_examples"], metrics["eval_examples"]) == (11, 3)
    for name in ("pretrained", "random", "pixels"):
        train, test = (cached(root, name, split) for split in ("train", "test"))
        fit, _ = divided(host_rng(0, "held out images").permutation(11)[::-1], 0.1)
        of_fit = train["features"][fit].reshape(-1, train["features"].shape[-1]).astype(np.float64)
        scale = np.where(of_fit.std(axis=0) > 1e-6, of_fit.std(axis=0), np.inf)
        bank, queries = (
            ((split["features"].astype(np.float64) - of_fit.mean(axis=0)) / scale).reshape(-1, of_fit.shape[1])
            for split in (train, test)
        )
        labels = train["labels"].reshape(-1, PATCH * PATCH)
        kept = np.array([np.bincount(row, minlength=256).argmax() != 255 for row in labels])
        bank, labels = bank[kept], labels[kept]
        if metrics[f"{name}/knn/cosine"]:
            bank, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, queries))
        distances = ((queries[:, None] - bank) ** 2).sum(axis=-1)
        nearest = np.argsort(distances, axis=1)[:, :3]
        predicted = np.array(
            [[np.bincount(column, minlength=256).argmax() for column in labels[rows].T] for rows in nearest]
        )
        true = test["labels"].reshape(-1, PATCH * PATCH)
        ious = []
        for number in (0, 1):
            here, said = (true == number), (predicted == number) & (true != 255)
            ious.append((here & said).sum() / (here | said).sum())
        assert metrics[f"{name}/knn/mean_iou"] == pytest.approx(np.mean(ious)), name
        assert metrics[f"{name}/knn/iou/red"] == pytest.approx(ious[0])
    assert metrics["pixels/knn/mean_iou"] > 0.6 and metrics["pixels/logistic/pixel_accuracy"] > 0.6
    assert Image.open(root / "run" / "dense.png").width > 1000


@pytest.mark.long
def test_features_are_of_every_image_once_for_any_batch(finished):
    root, config = finished
    config = config_lib.decided(config, {"backbone.layer": 2, "run.batch_size": 16})
    built = tasks_dense.build(config)
    pixels = built.feature_sets[-1]
    found = dense.cached_patches(pixels, built, built.sources[0], config, str(root / "other"))
    for name, array in cached(root, "pixels", "train").items():
        np.testing.assert_array_equal(found._asdict()[name], array)
    image = np.asarray(Image.open(root / "data" / "train" / "1.png").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(found.features[1, 1], image[:3, 3:6].reshape(-1) / 255, atol=1e-3)


def test_a_bank_is_bounded_by_a_draw():
    labels = np.array([[[0, 0], [255, 255], [1, 255]], [[1, 1], [0, 1], [2, 2]]], np.uint8)
    features = np.arange(6, dtype=np.float16).reshape(2, 3, 1)
    patches = dense.Patches(features, labels, np.arange(2))
    bank = dense.bank_of(patches, 0, 0)
    assert bank.features[:, 0].tolist() == [0, 2, 3, 4, 5] and bank.majority.tolist() == [0, 1, 1, 0, 2]
    drawn = dense.bank_of(patches, 3, 0)
    assert len(set(drawn.features[:, 0].tolist())) == 3 and 1 not in drawn.features
    np.testing.assert_array_equal(drawn.labels, labels.reshape(6, 2)[drawn.features[:, 0].astype(int)])
