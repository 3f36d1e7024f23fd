"""Weights in timm's layout: both file formats, half precision, and errors that name the entry."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from beitv2_jax.convert.timm import read_weights, vit_from_timm
from beitv2_jax.errors import UserError
from beitv2_jax.models.teachers import NormalisedViT

WIDTH, DEPTH, PATCH, SIDE, MLP = 6, 3, 5, 2, 7


def make_state():
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
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_arguments_and_tree_fit_our_transformer():
    arguments, params = vit_from_timm(make_state(), num_heads=2)
    expected = dict(image_size=10, patch_size=5, width=6, depth=3, num_heads=2, mlp_dim=7)
    assert arguments == {**expected, "position": "absolute", "qkv_bias": "full"}
    ours = jax.eval_shape(NormalisedViT(arguments).init, jax.random.key(0), np.zeros((1, 10, 10, 3), np.float32))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, ours["params"])


def test_every_entry_arrives_once_in_our_layout():
    state = make_state()
    _, params = vit_from_timm(state, num_heads=3)
    flat = traverse_util.flatten_dict(params, sep="/")
    np.testing.assert_array_equal(flat["backbone/blocks_2/mlp/fc1/kernel"], state["blocks.2.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(flat["backbone/blocks_1/norm2/scale"], state["blocks.1.norm2.weight"])
    kernel = state["patch_embed.proj.weight"]
    np.testing.assert_array_equal(flat["backbone/patch_embed/kernel"][1, 4, 2, 3], kernel[3, 2, 1, 4])
    sums = sorted(float(np.sum(array, dtype=np.float64)) for array in flat.values())
    theirs = sorted(float(np.sum(v, dtype=np.float64)) for k, v in state.items() if not k.startswith("head."))
    np.testing.assert_allclose(sums, theirs)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_of_half_precision_are_read_as_float32(tmp_path, suffix):
    state = {name: array.astype(np.float16) for name, array in make_state().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **state)
    else:
        save_file(state, path)
    read = read_weights(str(path))
    assert read.keys() == state.keys()
    for name, array in read.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state[name])


def test_missing_file_and_pickles_are_refused(tmp_path):
    with pytest.raises(UserError, match="no weights file"):
        read_weights(str(tmp_path / "absent.npz"))
    (tmp_path / "model.pth").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"model\.pth"):
        read_weights(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    np.savez(tmp_path / "whole.npz", **make_state())
    path.write_bytes((tmp_path / "whole.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match="cut"):
        read_weights(str(path))


@pytest.mark.parametrize("name", sorted(make_state().keys() - {"head.weight", "head.bias"}))
def test_each_missing_entry_is_named(name):
    state = make_state()
    del state[name]
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        vit_from_timm(state, num_heads=2)


def test_a_missing_block_in_the_middle_is_named():
    state = {name: array for name, array in make_state().items() if not name.startswith("blocks.1.")}
    with pytest.raises(UserError, match=r"blocks\.1\."):
        vit_from_timm(state, num_heads=2)


def test_unknown_entry_is_named():
    with pytest.raises(UserError, match=r"blocks\.0\.ls1\.gamma"):
        vit_from_timm({**make_state(), "blocks.0.ls1.gamma": np.ones(WIDTH)}, num_heads=2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.1.attn.qkv.weight", (2 * WIDTH, WIDTH)),
        ("blocks.2.mlp.fc2.weight", (MLP, WIDTH)),
        ("cls_token", (1, WIDTH)),
        ("pos_embed", (1, SIDE**2, WIDTH)),
        ("pos_embed", (SIDE**2 + 1, WIDTH)),
        ("patch_embed.proj.weight", (WIDTH, 3 * PATCH * PATCH)),
        ("patch_embed.proj.weight", (WIDTH, 1, PATCH, PATCH)),
        ("norm.bias", (WIDTH + 1,)),
    ],
)
def test_wrong_shape_is_named(name, shape):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        vit_from_timm({**make_state(), name: np.zeros(shape, np.float32)}, num_heads=2)


@pytest.mark.parametrize("num_heads", [None, 0, 4])
def test_heads_that_do_not_fit_ask_for_the_option(num_heads):
    with pytest.raises(UserError, match="num_heads"):
        vit_from_timm(make_state(), num_heads=num_heads)
