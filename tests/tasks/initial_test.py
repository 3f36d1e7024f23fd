"""What a stage takes from weights of any layout, from stored targets and from its data, where nobody has set it."""

import json
import logging
import pathlib

import jax
import numpy as np
import pytest
import teacher_cases
from convert_states import drawn_weights
from paths import CONFIGS, GOLDEN
from PIL import Image
from target_caches import CODE_MANIFEST, FEATURE_MANIFEST

from beitv2_jax import config as config_lib
from beitv2_jax.convert.writing import write
from beitv2_jax.data.segmentation.histogram import count_classes
from beitv2_jax.data.segmentation.sources import open_label_maps
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.runners import stages
from beitv2_jax.tasks import finetune, initial, inputs
from beitv2_jax.tasks.common import normalized

BACKBONE = {"patch_size": 3, "width": 10, "depth": 2, "num_heads": 2, "mlp_dim": 31, "stem": "linear"}
"""Sizes of `drawn_weights`, whose images have 9 pixels."""
HEADS = {"layer_scale_init": 0.1, "qkv_bias": "qv", "norm_eps": 1e-6}


def load(name, **values):
    config = config_lib.load(f"{CONFIGS / name}.py")
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def stored(tmp_path, kind, layout="run", **sizes):
    path = str(tmp_path / (kind if layout != "official" else f"{kind}.npz"))
    write(drawn_weights(kind, **sizes), path, layout)
    return path


def taken(config):
    """Return what `completed` has changed, without the number of classes, which no data are here for."""
    done = initial.completed(config, "", tolerant=True)
    changed = config_lib.changed(config_lib.from_json(config_lib.to_json(config)), done)
    return {key: new for key, _, new in changed}


def expected(config, **values):
    flat = config_lib.flatten(config)
    values = {key.replace("__", "."): value for key, value in values.items()}
    return {key: value for key, value in values.items() if flat[key] != value}


def model(**values):
    return {f"model__{name}": value for name, value in {**BACKBONE, **HEADS, **values}.items()}


@pytest.mark.parametrize(
    "kind, layout, position, found",
    [
        ("mim", "run", "relative_shared", {}),
        ("mim", "official", "relative_shared", {}),
        ("classifier", "run", "relative", {"model__pooling": "mean"}),
        ("classifier", "huggingface", "absolute", {"model__position": "absolute", "model__pooling": "cls"}),
        ("segmenter", "run", "relative", {}),
        ("vqkd", "run", "absolute", {"model__position": "absolute", "normalization": "half"}),
    ],
)
def test_fine_tuning_takes_the_network_of_any_weights(kind, layout, position, found, tmp_path):
    config = load("finetune", init_from=stored(tmp_path, kind, layout, position=position))
    assert taken(config) == expected(config, views__image_size=9, **{**model(), **found})


def test_segmentation_takes_the_network_and_keeps_its_crops(tmp_path):
    config = load("segment", init_from=stored(tmp_path, "mim", position="relative_shared"))
    # layers at a third, half, two thirds and all of two blocks; 171 patches of 3 pixels are nearest to 512
    head = {"model__out_layers": [1, 1, 1, 2], "model__channels": 10}
    assert taken(config) == expected(config, views__image_size=513, **model(), **head)
    config = load("segment", init_from=stored(tmp_path, "segmenter", position="relative"))
    head = {"model__out_layers": [1, 1, 1, 2], "model__channels": 13, "model__aux_channels": 11}
    assert taken(config) == expected(config, views__image_size=513, **model(), **head)


def test_pre_training_takes_the_network_and_hides_the_published_fraction(tmp_path):
    config = load("mim", init_from=stored(tmp_path, "mim", position="relative"), tokenizer__run="nowhere")
    own = {"model__early_layer": 1, "model__head_depth": 2, "model__shared_head": False, "model__position": "relative"}
    # 75 / 196 of 9 patches, and 16 / 196 of them
    masking = {"masking__num_masked": 3, "masking__min_patches": 1}
    assert taken(config) == expected(config, views__image_size=9, **model(), **own, **masking)


def test_a_tokenizer_takes_encoder_decoder_and_codebook_of_a_tokenizer(tmp_path):
    config = load("vqkd", init_from=stored(tmp_path, "vqkd"), teacher__weights="nowhere")
    encoder = {f"model__encoder__{name}": value for name, value in BACKBONE.items()}
    decoder = {f"model__decoder__{name}": BACKBONE[name] for name in ("num_heads",)}
    decoder |= {"model__decoder__width": 6, "model__decoder__depth": 1, "model__decoder__mlp_dim": 31}
    sizes = {"views__image_size": 9, "model__codebook_size": 19, "model__code_dim": 4}
    assert taken(config) == expected(config, **encoder, **decoder, **sizes)


def test_what_is_given_stays(tmp_path):
    path = stored(tmp_path, "mim", position="relative_shared")
    config = load("finetune", init_from=path, model__width=768, views__image_size=12, normalization="half")
    found = taken(config)
    assert not {"model.width", "views.image_size", "normalization"} & found.keys()
    assert found["model.depth"] == 2


