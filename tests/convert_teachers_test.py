"""Loading a teacher by path: a timm-format file or a finetune run, and errors that say what to change."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from testing import quick_jit

from beitv2_jax.convert.teachers import load_teacher
from beitv2_jax.errors import UserError
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize

GOLDEN = Path(__file__).parent / "golden" / "timm_vit.npz"
MODEL = dict(
    patch_size=2, width=10, depth=2, num_heads=5, mlp_dim=7, num_classes=3, position="absolute", drop_path_rate=0.2
)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit_golden.npz"
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        np.savez(path, **{key.removeprefix("sd/"): arrays[key] for key in arrays.files if key.startswith("sd/")})
    return path


@pytest.fixture(scope="module")
def finetune_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "teacher"
    workdir.mkdir()
    config = {"stage": "finetune", "views": {"image_size": 6}, "normalization": "imagenet", "model": MODEL}
    (workdir / "config.json").write_text(json.dumps(config))
    params = quick_jit(Classifier(image_size=6, **MODEL).init)(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))["params"]
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    manager.save(17, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    manager.wait_until_finished()
    manager.close()
    return workdir, params


def test_a_timm_file_gives_timm_features(timm_file):
    teacher, params = load_teacher(str(timm_file), image_size=32, num_heads=3, normalization="half")
    assert (teacher.name, teacher.grid, teacher.width) == ("vit_golden", (4, 4), 48)
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        images, tokens = arrays["in/image"], arrays["out/tokens"]
    features = jax.jit(teacher.features)(params, images)
    np.testing.assert_allclose(features, tokens[:, 1:], atol=1e-5 * np.abs(tokens).max())
    assert (
        np.abs(
            features - jax.jit(load_teacher(str(timm_file), image_size=32, num_heads=4)[0].features)(params, images)
        ).max()
        > 0.01
    )


def test_the_hash_follows_the_weights(timm_file, tmp_path):
    teacher, _ = load_teacher(str(timm_file), image_size=32, num_heads=3)
    with np.load(timm_file) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    np.savez(tmp_path / "copy.npz", **changed)
    assert load_teacher(str(tmp_path / "copy.npz"), image_size=32, num_heads=3)[0].weights_hash == teacher.weights_hash
    changed["norm.bias"] = changed["norm.bias"] + 1e-3
    np.savez(tmp_path / "copy.npz", **changed)
    assert load_teacher(str(tmp_path / "copy.npz"), image_size=32, num_heads=3)[0].weights_hash != teacher.weights_hash


def test_a_finetune_run_is_a_teacher_with_its_own_normalization(finetune_run):
    workdir, params = finetune_run
    teacher, loaded = load_teacher(str(workdir), image_size=6, normalization="clip")
    assert (teacher.name, teacher.grid, teacher.normalization) == ("teacher@17", (3, 3), "imagenet")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    images = normalize(pixels, *NORMALIZATIONS["imagenet"])
    forward = functools.partial(Classifier(image_size=6, **MODEL).apply, method=Classifier.features)
    tokens = quick_jit(forward)({"params": params}, images)
    np.testing.assert_allclose(quick_jit(teacher.features)(loaded, pixels), tokens[:, 1:], atol=1e-6)


def test_errors_say_what_to_change(timm_file, finetune_run, tmp_path):
    with pytest.raises(UserError, match="no teacher weights"):
        load_teacher(str(tmp_path / "absent.npz"), image_size=32)
    with pytest.raises(UserError, match=r"views\.image_size=32"):
        load_teacher(str(timm_file), image_size=48, num_heads=3)
    with pytest.raises(UserError, match="num_heads"):
        load_teacher(str(timm_file), image_size=32)
    with pytest.raises(UserError, match="halve"):
        load_teacher(str(timm_file), image_size=32, num_heads=3, normalization="halve")
    with pytest.raises(UserError, match=r"views\.image_size=6"):
        load_teacher(str(finetune_run[0]), image_size=8)
    (tmp_path / "config.json").write_text(json.dumps({"stage": "mim"}))
    with pytest.raises(UserError, match="complete checkpoint"):
        load_teacher(str(tmp_path), image_size=6)


def test_a_run_of_another_stage_is_refused(finetune_run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(finetune_run[0] / "checkpoints")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "mim"}))
    with pytest.raises(UserError, match="'mim'"):
        load_teacher(str(tmp_path), image_size=6)
