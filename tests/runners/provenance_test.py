"""What a run is made from, compared between two starts: data, target caches and frozen networks."""

import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from target_caches import CODE_MANIFEST, FEATURE_MANIFEST

from beitv2_jax import config as config_lib
from beitv2_jax.convert.runs import write_run
from beitv2_jax.data import embedded
from beitv2_jax.errors import UserError
from beitv2_jax.runners import provenance, stages
from beitv2_jax.tasks.targets import PARTS


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture
def folder(tmp_path):
    """Two classes of four and two images."""
    for split, count in (("train", 4), ("validation", 2)):
        for name in ("cats", "dogs"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 40)).save(tmp_path / "images" / split / name / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Start a run on the folder that ends after its first checkpoint; return its config and a function to start it."""
    config = config_lib.load(f"{ROOT / 'configs/teacher.py'}:smoke").unlock()
    config.data.source, config.model.num_classes, config.run.batch_size = f"folder:{folder}", 2, 8

    def end(task, config, workdir):
        os.makedirs(os.path.join(workdir, "checkpoints", "2"), exist_ok=True)
        raise Interrupted

    monkeypatch.setitem(stages.RUNNERS, "finetune", end)
    monkeypatch.setattr(stages.loop, "check_checkpoint", lambda task, config, workdir: None)  # it is an empty folder

    def start(**arguments):
        with pytest.raises(Interrupted):
            stages.run_stage(config, str(tmp_path / "run"), **arguments)

    start()
    return config, start


def test_an_added_image_is_noticed_and_named(run, folder, tmp_path, caplog):
    config, start = run
    start()  # the same data
    shutil.copy(folder / "train/dogs/0.png", folder / "train/dogs/new.png")
    with pytest.raises(
        UserError, match=r"\(train.source: 'folder:images@.* -> .*, train.examples: 8 -> 9, train.sizes: "
    ):
        stages.run_stage(config, str(tmp_path / "run"))
    kept = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert kept["train"]["examples"] == 8 and kept["eval"]["examples"] == 4
    start(allow_config_change=True)
    assert "the inputs changed, and with them the result: " in caplog.text
    assert json.loads((tmp_path / "run" / "inputs.json").read_text())["train"]["examples"] == 9
    start()


def test_a_renamed_class_is_noticed(run, folder, tmp_path):
    config, _ = run
    for split in ("train", "validation"):
        (folder / split / "cats").rename(folder / split / "cows")
    with pytest.raises(UserError, match=r"train.classes\[0\]: 'cats' -> 'cows'"):
        stages.run_stage(config, str(tmp_path / "run"))


def test_data_that_moved_are_the_same_data(run, folder, tmp_path):
    config, _ = run
    found = provenance.describe_data(_sources(config))
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "images")
    config.data.source = f"folder:{tmp_path / 'elsewhere' / 'images'}"
    assert provenance.describe_data(_sources(config)) == found


def _sources(config):
    from beitv2_jax.tasks import inputs

    return inputs.open_sources(config)


def weights(value):
    return {"params": {"kernel": np.full((2, 3), value, np.float32)}, "model_state": {}}


def test_networks_are_known_by_their_weights_and_not_by_their_place(tmp_path):
    config = config_lib.load(f"{ROOT / 'configs/mim.py'}:smoke").unlock()
    found = []
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        write_run(str(tmp_path / name), {"stage": "vqkd"}, weights(value))
        np.savez(tmp_path / f"{name}.npz", **weights(value)["params"])
        for path in (tmp_path / name, tmp_path / f"{name}.npz"):
            config.tokenizer.run = str(path)
            found.append(provenance.describe_networks(config)["tokenizer.run"])
    run_a, file_a, run_b, file_b, run_c, file_c = found
    assert run_a == run_b != run_c and file_a == file_b != file_c
    config.tokenizer.run = str(tmp_path / "missing")
    assert provenance.describe_networks(config, there=True) == {}
    with pytest.raises(UserError, match=r"There is no file or folder .*missing, which tokenizer.run names"):
        provenance.describe_networks(config)


def test_a_finished_stage_is_refused_when_its_network_was_made_anew(tmp_path):
    """As in a pipeline whose vqkd stage is removed and trained again: tokenize is not 'finished before'."""
    config = config_lib.load(f"{ROOT / 'configs/tokenize.py'}").unlock()
    config.tokenizer.run = "{workdir}/vqkd"
    write_run(str(tmp_path / "vqkd"), {"stage": "vqkd"}, weights(1.0))
    codes = tmp_path / "tokenize"
    codes.mkdir()
    summary = {"stage": "tokenize", "metrics": {"views_per_example": config.views.num_views}}
    (codes / "summary.json").write_text(json.dumps(summary))
    (codes / "config.json").write_text(config_lib.to_json(config))
    resolved = config_lib.resolve(config, str(tmp_path))
    provenance.write_inputs(str(codes), {"networks": provenance.describe_networks(resolved)}, resolved)
    assert stages.run_stage(config, str(codes)) == summary
    shutil.rmtree(tmp_path / "vqkd")
    assert stages.run_stage(config, str(codes)) == summary  # what is not there cannot be compared
    write_run(str(tmp_path / "vqkd"), {"stage": "vqkd"}, weights(2.0))
    with pytest.raises(UserError, match=r"networks.tokenizer.run: 'step 0, weights .* -> 'step 0, weights ") as caught:
        stages.run_stage(config, str(codes), allow_config_change=True)
    assert f"delete {codes} and what later stages made from it." in caught.value.instead
    shutil.rmtree(tmp_path / "vqkd")
    write_run(str(tmp_path / "vqkd"), {"stage": "vqkd"}, weights(1.0))
    assert stages.run_stage(config, str(codes)) == summary


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A pipeline whose stages stand finished, each made from the one before, and the stages that a start runs."""
    config = config_lib.load(f"{ROOT / 'configs/quickstart.py'}:smoke")
    for name, stage in config.stages.items():
        folder = tmp_path / name
        if name in stages.TARGET_CACHE_STAGES:
            for part in PARTS:
                kind = FEATURE_MANIFEST if name == "extract" else {**CODE_MANIFEST, "codebook_size": 1 + len(name)}
                (folder / part).mkdir(parents=True)
                extra = {"part": part} | ({"crop_fraction": 0.9} if part == "centre" else {})
                manifest = {**kind, **extra, "schema_version": 2, "unreadable": 0}
                (folder / part / "manifest.json").write_text(json.dumps(manifest))
        else:
            write_run(str(folder), json.loads(config_lib.to_json(stage)), weights(1.0))
        (folder / "config.json").write_text(config_lib.to_json(stage))
        (folder / "summary.json").write_text(json.dumps({"stage": name, "metrics": {}}))
        resolved = config_lib.resolve(stage, str(tmp_path))
        provenance.write_inputs(str(folder), {"networks": provenance.describe_networks(resolved)}, resolved)
    begun = []

    def run_stage(stage, workdir, **_):
        begun.append(os.path.basename(workdir))
        return {"stage": stage.stage, "seconds": 0.0, "metrics": {}}

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(stages.report, "write_report", lambda *_: "")
    monkeypatch.setattr(stages.closing, "of_pipeline", lambda workdir: "")
    return config, begun


def outdated(config, workdir, **arguments):
    with pytest.raises(UserError, match="changed afterwards or is not finished any more") as caught:
        stages.run_pipeline(config, str(workdir), **arguments)
    listed = re.match("Delete (.*) and run the same command again", caught.value.instead)[1].split(", ")
    return [os.path.relpath(path, workdir) for path in listed]


def test_a_pipeline_refuses_at_its_start_what_was_made_from_an_earlier_stage_that_is_gone(pipeline, tmp_path):
    config, begun = pipeline
    everything = list(config.stages)
    stages.run_pipeline(config, str(tmp_path))
    assert begun == everything
    # a cache that was deleted to free space is made again from the same network
    shutil.rmtree(tmp_path / "extract")
    stages.run_pipeline(config, str(tmp_path))
    # a summary that was lost changes no weights
    (tmp_path / "vqkd" / "summary.json").unlink()
    stages.run_pipeline(config, str(tmp_path))
    del begun[:]
    shutil.rmtree(tmp_path / "vqkd")
    assert outdated(config, tmp_path) == ["tokenize", "mim", "probe"] and begun == []
    write_run(str(tmp_path / "vqkd"), json.loads(config_lib.to_json(config.stages.vqkd)), weights(2.0))
    (tmp_path / "vqkd" / "summary.json").write_text(json.dumps({"stage": "vqkd", "metrics": {}}))
    assert outdated(config, tmp_path, allow_config_change=True) == ["tokenize", "mim", "probe"] and begun == []
    shutil.rmtree(tmp_path / "vqkd" / "checkpoints")
    assert outdated(config, tmp_path) == ["tokenize", "mim", "probe"] and begun == []
    for name in ("tokenize", "mim", "probe"):
        shutil.rmtree(tmp_path / name)
    stages.run_pipeline(config, str(tmp_path))
    assert begun == everything


def test_an_interrupted_stage_of_a_pipeline_may_continue_with_another_network_if_that_is_allowed(pipeline, tmp_path):
    config, begun = pipeline
    shutil.rmtree(tmp_path / "mim")
    write_run(str(tmp_path / "mim"), json.loads(config_lib.to_json(config.stages.mim)), weights(3.0))
    shutil.rmtree(tmp_path / "probe")
    (tmp_path / "probe" / "features" / "train").mkdir(parents=True)
    (tmp_path / "probe" / "features" / "train" / "labels.npy").touch()
    (tmp_path / "probe" / "config.json").write_text(config_lib.to_json(config.stages.probe))
    inputs = {"networks": {"backbone.run": "step 9, weights 0"}}
    provenance.write_inputs(str(tmp_path / "probe"), inputs, config_lib.resolve(config.stages.probe, str(tmp_path)))
    assert outdated(config, tmp_path) == ["probe"]
    stages.run_pipeline(config, str(tmp_path), allow_config_change=True)
    assert begun == list(config.stages)


def test_an_image_with_other_contents_under_its_name_is_noticed(run, folder, tmp_path):
    config, start = run
    Image.effect_noise((40, 40), 50).convert("RGB").save(folder / "train/dogs/0.png")
    with pytest.raises(UserError, match=r"\(train.sizes: '\w+' -> '\w+'\)"):
        stages.run_stage(config, str(tmp_path / "run"))
    start(allow_config_change=True)


@pytest.mark.parametrize("odd", [None, 2])
def test_processes_that_found_different_inputs_refuse(monkeypatch, odd):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    gather = lambda own: np.stack([own + (index == odd) for index in range(3)])  # noqa: E731
    monkeypatch.setattr(provenance.multihost_utils, "process_allgather", gather)
    if odd is None:
        provenance.refuse_disagreement({"networks": {}})
        return
    with pytest.raises(UserError, match="that process 2 finds differ from those of process 0"):
        provenance.refuse_disagreement({"networks": {}})


def test_a_tfds_set_of_the_same_name_and_length_but_other_files_is_noticed(tmp_path):
    """As where data.data_dir names another copy, prepared from other images."""
    found = []
    directory = embedded.prepare("", "tiny")
    place = pathlib.Path(*directory.parts[-3:])  # data set, configuration and version
    for name, size in (("a", None), ("b", None), ("c", "12345")):
        config = {"source": "embedded/tiny", "train_split": "train", "eval_split": "validation"}
        shutil.copytree(directory, tmp_path / name / place)
        info = tmp_path / name / place / "dataset_info.json"
        if size:
            text = json.loads(info.read_text())
            for split in text["splits"]:
                split["numBytes"] = size
            info.write_text(json.dumps(text))
        data = config_lib.from_json({"data": {**config, "data_dir": str(tmp_path / name)}})
        found.append(provenance.describe_data(_sources(data)))
    assert found[0] == found[1]
    assert {key: value for key, value in found[2]["train"].items() if key != "digest"} == {
        key: value for key, value in found[0]["train"].items() if key != "digest"
    }
    assert found[2]["train"]["digest"] != found[0]["train"]["digest"] != ""
