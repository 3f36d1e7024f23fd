"""State dicts inside what training scripts save around them: the names that come out, and which of several is taken."""

import numpy as np
import pytest

from beitv2_jax.convert.wrappers import select, unwrap, wrapping_prefix
from beitv2_jax.errors import UserError

NAMES = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.11.attn.qkv.weight", "norm.weight")
HEAD = {"head.mlp.0.weight": np.zeros(2), "head.last_layer.weight_g": np.zeros(2)}


def network(prefix="", value=0.0):
    """Return names of a ViT behind a prefix, with one number as every array."""
    return {f"{prefix}{name}": np.array([value]) for name in NAMES}


def read(tree, chosen=""):
    return unwrap(select(tree, chosen, "w.pth"), "w.pth")


@pytest.mark.parametrize(
    "tree",
    [
        network(),
        network("_orig_mod."),
        network("module._orig_mod."),
        network("_orig_mod.module."),
        network("model."),
        network("model.backbone."),
        network("backbone."),
        network("_forward_module.model."),
        {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): array for name, array in network().items()},
        {name.replace("blocks.11.", "blocks.2.11."): array for name, array in network().items()},
        {"model_state_dict": network("module."), "epoch": 3, "optimizer": {"state": {0: {"exp_avg": np.zeros(2)}}}},
        {"state_dict": network("model."), "callbacks": {"best": np.zeros(())}, "hyper_parameters": {"lr": 0.1}},
        {"teacher": network("backbone.") | HEAD, "epoch": np.zeros(()), "dino_loss": {"center": np.zeros(3)}},
        {"model": {"state_dict": network()}},
        network("module.") | {"n_averaged": np.zeros(())},
        network("model.") | {"criterion.weight": np.zeros(3)},
    ],
)
def test_known_wrappers_are_removed(tree):
    found = read(tree)
    assert found.arrays.keys() == set(NAMES)
    assert found.assumptions == ()


@pytest.mark.parametrize(
    "tree, chosen, number",
    [
        ({"model": network(value=1), "model_ema": network("module.", 2)}, "", 1),
        ({"model": network(value=1), "model_ema": network("module.", 2)}, "model_ema", 2),
        ({"state_dict": network(value=1), "state_dict_ema": network(value=2)}, "", 1),
        ({"state_dict": network(value=1), "state_dict_ema": network(value=2)}, "state_dict_ema", 2),
        ({"student": network("module.backbone.", 1), "teacher": network("backbone.", 2) | HEAD}, "", 2),
        ({"student": network("module.backbone.", 1), "teacher": network("backbone.", 2) | HEAD}, "student", 1),
        ({"model": network("student.backbone.", 1) | network("teacher.backbone.", 2)}, "", 2),
        ({"model": network("student.backbone.", 1) | network("teacher.backbone.", 2)}, "student", 1),
        ({"model": network("student.backbone.", 1) | network("teacher.backbone.", 2)}, "model.student", 1),
        (network("online_model.", 1) | network("ema_model.", 2) | {"step": np.zeros(())}, "", 1),
        (network("online_model.", 1) | network("ema_model.", 2) | {"step": np.zeros(())}, "ema_model", 2),
        ({"model": network(value=1), "average": {"shadow": network(value=2)}}, "average", 2),
        ({"encoder": network("module.", 1), "target_encoder": network("module.", 2)}, "target_encoder", 2),
        (network("learner.net.", 1) | network("learner.copy.", 2), "learner.copy", 2),
    ],
)
def test_one_of_several_is_taken_and_said(tree, chosen, number):
    found = read(tree, chosen)
    assert found.arrays.keys() == set(NAMES)
    assert {float(array[0]) for array in found.arrays.values()} == {number}
    assert len(found.assumptions) == (0 if chosen else 1)


def test_the_log_names_what_was_taken_and_what_else_there_is():
    found = read({"student": network("module.backbone."), "teacher": network("backbone.") | HEAD})
    assert found.assumptions == ("state_dict=teacher.backbone: the file also has student",)
    assert found.dropped == dict.fromkeys(HEAD, "outside of 'backbone'")


@pytest.mark.parametrize(
    "names",
    [
        ("encoder.blocks.0.norm1.weight", "decoder.blocks.0.norm1.weight", "quantize.embedding.weight"),
        ("backbone.blocks.0.norm1.weight", "decode_head.conv_seg.weight"),
        ("beit.encoder.layer.0.lambda_1", "lm_head.weight"),
        ("visual.transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ln_1.weight", "logit_scale"),
        ("visual.trunk.blocks.0.norm1.weight", "text.transformer.resblocks.0.ln_1.weight"),
        ("vision_model.encoder.layers.0.layer_norm1.weight", "text_model.encoder.layers.0.layer_norm1.weight"),
        ("model", "module.x"),
    ],
)
def test_prefixes_of_the_published_layouts_stay(names):
    assert tuple(read({name: np.zeros(1) for name in names}).arrays) == names


def test_the_names_of_mmpretrain_become_those_of_timm():
    block = {"ln1": "norm1", "attn.qkv": "attn.qkv", "ln2": "norm2", "ffn.layers.0.0": "mlp.fc1"}
    block |= {"ffn.layers.1": "mlp.fc2"}
    names = {f"backbone.layers.3.{theirs}.weight": f"blocks.3.{ours}.weight" for theirs, ours in block.items()}
    names |= {"backbone.layers.3.gamma_1": "blocks.3.gamma_1", "backbone.cls_token": "cls_token"}
    names |= {"backbone.patch_embed.projection.bias": "patch_embed.proj.bias", "backbone.ln1.bias": "norm.bias"}
    names |= {
        "backbone.ln2.bias": "fc_norm.bias",
        "head.fc.weight": "head.weight",
        "head.layers.head.bias": "head.bias",
    }
    state = {theirs: np.array([index]) for index, theirs in enumerate(names)}
    found = read({"meta": {"epoch": 3}, "state_dict": state | {"neck.fc.weight": np.zeros(1)}})
    assert {ours: int(array[0]) for ours, array in found.arrays.items()} == {
        ours: index for index, ours in enumerate(names.values())
    }
    assert found.dropped.keys() == {"neck.fc.weight"}
    bare = {theirs.removeprefix("backbone."): array for theirs, array in state.items() if theirs.startswith("backbone")}
    assert read(bare).arrays.keys() == {ours for ours in names.values() if not ours.startswith("head.")}


@pytest.mark.parametrize(
    "tree, chosen, guess",
    [
        ({"learner": network(), "epoch": 3}, "", "learner"),
        ({"model": network(), "model_ema": network()}, "model_em", "model_ema"),
        (network("student.") | network("teacher."), "teachr", "teacher"),
    ],
)
def test_a_name_that_is_not_there_leads_to_one_that_is(tree, chosen, guess):
    with pytest.raises(UserError, match=rf"w\.pth .*'{guess}'") as caught:
        read(tree, chosen)
    assert f"--state_dict={guess} " in caught.value.instead
    assert read(tree, guess).arrays.keys() == set(NAMES)


def test_an_unknown_prefix_is_found():
    assert wrapping_prefix(network("learner.net.")) == "learner.net"
    assert read(network("learner.net."), "learner.net").arrays.keys() == set(NAMES)
    assert wrapping_prefix(network()) == wrapping_prefix(["stem.weight"]) == ""


def test_dicts_that_contain_each_other_end():
    tree = {"epoch": 3}
    tree["self"], tree["model"] = tree, network()
    assert read(tree).arrays.keys() == set(NAMES)
