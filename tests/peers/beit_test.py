"""Compare our BEiT models with timm and transformers in both directions: outputs, names and exact weights."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from beit_oracles import (
    HUGGINGFACE,
    TIMM,
    case,
    channels_first,
    huggingface_arguments,
    huggingface_outputs,
    images_for,
    mask_for,
    timm_arguments,
)
from beit_peers import answers, error
from safetensors.numpy import load_file
from testing import drawn_variables
from timm import create_model
from timm.models.beit import Beit

from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.weights import Weights, read
from beitv2_jax.convert.writing import write

TOLERANCE = 1e-5


def heads_of(name: str) -> int | None:
    return 3 if name == "timm_absolute" else None


def drawn(kind: str, **arguments) -> Weights:
    """Return random weights of our model, scaled so that activations stay moderate."""
    model = MODELS[kind].from_arguments(arguments)
    size = arguments["image_size"]
    inputs = [np.zeros((1, size, size, 3), np.float32)]
    options = {"train": False}
    if kind == "mim":
        inputs.append(np.zeros((1, (size // arguments["patch_size"]) ** 2), bool))
        options["num_masked"] = 1
    variables = drawn_variables(model, *inputs, seed=11, **options)

    def sized(path, leaf):
        if path[-1].key == "scale":
            return 1 + 0.2 * leaf
        return leaf * (1 / np.sqrt(np.prod(leaf.shape[:-1])) if path[-1].key == "kernel" else 0.3)

    variables = jax.tree_util.tree_map_with_path(sized, variables)
    variables = jax.tree.map(np.float32, variables)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(lambda leaf: np.abs(leaf) + np.float32(0.5), variables["batch_stats"])
    return Weights(kind=kind, arguments=arguments, variables=variables, layout="run", normalization="imagenet")


SIZES = dict(image_size=20, patch_size=4, width=30, depth=3, num_heads=5, mlp_dim=42)
CLASSIFIERS = {
    "relative": dict(SIZES, num_classes=13, position="relative", layer_scale_init=0.1),
    "shared": dict(SIZES, num_classes=13, position="relative_shared", layer_scale_init=0.1),
    "absolute": dict(SIZES, num_classes=13, position="absolute", layer_scale_init=0.0, pooling="cls"),
}


@pytest.mark.parametrize("name", TIMM + HUGGINGFACE)
def test_their_weights_give_their_outputs_and_round_trip_exactly(name, tmp_path):
    made = case(name)
    weights = read(made.write(tmp_path / "theirs"), num_heads=heads_of(name))
    assert error(answers(weights, made.inputs), made.outputs["logits"]) < TOLERANCE
    layout = "timm" if name in TIMM else "huggingface"
    dest = tmp_path / ("back.safetensors" if layout == "timm" else "back")
    write(weights, str(dest), layout)
    back = load_file(dest if layout == "timm" else dest / "model.safetensors")
    kept = {key for key in made.state if not key.endswith("num_batches_tracked")}
    assert {key for key in back if not key.endswith("num_batches_tracked")} == kept
    for key in kept:
        np.testing.assert_array_equal(back[key], made.state[key], err_msg=key)


@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_our_files_strictly(name, tmp_path):
    made = case(name)
    weights = read(made.write(tmp_path / "theirs"), num_heads=heads_of(name))
    for ending in ("safetensors", "pth"):
        write(weights, str(tmp_path / f"ours.{ending}"), "timm")
    model = Beit(**timm_arguments(name))
    model.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True)["model"], strict=True)
    model.eval().double()
    with torch.no_grad():
        again = model(channels_first(made.inputs["images"])).numpy()
    np.testing.assert_array_equal(again, made.outputs["logits"])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_our_classifier_in_timm_and_transformers(name, tmp_path):
    weights = drawn("classifier", **CLASSIFIERS[name])
    images = images_for(20, seed=9)
    ours = answers(weights, {"images": images})
    write(weights, str(tmp_path / "ours.safetensors"), "timm")
    arguments = CLASSIFIERS[name]
    model = Beit(
        img_size=20,
        patch_size=4,
        embed_dim=30,
        depth=3,
        num_heads=5,
        mlp_ratio=42 / 30,
        num_classes=13,
        global_pool="token" if name == "absolute" else "avg",
        init_values=arguments["layer_scale_init"] or None,
        use_abs_pos_emb=name == "absolute",
        use_rel_pos_bias=name == "relative",
        use_shared_rel_pos_bias=name == "shared",
    )
    state = {key: torch.from_numpy(value) for key, value in load_file(tmp_path / "ours.safetensors").items()}
    model.load_state_dict(state, strict=True)
    model.eval().double()
    with torch.no_grad():
        assert error(ours, model(channels_first(images)).numpy()) < TOLERANCE

    write(weights, str(tmp_path / "ours"), "huggingface")
    model, report = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert error(ours, huggingface_outputs(model, {"images": images})["logits"]) < TOLERANCE


@pytest.mark.parametrize("position", ("relative_shared", "relative", "absolute"))
def test_our_masked_image_model_in_transformers(position, tmp_path):
    weights = drawn("mim", **SIZES, codebook_size=17, position=position, early_layer=2, head_depth=1)
    inputs = {"images": images_for(20, seed=9), "mask": mask_for(5, seed=8)}
    not_written = write(weights, str(tmp_path / "ours"), "huggingface")
    assert not_written and all(name.startswith("cls_pt_layers.0.") for name in not_written)
    model, report = transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert error(answers(weights, inputs), huggingface_outputs(model, inputs)["logits"]) < TOLERANCE


def test_our_segmenter_in_transformers(tmp_path):
    heads = dict(num_classes=13, out_layers=(1, 2, 3, 4), channels=30, aux_channels=7)
    weights = drawn("segmenter", **(SIZES | {"depth": 5}), **heads)
    inputs = {"images": images_for(20, seed=9)}
    write(weights, str(tmp_path / "ours"), "huggingface")
    model, report = transformers.BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert error(answers(weights, inputs), huggingface_outputs(model, inputs)["logits"]) < TOLERANCE


def test_the_published_base_model(tmp_path):
    weights = drawn(
        "classifier",
        **dict(image_size=224, patch_size=16, width=768, depth=12, num_heads=12, mlp_dim=3072, num_classes=1000),
    )
    images = images_for(224, seed=9)[:1]
    ours = answers(weights, {"images": images})
    write(weights, str(tmp_path / "ours.safetensors"), "timm")
    state = {key: torch.from_numpy(value) for key, value in load_file(tmp_path / "ours.safetensors").items()}
    model = create_model("beitv2_base_patch16_224")
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    assert error(ours, theirs) < TOLERANCE
    write(weights, str(tmp_path / "ours"), "huggingface")
    model = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    assert error(ours, theirs) < TOLERANCE


def test_a_pth_file_of_every_kind_is_read_by_torch(tmp_path):
    tokenizer = dict(
        image_size=20,
        encoder=dict(patch_size=4, width=30, depth=2, num_heads=5, mlp_dim=42),
        decoder=dict(width=18, depth=1, num_heads=3, mlp_dim=22),
        codebook_size=17,
        code_dim=7,
        teacher_width=19,
    )
    heads = dict(num_classes=13, out_layers=(1, 2, 2, 3), channels=11, aux_channels=7)
    for weights in (
        drawn("vqkd", **tokenizer),
        drawn("mim", **SIZES, codebook_size=17, early_layer=2),
        drawn("classifier", **CLASSIFIERS["relative"]),
        drawn("segmenter", **SIZES, **heads),
    ):
        write(weights, str(tmp_path / f"{weights.kind}.pth"), "official")
        write(weights, str(tmp_path / f"{weights.kind}.safetensors"), "official")
        state = torch.load(tmp_path / f"{weights.kind}.pth", weights_only=True)["model"]
        expected = load_file(tmp_path / f"{weights.kind}.safetensors")
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(tensor.numpy(), expected[name], err_msg=name)
            assert tensor.numpy().dtype == expected[name].dtype, name
        again = read(str(tmp_path / f"{weights.kind}.pth"), num_heads=5 if weights.kind != "vqkd" else 1)
        assert again.kind == weights.kind


def test_the_names_of_the_huggingface_cases_are_complete():
    for name in HUGGINGFACE:
        kind, arguments = huggingface_arguments(name)
        assert dataclasses.asdict(case(name))["config"]["architectures"] == [kind.__name__], arguments
