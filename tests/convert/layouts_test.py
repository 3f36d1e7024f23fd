"""Which layout holds which model, as the table of docs/export.md has it, and the class names in each."""

import dataclasses
import functools
import json

import pytest
from convert_states import KINDS, arguments_of, drawn_weights

from beitv2_jax.convert.weights import read
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError

FILES = {"official": "w.safetensors", "timm": "w", "huggingface": "w", "run": "w", "stablehlo": "w"}
HELD = {
    "official": KINDS,
    "timm": ("mim", "classifier"),
    "huggingface": ("mim", "classifier", "segmenter"),
    "run": KINDS,
}
"""Layout -> the kinds that it holds; that stablehlo holds all is tested with what its functions compute."""


@functools.cache
def weights_of(kind, stem="linear"):
    """Return a drawn model; a segmenter with the sizes that Hugging Face can build."""
    if stem == "conv":
        return drawn_weights(kind, stem="conv", patch_size=4)
    position = "absolute" if kind == "vqkd" else "relative"
    weights = drawn_weights(kind, position=position, depth=3)
    if kind == "segmenter":
        arguments = {**weights.arguments, "channels": 10, "out_layers": (1, 1, 2, 2)}
        weights = drawn_weights(kind, arguments=arguments)
    return weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", HELD)
def test_a_layout_holds_a_kind_or_says_why_not(layout, kind, tmp_path):
    weights, path = weights_of(kind), tmp_path / FILES[layout]
    if kind in HELD[layout]:
        write(weights, str(path), layout)
        again = read(str(path), num_heads=None if layout == "run" or kind != "vqkd" else 2)
        assert again.kind == ("classifier" if (layout, kind) == ("timm", "mim") else kind)
        return
    with pytest.raises(UserError, match=f"of kind '{kind}'"):
        write(weights, str(path), layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ("official", "timm", "huggingface"))
def test_layouts_of_others_refuse_a_convolutional_stem(layout, kind, tmp_path):
    weights = weights_of(kind, stem="conv")
    with pytest.raises(UserError, match=rf"model\.stem=conv.* layout '{layout}' cannot hold"):
        write(weights, str(tmp_path / FILES[layout]), layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantizer", ("simvq", "fsq"))
@pytest.mark.parametrize("layout", ("official", "timm", "huggingface"))
def test_layouts_of_others_refuse_a_quantizer_without_a_moving_codebook(layout, quantizer, tmp_path):
    arguments = {**arguments_of("vqkd"), "quantizer": quantizer, "codebook_size": 24, "fsq_levels": (2, 3, 2, 2)}
    with pytest.raises(UserError, match=rf"model\.quantizer={quantizer}.* layout '{layout}' cannot hold") as caught:
        write(drawn_weights("vqkd", arguments=arguments), str(tmp_path / FILES[layout]), layout)
    assert "--layout=stablehlo" in caught.value.instead and not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ("timm", "huggingface", "run", "stablehlo"))
def test_class_names_go_with_the_weights(layout, tmp_path):
    names = tuple(f"species {letter}" for letter in "abcdefghijklmnopq")
    weights = dataclasses.replace(weights_of("classifier"), class_names=names)
    write(weights, str(tmp_path / "w"), layout)
    if layout == "stablehlo":
        assert json.loads((tmp_path / "w" / "manifest.json").read_text())["class_names"] == list(names)
    else:
        assert read(str(tmp_path / "w")).class_names == names


def test_synsets_have_their_descriptions_as_names(tmp_path):
    write(weights_of("classifier"), str(tmp_path / "w"), "timm")
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    synsets = [f"n{number:08d}" for number in range(17)]
    config |= {"label_names": synsets, "label_descriptions": {synsets[0]: "tench"}}
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    assert read(str(tmp_path / "w")).class_names == ("tench", *synsets[1:])


def test_a_timm_folder_says_what_a_file_cannot(tmp_path):
    """Heads without tables, and an input normalisation that is not the usual one."""
    weights = dataclasses.replace(drawn_weights("classifier", position="absolute"), normalization="clip")
    assert write(weights, str(tmp_path / "w.npz"), "timm").keys() == {"num_heads", "normalization"}
    assert write(weights, str(tmp_path / "w"), "timm") == {}
    again = read(str(tmp_path / "w"))
    assert (again.arguments["num_heads"], again.normalization, again.assumptions) == (2, "clip", ())


def test_the_ratio_of_timm_gives_the_width_of_the_mlp(tmp_path):
    heads = 29  # int(145 * (436 / 145)) is 435
    write(drawn_weights("classifier", heads=heads), str(tmp_path / "w"), "timm")
    model_args = json.loads((tmp_path / "w" / "config.json").read_text())["model_args"]
    assert int(model_args["embed_dim"] * model_args["mlp_ratio"]) == 15 * heads + 1


@pytest.mark.parametrize("image_size, stated, resized", ((224, 0, 256), (160, 0, 182), (384, 0, 384), (224, 0.95, 235)))
def test_images_are_prepared_as_the_evaluation_does(image_size, stated, resized, tmp_path):
    weights = drawn_weights("classifier", position="absolute", patch_size=16, grid=image_size // 16)
    weights = dataclasses.replace(weights, stated_crop_fraction=stated)
    write(weights, str(tmp_path / "hf"), "huggingface")
    preprocessor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": resized}
    assert preprocessor["crop_size"] == {"height": image_size, "width": image_size}
    write(weights, str(tmp_path / "timm"), "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert int(config["input_size"][1] / config["crop_pct"]) == resized
    write(weights, str(tmp_path / "run"), "run")
    for layout in ("hf", "timm", "run"):
        again = read(str(tmp_path / layout))
        assert int(image_size / again.crop_fraction) == resized
    assert ("crop_fraction" in write(weights, str(tmp_path / "w.npz"), "official")) == bool(stated)
    assert f"Resize the shorter side to {resized} pixels" in (tmp_path / "hf" / "README.md").read_text()