@pytest.mark.parametrize(
    "protocol, published",
    [
        ("ours", ("100 epochs", 1024)),
        ("dinov3", ("12500 steps", 1024)),
        ("capi", ("12500 steps", 1024)),
        ("ep", ("90 epochs", 4096)),
        ("beit", ("100 epochs", 1024)),
    ],
)
def test_a_protocol_of_the_probe_sets_what_was_published_unless_it_is_given(protocol, published):
    config = initial.completed(load("probe", probe__protocol=protocol), "")
    assert (config.probe.duration, config.probe.batch_size) == published
    config = initial.completed(load("probe", probe__protocol=protocol, probe__batch_size=64), "")
    assert (config.probe.duration, config.probe.batch_size) == (published[0], 64)


@pytest.mark.parametrize("kind", ["mim", "vqkd", "classifier", "segmenter"])
def test_a_probe_reads_the_early_layer_and_the_last(kind, tmp_path):
    found = taken(load("probe", backbone__run=stored(tmp_path, kind)))
    assert found == {"views.image_size": 9, "probe.layers": [1, 2]}


def test_pre_training_and_tokenize_take_what_the_tokenizer_sees(tmp_path):
    path = stored(tmp_path, "vqkd")
    masking = {"masking.num_masked": 3, "masking.min_patches": 1}
    sizes = {"views.image_size": 9, "model.patch_size": 3, "model.codebook_size": 19}
    assert taken(load("mim", tokenizer__run=path)) == sizes | masking
    assert taken(load("tokenize", tokenizer__run=path)) == {"views.image_size": 9}
    # a view of its own says nothing of the model's
    assert taken(load("mim", tokenizer__run=path, views__tokenizer_image_size=9)) == {"model.codebook_size": 19}


@pytest.mark.parametrize(
    "stage, key, target, section",
    [
        ("mim", "tokenizer__codes", CODE_MANIFEST, "model"),
        ("vqkd", "teacher__features", FEATURE_MANIFEST, "model.encoder"),
    ],
)
def test_stored_targets_bring_their_views(stage, key, target, section, tmp_path):
    manifest = {**target, "grid": [8, 8], "num_views": 3, "interpolation": "bilinear", "color_jitter": 0.3}
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 2, "unreadable": 0}))
    config = load(stage, **{key: str(tmp_path)})
    views = {"image_size": 32, "num_views": 3, "interpolation": "bilinear", "min_scale": 0.2, "color_jitter": 0.3}
    found = {f"views.{name}": value for name, value in views.items()} | {"seed": 11, f"{section}.patch_size": 4}
    if stage == "mim":
        # 75 / 196 and 16 / 196 of 64 patches
        found |= {"model.codebook_size": 13, "masking.num_masked": 24, "masking.min_patches": 5}
    declared = config_lib.flatten(config)
    assert taken(config) == {key: value for key, value in found.items() if declared[key] != value}


def test_what_a_run_has_decided_is_not_decided_again(tmp_path):
    config = load("finetune", init_from="nowhere", data__source="folder:nowhere")
    former = config_lib.decided(config, {"model.width": 96, "optim.peak_lr": 1.0})
    done = initial.completed(config, "", former=former)
    assert (done.model.width, done.optim.peak_lr) == (96, 5e-4)


