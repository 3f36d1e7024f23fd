"""Durations, presets, files, text form, differences and checks of configs, against values worked out by hand."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from paths import CONFIGS, ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError, nearest

IMAGENET = 1_281_167


@pytest.mark.parametrize(
    "duration, batch_size, num_examples, expected",
    [
        ("100 epochs", 512, IMAGENET, 250_200),  # released VQ-KD: 2502 steps an epoch
        ("10 epochs", 512, IMAGENET, 25_020),
        ("1600 epochs", 2048, IMAGENET, 1_000_000),
        ("300 epochs", 2048, IMAGENET, 187_500),
        ("1 epoch", 2048, IMAGENET, 625),
        ("0.5 epochs", 2048, IMAGENET, 312),
        ("0.1 epochs", 7, 70, 1),
        ("0.01 epochs", 7, 70, 1),
        ("1000 steps", 512, 3, 1000),
        ("1 step", 512, 3, 1),
        ("5000 examples", 512, IMAGENET, 10),
        ("5120 examples", 512, IMAGENET, 10),
        ("5121 examples", 512, IMAGENET, 11),
        ("1 example", 512, IMAGENET, 1),
        ("  3 Epochs ", 5, 11, 6),
        ("0 epochs", 5, 11, 0),
        ("0 steps", 5, 11, 0),
    ],
)
def test_steps(duration, batch_size, num_examples, expected):
    assert config_lib.steps(duration, batch_size=batch_size, num_examples=num_examples) == expected


@pytest.mark.parametrize("duration", ["300", "epochs", "-3 epochs", "3epochs", "3 epochs 2 steps", "", 300, None])
def test_steps_refuses_what_is_no_duration(duration):
    with pytest.raises(UserError, match="not a duration"):
        config_lib.steps(duration, batch_size=2, num_examples=10)


def test_steps_names_the_nearest_unit():
    with pytest.raises(UserError, match="unknown unit 'epcohs'") as caught:
        config_lib.steps("3 epcohs", batch_size=2, num_examples=10)
    assert caught.value.instead == "Write '3 epochs'."


def test_steps_refuses_an_epoch_without_a_batch():
    with pytest.raises(UserError, match="An epoch of 10 examples holds no batch of 11"):
        config_lib.steps("3 epochs", batch_size=11, num_examples=10)
    assert config_lib.steps("3 epochs", batch_size=10, num_examples=10) == 3


@settings(max_examples=50, deadline=None)
@given(epochs=st.integers(1, 2000), batch_size=st.integers(1, 97), extra=st.integers(0, 1000))
def test_epochs_are_whole_batches(epochs, batch_size, extra):
    num_examples = batch_size + extra
    count = config_lib.steps(f"{epochs} epochs", batch_size=batch_size, num_examples=num_examples)
    assert count % epochs == 0
    assert 0 <= num_examples - (count // epochs) * batch_size < batch_size


def test_nearest():
    assert nearest("codebook_sise", ("code_dim", "codebook_size", "image_size")) == "codebook_size"
    assert nearest("bicubik", ("bilinear", "bicubic")) == "bicubic"
    assert nearest("DINOv3", ("ours", "dinov3", "ep")) == "dinov3"
    assert nearest("x", ("b", "a")) is None
    assert nearest("x", ("b", "a"), least=0) == "a"
    assert nearest("x", ()) is None


def _presets(calls):
    return {name: lambda config, name=name: calls.append(name) for name in ("large", "300ep", "smoke")}


def test_presets_are_applied_in_the_order_written():
    calls = []
    config_lib.apply_presets(ConfigDict(), "smoke, large,300ep", _presets(calls))
    assert calls == ["smoke", "large", "300ep"]


@pytest.mark.parametrize("arg", ["", None])
def test_no_presets(arg):
    calls, config = [], ConfigDict()
    assert config_lib.apply_presets(config, arg, _presets(calls)) is config
    assert calls == []


@pytest.mark.parametrize("arg", ["larg", "large,larg", "larg,smoke"])
def test_an_unknown_preset_names_the_nearest_and_lists_all(arg):
    with pytest.raises(UserError, match="no preset 'larg'") as caught:
        config_lib.apply_presets(ConfigDict(), arg, _presets([]))
    assert "'large'" in caught.value.meant
    assert "300ep, large, smoke" in caught.value.instead


@pytest.fixture
def config_dir(tmp_path):
    (tmp_path / "child.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config(arg=''):\n    return ConfigDict({'arg': arg})\n"
    )
    (tmp_path / "parent.py").write_text(
        "from beitv2_jax.config import load\n"
        "def get_config(arg=''):\n"
        "    return load('child:' + arg) if arg else load('child')\n"
    )
    return tmp_path


def test_load_finds_siblings_of_the_caller(config_dir, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert config_lib.load(f"{config_dir}/parent.py:a,b:c").arg == "a,b:c"
    assert config_lib.load(f"{config_dir}/parent.py").arg == ""


def test_load_works_where_the_caller_is_no_file(config_dir, monkeypatch):
    """As in `python -c` and in notebooks: a bare name is looked for in the current folder."""
    monkeypatch.chdir(config_dir)
    source = "from beitv2_jax import config; loaded = config.load(spec)"
    found, missing = {"spec": "child:a"}, {"spec": "chidl:a"}
    exec(source, found)
    assert found["loaded"].arg == "a"
    with pytest.raises(UserError, match=r"no config file chidl\.py") as caught:
        exec(source, missing)
    assert caught.value.meant == "Did you mean 'child.py'?"
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        exec(source, {"spec": "finetune:smoke"})
    assert caught.value.meant == "Did you mean 'configs/finetune.py'?"


def test_load_of_a_missing_file_names_the_nearest(config_dir):
    with pytest.raises(UserError, match="no config file") as caught:
        config_lib.load(f"{config_dir}/chidl.py:large")
    assert caught.value.meant == f"Did you mean '{config_dir}/child.py'?"
    assert "child.py" in caught.value.instead and "parent.py" in caught.value.instead


def test_link_follows_until_set():
    source = ConfigDict({"a": 1, "b": 2})
    target = ConfigDict({"a": 0, "b": 0, "c": 3})
    config_lib.link(target, source)
    target.b = 5
    source.a, source.b = 7, 8
    assert target.to_dict() == {"a": 7, "b": 5, "c": 3}
    assert source.to_dict() == {"a": 7, "b": 8}


def test_flatten():
    nested = ConfigDict({"b": {"c": {"d": 1}, "e": (2, 3)}, "a": ""})
    assert config_lib.flatten(nested) == {"a": "", "b.c.d": 1, "b.e": (2, 3)}


def _pipeline():
    config = ConfigDict({"stage": "pipeline", "seed": 3})
    config.stages = ConfigDict(sort_keys=False)
    config.stages.mim = ConfigDict({"z": "{workdir}/vqkd", "seed": 0, "betas": (0.9, 0.98)})
    config.stages.extract = ConfigDict({"z": "no {workdir} but {other}", "seed": 0})
    for stage in config.stages.values():
        config_lib.link(stage, ConfigDict({"seed": config.get_oneway_ref("seed")}))
    return config


def test_resolve_fills_in_the_workdir_in_a_copy():
    config = _pipeline()
    resolved = config_lib.resolve(config, "/runs/1")
    assert resolved.stages.mim.z == "/runs/1/vqkd"
    assert resolved.stages.extract.z == "no /runs/1 but {other}"
    assert list(resolved.stages) == ["mim", "extract"]
    assert config.stages.mim.z == "{workdir}/vqkd"
    config.seed = 4
    assert resolved.seed == resolved.stages.mim.seed == 3
    with pytest.raises(AttributeError):
        resolved.stages.mim.seeed = 1


@pytest.mark.parametrize(
    "workdir, beside", [("/runs/1", "/runs/2/vqkd"), ("gs://bucket/1", "gs://bucket/2/vqkd"), ("1", "2/vqkd")]
)
def test_a_folder_beside_the_workdir_is_found_before_the_workdir_is_there(workdir, beside):
    assert config_lib.resolve(ConfigDict({"run": "{workdir}/../2/vqkd"}), workdir).run == beside


def test_a_home_directory_is_filled_in_where_a_value_begins_with_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = ConfigDict({"run": "~/vqkd", "data": {"data_dir": "~", "source": "folder:~/images", "glob": "a~b"}})
    resolved = config_lib.resolve(config, "/runs/1")
    assert resolved.to_dict() == {
        "run": "/home/me/vqkd",
        "data": {"data_dir": "/home/me", "source": "folder:~/images", "glob": "a~b"},  # sources expand their own
    }
    for path in ("~nobody-has-this-name/x", "~"):
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        with pytest.raises(UserError, match=f"The home directory that {path} names is unknown"):
            config_lib.expand_home(path)


def test_json_is_stable_and_keeps_the_order_of_stages():
    config = _pipeline()
    text = config_lib.to_json(config)
    assert json.loads(text) == {
        "seed": 3,
        "stage": "pipeline",
        "stages": {
            "mim": {"betas": [0.9, 0.98], "seed": 3, "z": "{workdir}/vqkd"},
            "extract": {"seed": 3, "z": "no {workdir} but {other}"},
        },
    }
    assert text.index('"seed"') < text.index('"stage"') < text.index('"mim"') < text.index('"extract"')
    back = config_lib.from_json(text)
    assert list(back.stages) == ["mim", "extract"]
    assert back.stages.mim.betas == (0.9, 0.98)
    assert back.is_locked and back.stages.mim.is_locked
    assert config_lib.to_json(back) == text
    assert config_lib.to_json(config_lib.from_json(json.loads(text))) == text


def test_changed_lists_what_changes_results():
    old = {
        "efficiency": {"dtype": "float32"},
        "mesh": {"data": 1},
        "data": {"num_threads": 1, "num_workers": 0, "max_bad_fraction": 0.001, "data_dir": "a", "source": "x"},
        "run": {"log_every": "1 step", "batch_size": 8},
        "optim": {"betas": (0.9, 0.98)},
        "gone": 1,
    }
    new = {
        "efficiency": {"dtype": "bfloat16"},
        "mesh": {"data": 2},
        "data": {"num_threads": 2, "num_workers": 3, "max_bad_fraction": 0.1, "data_dir": "b", "source": "y"},
        "run": {"log_every": "2 steps", "batch_size": 9},
        "optim": {"betas": [0.9, 0.98]},
        "meshes": 1,
    }
    expected = [("data.source", "x", "y"), ("gone", 1, None), ("meshes", None, 1), ("run.batch_size", 8, 9)]
    assert config_lib.changed(ConfigDict(old), ConfigDict(new)) == expected
    harmless = config_lib.changed(ConfigDict(old), ConfigDict(new), harmless=True)
    assert [key for key, _, _ in harmless] == [
        "data.data_dir",
        "data.max_bad_fraction",
        "data.num_threads",
        "data.num_workers",
        "efficiency.dtype",
        "mesh.data",
        "run.log_every",
    ]
    assert harmless[-1] == ("run.log_every", "1 step", "2 steps")
    defaults = ConfigDict({"meshes": 1, "elsewhere": 2, "optim": {"betas": (0.9, 0.999)}})
    with_defaults = config_lib.changed(ConfigDict(old), ConfigDict(new), defaults=defaults)
    assert with_defaults == [change for change in expected if change[0] != "meshes"]
    defaults.meshes = 0
    assert ("meshes", 0, 1) in config_lib.changed(ConfigDict(old), ConfigDict(new), defaults=defaults)
    nested = [(f"stages.mim.{key}", before, after) for key, before, after in expected]
    assert config_lib.changed(ConfigDict({"stages": {"mim": old}}), ConfigDict({"stages": {"mim": new}})) == nested
    assert config_lib.changed(ConfigDict(old), config_lib.from_json(config_lib.to_json(ConfigDict(old)))) == []


MIM = {
    "stage": "mim",
    "data": {"source": "embedded", "num_threads": 2, "num_workers": 0, "max_bad_fraction": 0.001},
    "views": {"image_size": 96, "num_views": 0, "interpolation": "bicubic", "tokenizer_interpolation": ""},
    "masking": {"num_masked": 14},
    "tokenizer": {"run": "DIR", "codes": ""},
    "model": {
        "patch_size": 16,
        "width": 30,
        "num_heads": 5,
        "depth": 4,
        "patch_aggregation": True,
        "early_layer": 4,
        "position": "relative_shared",
    },
    "optim": {"warmup": "1 epoch", "betas": (0.9, 0.98)},
    "run": {"batch_size": 8, "duration": "10 steps", "log_every": "1 step"},
    "efficiency": {"dtype": "float32", "gradient_dtype": "float32", "accumulation_steps": 4, "remat": "dots"},
}
VQKD = {
    "stage": "vqkd",
    "data": {"source": "embedded"},
    "views": {"image_size": 96, "num_views": 2},
    "teacher": {"features": "DIR", "weights": "", "normalization": "clip"},
    "model": {
        "encoder": {"patch_size": 16, "width": 30, "num_heads": 5},
        "decoder": {"width": 30, "num_heads": 3},
        "codebook_size": 288,
    },
    "usage_window": "1 epoch",
    "kmeans_start": True,
    "init_from": "",
    "run": {"batch_size": 8, "duration": "10 steps"},
}


SEGMENT = {
    "stage": "segment",
    "data": {"source": "folder:somewhere"},
    "views": {
        "image_size": 48,
        "long_side": 90,
        "short_side": 60,
        "min_ratio": 0.5,
        "max_ratio": 2.0,
        "max_class_fraction": 0.75,
    },
    "evaluation": {"long_side": 90, "short_side": 60, "stride": 32, "scales": (1.0,), "batch_size": 2},
    "model": {"patch_size": 16, "width": 64, "num_heads": 1, "depth": 4, "out_layers": (1, 1, 2, 4)},
}


@pytest.mark.parametrize("good", [MIM, VQKD, SEGMENT])
def test_validate_accepts(good):
    config_lib.validate(ConfigDict(good))
    pipeline = ConfigDict({"stage": "pipeline", "stages": {"one": good, "two": good}})
    config_lib.validate(pipeline)


@pytest.mark.parametrize(
    "base, key, value, named",
    [
        (MIM, "stage", "mimm", ["stage", "mim"]),
        (MIM, "views.image_size", 100, ["views.image_size", "model.patch_size=16", "=96"]),
        (MIM, "views.interpolation", "bicubik", ["views.interpolation", "=bicubic"]),
        (MIM, "masking.num_masked", 37, ["masking.num_masked", "36 patches", "=14"]),
        (MIM, "masking.num_masked", 0, ["masking.num_masked"]),
        (MIM, "model.early_layer", 5, ["model.early_layer", "model.depth=4", "=3"]),
        (MIM, "model.early_layer", 0, ["model.early_layer"]),
        (SEGMENT, "model.out_layers", (1, 2, 3, 5), ["model.out_layers", "model.depth=4", "='(1, 2, 3, 4)'"]),
        (SEGMENT, "model.out_layers", (1, 2, 4), ["model.out_layers", "four"]),
        (MIM, "model.patch_size", 0, ["model.patch_size", "at least 1", "=16"]),
        (MIM, "model.depth", 0, ["model.depth", "at least 1"]),
        (VQKD, "model.encoder.stem", "conv", ["model.encoder.stem", "model.encoder.patch_size=24", "=linear"]),
        (MIM, "model.num_heads", 4, ["model.width", "model.num_heads=4"]),
        (MIM, "model.position", "relative_shard", ["model.position", "=relative_shared"]),
        (MIM, "tokenizer.run", "", ["tokenizer.codes", "tokenizer.run"]),
        (MIM, "tokenizer.codes", "DIR2", ["tokenizer.codes", "tokenizer.run='DIR'"]),
        (MIM, "data.source", "", ["data.source"]),
        (SEGMENT, "data.source", "", ["data.source"]),
        (SEGMENT, "evaluation.stride", 49, ["evaluation.stride", "48 pixels", "=32"]),
        (SEGMENT, "evaluation.stride", 0, ["evaluation.stride"]),
        (SEGMENT, "evaluation.short_side", 91, ["evaluation.short_side", "evaluation.long_side=90"]),
        (SEGMENT, "views.short_side", 0, ["views.short_side", "=90"]),
        (SEGMENT, "evaluation.scales", (), ["evaluation.scales"]),
        (SEGMENT, "evaluation.scales", (1.0, -0.5), ["evaluation.scales", "(1.0,)"]),
        (SEGMENT, "evaluation.batch_size", 0, ["evaluation.batch_size"]),
        (SEGMENT, "views.min_ratio", 2.5, ["views.min_ratio", "views.max_ratio=2.0", "=0.5"]),
        (SEGMENT, "views.max_class_fraction", 75.0, ["views.max_class_fraction", "=0.75"]),
        (MIM, "data.num_workers", -1, ["data.num_workers", "=0"]),
        (MIM, "data.num_threads", -2, ["data.num_threads", "=0"]),
        (MIM, "data.max_bad_fraction", 2.0, ["data.max_bad_fraction", "=0.02"]),
        (MIM, "data.max_bad_fraction", -0.1, ["data.max_bad_fraction"]),
        (MIM, "views.tokenizer_interpolation", "lancoz", ["views.tokenizer_interpolation", "=lanczos"]),
        (MIM, "run.batch_size", 0, ["run.batch_size"]),
        (MIM, "run.duration", "10", ["run.duration", "not a duration"]),
        (MIM, "run.log_every", "1 stop", ["run.log_every", "'steps'"]),
        (MIM, "optim.warmup", "10 steps", ["optim.warmup", "run.duration='10 steps'"]),
        (MIM, "optim.betas", (0.9,), ["optim.betas"]),
        (MIM, "optim.betas", (0.9, 1.0), ["optim.betas"]),
        (MIM, "efficiency.dtype", "bf16", ["efficiency.dtype", "=bfloat16"]),
        (MIM, "efficiency.gradient_dtype", "float16", ["efficiency.gradient_dtype", "=bfloat16"]),
        (MIM, "efficiency.accumulation_steps", 3, ["efficiency.accumulation_steps", "run.batch_size=8", "=2"]),
        (MIM, "efficiency.accumulation_steps", 0, ["efficiency.accumulation_steps", "=1"]),
        (MIM, "efficiency.remat", "dot", ["efficiency.remat", "none, dots, full", "=dots"]),
        (VQKD, "teacher.weights", "FILE", ["teacher.features", "teacher.weights='FILE'"]),
        (VQKD, "teacher.features", "", ["teacher.features", "teacher.weights=''"]),
        (VQKD, "teacher.normalization", "klip", ["teacher.normalization", "=clip"]),
        (VQKD, "views.num_views", 0, ["views.num_views"]),
        (VQKD, "views.image_size", 100, ["views.image_size", "model.encoder.patch_size=16"]),
        (VQKD, "model.encoder.num_heads", 4, ["model.encoder.width", "model.encoder.num_heads=4"]),
        (VQKD, "model.decoder.num_heads", 4, ["model.decoder.width", "model.decoder.num_heads=4"]),
        (
            VQKD,
            "run.batch_size",
            7,
            ["run.batch_size", "252 patches", "model.codebook_size=288", "=14 or --config."],
        ),
        (VQKD, "model.codebook_size", 1000, ["run.batch_size", "288 patches", "model.codebook_size=1000", "=32 or"]),
        (VQKD, "usage_window", "1", ["usage_window", "not a duration"]),
    ],
)
def test_validate_refuses(base, key, value, named):
    config = ConfigDict(base).copy_and_resolve_references()
    if key == "model.encoder.stem":
        config.model.encoder.update(patch_size=24, stem="linear")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    for text in named:
        assert text in str(caught.value)
    assert f"--config.{named[0]}=" in caught.value.instead
    if key != "stage":
        with pytest.raises(UserError) as caught:
            config_lib.validate(ConfigDict({"stage": "pipeline", "stages": {"first": base, "second": config}}))
        assert f"--config.stages.second.{named[0]}=" in caught.value.instead


@pytest.mark.parametrize(
    "stage, missing", [("extract", "teacher.weights"), ("tokenize", "tokenizer.run"), ("probe", "backbone.run")]
)
def test_validate_asks_for_a_stage_s_input(stage, missing):
    section, key = missing.split(".")
    config = ConfigDict({"stage": stage, section: {key: ""}, "views": {"num_views": 1, "image_size": 32}})
    with pytest.raises(UserError) as caught:
        config_lib.validate(config)
    assert f"--config.{missing}=" in caught.value.instead
    config[section][key] = "DIR"
    config_lib.validate(config)


QUICKSTART = f"{CONFIGS / 'quickstart.py'}:smoke"


@pytest.mark.parametrize(
    "stage, key, expected",
    [
        ("extract", "data.source", "data.source"),
        ("mim", "views.image_size", "mim_views.image_size"),
        ("probe", "views.image_size", "mim_views.image_size"),
        ("teacher", "views.min_scale", "teacher_views.min_scale"),
        ("vqkd", "seed", "seed"),
        ("mim", "efficiency.dtype", "efficiency.dtype"),
        ("mim", "run.batch_size", "stages.mim.run.batch_size"),
        ("vqkd", "data.source", "stages.vqkd.data.source"),  # set for itself below
    ],
)
def test_errors_of_a_stage_name_the_key_that_the_pipeline_has_for_it(stage, key, expected):
    config = config_lib.load(QUICKSTART)
    config.stages.vqkd.data.source = "folder:own"
    with pytest.raises(UserError) as caught, config_lib.stage_errors(config, stage):
        raise UserError("It happened.", f"Did you mean --config.{key}=1?", f"Write --config.{key}=2, or wait.")
    assert caught.value.happened == f"Stage {stage} of the pipeline: It happened."
    assert caught.value.meant == f"Did you mean --config.{expected}=1?"
    assert caught.value.instead == f"Write --config.{expected}=2, or wait."


@pytest.mark.parametrize("key, value", [("kmeans_start", False), ("init_from", "DIR")])
def test_validate_ignores_the_size_of_the_first_batch_without_k_means(key, value):
    config = ConfigDict(VQKD)
    config.model.codebook_size = 1000
    config[key] = value
    config_lib.validate(config)


def test_validate_ignores_the_early_layer_without_aggregation():
    config = ConfigDict(MIM)
    config.model.update(patch_aggregation=False, early_layer=99)
    config_lib.validate(config)


def test_durations_of_different_units_are_compared_once_the_data_are_known():
    config = ConfigDict(MIM)  # one epoch of warm-up in ten steps of eight
    config_lib.validate(config, num_examples=79)
    with pytest.raises(UserError, match=r"optim.warmup='1 epoch'.*run.duration='10 steps'"):
        config_lib.validate(config, num_examples=80)
