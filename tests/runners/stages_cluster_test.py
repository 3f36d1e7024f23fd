"""The cluster stage on a small folder of images: what it makes, and that every later stage takes it."""

import json
import os

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
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.convert.writing import write
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.errors import UserError
from beitv2_jax.planning import abstract_task
from beitv2_jax.runners import stages
from beitv2_jax.tasks import cluster, initial, mim
from beitv2_jax.tasks.tokenize import load_tokenizer

CODES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images in two classes for training, six for evaluation, and the weights of a teacher."""
    root = tmp_path_factory.mktemp("cluster")
    write_dark_and_light(root / "images", train=6, validation=3)
    write(drawn_weights("classifier"), str(root / "teacher"), "run")
    return root


def stage(folder, name, **changes):
    config = config_lib.load(f"{ROOT / 'configs' / name}.py:smoke").unlock()
    config.data.source = f"folder:{folder / 'images'}"
    config.update_from_flattened_dict({"views.num_views": 2, "views.image_size": 9, **changes})
    return config.lock()


@pytest.fixture(scope="module")
def features(folder):
    given = {"teacher.weights": str(folder / "teacher"), "teacher.tokenizer_patch_size": 3, "output.dtype": "float32"}
    workdir = str(folder / "extract")
    stages.run_stage(stage(folder, "extract", **given), workdir)
    return workdir


def clustering(folder, features, **changes):
    """Return the config of the stage; image size, views and seed are not set, so they are those of the features."""
    config = config_lib.load(f"{ROOT / 'configs' / 'cluster.py'}").unlock()
    config.data.source, config.data.num_threads = f"folder:{folder / 'images'}", 2
    given = {"teacher.features": features, "model.codebook_size": CODES, "clustering.iterations": 5, **changes}
    config.update_from_flattened_dict(given)
    return config.lock()


@pytest.fixture(scope="module")
def made(folder, features):
    workdir = str(folder / "tokenizer")
    summary = stages.run_stage(clustering(folder, features), workdir)
    return workdir, summary["metrics"]


@pytest.fixture(scope="module")
def answers(folder):
    """Pixels of some images, and the features that the teacher itself has for them."""
    pixels = np.float32(np.random.default_rng(1).integers(0, 256, (5, 9, 9, 3)))
    teacher, params = load_teacher(str(folder / "teacher"), image_size=9)
    return pixels, np.asarray(jax.jit(teacher.features)(params, pixels), np.float64)


def all_features(features, part="views", split="train"):
    reader = TargetReader(os.path.join(features, part), split)
    return np.stack([reader[number, view] for number in range(len(reader)) for view in range(reader.num_views)])


def numpy_ids(model_state, features):
    """Return the ids of features by NumPy in float64."""
    centred = features.astype(np.float64) - model_state["mean"]
    return np.argmax(
        centred / np.linalg.norm(centred, axis=-1, keepdims=True) @ model_state["quantizer"]["codebook"].T, -1
    )


def test_the_saved_run_gives_the_ids_of_numpy(answers, features, made):
    workdir, metrics = made
    tokenizer, variables = load_tokenizer(workdir, 9, "float32")
    tokens = all_features(features)
    assert metrics["tokens"] == 12 * 2 * 9
    codebook = variables["codebook"]
    np.testing.assert_allclose(
        codebook["mean"], tokens.reshape(-1, tokens.shape[-1]).mean(axis=0), rtol=1e-5, atol=1e-6
    )
    pixels, live = answers
    expected = numpy_ids(codebook, live)
    np.testing.assert_array_equal(jax.jit(tokenizer.encode)(variables, pixels), expected)
    assert len(np.unique(expected)) > 3
    # what the stage says of the eval split
    held_out = all_features(features, "centre", "validation")
    ids = numpy_ids(codebook, held_out)
    counts = np.bincount(ids.reshape(-1), minlength=CODES)
    shares = counts[counts > 0] / counts.sum()
    assert metrics["eval/codebook_usage"] == pytest.approx(np.mean(counts > 0))
    assert metrics["eval/codebook_perplexity"] == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-5)
    # the features of a code are the mean direction of its tokens
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    train_ids = numpy_ids(codebook, tokens)
    means = np.stack([unit[train_ids == code].mean(axis=0) for code in range(CODES)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(codebook["features"], means, atol=1e-5)
    cosine = np.sum(held_out * means[ids], axis=-1) / np.linalg.norm(held_out, axis=-1)
    assert metrics["eval/reconstruction_loss"] == pytest.approx(1 - cosine.mean(), abs=1e-5)


def test_the_same_seed_makes_the_same_tokenizer_and_less_tokens_another(folder, features, made, tmp_path):
    workdir, _ = made
    stages.run_stage(clustering(folder, features), str(tmp_path / "again"))
    first, again = (load_tokenizer(str(path), 9, "float32")[0].weights_hash for path in (workdir, tmp_path / "again"))
    assert first == again
    reader = TargetReader(os.path.join(features, "views"), "train")
    drawn = cluster.drawn_tokens(reader, 2, 50, seed=0)
    assert len(drawn) == 50 // 9 and all(len(view.patches) == 9 for view in drawn)
    assert drawn != cluster.drawn_tokens(reader, 2, 50, seed=1)


@pytest.mark.long
def test_components_keep_what_they_keep(folder, features, answers, tmp_path):
    workdir = str(tmp_path / "w")
    stages.run_stage(clustering(folder, features, **{"clustering.components": 3}), workdir)
    tokenizer, variables = load_tokenizer(workdir, 9, "float32")
    codebook = variables["codebook"]
    assert codebook["quantizer"]["codebook"].shape == (CODES, 3)
    pixels, live = answers
    projected = (live - codebook["mean"]) @ codebook["projection"]
    cosine = projected @ codebook["quantizer"]["codebook"].T / np.linalg.norm(projected, axis=-1, keepdims=True)
    np.testing.assert_array_equal(jax.jit(tokenizer.encode)(variables, pixels), cosine.argmax(axis=-1))


@pytest.mark.long
def test_later_stages_take_it(folder, made, tmp_path):
    workdir, _ = made
    tokenize = stage(folder, "tokenize", **{"tokenizer.run": workdir, "views.num_views": 1})
    stages.run_stage(tokenize, str(tmp_path / "codes"))
    reader = TargetReader(str(tmp_path / "codes" / "centre"), "validation")
    paths = sorted((folder / "images" / "validation").rglob("*.png"))
    mine = beitv2_jax.load_tokenizer(workdir)
    ids = mine.encode(paths)
    np.testing.assert_array_equal(ids.reshape(6, 9), np.stack([reader[number, 0] for number in range(6)]))
    assert mine.codebook.shape[0] == CODES and mine.decode(ids).shape == (6, 3, 3, mine.decode(ids).shape[-1])


def masked_model(folder, tokenizer):
    """Return the config of a MIM stage with a live tokenizer; image size, patches and codes follow from it."""
    config = config_lib.load(f"{ROOT / 'configs' / 'mim.py'}").unlock()
    config.data.source, config.data.num_threads = f"folder:{folder / 'images'}", 2
    config.tokenizer.run = tokenizer
    config.model.update(width=16, depth=2, num_heads=2, mlp_dim=32, early_layer=1)
    config.run.update(batch_size=8, duration="2 steps", checkpoint_every="2 steps", eval_every="2 steps")
    config.optim.warmup, config.efficiency.dtype = "1 step", "float32"
    return config.lock()


@pytest.mark.long
def test_a_masked_model_learns_its_codes_in_the_step(folder, made):
    config = initial.completed(masked_model(folder, made[0]), "")
    assert (config.views.image_size, config.model.patch_size, config.model.codebook_size) == (9, 3, CODES)
    task = mim.build(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    batch = next(iter(task.eval_batches(0, 1)))
    batch.pop("faults")
    counts = jax.jit(task.evaluate)(params, {}, task.frozen, batch)["counts"]
    tokenizer, variables = load_tokenizer(made[0], 9, "float32")
    hidden = np.asarray(jax.jit(tokenizer.encode)(variables, batch["images"]))[
        batch["mask"] & (batch["weight"] > 0)[:, None]
    ]
    np.testing.assert_array_equal(counts, np.bincount(hidden, minlength=CODES))
    described = abstract_task.describe(abstract_task.complete(config)[0], 12).task.frozen["tokenizer"]
    assert jax.tree.map(np.shape, described) == jax.tree.map(np.shape, task.frozen["tokenizer"])


@pytest.mark.long
def test_a_masked_model_trains_on_it(folder, made, tmp_path):
    summary = stages.run_stage(masked_model(folder, made[0]), str(tmp_path / "mim"))
    assert np.isfinite(summary["metrics"]["loss"])


def test_evaluate_and_convert_take_it(folder, made, tmp_path, capsys):
    workdir, metrics = made
    data = f"folder:{folder / 'images'}"
    assert evaluate.main([workdir, data, f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    for name in ("reconstruction_loss", "codebook_usage", "codebook_perplexity"):
        assert found[name] == pytest.approx(metrics[f"eval/{name}"], rel=1e-4), name
    assert 0 <= found["nmi_class"] <= 1 and found["majority_class"] == 0.5 <= found["purity_class"]
    assert evaluate.main([workdir, data, "--teacher=x"]) == 2
    assert "Leave out --teacher" in capsys.readouterr().err
    assert convert([workdir, str(tmp_path / "copy")]) == 0
    image = folder / "images" / "train" / "dark" / "0.png"
    ids = [beitv2_jax.load_tokenizer(path).encode(image) for path in (workdir, tmp_path / "copy")]
    np.testing.assert_array_equal(*ids)


def test_what_it_cannot_be(folder, features, made, tmp_path):
    workdir, _ = made
    with pytest.raises(UserError, match="is trained at 9 pixels"):
        load_tokenizer(workdir, 12, "float32")
    with pytest.raises(UserError, match="not a backbone"):
        beitv2_jax.load_backbone(workdir)
    many = clustering(folder, features, **{"model.codebook_size": 500})
    with pytest.raises(UserError, match="holds 216 features"):
        stages.run_stage(many, str(tmp_path / "many"))
    assert not (tmp_path / "many").exists()
