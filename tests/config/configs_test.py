"""Every config file and preset: found by listing the folder, built, checked; and the published numbers in them."""

import ast
import hashlib
import itertools
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from paths import ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError

FOLDER = ROOT / "configs"
STAGES = {
    "cluster": "cluster",
    "dense": "dense",
    "extract": "extract",
    "finetune": "finetune",
    "mim": "mim",
    "pipeline": "pipeline",
    "probe": "probe",
    "quickstart": "pipeline",
    "regress": "regress",
    "segment": "segment",
    "segment_linear": "segment_linear",
    "study": "pipeline",
    "teacher": "finetune",
    "tokenize": "tokenize",
    "vqkd": "vqkd",
}
REQUIRED = {
    "cluster": "teacher.features",
    "dense": "backbone.run",
    "extract": "teacher.weights",
    "mim": "tokenizer.run",
    "pipeline": "teacher.weights",
    "probe": "backbone.run",
    "segment_linear": "backbone.run",
    "tokenize": "tokenizer.run",
    "vqkd": "teacher.weights",
}
"""What a user has to give; a config without it must be refused and name it."""


def presets(name: str) -> list[str]:
    """Return the keys of the file's PRESETS table, read from its source."""
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return [key.value for key in assigned["PRESETS"].keys]


def load(name: str, arg: str = "") -> ConfigDict:
    return config_lib.load(f"{FOLDER / name}.py:{arg}")


def given(name: str, arg: str = "") -> ConfigDict:
    """Return a config with its required setting given, as a run would see it."""
    config = load(name, arg)
    if name in REQUIRED:
        config.update_from_flattened_dict({REQUIRED[name]: "somewhere"})
    if name == "study":
        config.teacher.weights = "somewhere"  # which two of its runs need
    return config_lib.resolve(config, "/runs/1")


EVERY = [(name, arg) for name in STAGES for arg in ("", *presets(name))]


def test_no_config_escapes():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(STAGES)


def long_study(cases):
    """Return the cases as parameters; of the many presets of the study only its smoke run is in the default tier."""
    marks = {True: [pytest.mark.long], False: []}
    return [pytest.param(*case, marks=marks[case[0] == "study" and case[1] not in ("", "smoke")]) for case in cases]


@pytest.mark.parametrize("name, arg", long_study(EVERY))
def test_every_preset_builds_and_validates(name, arg):
    config = load(name, arg)
    assert config.is_locked
    assert config.stage == STAGES[name]
    config = given(name, arg)
    config_lib.validate(config)
    text = config_lib.to_json(config)
    assert config_lib.to_json(config_lib.from_json(text)) == text
    assert "{workdir}" not in text


@pytest.mark.parametrize("name, arg", long_study((name, arg) for name, arg in EVERY if arg))
def test_every_preset_is_explained_and_does_what_it_says(name, arg):
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"\n  {arg} " in docstring.partition("\nPresets")[2]
    changed = config_lib.changed(load(name), load(name, arg))
    assert bool(changed) != (arg in ("base", "1600ep", "base1600"))  # these spell out the default


@pytest.mark.parametrize("name", STAGES)
def test_the_docstring_is_a_notebook(name):
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"--config=configs/{name}.py --workdir=" in docstring


@pytest.mark.parametrize("name", REQUIRED)
def test_what_must_be_given_is_asked_for(name):
    with pytest.raises(UserError) as caught:
        config_lib.validate(load(name))
    section, key = REQUIRED[name].split(".")
    assert f"{section}." in str(caught.value) and key in str(caught.value)


def test_presets_of_mim_commute():
    for first, second in itertools.permutations(("300ep", "large"), 2):
        assert load("mim", f"{first},{second}").to_dict() == load("mim", f"{second},{first}").to_dict()
    assert load("mim", "large,300ep").model.layer_scale_init == 1e-5


