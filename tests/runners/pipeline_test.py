"""What a pipeline does before its first stage: it looks for every path, and leaves out a probe without labels."""

import logging

import numpy as np
import pytest
from paths import CONFIGS
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.runners import stages


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(40):
        pixels = np.full((20, 30, 3), 6 * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def config(tmp_path, photographs):
    """The pipeline on photographs without classes, with a teacher that is never read here."""
    (tmp_path / "teacher.pth").write_text("")
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
