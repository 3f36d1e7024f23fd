"""Released state dicts to our trees and back: every name, refusals."""

import numpy as np
import pytest

from beitv2_jax.convert.official import from_official, to_official
from beitv2_jax.errors import UserError

KINDS = {"mim_cls_unshared": "mim", "mim_cls": "mim", "mim_v1_abs": "mim", "finetune": "classifier", "vqkd": "vqkd"}
DEAD = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted")


def load(golden_dir, name):
    with np.load(golden_dir / f"{name}.npz", allow_pickle=False) as arrays:
        return {key.removeprefix("sd/"): arrays[key] for key in arrays.files if key.startswith("sd/")}


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_is_exact(name, golden_dir):
    state = load(golden_dir, name)
    back = to_official(KINDS[name], from_official(KINDS[name], state))
    assert back.keys() == state.keys()
    for key in state.keys() - set(DEAD):
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)
        assert back[key].dtype == state[key].dtype, key
    for key in state.keys() & set(DEAD):
        assert back[key].shape == state[key].shape


def test_tokenizer_tree(golden_dir):
    state = load(golden_dir, "vqkd")
    extra = {"teacher_model.visual.proj": np.ones(3), "scaling_layer.shift": np.ones(3), "loss.x": np.ones(3)}
    variables = from_official("vqkd", state | extra)
    assert set(variables["params"]) == {
        *("encoder", "encoder_norm", "encode_task", "decoder", "decoder_norm", "decode_task")
    }
    codebook = variables["codebook"]["quantizer"]
    np.testing.assert_array_equal(codebook["codebook"], state["quantize.embedding.weight"])
    np.testing.assert_array_equal(codebook["cluster_counts"], state["quantize.cluster_size"])
    for window in ("window_counts", "last_window_counts"):
        np.testing.assert_array_equal(codebook[window], np.zeros(64, np.float32))
    kernel = variables["params"]["encoder"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel[3, 5, 2], state["encoder.patch_embed.proj.weight"][:, 2, 3, 5])
    np.testing.assert_array_equal(
        variables["params"]["encode_task"]["fc2"]["kernel"].T, state["encode_task_layer.2.weight"]
    )


def test_missing_and_unknown_names_are_refused(golden_dir):
    state = load(golden_dir, "mim_cls_unshared")
    for name in state:
        if not name.endswith("relative_position_index"):
            with pytest.raises(UserError, match=name):
                from_official("mim", {key: value for key, value in state.items() if key != name})
    for name in ("teacher_model.x", "blocks.0.attn.k_bias", "blocks.x.norm1.weight", "head.weight", "pos"):
        with pytest.raises(UserError, match=name):
            from_official("mim", state | {name: np.ones(3)})
    with pytest.raises(UserError, match="unknown entry"):
        from_official(
            "classifier", load(golden_dir, "finetune") | {"norm.weight": np.ones(48), "norm.bias": np.ones(48)}
        )
    with pytest.raises(UserError, match="lacks"):
        from_official("mim", {})
    variables = from_official("mim", state)
    with pytest.raises(UserError, match="backbone/extra"):
        to_official("mim", {"params": {**variables["params"], "backbone": {"extra": np.ones(3)}}})
    variables["params"]["backbone"].pop("mask_token")
    with pytest.raises(UserError, match="mask_token"):
        to_official("mim", variables)
