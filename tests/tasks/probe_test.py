"""What the probe reads of a network, against the network applied by hand."""

import jax
import numpy as np
import pytest
from convert_states import drawn_weights

from beitv2_jax.convert.weights import backbone_of
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.tasks import probe


@pytest.mark.parametrize("kind, norm", [("mim", "norm"), ("vqkd", "encoder_norm")])
def test_tokens_are_read_before_and_after_the_last_norm(kind, norm):
    weights = drawn_weights(kind)
    params, backbone = weights.variables["params"], backbone_of(weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    model = VisionTransformer(backbone)
    apply = jax.jit(lambda frozen, images: probe.token_features(model, "half", probe.FEATURES, (1, 2), frozen, images))
    found = apply(probe._frozen(weights, params), {"images": images})
    own = params["encoder" if kind == "vqkd" else "backbone"]
    hidden = jax.jit(lambda own, pixels: model.apply({"params": own}, pixels).hidden)(own, images / 127.5 - 1)
    assert len(hidden) == 2
    for place, tokens in enumerate(np.asarray(layer, np.float64) for layer in hidden):
        spread = tokens - tokens.mean(axis=-1, keepdims=True)
        unit = spread / np.sqrt(np.square(spread).mean(axis=-1, keepdims=True) + 1e-6)
        normed = unit * params[norm]["scale"] + params[norm]["bias"]
        for suffix, values in (("", tokens), ("_normed", normed)):
            assert np.abs(normed - tokens).max() > 0.1
            close = {"atol": 2e-5 * np.abs(values).max()}
            np.testing.assert_allclose(found[f"cls{suffix}"][:, place], values[:, 0], **close)
            np.testing.assert_allclose(found[f"mean{suffix}"][:, place], values[:, 1:].mean(axis=1), **close)
            np.testing.assert_allclose(
                found[f"patches{suffix}"][:, place], values[:, 1:], atol=1e-3 * np.abs(values).max()
            )
    assert found["patches"].dtype == np.float16 and found["cls_normed"].dtype == np.float32


def test_patch_tokens_beyond_float16_are_not_infinite():
    weights = drawn_weights("mim")
    frozen = probe._frozen(weights, weights.variables["params"])
    frozen["backbone"]["patch_embed"]["bias"] = np.full_like(frozen["backbone"]["patch_embed"]["bias"], 1e6)
    model = VisionTransformer(backbone_of(weights))
    batch = {"images": np.zeros((1, 9, 9, 3), np.uint8)}
    found = probe.token_features(model, "half", ("patches",), (2,), frozen, batch)
    assert np.abs(found["patches"].astype(np.float32)).max() == 65504
