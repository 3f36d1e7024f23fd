"""The quantizers that are for comparison, from training to use: every stage that takes a tokenizer takes theirs."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from convert_states import drawn_weights
from paths import ROOT
from testing import write_dark_and_light

import beitv2_jax
from beitv2_jax import config as config_lib
from beitv2_jax import evaluate
from beitv2_jax.convert.__main__ import main as convert
from beitv2_jax.convert.runs import read_run
from beitv2_jax.convert.writing import write
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.runners import stages

pytestmark = pytest.mark.long
CODES = 24
MODELS = {
    "fsq": {"quantizer": "fsq", "fsq_levels": (4, 3, 2), "codebook_size": CODES, "code_dim": 3},
    "simvq": {"quantizer": "simvq", "codebook_size": CODES, "code_dim": 5},
    "rotation": {"quantizer_gradient": "rotation", "codebook_size": CODES, "code_dim": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixteen images for training, six for evaluation, and the weights of a teacher."""
    root = tmp_path_factory.mktemp("quantizers")
    write_dark_and_light(root / "images", train=8, validation=3)
    write(drawn_weights("classifier"), str(root / "teacher"), "run")
    return root


def stage(folder, name, **changes):
    config = config_lib.load(f"{ROOT / 'configs' / name}.py:smoke").unlock()
    config.data.source = f"folder:{folder / 'images'}"
    config.update_from_flattened_dict(changes)
    return config.lock()


def training(folder, name):
    model = {f"model.{key}": value for key, value in MODELS[name].items()}
    given = {"views.image_size": 9, "model.encoder.patch_size": 3, "teacher.weights": str(folder / "teacher")}
    return stage(folder, "vqkd", **given, **model, **{"run.batch_size": 8})


@pytest.fixture(scope="module", params=MODELS)
def trained(folder, request):
    workdir = str(folder / request.param)
    summary = stages.run_stage(training(folder, request.param), workdir)
    return request.param, workdir, summary["metrics"]


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(folder, trained, tmp_path):
    name, workdir, metrics = trained
    assert metrics["codebook_tokens"] == 2 * 8 * 9 and 0 < metrics["codebook_usage"] <= 1
    again = str(tmp_path / "again")
    shutil.copytree(workdir, again)
    shutil.rmtree(os.path.join(again, "checkpoints", "4"))
    os.remove(os.path.join(again, "summary.json"))
    stages.run_stage(training(folder, name), again)
    expected, found = read_run(workdir), read_run(again)
    assert found.step == 4
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.model_state, expected.model_state)


def test_evaluation_export_and_the_python_api_take_it(folder, trained, tmp_path, capsys):
    name, workdir, metrics = trained
    data = f"folder:{folder / 'images'}"
    teacher = f"--teacher={folder / 'teacher'}"
    assert evaluate.main([workdir, data, teacher, f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    for metric in ("reconstruction_loss", "codebook_usage", "codebook_perplexity"):
        assert found[metric] == pytest.approx(metrics[f"eval/{metric}"], rel=1e-4), metric
    tokenizer = beitv2_jax.load_tokenizer(workdir)
    paths = sorted((folder / "images" / "validation").rglob("*.png"))
    ids = tokenizer.encode(paths)
    assert tokenizer.codebook.shape == (CODES, MODELS[name]["code_dim"]) and tokenizer.decode(ids).shape[:3] == (
        6,
        3,
        3,
    )
    codes = tokenizer.codebook[ids].reshape(6, 9, -1)
    model = VQKD.from_arguments(tokenizer.weights.arguments)
    decoded = model.apply(tokenizer.weights.variables, codes, method=VQKD.decode)
    np.testing.assert_allclose(tokenizer.decode(ids).reshape(decoded.shape), decoded, rtol=1e-4, atol=1e-4)
    for layout in ("run", "stablehlo"):
        assert convert([workdir, str(tmp_path / layout), f"--layout={layout}"]) == 0
    np.testing.assert_array_equal(beitv2_jax.load_tokenizer(tmp_path / "run").encode(paths), ids)
    official = convert([workdir, str(tmp_path / "w.safetensors"), "--layout=official"])
    assert official == (0 if name == "rotation" else 2)
    if name != "rotation":
        assert f"model.quantizer={name}, which the layout 'official' cannot hold" in capsys.readouterr().err


def test_later_stages_take_it(folder, trained, tmp_path):
    _, workdir, _ = trained
    tokenize = stage(folder, "tokenize", **{"tokenizer.run": workdir, "views.num_views": 1, "views.image_size": 9})
    stages.run_stage(tokenize, str(tmp_path / "codes"))
    reader = TargetReader(str(tmp_path / "codes" / "centre"), "validation")
    ids = beitv2_jax.load_tokenizer(workdir).encode(sorted((folder / "images" / "validation").rglob("*.png")))
    np.testing.assert_array_equal(ids.reshape(6, 9), np.stack([reader[number, 0] for number in range(6)]))
    for source in ({"tokenizer.run": workdir}, {"tokenizer.codes": str(tmp_path / "codes"), "views.num_views": 1}):
        sizes = {"views.image_size": 9, "model.patch_size": 3, "model.codebook_size": CODES}
        masking = {"masking.num_masked": 4, "masking.min_patches": 1, "run.batch_size": 8}
        config = stage(folder, "mim", **source, **sizes, **masking)
        place = str(tmp_path / ("live" if "tokenizer.run" in source else "stored"))
        assert np.isfinite(stages.run_stage(config, place)["metrics"]["loss"])
    # its encoder starts other models
    config = stage(
        folder,
        "finetune",
        **{"init_from": workdir, "views.image_size": 9, "model.patch_size": 3, "model.num_classes": 2},
    )
    config.unlock().model.update(width=64, depth=2, num_heads=2, mlp_dim=128, position="absolute", layer_scale_init=0.0)
    config.run.batch_size = 8
    assert np.isfinite(stages.run_stage(config.lock(), str(tmp_path / "finetune"))["metrics"]["loss"])
