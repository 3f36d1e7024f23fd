"""State dicts of published ViTs: their family, the use of every entry, and errors that name entries."""

import re

import jax
import numpy as np
import pytest
import teacher_cases
from flax import traverse_util
from paths import GOLDEN

from beitv2_jax.convert.teachers.layouts import FAMILIES
from beitv2_jax.convert.teachers.weights import from_state, recognise
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.teachers import NormalisedViT

WIDTH, DEPTH, PATCH, SIDE, MLP = 6, 3, 5, 2, 7
CASES = teacher_cases.read(GOLDEN / "teachers.npz")
TITLES = {
    "dinov2": "DINOv2",
    "dinov2_giant_registers": "DINOv2 with registers",
    "hf_clip": "Hugging Face CLIP",
    "hf_clip_tokens": "Hugging Face CLIP",
    "hf_deit": "Hugging Face ViT",
    "hf_dinov2": "Hugging Face DINOv2",
    "hf_dinov2_giant_registers": "Hugging Face DINOv2 with registers",
    "hf_dinov3": "Hugging Face DINOv3",
    "hf_dinov3_huge": "Hugging Face DINOv3",
    "hf_siglip": "Hugging Face SigLIP",
    "hf_tips": "TIPS as transformers stores it",
    "hf_tips_published": "TIPS",
    "open_clip": "OpenCLIP",
    "openai_clip": "OpenAI CLIP",
    "timm_clip": "CLIP in timm's names",
    "timm_deit": "ViT in timm's names",
    "timm_dinov2_registers": "DINOv2 in timm's names",
    "timm_siglip": "SigLIP in timm's names",
    "timm_tips": "TIPS in timm's names",
}


def make_state(**changes):
    """Return a plain ViT in timm's names with a classifier, of sizes that are all different."""
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, SIDE**2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (11, WIDTH),
        "head.bias": (11,),
    }
    for index in range(DEPTH):
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linear |= {"mlp.fc1": (MLP, WIDTH), "mlp.fc2": (WIDTH, MLP)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{name}.weight": (WIDTH,), f"blocks.{index}.{name}.bias": (WIDTH,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | changes


def case_weights(name, **changes):
    case = CASES[name]
    options = {key: value for key, value in case.options.items() if key in ("num_heads", "activation", "output")}
    return from_state(case.state | changes, case.config, **options)


def test_arguments_and_tree_fit_our_transformer():
    weights = from_state(make_state(), num_heads=2)
    expected = dict(image_size=10, patch_size=5, width=6, depth=3, num_heads=2, mlp_dim=7, num_registers=0)
    assert weights.arguments == {**expected, "position": "absolute", "qkv_bias": "full", "activation": "gelu"}
    assert weights.dropped == dict.fromkeys(("head.bias", "head.weight"), "head; the features are the tokens before it")
    model = NormalisedViT(Backbone(**weights.arguments))
    ours = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 10, 10, 3), np.float32))
    assert jax.tree.map(np.shape, weights.params) == jax.tree.map(np.shape, ours["params"])


