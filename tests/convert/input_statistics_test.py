"""The input normalisation stored next to weights: which file has it, what takes precedence, and unusual contents."""

import json

import numpy as np
import pytest

from beitv2_jax.convert.input_statistics import crop_fraction_of, normalization_of
from beitv2_jax.errors import UserError

HALF = [0.5, 0.5, 0.5]
IMAGENET = [0.48500001430511475, 0.4560000002384186, 0.4059999883174896], [0.229, 0.224, 0.225]
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def beside(folder, content, name="preprocessor_config.json"):
    """Write a JSON file and a weights file beside it; return the path of the latter."""
    (folder / name).write_text(json.dumps(content))
    np.savez(folder / "w.npz", a=np.zeros(1))
    return str(folder / "w.npz")


def found(path, *, given="", usual=""):
    return normalization_of(path, given=given, usual=usual, option="--option")


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("preprocessor_config.json", {"image_mean": HALF, "image_std": HALF, "size": 224}, "half"),
        ("preprocessor_config.json", {"image_mean": IMAGENET[0], "image_std": IMAGENET[1]}, "imagenet"),
        ("config.json", {"architecture": "vit", "pretrained_cfg": {"mean": CLIP[0], "std": CLIP[1]}}, "clip"),
        ("config.json", {"architecture": "vit", "mean": HALF, "std": HALF}, "half"),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": CLIP[0], "std": CLIP[1]}}, "clip"),
        ("config.json", {"model_type": "vit"}, ""),
        ("config.json", {"pretrained_cfg": {}}, ""),
        ("preprocessor_config.json", {"image_mean": None, "image_std": None}, ""),
        ("preprocessor_config.json", {"image_mean": HALF, "image_std": HALF, "do_normalize": False}, "unit"),
    ],
)
def test_every_library_s_file_is_read(name, content, expected, tmp_path):
    path = beside(tmp_path, content, name)
    assert found(path) == found(str(tmp_path)) == expected
    assert found(path, usual="other") == (expected or "other")


def test_what_is_given_goes_before_what_is_stated_and_that_before_the_usual(tmp_path, caplog):
    path = beside(tmp_path, {"image_mean": HALF, "image_std": HALF})
    assert found(path, usual="clip") == "half" and found(path, given="half") == "half"
    assert not caplog.records
    assert found(path, given="imagenet") == "imagenet"
    (tmp_path / "preprocessor_config.json").unlink()
    assert found(path, given="imagenet") == "imagenet"
    assert len(caplog.records) == 1
    assert "normalisation half (preprocessor_config.json), but imagenet is used" in caplog.text
    assert found(path, given="imagenet", usual="clip") == "imagenet"
    assert len(caplog.records) == 2


@pytest.mark.parametrize("content", [{"image_mean": HALF, "image_std": [0.3] * 3}, {"image_mean": [0.1] * 3}])
def test_numbers_without_a_name_are_refused_unless_one_is_given(content, tmp_path):
    path = beside(tmp_path, {"image_mean": HALF, "image_std": HALF} | content)
    with pytest.raises(UserError, match=r"mean \[.*preprocessor_config\.json") as raised:
        found(path, usual="clip")
    assert raised.value.instead.startswith("Write --option=NAME with one of imagenet, clip, half")
    assert found(path, given="half") == "half"


@pytest.mark.parametrize("mean", [0.5, [0.5], ["a", "b", "c"], [[0.5], 0.5, 0.5]])
def test_anything_but_three_numbers_is_named(mean, tmp_path):
    with pytest.raises(UserError, match="not three numbers each"):
        found(beside(tmp_path, {"image_mean": mean, "image_std": HALF}))


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("config.json", {"pretrained_cfg": {"crop_pct": 0.95}}, 0.95),
        ("config.json", {"crop_pct": 0.9, "crop_mode": "center"}, 0.9),
        ("config.json", {"pretrained_cfg": {"crop_pct": 0.95, "crop_mode": "squash"}}, 0.0),
        ("config.json", {"pretrained_cfg": {"crop_pct": 0.875}}, 0.0),
        ("config.json", {"pretrained_cfg": {"crop_pct": 95}}, 0.0),
        ("config.json", {"pretrained_cfg": {}}, 0.0),
        (
            "preprocessor_config.json",
            {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224}},
            0.0,
        ),
        ("preprocessor_config.json", {"do_center_crop": True, "size": {"height": 235}, "crop_size": 224}, 0.0),
    ],
)
def test_the_crop_that_a_library_states(name, content, expected, tmp_path):
    path = beside(tmp_path, content, name)
    assert crop_fraction_of(path, 224) == crop_fraction_of(str(tmp_path), 224) == expected


def test_the_crop_of_transformers_gives_the_size_that_it_resizes_to(tmp_path):
    for side in range(224, 300):
        content = {"do_center_crop": True, "size": {"shortest_edge": side}, "crop_size": {"height": 224}}
        fraction = crop_fraction_of(beside(tmp_path, content), 224)
        assert int(224 / (fraction or 0.875)) == side
