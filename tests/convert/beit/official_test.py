"""Converting released state dicts to our variables and back: names, shapes, errors and the published files."""

import math

import jax
import numpy as np
import pytest
from convert_states import FILES, KINDS, SIZES, drawn_state, published
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_jax.convert import arguments as arguments_module
from beitv2_jax.convert.beit import official
from beitv2_jax.convert.beit.official import dropped_entries, from_official, recognise, to_official
from beitv2_jax.errors import UserError
from beitv2_jax.models.layers import relative_position_index

DEAD = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg", "quantize.embedding.initted")
PUBLISHED = {
    # number of keys, trained parameters and dropped entries of the published files
    "vqkd_1x768x12_clip": (194, 94_655_008, 329),
    "vqkd_3x768x12_clip": (220, 108_829_216, 329),
    "vqkd_1x768x12_dino": (194, 94_851_872, 329),
    "base_pt1k": (220, 106_143_056, 1),
    "base_pt1k_unshared": (224, 112_444_240, 1),
    "base_v1": (190, 91_965_776, 1),
    "large_pt1k": (400, 336_728_512, 1),
    "base_ft1k": (211, 86_530_984, 12),
    "base_ft21k": (211, 102_557_713, 12),
    "large_ft1k": (415, 304_430_568, 24),
    "large_ft21k": (415, 325_792_593, 24),
}


@pytest.fixture
def quick_shapes(monkeypatch):
    """Trace each model only once: hundreds of wrong state dicts have the same sizes."""
    traced = {}

    def shapes(kind, arguments):
        key = f"{kind} {arguments}"
        if key not in traced:
            traced[key] = arguments_module.shapes(kind, arguments)
        return traced[key]

    monkeypatch.setattr(official, "shapes", shapes)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name, quick_shapes):
    num_keys, num_params, num_dropped = PUBLISHED[name]
    kind, state = published(name)
    if kind == "vqkd":
        assert sum(not key.startswith(("teacher_model.", "scaling_layer.")) for key in state) == num_keys
        assert name != "vqkd_3x768x12_clip" or len(state) == 524
        num_dropped = len(state) - num_keys + len(DEAD)
    else:
        assert len(state) == num_keys
    assert recognise(state) == kind
    assert len(dropped_entries(kind, state)) == num_dropped
    variables = from_official(kind, state)
    assert count(variables) == num_params
    back = to_official(kind, variables)
    kept = {key for key in state if not key.startswith(("teacher_model.", "scaling_layer."))}
    assert back.keys() == kept
    assert {key: back[key].shape for key in kept} == {key: state[key].shape for key in kept}


@pytest.mark.parametrize(
    "width, depth, num_heads, num_params", [(768, 12, 12, 163_080_812), (1024, 24, 16, 440_398_636)]
)
def test_published_segmentation_models(width, depth, num_heads, num_params):
    sizes = dict(image_size=512, patch_size=16, width=width, depth=depth, num_heads=num_heads, mlp_dim=4 * width)
    heads = dict(num_classes=150, channels=width, aux_channels=256, out_layers=None)
    found = arguments_module.shapes("segmenter", sizes | heads)
    assert sum(math.prod(shape) for path, shape in found.items() if path.startswith("params/")) == num_params


@pytest.mark.parametrize("name", FILES)
def test_state_dicts_of_the_released_code_round_trip_exactly(name, golden_dir):
    with np.load(golden_dir / f"{name}.npz", allow_pickle=False) as arrays:
        state = {key.removeprefix("sd/"): arrays[key] for key in arrays.files if key.startswith("sd/")}
    kind = recognise(state)
    assert kind == FILES[name]
    back = to_official(kind, from_official(kind, state))
    assert back.keys() == state.keys()
    for key in state:
        assert back[key].dtype == state[key].dtype and back[key].shape == state[key].shape, key
        if key not in DEAD and not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[key], state[key], err_msg=key)


@settings(deadline=None, max_examples=5)
@given(**SIZES, head_width=st.sampled_from((3, 7)))
def test_every_size_round_trips_exactly(**sizes):
    kind = sizes.pop("kind")
    state = drawn_state(kind, **sizes)
    assert recognise(state) == kind
    variables = from_official(kind, state)
    back = to_official(kind, variables)
    assert back.keys() == state.keys()
    for key in state:
        np.testing.assert_array_equal(back[key], state[key], err_msg=key)