def test_published_vqkd_recipe():
    config = load("vqkd")
    assert config.data.source == "tfds:imagenet2012"
    assert config.views.to_dict() == {
        "image_size": 224,
        "min_scale": 0.08,
        "num_views": 0,
        "interpolation": "bicubic",
        "color_jitter": 0.0,
    }
    assert config.model.encoder.to_dict() == {
        "patch_size": 16,
        "stem": "linear",
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_dim": 3072,
    }
    assert config.model.decoder.to_dict() == {"width": 768, "depth": 3, "num_heads": 12, "mlp_dim": 3072}
    model = {key: value for key, value in config.model.items() if key not in ("encoder", "decoder")}
    quantizer = {"quantizer": "ema", "quantizer_gradient": "straight_through", "fsq_levels": ()}
    assert model == {"codebook_size": 8192, "code_dim": 32, "ema_decay": 0.99, "commitment_weight": 1.0} | quantizer
    assert config.kmeans_start
    # CLIP's own input range, and its projected features
    assert (config.teacher.normalization, config.teacher.output) == ("", "")
    assert config.optim.peak_lr == pytest.approx(5e-5 * 512 / 128, rel=1e-15)
    optim = {key: value for key, value in config.optim.items() if key != "peak_lr"}
    assert optim == {
        "min_lr": 1e-5,
        "warmup": "10 epochs",
        "betas": (0.9, 0.99),
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "clip_norm": 0.0,
        "spike_factor": 0.0,
        "layer_decay": 1.0,
        "weight_average": 0.0,
    }
    assert (config.run.batch_size, config.run.duration) == (512, "100 epochs")
    dino = load("vqkd", "dino")
    assert (dino.model.decoder.depth, dino.teacher.normalization) == (1, "imagenet")


def test_published_mim_recipe():
    config = load("mim")
    assert (config.views.image_size, config.views.min_scale, config.views.color_jitter) == (224, 0.2, 0.4)
    assert config.normalization == "imagenet"
    assert config.masking.to_dict() == {"num_masked": 75, "min_patches": 16, "max_patches": 0}
    assert config.model.to_dict() == {
        "patch_size": 16,
        "stem": "linear",
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_dim": 3072,
        "qkv_bias": "qv",
        "norm_eps": 1e-6,
        "codebook_size": 8192,
        "position": "relative_shared",
        "param_init": "clipped",
        "layer_scale_init": 0.1,
        "drop_path_rate": 0.1,
        "patch_aggregation": True,
        "early_layer": 9,
        "head_depth": 2,
        "shared_head": True,
    }
    assert config.optim.to_dict() == {
        "peak_lr": 1.5e-3,
        "min_lr": 1e-5,
        "warmup": "10 epochs",
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.05,
        "weight_decay_end": 0.05,
        "clip_norm": 3.0,
        "spike_factor": 0.0,
        "layer_decay": 1.0,
        "weight_average": 0.0,
    }
    assert (config.run.batch_size, config.run.duration) == (2048, "1600 epochs")


def test_published_mim_variants():
    base, large, short = load("mim"), load("mim", "large"), load("mim", "300ep")
    assert config_lib.changed(base, large) == [
        ("model.depth", 12, 24),
        ("model.early_layer", 9, 21),
        ("model.layer_scale_init", 0.1, 1e-5),
        ("model.mlp_dim", 3072, 4096),
        ("model.num_heads", 12, 16),
        ("model.width", 768, 1024),
    ]
    assert config_lib.changed(base, short) == [
        ("model.drop_path_rate", 0.1, 0.0),
        ("optim.betas", [0.9, 0.999], [0.9, 0.98]),
        ("run.duration", "1600 epochs", "300 epochs"),
    ]
    assert load("mim", "300ep,1600ep").to_dict() == base.to_dict()


PUBLISHED_FINETUNING = {
    # lr, epochs, warm-up epochs, batch, layer decay, drop path, mixup, cutmix, classes
    "base300": (5e-4, 100, 20, 1024, 0.65, 0.1, 0.8, 1.0, 1000),
    "base1600": (5e-4, 100, 20, 1024, 0.6, 0.2, 0.8, 1.0, 1000),
    "base21k": (5e-5, 30, 20, 1024, 0.75, 0.1, 0.0, 0.0, 1000),
    "large300": (5e-4, 50, 5, 1024, 0.8, 0.2, 0.8, 1.0, 1000),
    "large1600": (2e-4, 50, 5, 1024, 0.8, 0.2, 0.8, 1.0, 1000),
    "large21k": (7e-5, 20, 5, 1024, 0.8, 0.25, 0.0, 0.0, 1000),
    "21kbase": (6e-4, 90, 20, 4096, 0.75, 0.1, 0.8, 1.0, 21841),
    "21klarge": (6e-4, 90, 20, 4096, 0.75, 0.2, 0.8, 1.0, 21841),
}


