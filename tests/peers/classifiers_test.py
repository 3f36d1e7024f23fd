"""Compare the logits of plain ViT classifiers with timm and transformers: random weights, both ways of pooling."""

import json

import jax
import numpy as np
import pytest
import teacher_oracles as oracles
import timm
import torch
import transformers
from safetensors.numpy import save_file

from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.weights import read
from beitv2_jax.errors import UserError

SIDE = 48


def ours(path, images, num_heads=None):
    """Return our logits of images that are normalised already, 'b H W 3'."""
    weights = read(str(path), num_heads=num_heads, normalization="half", plain_vit=True)
    model = MODELS["classifier"].from_arguments(weights.arguments)
    return jax.jit(model.apply)({"params": weights.variables["params"]}, images)


def theirs(model, images):
    with torch.no_grad():
        output = model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    return getattr(output, "logits", output).numpy()


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(3, SIDE, SIDE, 3)).astype(np.float32)


def randomised(model):
    model.load_state_dict(oracles.randomise(model.state_dict(), np.random.default_rng(4)))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_base_patch16_224.mae", {"global_pool": "avg"}),
        ("deit3_base_patch16_224", {}),
    ],
)
def test_logits_of_timm(tmp_path, images, name, options):
    model = timm.create_model(
        name.partition(".")[0], img_size=SIDE, embed_dim=24, depth=2, num_heads=3, num_classes=7, **options
    )
    randomised(model)
    arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in model.state_dict().items()}
    save_file(arrays, tmp_path / "vit.safetensors")
    np.testing.assert_allclose(
        ours(tmp_path / "vit.safetensors", images, 3), theirs(model, images), rtol=1e-4, atol=1e-4
    )


def test_logits_of_hugging_face(tmp_path, images):
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=SIDE,
        patch_size=16,
        num_labels=7,
    )
    model = randomised(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    np.testing.assert_allclose(ours(tmp_path, images), theirs(model, images), rtol=1e-4, atol=1e-4)


def test_two_heads_are_refused(tmp_path, images):
    model = timm.create_model("deit_base_distilled_patch16_224", img_size=SIDE, embed_dim=24, depth=1, num_heads=3)
    arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in model.state_dict().items()}
    save_file(arrays, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match="not a linear map"):
        ours(tmp_path / "vit.safetensors", images, 3)
