"""What a pipeline does before its first stage: paths, sizes of outside weights, and a probe without labels.

Sizes that stages of one pipeline must share are in `advice_test`.
"""

import logging

import numpy as np
import pytest
from convert_states import drawn_weights
from paths import CONFIGS, GOLDEN
from PIL import Image
from target_caches import CODE_MANIFEST, fill

from beitv2_jax import config as config_lib
from beitv2_jax.convert.teachers.load import read_teacher
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages
from beitv2_jax.tasks import fit


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(40):
        pixels = np.full((20, 30, 3), 6 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def config(tmp_path, photographs, monkeypatch):
    """The pipeline on photographs without classes, with a teacher that is not read here."""
    (tmp_path / "teacher.pth").write_text("")
    monkeypatch.setattr(fit, "read_teacher", lambda **options: None)
    config = config_lib.load(f"{CONFIGS / 'pipeline.py'}:mini")
    config.data.source = f"folder:{photographs}"
    config.teacher.weights = str(tmp_path / "teacher.pth")
    return config


@pytest.fixture
def ran(monkeypatch):
    """The names of the stages that a pipeline runs, of which none computes anything."""
    names = []

    def run_stage(config, workdir, **arguments):
        names.append(workdir.rpartition("/")[2])
        return {"stage": config.stage, "seconds": 1.0, "metrics": {}}

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(stages.report, "write_report", lambda workdirs, out: None)
    monkeypatch.setattr(stages.closing, "of_pipeline", lambda workdir: "")
    return names


def test_without_labels_the_probe_is_left_out_with_a_line(config, ran, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    summary = stages.run_pipeline(config, str(tmp_path / "run"))
    assert ran == list(summary["metrics"]) == ["extract", "vqkd", "tokenize", "mim"]
    (line,) = [message for message in caplog.messages if "left out" in message]
    assert "stage probe" in line and "folder:photographs@" in line


def test_with_classes_it_runs(config, ran, photographs, tmp_path):
    for number, image in enumerate(sorted(photographs.iterdir())):
        folder = photographs / ("dark" if number < 20 else "bright")
        folder.mkdir(exist_ok=True)
        image.rename(folder / image.name)
    stages.run_pipeline(config, str(tmp_path / "run"))
    assert ran == ["extract", "vqkd", "tokenize", "mim", "probe"]


@pytest.mark.parametrize("key", ["stages.extract.teacher.weights", "stages.mim.init_from", "stages.probe.backbone.run"])
def test_a_path_that_is_missing_is_found_before_the_data_are_opened(config, ran, tmp_path, key):
    config.data.source = "folder:/nowhere/images"
    with pytest.raises(UserError, match="/nowhere/images does not exist"):
        stages.run_pipeline(config, str(tmp_path / "run"))
    config.update_from_flattened_dict({key: "/nowhere/weights"})
    with pytest.raises(UserError, match=f"no file or folder /nowhere/weights, which {key.split('.', 2)[2]}") as caught:
        stages.run_pipeline(config, str(tmp_path / "run"))
    assert "--config.teacher.weights=" in caught.value.instead or f"--config.{key}=" in caught.value.instead
    assert ran == [] and not (tmp_path / "run").exists()


def refused(config, workdir, match):
    """Return the error of a start whose data do not exist, so that only what is checked before them can refuse it."""
    config.data.source = "folder:/nowhere/images"
    with pytest.raises(UserError, match=match) as caught:
        stages.run_stage(config, str(workdir))
    assert not workdir.exists()
    return caught.value


def test_an_outside_teacher_is_read_before_the_data_are_opened(config, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "read_teacher", read_teacher)
    with np.load(GOLDEN / "timm_vit.npz") as arrays:
        state = {name.removeprefix("sd/"): arrays[name] for name in arrays.files if name.startswith("sd/")}
    np.savez(tmp_path / "vit.npz", **state)
    config.teacher.weights = str(tmp_path / "vit.npz")
    error = refused(config, tmp_path / "run", "Stage extract of the pipeline: A width of 48 cannot be divided")
    assert "--config.teacher.num_heads=N" in error.instead


def test_what_outside_weights_decide_is_compared_with_the_other_stages(config, tmp_path):
    """Two blocks of a file are too few for the probe, and its patches of 8 pixels are not those of the tokenizer."""
    published = config_lib.load(f"{CONFIGS / 'pipeline.py'}")
    published.teacher.weights = config.teacher.weights
    sizes = {"width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20, "position": "relative_shared"}
    heads = {"codebook_size": 19, "early_layer": 1, "head_depth": 1, "shared_head": True}
    for patch_size, match in (
        (16, r"Stage probe of the pipeline: probe.layers=\(9, 12\) .* has 2 blocks"),
        (8, r"Stage mim of the pipeline: The targets .* grid = \[14, 14\], this run has \[28, 28\]"),
    ):
        arguments = {"image_size": 4 * patch_size, "patch_size": patch_size, **sizes, "layer_scale_init": 0.1, **heads}
        published.stages.mim.init_from = str(tmp_path / f"{patch_size}.npz")
        write(drawn_weights("mim", arguments=arguments), published.stages.mim.init_from, "official")
        refused(published, tmp_path / "run", match)


def test_weights_of_an_earlier_stage_and_images_of_the_probe(tmp_path):
    for key, value, match, flag in (
        (
            "stages.mim.init_from",
            "{workdir}/teacher",
            "layer_scale_init=0.0, the config",
            "mim.model.layer_scale_init=0.0",
        ),
        ("stages.probe.views.image_size", 60, "60 pixels cannot be divided", "probe.views.image_size=64"),
    ):
        config = config_lib.load(f"{CONFIGS / 'quickstart.py'}:smoke")
        config.update_from_flattened_dict({key: value})
        error = refused(config, tmp_path / "run", match)
        assert f"--config.stages.{flag}" in error.instead


def test_a_single_stage_compares_before_it_opens_the_data(tmp_path):
    codes = config_lib.load(f"{CONFIGS / 'mim.py'}:smoke")
    centre = {**CODE_MANIFEST, "grid": [6, 6], "part": "centre", "num_views": 1, "crop_fraction": 0.875}
    del centre["seed"], centre["min_scale"], centre["color_jitter"]
    for manifest in ({**CODE_MANIFEST, "grid": [6, 6]}, centre):
        fill(tmp_path / "codes" / manifest["part"], manifest, lambda *_: np.zeros(36, np.int32))
    codes.tokenizer.codes, codes.model.codebook_size = str(tmp_path / "codes"), 13
    codes.model.patch_size = 16
    refused(codes, tmp_path / "run", "made with image_size = 32, this run has 96")
    finetune = config_lib.load(f"{CONFIGS / 'finetune.py'}")
    arguments = {"image_size": 32, "patch_size": 16, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20}
    arguments |= {"position": "relative", "num_classes": 2, "pooling": "mean"}
    write(drawn_weights("classifier", arguments=arguments), str(tmp_path / "w.npz"), "official")
    finetune.init_from, finetune.model.depth = str(tmp_path / "w.npz"), 3
    refused(finetune, tmp_path / "run", "they have depth=2, the config depth=3")