@pytest.mark.parametrize("arg", PUBLISHED_FINETUNING)
def test_published_finetuning_recipes(arg):
    config = load("finetune", arg)
    model, optim, augment = config.model, config.optim, config.augment
    lr, epochs, warmup, *rest = PUBLISHED_FINETUNING[arg]
    assert (optim.peak_lr, config.run.duration, optim.warmup) == (lr, f"{epochs} epochs", f"{warmup} epochs")
    assert rest == [
        config.run.batch_size,
        optim.layer_decay,
        model.drop_path_rate,
        augment.mixup,
        augment.cutmix,
        model.num_classes,
    ]
    assert (model.width, model.depth) == ((768, 12) if "base" in arg else (1024, 24))
    # what all of them share
    assert (config.views.image_size, config.views.min_scale, config.views.color_jitter) == (224, 0.08, 0.0)
    assert (config.normalization, config.label_smoothing) == ("imagenet", 0.1)
    assert (config.evaluation.crop_fraction, config.class_weights, config.data.train_labels) == (0.0, "none", "")
    assert (model.position, model.pooling, model.layer_scale_init, model.head_init_scale) == (
        "relative",
        "mean",
        0.1,
        0.001,
    )
    assert (optim.min_lr, optim.weight_decay, optim.weight_decay_end, optim.clip_norm) == (1e-6, 0.05, 0.05, 0.0)
    assert (optim.betas, optim.eps, optim.weight_average) == ((0.9, 0.999), 1e-8, 0.0)
    assert {key: augment[key] for key in augment if key not in ("mixup", "cutmix")} == {
        "randaugment_ops": 2,
        "randaugment_magnitude": 9.0,
        "randaugment_std": 0.5,
        "mix_probability": 1.0,
        "switch_probability": 0.5,
        "erasing": 0.25,
    }


PUBLISHED_SEGMENTATION = {
    # lr, layer decay, drop path, layer-scale init, blocks, width of the head
    "base1600": (5e-5, 0.75, 0.15, 0.1, (4, 6, 8, 12), 768),
    "base21k": (5e-5, 0.85, 0.15, 0.1, (4, 6, 8, 12), 768),
    "large1600": (4e-5, 0.9, 0.2, 1e-6, (8, 12, 16, 24), 1024),
    "large21k": (3e-5, 0.9, 0.2, 1e-6, (8, 12, 16, 24), 1024),
}


@pytest.mark.parametrize("arg", PUBLISHED_SEGMENTATION)
def test_published_segmentation_recipes(arg):
    config = load("segment", arg)
    model, optim = config.model, config.optim
    assert PUBLISHED_SEGMENTATION[arg] == (
        *(optim.peak_lr, optim.layer_decay, model.drop_path_rate, model.layer_scale_init, model.out_layers),
        model.channels,
    )
    # what all of them share
    assert (model.position, model.num_classes, model.aux_channels, model.dropout_rate) == ("relative", 150, 256, 0.1)
    assert (optim.schedule, optim.min_lr, optim.warmup) == ("linear", 0.0, "1500 steps")
    assert (optim.betas, optim.weight_decay, optim.weight_decay_end, optim.clip_norm) == ((0.9, 0.999), 0.05, 0.05, 0.0)
    assert (config.run.batch_size, config.run.duration, config.run.eval_every) == (16, "160000 steps", "16000 steps")
    assert config.labels.to_dict() == {"offset": 1, "mapping": (), "ignored": (0, 255)}
    assert config.loss.to_dict() == {"auxiliary_weight": 0.4, "count_unlabelled": True}
    assert config.views.to_dict() == {
        "image_size": 512,
        "long_side": 2048,
        "short_side": 512,
        "min_ratio": 0.5,
        "max_ratio": 2.0,
        "max_class_fraction": 0.75,
        "distortion": {"brightness": 32.0, "contrast": 0.5, "saturation": 0.5, "hue": 18 / 180, "probability": 0.5},
    }
    evaluation = config.evaluation
    assert (evaluation.long_side, evaluation.short_side, evaluation.stride) == (2048, 512, 341)
    assert (evaluation.scales, evaluation.flip) == ((1.0,), False)
    assert config.normalization == "imagenet"


def test_a_teacher_is_trained_without_augmentation():
    augment = load("teacher").augment
    assert (augment.randaugment_ops, augment.mixup, augment.cutmix, augment.erasing) == (0, 0.0, 0.0, 0.0)
    assert set(augment) == set(load("finetune").augment)