def test_what_is_not_there_is_an_error_unless_that_is_tolerated(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    config = load("finetune", init_from="nowhere", data__source="folder:nowhere2")
    with pytest.raises(UserError, match="nowhere"):
        initial.completed(config, "")
    done = initial.completed(config, "", tolerant=True)
    assert config_lib.changed(config, done) == []
    assert [line for line in caplog.messages if "init_from=nowhere decides nothing here" in line]
    assert [line for line in caplog.messages if "data.source=folder:nowhere2 decides nothing here" in line]


def test_where_values_come_from_is_said_in_one_line_each(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    path = stored(tmp_path, "vqkd", layer_scale=False)
    for name in ("cat", "dog", "owl"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
    config = load("finetune", init_from=path, data__source=f"folder:{tmp_path / 'photos'}", views__image_size=12)
    done = initial.completed(config, "")
    assert done.model.num_classes == 3
    lines = [line for line in caplog.messages if " sets " in line]
    assert [line.partition(" sets ")[0] for line in lines] == [
        f"init_from={path}, a tokenizer for 9 pixels,",
        f"data.source=folder:{tmp_path / 'photos'}, the data set,",
    ]
    assert "normalization=half" in lines[0] and "model.width=10" in lines[0]
    caplog.clear()
    inputs.initial_variables(done, "classifier", finetune.make_model(done, Compute()))
    resized = f"the positions of {path} are resized from a grid of 3 x 3 patches to 4 x 4"
    assert [line for line in caplog.messages if "positions" in line] == [resized]


def label_maps(root, numbers):
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for index, number in enumerate(numbers):
            Image.new("RGB", (20, 20)).save(root / "images" / split / f"{index}.png")
            Image.fromarray(np.full((20, 20), number, np.uint8)).save(root / "annotations" / split / f"{index}.png")
    return f"folder:{root}"


def test_the_classes_of_label_maps_are_counted_or_listed(tmp_path):
    source = label_maps(tmp_path / "a", (0, 3, 1, 255))
    # numbers 1 to 3 are classes 0 to 2, as in ADE20K
    assert initial.completed(load("segment", data__source=source), "").model.num_classes == 3
    images = open_label_maps(source, "train")
    assert count_classes(images, offset=0, ignored=(255,), mapping=()) == 4
    assert count_classes(images, offset=0, ignored=(), mapping=((0, 0), (1, 5), (3, 1))) == 6
    assert images.class_names == ()
    (tmp_path / "a" / "labels.txt").write_text("road\nsky\ncar\ntree\n")
    assert open_label_maps(source, "train").class_names == ("road", "sky", "car", "tree")
    assert initial.completed(load("segment", data__source=source), "").model.num_classes == 4
    (tmp_path / "a" / "labels.txt").unlink()
    (tmp_path / "a" / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall\n2\t0.1\t6046\t612\t1\tbuilding, edifice\n"
    )
    assert open_label_maps(source, "train").class_names == ("wall", "building, edifice")


@pytest.mark.parametrize("kind", ["mim", "vqkd"])
@pytest.mark.parametrize("stage", ["finetune", "segment", "probe"])
def test_weights_and_data_are_a_complete_command(stage, kind, tmp_path, monkeypatch):
    """Everything of a run but the training itself; the second start finds the same config and needs no weights."""
    path = stored(tmp_path, kind, position="relative_shared" if kind == "mim" else "absolute")
    if stage == "segment":
        source = label_maps(tmp_path / "data", (1, 2, 3, 1, 2, 3, 1, 2))
    else:
        for split in ("train", "validation"):
            for name in ("cat", "dog"):
                (tmp_path / "data" / split / name).mkdir(parents=True)
                for index in range(4):
                    Image.new("RGB", (20, 20)).save(tmp_path / "data" / split / name / f"{index}.png")
        source = f"folder:{tmp_path / 'data'}"
    built = []
    monkeypatch.setitem(stages.RUNNERS, stage, lambda task, config, workdir: built.append((task, config)) or {})
    config = load(stage, data__source=source, run__batch_size=8)
    config.update_from_flattened_dict({"backbone.run" if stage == "probe" else "init_from": path})
    if stage == "probe":
        config.probe.batch_size = 8
    else:
        config.run.duration, config.optim.warmup = "2 steps", "0 steps"
    if stage == "segment":
        config.views.image_size, config.evaluation.stride, config.evaluation.batch_size = 12, 8, 8
    workdir = str(tmp_path / "run")
    stages.run_stage(config, workdir)
    written = json.loads(pathlib.Path(workdir, "config.json").read_text())
    _, used = built[0]
    if stage == "probe":
        assert (written["views"]["image_size"], written["probe"]["layers"]) == (9, [1, 2])
    else:
        assert written["model"]["num_classes"] == used.model.num_classes == (3 if stage == "segment" else 2)
        assert (written["model"]["width"], written["views"]["image_size"]) == (10, 12 if stage == "segment" else 9)
    classes = json.loads(pathlib.Path(workdir, "inputs.json").read_text())["train"]["classes"]
    assert classes == ([] if stage == "segment" else ["cat", "dog"])
    again = json.loads(config_lib.to_json(initial.completed(config, "", former=config_lib.from_json(written))))
    assert again == written
    config.seed = 7
    with pytest.raises(UserError, match="a finished run of another config \\(seed: 0 -> 7\\)"):
        stages.run_stage(config, workdir)


def test_a_plain_vit_starts_fine_tuning(tmp_path):
    """The stored features are those of the library that the network comes from."""
    case = teacher_cases.read(GOLDEN / "teachers.npz")["hf_dinov2"]
    config = load("finetune", init_from=case.store(tmp_path), data__source="folder:nowhere", model__pooling="cls")
    config.views.image_size = 12  # of the stored features; its library resizes positions as ours does
    done = initial.completed(config, "", tolerant=True)
    assert (done.model.qkv_bias, done.model.position, done.views.image_size) == ("full", "absolute", 12)
    classifier = finetune.make_model(done, Compute())
    params = inputs.initial_variables(done, "classifier", classifier)["params"]

    def features(params, pixels):
        images = normalized(pixels.astype(np.float32), done.normalization)
        return classifier.apply({"params": params}, images, method=Classifier.features)

    tokens = jax.jit(features)(params, case.pixels)
    np.testing.assert_allclose(tokens[:, 1:], case.features, atol=1e-5 * np.abs(case.features).max())


def test_a_plain_vit_that_no_stage_can_train_is_named(tmp_path):
    case = teacher_cases.read(GOLDEN / "teachers.npz")["hf_clip_tokens"]
    config = load("finetune", init_from=case.store(tmp_path), data__source="folder:nowhere")
    done = initial.completed(config, "", tolerant=True)
    with pytest.raises(
        UserError, match="a plain vision transformer with activation='quick_gelu', pre_norm=True"
    ) as raised:
        inputs.initial_variables(done, "classifier", finetune.make_model(done, Compute()))
    assert "--config.teacher.weights=PATH" in raised.value.instead