def test_every_entry_is_used_once_in_our_layout():
    state = make_state()
    flat = traverse_util.flatten_dict(from_state(state, num_heads=3).params, sep="/")
    np.testing.assert_array_equal(flat["backbone/blocks_2/mlp/fc1/kernel"], state["blocks.2.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(flat["backbone/blocks_1/norm2/scale"], state["blocks.1.norm2.weight"])
    kernel = state["patch_embed.proj.weight"]
    np.testing.assert_array_equal(flat["backbone/patch_embed/kernel"][1, 4, 2, 3], kernel[3, 2, 1, 4])
    sums = sorted(float(np.sum(array, dtype=np.float64)) for array in flat.values())
    theirs = sorted(float(np.sum(v, dtype=np.float64)) for k, v in state.items() if not k.startswith("head."))
    np.testing.assert_allclose(sums, theirs)


@pytest.mark.parametrize("name", TITLES)
def test_the_family_is_recognised_from_the_entries(name):
    family, _ = recognise(CASES[name].state)
    assert family.title == TITLES[name]
    assert TITLES.keys() == CASES.keys()


@pytest.mark.parametrize("name", TITLES)
def test_every_entry_of_every_family_is_used_or_dropped(name):
    """Every entry is used or dropped for a reason, and an error names each missing entry."""
    case, weights = CASES[name], case_weights(name)
    assert all(weights.dropped.values())
    used = sorted(case.state.keys() - weights.dropped.keys())
    size = sum(case.state[key].size for key in used)
    ours = {path: array.size for path, array in traverse_util.flatten_dict(weights.params, sep="/").items()}
    # timm has no position for [CLS]; the position of DeiT's distillation token is added to the token
    added = {"timm_dinov2_registers": 16, "timm_tips": 16, "timm_deit": -16, "hf_deit": -16}.get(name, 0)
    assert sum(ours.values()) == size + added
    # a network without its registers is still a network of its family
    for key in (key for key in used if not re.search(r"\.\d+\.|reg(ister)?_token", key)):
        short = {other: array for other, array in case.state.items() if other != key}
        with pytest.raises(UserError) as caught:
            from_state(short, case.config, num_heads=2, activation="gelu", output=case.options.get("output", ""))
        assert key in str(caught.value) or key.rpartition(".")[0] in str(caught.value)


def test_what_is_dropped_and_why():
    reasons = set(case_weights("openai_clip").dropped.values())
    assert reasons == {"text encoder", "constant of the contrastive loss", "sizes, which the arrays show"}
    whole = case_weights("hf_siglip").dropped
    assert whole["vision_model.head.probe"] == "attention pooling; the features are the tokens before it"
    assert "text_model.head.weight" in whole and "logit_bias" in whole
    assert case_weights("dinov2").dropped == {"mask_token": "for masked patches, but a teacher sees complete images"}
    whole = case_weights("hf_tips_published").dropped
    assert whole["temperature"] == "constant of the contrastive loss"
    assert whole["text_encoder.token_embedding.weight"] == "text encoder"
    case = CASES["openai_clip"]
    tokens = from_state(case.state, output="tokens", num_heads=2)
    assert tokens.projection_dim == 0
    assert tokens.dropped["visual.proj"] == "projection; the features are the tokens before it"


def test_networks_inside_larger_models_are_found():
    state = {f"visual.trunk.{name}": array for name, array in make_state().items() if not name.startswith("head")}
    weights = from_state({**state, "text.x.weight": np.ones(3), "logit_scale": np.ones(())}, num_heads=2)
    np.testing.assert_array_equal(weights.params["norm"]["scale"], state["visual.trunk.norm.weight"])
    assert weights.dropped == {"text.x.weight": "text encoder", "logit_scale": "constant of the contrastive loss"}
    with pytest.raises(UserError, match=r"'visual\.trunk\.extra'"):
        from_state({**state, "visual.trunk.extra": np.ones(3)}, num_heads=2)


@pytest.mark.parametrize("name", sorted(make_state().keys() - {"head.weight", "head.bias"}))
def test_each_missing_entry_is_named(name):
    state = make_state()
    del state[name]
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        from_state(state, num_heads=2, activation="gelu")


def test_a_missing_block_in_the_middle_is_named():
    state = {name: array for name, array in make_state().items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"blocks\.1\."):
        from_state(state, num_heads=2)


@pytest.mark.parametrize("name", ["blocks.0.attn.rel_pos", "fc_norm.weight", "norm_pre", "blocks.3"])
def test_unknown_entry_is_named(name):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        from_state(make_state(**{name: np.ones(WIDTH)}), num_heads=2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.attn.qkv.weight", (2 * WIDTH, WIDTH)),
        ("blocks.2.mlp.fc2.weight", (MLP, WIDTH)),
        ("blocks.0.mlp.fc1.weight", (MLP,)),
        ("cls_token", (1, WIDTH)),
        ("pos_embed", (1, SIDE**2 + 2, WIDTH)),
        ("pos_embed", (SIDE**2 + 1, WIDTH)),
        ("patch_embed.proj.weight", (WIDTH, 3 * PATCH * PATCH)),
        ("patch_embed.proj.weight", (WIDTH, 1, PATCH, PATCH)),
        ("norm.bias", (WIDTH + 1,)),
    ],
)
def test_wrong_shape_is_named(name, shape):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        from_state(make_state(**{name: np.zeros(shape, np.float32)}), num_heads=2)


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "self_attn.v_proj.bias"])
def test_wrong_shape_of_one_of_three_is_named(name):
    key = f"vision_model.encoder.layers.1.{name}"
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        case_weights("hf_clip", **{key: CASES["hf_clip"].state[key][:-1]})


@pytest.mark.parametrize("num_heads", [0, 4])
def test_heads_that_do_not_fit_name_the_option(num_heads):
    with pytest.raises(UserError, match="num_heads"):
        from_state(make_state(), num_heads=num_heads)


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1152, 16), (1280, 16), (1536, 24)])
def test_heads_of_the_published_widths(width, heads):
    """ViT-S, B, So400m, H and DINOv2's g."""
    state = make_state()
    shapes = {name: tuple(width if size == WIDTH else size for size in array.shape) for name, array in state.items()}
    shapes |= {name: (3 * width, *shapes[name][1:]) for name, array in state.items() if array.shape[:1] == (3 * WIDTH,)}
    state = {name: np.broadcast_to(np.float32(0.0), shape) for name, shape in shapes.items()}
    assert from_state(state).arguments["num_heads"] == heads


