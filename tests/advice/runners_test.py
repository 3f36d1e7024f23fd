"""Every error of starting stages: provoked, its advice followed, and then it is gone."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from convert_states import drawn_weights
from paths import ROOT
from PIL import Image
from target_caches import FEATURE_MANIFEST, fill
from user_errors import check_all_provoked, flag, provoked

from beitv2_jax import config as config_lib
from beitv2_jax.data.sources import open_source
from beitv2_jax.data.target_cache.encoding import FeatureEncoding
from beitv2_jax.evaluation.classes import imagenet_ids
from beitv2_jax.runners import (
    evaluate,
    feature_cache,
    features,
    parts,
    provenance,
    report,
    robustness,
    stages,
    targets,
    verify,
)


class Interrupted(Exception):
    """Stands for whatever ends a run."""

    @classmethod
    def raised(cls, *_, **__):
        raise cls


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return the function (config, workdir) that starts a stage, which ends after its first checkpoint."""

    def run(task, config, workdir):
        os.makedirs(os.path.join(workdir, "checkpoints", "2"), exist_ok=True)
        raise Interrupted

    def start(config, workdir, **arguments):
        with pytest.raises(Interrupted):
            stages.run_stage(config, str(workdir), **arguments)

    monkeypatch.setitem(stages.RUNNERS, "finetune", run)
    monkeypatch.setattr(stages.loop, "check_checkpoint", lambda task, config, workdir: None)  # it is an empty folder
    return start


def loaded(name="teacher"):
    return config_lib.load(f"{ROOT}/configs/{name}.py:smoke").unlock()


def test_a_workdir_of_another_config(start, tmp_path):
    config, workdir = loaded(), tmp_path / "run"
    start(config, workdir)
    rate, config.optim.peak_lr = config.optim.peak_lr, 0.123
    with provoked("or the former values; or add --allow_config_change") as caught:
        stages.run_stage(config, str(workdir))
    assert "--workdir=DIR with a folder that does not exist yet" in caught.value.instead
    start(config, tmp_path / "new")
    start(config, workdir, allow_config_change=True)
    with provoked("or the former values"):
        stages.run_stage(loaded(), str(workdir))
    config.optim.peak_lr = rate
    start(config, workdir, allow_config_change=True)
    start(loaded(), workdir)


def test_a_workdir_of_another_stage(start, tmp_path):
    config = loaded()
    start(config, tmp_path / "run")
    other = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**other, "stage": "mim"}))
    with provoked("Write --workdir=DIR with a folder that does not exist yet, or with that of a run of this stage"):
        stages.run_stage(config, str(tmp_path / "run"))
    for name in ("new", "former"):
        start(config, tmp_path / name)
    start(config, tmp_path / "former")
    with provoked("--workdir=") as caught:
        stages.run_stage(config, str(tmp_path))
    start(config, flag(caught.value.instead, "workdir"))


