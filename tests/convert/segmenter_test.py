"""Converting released segmentation models to our variables and back: names, layouts and errors."""

import numpy as np
import pytest
from golden_files import Golden

from beitv2_jax.convert.beit.official import from_official, to_official
from beitv2_jax.errors import UserError


@pytest.fixture(scope="module")
def state(golden_dir):
    return Golden(golden_dir, "upernet").state


def test_round_trip_is_exact(state):
    back = to_official("segmenter", from_official("segmenter", state))
    assert back.keys() == state.keys()
    for name in state:
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[name], state[name], err_msg=name)
        assert (back[name].dtype, back[name].shape) == (state[name].dtype, state[name].shape), name


def test_layouts(state):
    variables = from_official("segmenter", state)
    params, statistics = variables["params"], variables["batch_stats"]
    kernel = params["fpn1"]["up_0"]["kernel"]  # [rows, columns, in, out] from [in, out, rows, columns]
    assert kernel[1, 0, 3, 5] == state["backbone.fpn1.0.weight"][3, 5, 1, 0]
    kernel = params["decode_head"]["bottleneck"]["conv"]["kernel"]
    assert kernel[2, 0, 7, 3] == state["decode_head.bottleneck.conv.weight"][3, 7, 2, 0]
    assert params["auxiliary_head"]["classes"]["kernel"][2, 5] == state["auxiliary_head.conv_seg.weight"][5, 2, 0, 0]
    var = statistics["decode_head"]["pool_2"]["norm"]["var"]
    np.testing.assert_array_equal(var, state["decode_head.psp_modules.2.1.bn.running_var"])


@pytest.mark.parametrize(
    "name",
    [
        "backbone.blocks.2.attn.proj.bias",
        "backbone.fpn1.3.weight",
        "backbone.fpn1.1.running_mean",
        "decode_head.psp_modules.3.1.conv.weight",
        "auxiliary_head.conv_seg.bias",
    ],
)
def test_a_missing_name_is_refused(state, name):
    with pytest.raises(UserError, match=name):
        from_official("segmenter", {key: value for key, value in state.items() if key != name})


@pytest.mark.parametrize(
    "name", ["backbone.norm.weights", "backbone.fpn3.0.weight", "decode_head.extra", "neck.conv.weight", "epoch"]
)
def test_an_unknown_name_is_refused(state, name):
    with pytest.raises(UserError, match=name):
        from_official("segmenter", state | {name: np.ones(3, np.float32)})


def test_variables_of_another_model_are_refused(state):
    variables = from_official("segmenter", state)
    variables["params"]["decode_head"].pop("fusion")
    with pytest.raises(UserError, match=r"decode_head\.fpn_bottleneck\.conv\.weight"):
        to_official("segmenter", variables)
    variables = from_official("segmenter", state)
    variables["params"]["neck"] = {"bias": np.ones(3)}
    with pytest.raises(UserError, match="params/neck/bias"):
        to_official("segmenter", variables)