def test_a_hugging_face_config_sets_heads_activation_and_epsilon():
    case = CASES["hf_clip"]
    assert case_weights("hf_clip").arguments["activation"] == "gelu"
    described = {"vision_config": {"num_attention_heads": 4, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}}
    arguments = from_state(case.state, described).arguments
    assert (arguments["num_heads"], arguments["activation"], arguments["norm_eps"]) == (4, "gelu_tanh", 1e-3)
    # a missing key means the default of the library
    assert from_state(case.state, {"vision_config": {"num_attention_heads": 4}}).arguments["activation"] == "quick_gelu"
    with pytest.raises(UserError, match="12 heads"):
        from_state(case.state, {"vision_config": {}})
    with pytest.raises(UserError, match=r"teacher\.activation"):
        from_state(case.state, num_heads=2)
    with pytest.raises(UserError, match=r"teacher\.activation"):
        from_state(case.state, {"vision_config": {"num_attention_heads": 4, "hidden_act": "relu"}})


def test_rotary_positions_that_are_not_the_published_ones_are_refused():
    case = CASES["hf_dinov3"]
    assert case_weights("hf_dinov3").arguments["qkv_bias"] == "qv"
    with pytest.raises(UserError, match=r"rope_theta=10000"):
        from_state(case.state, case.config | {"rope_theta": 10000.0})
    with pytest.raises(UserError, match=r"8 heads whose width is a multiple of 4\.\n.*\n.*teacher\.num_heads"):
        from_state(case.state, case.config, num_heads=8)
    with pytest.raises(UserError, match=r"layer\.0\.attention\.v_proj\.bias"):  # of one layer alone
        some = {key: array for key, array in case.state.items() if key != "layer.0.attention.q_proj.bias"}
        from_state(some, case.config)


def test_a_config_that_only_names_the_network_leaves_heads_to_the_width():
    """config.json of TIPS's own code."""
    state = {key: array for key, array in CASES["hf_tips_published"].state.items()}
    config = CASES["hf_tips_published"].config
    with pytest.raises(UserError, match=r"teacher\.num_heads"):
        from_state(state, config)
    assert from_state(state, config, num_heads=4).arguments["num_heads"] == 4


def test_an_unknown_activation_is_an_error():
    for name in ("open_clip", "timm_clip"):
        with pytest.raises(UserError, match=r"teacher\.activation=quick_gelu"):
            from_state(CASES[name].state, num_heads=2)
    assert from_state(CASES["openai_clip"].state, num_heads=2).arguments["activation"] == "quick_gelu"
    without_class_token = {key: array for key, array in CASES["timm_siglip"].state.items() if "attn_pool" not in key}
    with pytest.raises(UserError, match=r"teacher\.activation"):
        from_state(without_class_token, num_heads=2)


def test_a_missing_projection_is_an_error():
    with pytest.raises(UserError, match=r"visual_projection.*\n.*\n.*teacher\.output=tokens"):
        from_state(CASES["hf_clip_tokens"].state, CASES["hf_clip_tokens"].config)
    with pytest.raises(UserError, match=r"teacher\.output=tokens"):
        from_state(make_state(), num_heads=2, output="projected")


def test_other_networks_are_refused_by_kind():
    key = "vision_model.embeddings.patch_embedding.weight"
    with pytest.raises(UserError, match="NaFlex"):
        case_weights("hf_siglip", **{key: CASES["hf_siglip"].state[key].reshape(16, -1)})
    with pytest.raises(UserError, match=r"beitv2_jax\.convert"):
        from_state(make_state(**{"blocks.0.attn.q_bias": np.ones(WIDTH)}))
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight.*\n.*\n.*Hugging Face DINOv2"):
        from_state({"layer1.0.conv1.weight": np.ones(3)})


def test_families_have_names_for_all_parameters():
    """Every family names every parameter of its networks."""
    for family in FAMILIES:
        bias = "q_bias" if family.arguments.get("qkv_bias") == "qv" else "qkv/bias"
        assert family.names(f"backbone/blocks_4/attn/{bias}") and family.names("norm/scale")
        if "layer_scale_init" in family.arguments:
            assert family.names("backbone/blocks_0/gamma_1") != family.names("backbone/blocks_0/gamma_2")
        if family.projected:
            assert len(family.names("projection/kernel")) == 1
