"""Beit models of transformers: stored outputs, names and configs, read and written."""

import json

import numpy as np
import pytest
from beit_peers import NAMES, answers, error, peer
from convert_states import assert_same, drawn_weights
from safetensors.numpy import load_file

from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError

CASES = [name for name in NAMES if name.startswith("huggingface")]


@pytest.mark.parametrize("name", CASES)
def test_their_weights_give_their_outputs(name, tmp_path):
    theirs = peer(name)
    weights = read(theirs.write(tmp_path / "theirs"))
    assert weights.layout == "huggingface"
    assert weights.arguments["norm_eps"] == theirs.config["layer_norm_eps"]
    assert error(answers(weights, theirs.inputs), theirs.outputs["logits"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_their_files_round_trip_exactly(name, tmp_path):
    theirs = peer(name)
    assert write(read(theirs.write(tmp_path / "theirs")), str(tmp_path / "back"), "huggingface") == {}
    state = load_file(tmp_path / "back" / "model.safetensors")
    assert state.keys() == theirs.state.keys()
    for key, array in state.items():
        assert array.dtype == theirs.state[key].dtype and array.shape == theirs.state[key].shape, key
        np.testing.assert_array_equal(array, theirs.state[key], err_msg=key)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    # stochastic depth is not stored in weights, and transformers writes keys that it does not need
    same = {key: value for key, value in config.items() if key != "drop_path_rate"}
    if theirs.config["architectures"] == ["BeitModel"]:
        same = {key: value for key, value in same.items() if not key.endswith("2id") and key != "id2label"}
    if theirs.config["architectures"] == ["BeitForImageClassification"]:
        assert len(config["id2label"]) == 7
    mine = {key: theirs.config[key] for key in same if key in theirs.config}
    assert same == mine


@pytest.mark.parametrize("position", ("absolute", "relative", "relative_shared"))
@pytest.mark.parametrize("kind", ("mim", "classifier"))
def test_our_weights_round_trip_exactly(kind, position, tmp_path):
    weights = drawn_weights(kind, position=position)
    left_out = write(weights, str(tmp_path / "theirs"), "huggingface")
    again = read(str(tmp_path / "theirs"))
    params = {name: tree for name, tree in weights.variables["params"].items() if not name.startswith("aggregation")}
    assert bool(left_out) == (kind == "mim") == (params != weights.variables["params"])
    assert all(name.startswith("cls_pt_") for name in left_out)
    assert_same(again.variables["params"], params)
    for name in ("num_heads", "position", "image_size", "mlp_dim"):
        assert again.arguments[name] == weights.arguments[name]
    assert again.arguments["norm_eps"] == 1e-6


def test_published_files_have_index_buffers(tmp_path):
    from beitv2_jax.models.layers import relative_position_index

    theirs = peer("huggingface_relative")
    for name in [name for name in theirs.state if name.endswith("_table")]:
        theirs.state[name.replace("_table", "_index").replace("bias_index", "index")] = relative_position_index((3, 3))
    weights = read(theirs.write(tmp_path / "theirs"))
    assert len(weights.dropped) == 2
    assert all(name.startswith("beit.encoder.layer.") for name in weights.dropped)


def test_errors_use_the_names_in_the_file(tmp_path):
    def refused(match, change, config=None):
        theirs = peer("huggingface_relative")
        change(theirs.state)
        theirs.config |= config or {}
        with pytest.raises(UserError, match=match):
            read(theirs.write(tmp_path / f"case{len(list(tmp_path.iterdir()))}"))

    layer = "beit.encoder.layer.1."
    inner = f"{layer}attention.attention."
    for name in ("beit.pooler.layernorm.weight", f"{layer}lambda_1", f"{layer}intermediate.dense.bias"):
        refused(f"lacks '{name}'", lambda state, name=name: state.pop(name))
        refused(name, lambda state, name=name: state.update({name: state[name][:-1]}))
    refused(f"'{inner}key.weight' is missing", lambda state: state.pop(f"{inner}key.weight"))
    for part in ("query", "value", "key"):
        name = f"{inner}{part}.weight"
        refused(f"'{inner}.*weight' has the shape", lambda state, name=name: state.update({name: state[name][:-1]}))
    refused(
        f"lacks '{inner}query.weight'",
        lambda state: [state.pop(f"{inner}{p}.weight") for p in ("query", "key", "value")],
    )
    refused("unknown entry 'beit.extra'", lambda state: state.update({"beit.extra": np.ones(3)}))
    refused(f"unknown entry '{layer}extra'", lambda state: state.update({f"{layer}extra": np.ones(3)}))
    refused("model_type='data2vec-vision'", lambda state: None, {"model_type": "data2vec-vision"})
    refused("hidden_act='relu'", lambda state: None, {"hidden_act": "relu"})


def test_models_that_transformers_cannot_build_are_refused(tmp_path):
    with pytest.raises(UserError, match="no Beit model of kind 'vqkd'"):
        write(drawn_weights("vqkd"), str(tmp_path / "a"), "huggingface")
    with pytest.raises(UserError, match="13 wide, but the transformer 10"):
        write(drawn_weights("segmenter"), str(tmp_path / "b"), "huggingface")
    weights = drawn_weights("segmenter")
    weights.arguments["channels"] = weights.arguments["width"]
    with pytest.raises(UserError, match="cannot read the last layer"):
        write(weights, str(tmp_path / "c"), "huggingface")
    assert not list(tmp_path.iterdir())
