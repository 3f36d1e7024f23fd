"""Linear segmentation: its loss and gradient by hand, and a run with its picture."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_states import drawn_weights
from paths import CONFIGS
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.convert.writing import write
from beitv2_jax.models.linear_segmenter import LinearSegmenter
from beitv2_jax.runners import stages
from beitv2_jax.tasks import segment_linear
from beitv2_jax.tasks.dense import FrozenBackbone

LAYOUT = types.SimpleNamespace(grid=(1, 1), width=3, num_prefix_tokens=1, norm_eps=1e-6)


class OfPixels:
    """A backbone whose patch tokens are the first pixel's colours times a matrix; one patch an image."""

    model, normalization = types.SimpleNamespace(backbone=LAYOUT), "half"

    def patch_tokens(self, params, images):
        return (images[:, 0, 0] @ params)[:, None]


def test_loss_and_gradient_by_hand():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 2, 2, 3), np.uint8)
    labels = np.array([[[0, 1], [1, 255]], [[1, 1], [0, 0]], [[255] * 2] * 2, [[0, 0], [0, 0]]], np.uint8)
    weight = np.array([1, 1, 1, 0], np.float32)
    matrix, kernel, bias = rng.normal(size=(3, 3)), rng.normal(size=(3, 2)), rng.normal(size=2)
    batch = {"images": images, "label_maps": labels, "weight": weight, "sizes": np.full((4, 2), 2, np.int32)}
    params = {"norm": {"scale": np.full(3, 1.5), "bias": np.full(3, 0.2)}, "head": {"kernel": kernel, "bias": bias}}
    state = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
    loss = segment_linear.linear_loss(LinearSegmenter(2, 0.0), OfPixels())

    def of_kernel(kernel):
        total, parts = loss(
            {**params, "head": {"kernel": kernel, "bias": bias}},
            state,
            {"backbone": matrix},
            batch,
            jax.random.key(0),
            0,
        )
        return total, parts

    (total, parts), gradient = jax.value_and_grad(of_kernel, has_aux=True)(jnp.asarray(kernel))
    tokens = (images[:, 0, 0] / 127.5 - 1) @ matrix
    mean, var = tokens[:3].mean(axis=0), tokens[:3].var(axis=0)  # the row of weight 0 has no part
    normed = (tokens - mean) / np.sqrt(var + 1e-5) * 1.5 + 0.2
    logits = normed @ kernel + bias
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    counts = np.array([[1, 2], [2, 2], [0, 0], [0, 0]])  # pixels of each class in the rows that count
    np.testing.assert_allclose(total, -(counts * log_shares).sum(), rtol=1e-5)
    assert parts.weight == 7
    error = np.exp(log_shares) * counts.sum(axis=1, keepdims=True) - counts
    np.testing.assert_allclose(gradient, normed.T @ error, atol=1e-4)
    np.testing.assert_allclose(parts.statistics["batch_stats"]["norm"]["mean"], 3 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(parts.statistics["batch_stats"]["norm"]["var"], 3 * var * 3 / 2, rtol=1e-4)


def test_patch_tokens_are_normalised_whatever_the_network_says():
    tokens = np.random.default_rng(1).normal(2, 3, (2, 5, 7)).astype(np.float32)
    network = types.SimpleNamespace(
        backbone=LAYOUT, apply=lambda variables, images: types.SimpleNamespace(tokens=jnp.asarray(tokens))
    )
    found = FrozenBackbone(network, {}, "half", lambda seed: {}).patch_tokens({}, None)
    patches = tokens[:, 1:].astype(np.float64)
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_new_layer_is_near_zero():
    variables = LinearSegmenter(50).init(jax.random.key(0), jnp.zeros((1, 2, 2, 40)), train=False)
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    assert kernel.std() == pytest.approx(0.01, rel=0.1) and not np.any(variables["params"]["head"]["bias"])


@pytest.mark.long
def test_a_run_learns_the_layer_alone_and_draws_its_picture(tmp_path):
    rng = np.random.default_rng(2)
    for split, count in (("train", 8), ("val", 3)):
        for folder in (f"{split}", f"{split}annot"):
            (tmp_path / "data" / folder).mkdir(parents=True)
        for index in range(count):
            numbers = np.kron(rng.integers(0, 2, (3, 4)), np.ones((6, 6))).astype(np.uint8)
            image = np.array([[220, 40, 40], [40, 40, 220]], np.uint8)[numbers]
            Image.fromarray(image).save(tmp_path / "data" / split / f"{index}.png")
            Image.fromarray(numbers).save(tmp_path / "data" / f"{split}annot" / f"{index}.png")
    weights = drawn_weights("mim", patch_size=3)
    write(weights, str(tmp_path / "mim"), "run")
    config = config_lib.load(f"{CONFIGS / 'segment_linear.py'}:smoke").unlock()
    config.data.source = f"folder:{tmp_path / 'data'}"
    config.backbone.run = str(tmp_path / "mim")
    config.views.update(image_size=12, long_side=32, short_side=16)
    config.evaluation.update(long_side=32, short_side=16, stride=8)
    config.run.update(duration="30 steps", eval_every="30 steps", checkpoint_every="30 steps")
    config.run.keep_every = "30 steps"
    config.optim.peak_lr = 0.05
    config.model.num_classes = 2
    stages.run_stage(config, str(tmp_path / "run"))
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["eval/pixel_accuracy"] > 0.8
    assert Image.open(tmp_path / "run" / "segmentation.png").width > 1000
