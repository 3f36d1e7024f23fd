"""Licence and origin of teachers: what the files beside weights state, what a run passes on, and what nobody states."""

import json

import numpy as np
import pytest

from beitv2_jax.convert.teachers.terms import OWN, UNKNOWN, rows_of, teachers_of, teachers_of_run, terms_of_weights

DINOV3 = """\
---
license: other
license_name: dinov3-license
license_link: https://example.org/dinov3-license
extra_gated_prompt: >-
  license: not this one
---
# Model card

license: nor this one
"""


def folder(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").touch()
    for name, text in files.items():
        (path / name.replace("_json", ".json").replace("_md", ".md")).write_text(text)
    return path


def run(path, stage, *, inputs=None, **config):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"stage": stage, "run": {}} | config))
    if inputs is not None:
        (path / "inputs.json").write_text(json.dumps(inputs))
    return str(path)


@pytest.mark.parametrize(
    ("files", "license"),
    [
        ({"README_md": DINOV3}, "dinov3-license (https://example.org/dinov3-license)"),
        ({"README_md": "---\ntags: [a]\nlicense: apache-2.0\n---\n"}, "apache-2.0"),
        ({"README_md": "---\r\nlicense: 'mit'\r\n---\r\n"}, "mit"),
        ({"README_md": "---\nlicense:\n- mit\n- cc-by-4.0\n---\n"}, "mit, cc-by-4.0"),
        ({"README_md": "---\nlicense: [mit, cc-by-4.0]\n---\n"}, "mit, cc-by-4.0"),
        ({"README_md": "---\nlicense: other\n---\n"}, "other"),
        (
            {"README_md": "license: mit\n", "LICENSE": "\n  MIT License\n\nCopyright"},
            "MIT License (LICENSE beside the weights)",
        ),
        ({"LICENSE_md": "# DINOv3 | License\n"}, "DINOv3 / License (LICENSE.md beside the weights)"),
        ({"config_json": '{"pretrained_cfg": {"license": "apache-2.0"}}'}, "apache-2.0"),
        ({"README_md": "---\nbase_model: x/y\n---\n", "config_json": "{}"}, UNKNOWN),
        ({"README_md": ""}, UNKNOWN),
        ({}, UNKNOWN),
    ],
)
def test_the_licence_is_what_the_files_beside_the_weights_state(tmp_path, files, license):
    path = folder(tmp_path / "vit", **files)
    assert terms_of_weights(str(path)) == {"name": "vit", "license": license, "origin": UNKNOWN}
    beside = terms_of_weights(str(path / "model.safetensors"))
    assert (beside["name"], beside["license"]) == ("model.safetensors", license)
    assert terms_of_weights(str(path), license=" given\nhere ")["license"] == "given here"


@pytest.mark.parametrize(
    ("name", "origin"), [("facebook/dino-vitb16", "hf:facebook/dino-vitb16"), ("/home/me/x", UNKNOWN)]
)
def test_the_origin_is_the_name_in_the_config_unless_that_is_a_path(tmp_path, name, origin):
    path = folder(tmp_path / "vit", config_json=json.dumps({"_name_or_path": name}))
    assert terms_of_weights(str(path))["origin"] == origin
    assert terms_of_weights(str(path), origin="a disk")["origin"] == "a disk"


def test_the_origin_of_files_in_the_cache_of_the_hub_is_the_repository_and_its_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    path = folder(tmp_path / "models--google--tipsv2-b14" / "snapshots" / commit)
    assert terms_of_weights(str(path))["origin"] == f"hf:google/tipsv2-b14@{commit}"


def test_weights_that_are_not_there_have_their_name_alone(tmp_path):
    assert terms_of_weights(str(tmp_path / "clip.pt")) == {"name": "clip.pt", "license": UNKNOWN, "origin": UNKNOWN}


def test_a_run_as_teacher_is_an_own_network_unless_it_began_with_weights(tmp_path):
    data = {"train": {"source": "folder:birds", "classes": []}, "teachers": []}
    own = run(tmp_path / "teacher", "finetune", inputs=data, init_from="")
    origin = "run teacher of the stage finetune, trained on folder:birds"
    assert teachers_of({"teacher": {"weights": own}}) == [{"name": "teacher", "license": OWN, "origin": origin}]
    begun = run(tmp_path / "begun", "finetune", inputs=data, init_from="clip.pt")
    assert teachers_of({"teacher": {"weights": begun}})[0]["license"] == UNKNOWN


def test_students_know_the_teacher_of_their_tokenizer(tmp_path):
    """weights -> extract -> vqkd -> tokenize -> mim -> finetune, of which each keeps what the one before has kept."""
    weights = folder(tmp_path / "dinov3", README_md=DINOV3)
    keys = {
        "extract": ("teacher", "weights"),
        "vqkd": ("teacher", "features"),
        "tokenize": ("tokenizer", "run"),
        "mim": ("tokenizer", "codes"),
    }
    expected, former = [terms_of_weights(str(weights))], str(weights)
    for stage, (section, key) in keys.items():
        found = teachers_of({section: {key: former}})
        assert found == expected, stage
        former = run(tmp_path / stage, stage, inputs={"teachers": found})
    assert teachers_of({"init_from": former}) == teachers_of({"backbone": {"run": former}}) == expected
    # a teacher that is itself such a student brings its own teacher with it
    names = [entry["name"] for entry in teachers_of({"teacher": {"weights": former}})]
    assert names == ["mim", "dinov3"]


def test_runs_of_older_versions_are_followed_by_their_configs(tmp_path):
    folder(tmp_path / "dinov3", README_md=DINOV3)
    run(tmp_path / "extract", "extract", teacher={"weights": "{workdir}/dinov3"})
    run(tmp_path / "vqkd", "vqkd", teacher={"features": "{workdir}/extract", "weights": ""})
    student = run(tmp_path / "mim", "mim", tokenizer={"run": "{workdir}/vqkd"}, inputs={"train": {}})
    assert teachers_of_run(student) == [terms_of_weights(str(tmp_path / "dinov3"))]
    live = run(tmp_path / "live", "vqkd", teacher={"weights": "hf:google/tipsv2-b14"})  # which is not fetched
    assert teachers_of_run(live) == [{"name": "tipsv2-b14", "license": UNKNOWN, "origin": "hf:google/tipsv2-b14"}]


def test_features_of_an_own_program_have_what_their_manifest_says(tmp_path):
    (tmp_path / "features" / "views").mkdir(parents=True)
    manifest = {"teacher": "my network", "teacher_license": "mit", "teacher_origin": UNKNOWN}
    (tmp_path / "features" / "views" / "manifest.json").write_text(json.dumps(manifest))
    learns = {"features": str(tmp_path / "features"), "weights": "", "license": "", "origin": "our lab"}
    assert teachers_of({"teacher": learns}) == [{"name": "my network", "license": "mit", "origin": "our lab"}]


def test_what_nobody_states_is_unknown(tmp_path):
    converted = run(tmp_path / "tokenizer", "vqkd")
    np.savez(tmp_path / "tokenizer.npz")
    for path, name in ((converted, "tokenizer"), (str(tmp_path / "tokenizer.npz"), "tokenizer.npz")):
        (found,) = teachers_of({"tokenizer": {"run": path}})
        assert found == {"name": f"teacher of {name}", "license": UNKNOWN, "origin": UNKNOWN}
    assert rows_of([found])[0][1].startswith("unknown (teacher.license")
    assert teachers_of_run(run(tmp_path / "finetune", "finetune")) == []
