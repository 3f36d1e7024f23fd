"""Image classifiers that are plain vision transformers: logits from the tokens of timm, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import teacher_cases
from paths import GOLDEN

from beitv2_jax.convert.weights import read, read_backbone
from beitv2_jax.errors import UserError
from beitv2_jax.models.classifier import Classifier


@pytest.fixture(scope="module")
def stored():
    with np.load(GOLDEN / "timm_vit.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def write_classifier(path, stored, rename=str):
    """Write the network of timm, under other names or, where `rename` gives '', without them."""
    state = {name.removeprefix("sd/"): array for name, array in stored.items() if name.startswith("sd/")}
    np.savez(path, **{rename(name): array for name, array in state.items() if rename(name)})


def test_logits_follow_from_the_tokens_of_timm(stored, tmp_path):
    write_classifier(tmp_path / "vit.npz", stored)
    heads = json.loads(str(stored["config"]))["num_heads"]
    weights = read(str(tmp_path / "vit.npz"), num_heads=heads, normalization="half", plain_vit=True)
    assert (weights.kind, weights.layout, weights.dropped) == ("classifier", "plain", {})
    model = Classifier.from_arguments(weights.arguments)
    images = jnp.asarray(stored["in/image"]).astype(jnp.float32) / 127.5 - 1.0
    logits = jax.jit(model.apply)({"params": weights.variables["params"]}, images)
    expected = stored["out/tokens"][:, 0] @ stored["sd/head.weight"].T + stored["sd/head.bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_mean_of_patches_is_recognised_by_its_norm(stored, tmp_path):
    write_classifier(tmp_path / "vit.npz", stored, rename=lambda name: f"fc_{name}" if name[:5] == "norm." else name)
    weights = read(str(tmp_path / "vit.npz"), num_heads=3, normalization="half", plain_vit=True)
    assert weights.arguments["pooling"] == "mean" and "fc_norm" in weights.variables["params"]


def test_the_normalisation_stands_beside_the_weights_or_is_asked_for(stored, tmp_path):
    write_classifier(tmp_path / "vit.npz", stored)
    with pytest.raises(UserError, match="how its input images are normalised") as raised:
        read(str(tmp_path / "vit.npz"), num_heads=3, plain_vit=True)
    assert "--normalization=half" in raised.value.instead
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    assert read(str(tmp_path / "vit.npz"), num_heads=3, plain_vit=True).normalization == "half"


def test_heads_that_the_width_does_not_show_are_read_beside_the_weights(stored, tmp_path):
    """A width of 48 and three heads: neither an initial network nor a classifier can be read without being told."""
    path = str(tmp_path / "vit.npz")
    write_classifier(path, stored)
    for reader in (read_backbone, functools.partial(read, plain_vit=True, normalization="half")):
        (tmp_path / "config.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match="cannot be divided into heads of 64") as raised:
            reader(path)
        assert '{"num_attention_heads": N} into a file config.json' in raised.value.instead
        for config in ({"num_attention_heads": 3}, {"model_args": {"num_heads": 3}}):
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert reader(path).arguments["num_heads"] == 3


def test_two_heads_and_none_are_refused(stored, tmp_path):
    path = teacher_cases.read(GOLDEN / "teachers.npz")["timm_deit"].store(tmp_path)
    with pytest.raises(UserError, match="not a linear map"):
        read(path, num_heads=2, normalization="imagenet", plain_vit=True)
    write_classifier(tmp_path / "vit.npz", stored, rename=lambda name: "" if name.startswith("head.") else name)
    with pytest.raises(UserError, match="not a BEiT"):
        read(str(tmp_path / "vit.npz"), num_heads=3, normalization="half", plain_vit=True)


def test_only_evaluations_and_predictions_read_them(stored, tmp_path):
    write_classifier(tmp_path / "vit.npz", stored)
    with pytest.raises(UserError, match="not a BEiT"):
        read(str(tmp_path / "vit.npz"), num_heads=3, normalization="half")
