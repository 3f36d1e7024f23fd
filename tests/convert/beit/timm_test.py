"""Beit models of timm: stored outputs and names, read and written."""

import numpy as np
import pytest
from beit_peers import NAMES, answers, error, peer
from convert_states import assert_same, drawn_weights
from safetensors.numpy import load_file

from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError

CASES = [name for name in NAMES if name.startswith("timm")]
HEADS = {"timm_absolute": 3}


@pytest.mark.parametrize("name", CASES)
def test_their_weights_give_their_outputs_and_round_trip_exactly(name, tmp_path):
    theirs = peer(name)
    weights = read(theirs.write(tmp_path / "theirs"), num_heads=HEADS.get(name))
    assert weights.dropped == {}
    assert error(answers(weights, theirs.inputs), theirs.outputs["logits"]) < 1e-5
    not_stored = {"num_heads"} if name == "timm_absolute" else set()
    assert write(weights, str(tmp_path / "back.safetensors"), "timm").keys() == not_stored
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == theirs.state.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, theirs.state[key], err_msg=key)


@pytest.mark.parametrize("position", ("absolute", "relative", "relative_shared"))
def test_our_weights_round_trip_exactly(position, tmp_path):
    weights = drawn_weights("classifier", position=position)
    write(weights, str(tmp_path / "theirs.safetensors"), "timm")
    again = read(str(tmp_path / "theirs.safetensors"), num_heads=2)
    assert_same(again.variables["params"], weights.variables["params"])
    assert (again.layout == "timm") == (position != "absolute")


def test_a_masked_image_model_becomes_features(tmp_path):
    weights = drawn_weights("mim", position="relative_shared")
    left_out = write(weights, str(tmp_path / "theirs.safetensors"), "timm")
    assert {name.partition(".")[0] for name in left_out} == {
        *("mask_token", "lm_head", "cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head")
    }
    again = read(str(tmp_path / "theirs.safetensors"))
    assert (again.kind, again.arguments["pooling"], again.arguments["num_classes"]) == ("classifier", "cls", 0)
    backbone = dict(weights.variables["params"]["backbone"])
    del backbone["mask_token"]
    assert_same(again.variables["params"]["backbone"], backbone)
    assert_same(again.variables["params"]["norm"], weights.variables["params"]["norm"])


@pytest.mark.parametrize("kind", ("vqkd", "segmenter"))
def test_models_that_timm_does_not_have_are_refused(kind, tmp_path):
    with pytest.raises(UserError, match=f"timm has no model of kind '{kind}'"):
        write(drawn_weights(kind), str(tmp_path / "theirs.safetensors"), "timm")


def test_an_epsilon_that_is_not_stored_is_reported(tmp_path):
    weights = drawn_weights("classifier", position="relative")
    weights.arguments["norm_eps"] = 1e-12
    assert write(weights, str(tmp_path / "theirs.npz"), "timm") == {
        "norm_eps": "the layout cannot store 1e-12; it will be read as 1e-06"
    }