def test_the_pipeline_chains_the_published_recipes():
    config = given("pipeline")
    assert list(config.stages) == ["extract", "vqkd", "tokenize", "mim", "probe"]
    for name in ("vqkd", "mim"):
        changed = {key for key, _, _ in config_lib.changed(load(name), config.stages[name])}
        assert changed <= {"teacher.features", "tokenizer.codes", "views.num_views"}
    live = given("pipeline", "live")
    assert list(live.stages) == ["vqkd", "mim", "probe"]
    assert config_lib.changed(given("vqkd"), live.stages.vqkd) == []
    changed = config_lib.changed(given("mim"), live.stages.mim)
    assert changed == [("tokenizer.run", "somewhere", "/runs/1/vqkd")]
    assert load("pipeline", "large").stages.mim.model.to_dict() == load("mim", "large").model.to_dict()


# a run of the study is a part of a chain, which tests/benchmarks/study_test.py puts together
PIPELINES = [(name, arg) for name, arg in EVERY if STAGES[name] == "pipeline" and name != "study"]


@pytest.mark.parametrize("name, arg", PIPELINES)
def test_stages_of_a_pipeline_fit_each_other(name, arg):
    stages = given(name, arg).stages
    for stage in stages.values():
        assert {key: stage.data[key] for key in stages.mim.data} == stages.mim.data.to_dict()
        assert stage.seed == stages.mim.seed
    for writer, reader in (("extract", "vqkd"), ("tokenize", "mim")):
        if writer in stages:
            views = stages[reader].views.to_dict()
            # the pre-trained ViT and its tokenizer see one view
            assert not views.pop("tokenizer_image_size", 0) and not views.pop("tokenizer_interpolation", "")
            assert stages[writer].views.to_dict() == views
            assert stages[reader].views.num_views > 0
    assert stages.mim.model.codebook_size == stages.vqkd.model.codebook_size
    assert stages.mim.views.image_size == stages.vqkd.views.image_size == stages.probe.views.image_size
    assert all(1 <= layer <= stages.mim.model.depth for layer in stages.probe.probe.layers)
    places = {f"/runs/1/{stage}" for stage in stages}
    given_paths = [stages.vqkd.teacher.features, stages.mim.tokenizer.codes, stages.probe.backbone.run]
    for path in filter(None, given_paths):
        assert path in places


@pytest.mark.parametrize("name, arg", PIPELINES)
def test_shared_settings_of_a_pipeline_reach_every_stage_unless_set_there(name, arg):
    config = load(name, arg)
    config.stages.mim.data.source = "folder:own"
    config.data.source, config.seed, config.mim_views.image_size = "folder:all", 7, 48
    config.mesh.fsdp, config.efficiency.dtype = 2, "float16"
    for key, stage in config.stages.items():
        assert stage.data.source == ("folder:own" if key == "mim" else "folder:all")
        assert (stage.seed, stage.mesh.fsdp, stage.efficiency.dtype) == (7, 2, "float16")
    assert config.stages.mim.views.image_size == config.stages.probe.views.image_size == 48


def test_quickstart_begins_with_the_teacher_of_the_package_or_trains_one():
    config = given("quickstart")
    assert list(config.stages) == ["extract", "vqkd", "tokenize", "mim", "probe"]
    weights = Path(config.stages.extract.teacher.weights)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in weights.with_name("README.md").read_text()
    assert all(stage.data.source == "embedded" for stage in config.stages.values())
    trained = given("quickstart", "from_labels")
    assert list(trained.stages) == ["teacher", *config.stages]
    assert trained.stages.extract.teacher.weights == "/runs/1/teacher"
    for chain in (config, trained):
        assert chain.stages.vqkd.init_from == chain.stages.extract.teacher.weights
    for stage in (trained.stages.extract, trained.stages.vqkd):
        assert stage.teacher.normalization == trained.stages.teacher.normalization
    assert trained.stages.teacher.model == given("teacher", "scenes").model
    smoke = given("quickstart", "smoke")
    assert all(stage.data.source == "embedded/tiny" for stage in smoke.stages.values())
    for stage in smoke.stages.values():
        if "duration" in stage.run:
            assert config_lib.steps(stage.run.duration, batch_size=1, num_examples=0) <= 10