def test_a_damaged_config(start, tmp_path):
    start(loaded(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with provoked(f"Delete {tmp_path}/config.json and run the same command again"):
        stages.run_stage(loaded(), str(tmp_path))
    (tmp_path / "config.json").unlink()
    start(loaded(), tmp_path)


def test_a_workdir_that_cannot_be_written(start, tmp_path):
    (tmp_path / "file").touch()
    with provoked("Write --workdir=PATH of a folder that you may write to"):
        stages.run_stage(loaded(), str(tmp_path / "file" / "run"))
    start(loaded(), tmp_path / "run")


def test_other_data(start, tmp_path):
    start(loaded(), tmp_path / "run")
    kept = tmp_path / "run" / "inputs.json"
    former = kept.read_text()
    kept.write_text(former.replace('"digest": "', '"digest": "0'))
    with provoked("bring the former inputs back, or delete") as caught:
        stages.run_stage(loaded(), str(tmp_path / "run"))
    assert "add --allow_config_change" in caught.value.instead
    kept.write_text(former)
    start(loaded(), tmp_path / "run")
    kept.write_text(former.replace('"digest": "', '"digest": "0'))
    start(loaded(), tmp_path / "run", allow_config_change=True)
    kept.write_text(former.replace('"digest": "', '"digest": "0'))
    start(loaded(), tmp_path / "new")
    shutil.rmtree(re.search(r"delete (\S+) and", caught.value.instead)[1])
    start(loaded(), tmp_path / "run")


def test_a_network_that_is_not_there(tmp_path):
    config = loaded("mim")
    config.tokenizer.run = str(tmp_path / "missing")
    with provoked("Write --config.tokenizer.run=PATH of something that exists"):
        provenance.describe_networks(config)
    np.savez(tmp_path / "weights.npz", kernel=np.ones(2))
    config.tokenizer.run = str(tmp_path / "weights.npz")
    assert provenance.describe_networks(config)


def test_processes_with_other_data(monkeypatch):
    odd = [1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = lambda own: np.stack([own, own + odd[0]])  # noqa: E731
    monkeypatch.setattr(provenance.multihost_utils, "process_allgather", gather)
    with provoked("Give all machines the same files"):
        provenance.refuse_disagreement({"networks": {}})
    odd[0] = 0
    provenance.refuse_disagreement({"networks": {}})


def test_a_pipeline_whose_later_stages_are_outdated(tmp_path, monkeypatch):
    config = loaded("quickstart")
    for name in ("mim", "probe"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config_lib.to_json(config.stages[name]))
        (tmp_path / name / "summary.json").write_text(json.dumps({"stage": name, "metrics": {}}))
    shutil.rmtree(tmp_path / "mim")
    begun = []
    monkeypatch.setattr(
        stages, "run_stage", lambda stage, workdir, **_: begun.append(workdir) or {"seconds": 0.0, "metrics": {}}
    )
    monkeypatch.setattr(stages.report, "write_report", lambda *_: "")
    monkeypatch.setattr(stages.closing, "of_pipeline", lambda workdir: "")
    with provoked("and run the same command again") as caught:
        stages.run_pipeline(config, str(tmp_path))
    assert not begun
    shutil.rmtree(re.match(r"Delete (\S+) and", caught.value.instead)[1])
    stages.run_pipeline(config, str(tmp_path))
    assert len(begun) == len(config.stages)


def test_what_can_be_verified(tmp_path, monkeypatch):
    with provoked("--workdir of a stage of") as caught:
        stages.verify_stage(loaded(), str(tmp_path))

    class Module:
        build = staticmethod(lambda config: None)

    monkeypatch.setattr(stages.importlib, "import_module", lambda name: Module)
    monkeypatch.setattr(stages.verify, "verify", lambda *_: {"views": {}})
    for name in caught.value.instead.partition("a stage of ")[2].partition(", or of")[0].split(", "):
        assert stages.verify_stage(loaded("quickstart").stages[name], str(tmp_path)) == {"views": {}}
    assert set(stages.verify_stage(loaded("quickstart"), str(tmp_path))) == {"extract", "tokenize"}


def test_targets_that_differ_from_the_network(tmp_path):
    live = np.ones((1, 2, 3), np.float32)
    directory = str(tmp_path / "views")
    with provoked(f"Delete {directory} and run the stage again"):
        verify._refuse_below(verify._compare_features(live, -live, [(0, 0)], 0.9), directory)
    verify._refuse_below(verify._compare_features(live, live, [(0, 0)], 0.9), directory)


def test_features_that_do_not_fit_on_the_disk(tmp_path, monkeypatch):
    """Patch tokens of 100 images, 2 x 16 x 64 float16 each, are there twice while they are joined."""
    free, row = [2 * 100 * 2 * 16 * 64 * 2 - 1], {"patches": np.zeros((1, 2, 16, 64), np.float16)}
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    arguments = (tmp_path / "run" / "features" / "new", row, 100, "smaller images")
    with provoked("Write --workdir=DIR on a larger disk, smaller images, or"):
        feature_cache._refuse_small_disk(*arguments)
    assert not list(tmp_path.iterdir())
    free[0] += 1
    feature_cache._refuse_small_disk(*arguments)


def test_cached_features_that_are_damaged(tmp_path):
    for path in (tmp_path / "part.npz", tmp_path / "cls.npy"):
        path.write_bytes(b"PK")
        with provoked(f"Delete {tmp_path} and run the same command again"):
            feature_cache._read(path)
        path.unlink()
    feature_cache._write(tmp_path / "part.npz", {"labels": np.arange(3)})
    assert feature_cache._read(tmp_path / "part.npz")["labels"].tolist() == [0, 1, 2]


def test_targets_on_a_full_disk(tmp_path):
    with provoked("Free space or repair the folder. The same command continues"), targets.explained(str(tmp_path)):
        raise OSError(28, "No space left on device")
    with targets.explained(str(tmp_path)):
        fill(tmp_path / "views", FEATURE_MANIFEST, lambda example_id, view: np.ones((21, 5), np.float32))


def test_targets_that_the_stored_type_cannot_hold():
    def pack(dtype):
        encoding = FeatureEncoding(dtype, num_tokens=2, width=3)
        filler = targets.Filler(
            None,
            load=None,
            apply=None,
            encoding=encoding,
            split="train",
            batch_size=1,
            reading={},
            max_bad_fraction=0.0,
            label="extract views",
        )
        with np.errstate(over="ignore"):
            shrunk = encoding.shrink(np.full((1, 2, 3), 1e6, np.float32))
        return filler._packed({"example_ids": np.arange(1), "weight": np.ones(1)}, shrunk, 1)

    with provoked("Write --config.efficiency.dtype=float32, or a wider --config.output.dtype"):
        pack("float16")
    pack("float32")
    pack("bfloat16")


def test_a_masked_model_with_another_tokenizer(monkeypatch):
    monkeypatch.setattr(evaluate, "_pass", Interrupted.raised)
    masking = evaluate.Masking(num_masked=2, min_patches=1, max_patches=None, seed=0)

    def start(tokenizer):
        arguments = (masking, evaluate.Passing())
        model = drawn_weights("mim")
        return evaluate.evaluate_masked_model(model, range(1), tokenizer, *arguments, crop_fraction=1.0)

    with provoked("Write --tokenizer=PATH with the tokenizer that it was trained with"):
        start(drawn_weights("vqkd", grid=2))
    with pytest.raises(Interrupted):
        start(drawn_weights("vqkd"))


def test_features_of_own_teachers(tmp_path):
    def checked(shape):
        teacher = features._CheckedTeacher(lambda crops: np.zeros(shape), (2, 2))
        return teacher(features.Crops("views", 0, np.arange(3), np.zeros((3, 8, 8, 3), np.uint8)))

    with provoked("Return an array of the shape (crops, 2, 2, width)"):
        checked((3, 5, 4))
    assert checked((3, 2, 2, 4)).shape == (3, 2, 2, 4)
    with provoked('Pass config.load("configs/vqkd.py") with views.num_views of 1 or more'):
        features._checked(loaded("mim"), str(tmp_path))
    config = loaded("vqkd")
    config.views.num_views = 1
    features._checked(config, str(tmp_path))


def test_features_of_images_that_cannot_be_read(tmp_path):
    config = loaded("vqkd")
    config.views.num_views = 1
    (tmp_path / "1.png").write_bytes(b"no picture")
    with provoked("Copy them again, or write another config.data.source"):
        features._one_crop(config, open_source(f"folder:{tmp_path}", "train"))
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    assert features._one_crop(config, open_source(f"folder:{tmp_path}", "train")).images.shape[0] == 1


def test_results_that_are_there_already(tmp_path):
    (tmp_path / "out.csv").touch()
    with provoked("Write another --out, or delete the old one"):
        parts.Parts(tmp_path / "out.csv", {}, 3, 2, ".csv")
    parts.Parts(tmp_path / "other.csv", {}, 3, 2, ".csv")
    (tmp_path / "out.csv").unlink()
    parts.Parts(tmp_path / "out.csv", {}, 3, 2, ".csv")


def test_workdirs_of_a_report(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with provoked("with the --workdir of a stage or a pipeline"):
        report.read_runs(str(run))
    (run / "config.json").write_text('{"model_type": "beit"}')
    with provoked("with the --workdir that the run was given"):
        report.read_runs(str(run))
    (run / "config.json").write_text(config_lib.to_json(loaded()))
    assert report.read_runs(str(run))
    with provoked("Write every workdir once"):
        report._short_names([run, run])
    assert report._short_names([run]) == ["run"]


def test_images_of_benchmarks(tmp_path):
    """Of a validation image of ImageNet, with and without what its name and its folder say."""

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(path)
        return path

    put(tmp_path / "val" / "one.png")
    with provoked("Write folder:PATH with one folder for each class"):
        robustness.open_benchmark(f"folder:{tmp_path}/val")
    renamed = put(tmp_path / "val" / "n01440764" / "one.png")
    (tmp_path / "val" / "one.png").unlink()
    source = robustness.open_benchmark(f"folder:{tmp_path}/val")
    with provoked("of images such as ILSVRC2012_val_00000001.JPEG"):
        robustness._image_numbers(source)
    renamed.rename(renamed.with_name("ILSVRC2012_val_00000002.png"))
    source = robustness.open_benchmark(f"folder:{tmp_path}/val")
    assert robustness._image_numbers(source) == [2]
    for text in ("[1, 2]", "[[1]]"):
        (tmp_path / "real.json").write_text(text)
        with provoked("Write --imagenet_real=FILE with the path of real.json"):
            robustness.evaluate_real(None, source, str(tmp_path / "real.json"))
    with provoked("CORRUPTION/SEVERITY/CLASS"):
        robustness.open_corruptions(f"folder:{tmp_path}")
    for name, severity in robustness.CORRUPTIONS:
        put(tmp_path / "c" / name / str(severity) / ("n01440764" if name != "fog" else "n01443537") / "1.png")
    parts = robustness.open_corruptions(f"folder:{tmp_path}/c")
    names = imagenet_ids()
    with provoked("Unpack all archives of ImageNet-C again"):
        robustness.evaluate_corruptions(robustness.Classifier(None, names, None, 1.0), parts)
    assert robustness.matched(names, parts[0]).numbers.tolist() == [0]


def test_every_error_of_the_stages_was_provoked(request):
    check_all_provoked(request, "runners")