def test_tokenizer_tree():
    state = drawn_state("vqkd")
    extra = {"teacher_model.visual.proj": np.ones(3), "scaling_layer.shift": np.ones(3), "loss.x": np.ones(3)}
    variables = from_official("vqkd", state | extra)
    assert set(dropped_entries("vqkd", state | extra)) == {*extra, *DEAD}
    assert set(variables["params"]) == {
        *("encoder", "encoder_norm", "encode_task", "decoder", "decoder_norm", "decode_task")
    }
    codebook = variables["codebook"]["quantizer"]
    np.testing.assert_array_equal(codebook["codebook"], state["quantize.embedding.weight"])
    np.testing.assert_array_equal(codebook["cluster_counts"], state["quantize.cluster_size"])
    for window in ("window_counts", "last_window_counts"):
        np.testing.assert_array_equal(codebook[window], np.zeros_like(state["quantize.cluster_size"]))
    kernel = variables["params"]["encoder"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel[2, 1, 0], state["encoder.patch_embed.proj.weight"][:, 0, 2, 1])
    np.testing.assert_array_equal(
        variables["params"]["encode_task"]["fc2"]["kernel"].T, state["encode_task_layer.2.weight"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_name_is_named(kind, quick_shapes):
    state = drawn_state(kind)
    recomputed = set(dropped_entries(kind, state))
    for name in state:
        # without positions or head the state dict is that of another valid model
        if (
            name in recomputed
            or name.endswith("pos_embed")
            or name.endswith("rel_pos_bias.relative_position_bias_table")
        ):
            continue
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            from_official(kind, {key: value for key, value in state.items() if key != name})


@pytest.mark.parametrize("kind", KINDS)
def test_every_wrong_shape_is_named(kind, quick_shapes):
    state = drawn_state(kind, position="relative" if kind in ("classifier", "segmenter") else "absolute")
    recomputed = {name for name in dropped_entries(kind, state) if not name.endswith("index")}
    for name, array in state.items():
        if name in recomputed or array.ndim == 0:
            continue
        wrong = [array[:-1], array[..., :-1], array.reshape(-1) if array.ndim > 1 else array[None]]
        if array.ndim > 1 and array.T.shape != array.shape:
            wrong.append(array.T)
        for shaped in wrong:
            with pytest.raises(UserError) as raised:
                from_official(kind, state | {name: shaped})
            assert repr(name) in raised.value.happened, (name, array.shape, shaped.shape, raised.value.happened)


def test_unknown_names_are_refused():
    state = drawn_state("mim")
    for name in ("teacher_model.x", "blocks.0.attn.k_bias", "blocks.x.norm1.weight", "head.weight", "pos"):
        with pytest.raises(UserError, match=f"unknown entry '{name}'"):
            from_official("mim", state | {name: np.ones(3)})
    classifier = drawn_state("classifier", position="relative")
    width = classifier["cls_token"].shape[-1]
    with pytest.raises(UserError, match="unknown entry"):
        from_official("classifier", classifier | {"norm.weight": np.ones(width), "norm.bias": np.ones(width)})
    with pytest.raises(UserError, match="lacks"):
        from_official("mim", {})
    with pytest.raises(UserError, match=r"'stem\.conv\.weight'.* no model"):
        recognise({"stem.conv.weight": np.ones(3)})


def test_a_classifier_without_head_has_no_classes():
    state = drawn_state("classifier")
    width = state["cls_token"].shape[-1]
    headless = {name: array for name, array in state.items() if not name.startswith("head.")}
    variables = from_official("classifier", headless)
    assert variables["params"]["head"]["kernel"].shape == (width, 0)
    assert to_official("classifier", variables).keys() == headless.keys()


def test_another_order_of_offsets_is_refused():
    state = drawn_state("mim", position="relative_shared", grid=3)
    name = "rel_pos_bias.relative_position_index"
    np.testing.assert_array_equal(state[name], relative_position_index((3, 3)))
    with pytest.raises(UserError, match=f"unknown order of relative position offsets in '{name}'"):
        from_official("mim", state | {name: state[name].T})
    with pytest.raises(UserError, match=r"no table for the index 'blocks\.0\.attn\."):
        from_official("mim", state | {"blocks.0.attn.relative_position_index": state[name]})


def test_parts_that_no_released_model_has_are_refused():
    variables = from_official("mim", drawn_state("mim"))
    with pytest.raises(UserError, match="backbone/extra"):
        to_official("mim", {"params": {**variables["params"], "backbone": {"extra": np.ones(3)}}})
    variables["params"]["backbone"].pop("mask_token")
    with pytest.raises(UserError, match="mask_token"):
        to_official("mim", variables)
