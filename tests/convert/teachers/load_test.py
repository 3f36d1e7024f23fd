"""Loading a teacher: published networks, runs of this package, other grids, and errors."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import teacher_cases
from paths import GOLDEN
from testing import drawn_variables

from beitv2_jax.convert.positions import resize_position_embedding, resize_relative_table
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.convert.torch_files import writer
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.models.preprocess import NORMALIZATIONS, normalize, resize
from beitv2_jax.models.teachers import NormalisedViT, vit_tokens
from beitv2_jax.runtime.checksums import write_checksums

TIMM = GOLDEN / "timm_vit.npz"
CASES = teacher_cases.read(GOLDEN / "teachers.npz")
MODEL = dict(
    patch_size=2, width=10, depth=2, num_heads=5, mlp_dim=7, num_classes=3, position="absolute", drop_path_rate=0.2
)


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit_golden.npz"
    with np.load(TIMM, allow_pickle=False) as arrays:
        np.savez(path, **{key.removeprefix("sd/"): arrays[key] for key in arrays.files if key.startswith("sd/")})
    return path


def save_run(workdir, stage, image_size, model, params):
    workdir.mkdir()
    config = {"stage": stage, "views": {"image_size": image_size}, "normalization": "imagenet", "model": model}
    (workdir / "config.json").write_text(json.dumps(config))
    manager = ocp.CheckpointManager(workdir / "checkpoints")
    manager.save(17, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    manager.wait_until_finished()
    manager.close()
    write_checksums(workdir / "checkpoints" / "17")
    return workdir


@pytest.fixture(scope="module")
def finetune_run(tmp_path_factory):
    params = drawn_variables(Classifier.from_arguments({"image_size": 6, **MODEL}), jnp.zeros((1, 6, 6, 3)))["params"]
    workdir = save_run(tmp_path_factory.mktemp("runs") / "teacher", "finetune", 6, MODEL, params)
    return workdir, params


def pixels_of(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_every_family_gives_the_features_of_its_library(name, tmp_path):
    """Features of transformers, timm and open_clip, in float64; some on another grid than the weights."""
    assert CASES[name].error(tmp_path) < teacher_cases.TOLERANCE


def test_the_cases_detect_wrong_details(tmp_path):
    """Wrong options change the features by more than the tolerance."""
    wrong = {
        "hf_clip": {"activation": "gelu_tanh"},
        "hf_dinov2": {"position_resize": "antialias"},
        "hf_tips": {"position_resize": "antialias"},
    }
    for name, option in wrong.items():
        assert CASES[name].error(tmp_path, **option) > 1.5 * teacher_cases.TOLERANCE, name


def test_default_options_of_published_networks(tmp_path):
    used = {}
    names = ("openai_clip", "open_clip", "hf_clip", "hf_siglip", "dinov2", "hf_dinov2_giant_registers")
    for name in (*names, "hf_dinov3", "hf_tips", "timm_tips"):
        teacher, _ = CASES[name].load(tmp_path)
        choices = teacher.choices
        used[name] = tuple(choices[key] for key in ("normalization", "output", "activation", "position_resize"))
    assert used == {
        "openai_clip": ("clip", "projected", "quick_gelu", "offset"),
        "open_clip": ("clip", "projected", "gelu", "antialias"),
        "hf_clip": ("clip", "projected", "gelu", "bicubic"),
        "hf_siglip": ("half", "tokens", "gelu_tanh", "bicubic"),
        "dinov2": ("imagenet", "tokens", "gelu", "offset"),
        "hf_dinov2_giant_registers": ("imagenet", "tokens", "swiglu", "antialias"),
        "hf_dinov3": ("imagenet", "tokens", "gelu", "bicubic"),
        "hf_tips": ("unit", "tokens", "gelu", "bilinear"),
        "timm_tips": ("unit", "tokens", "gelu", "antialias"),
    }


def test_a_timm_file_gives_the_features_of_timm(timm_file):
    teacher, params = load_teacher(str(timm_file), image_size=32, num_heads=3, normalization="half")
    assert (teacher.name, teacher.grid, teacher.width) == ("vit_golden", (4, 4), 48)
    with np.load(TIMM, allow_pickle=False) as arrays:
        images, tokens = arrays["in/image"], arrays["out/tokens"]
    features = jax.jit(teacher.features)(params, images)
    np.testing.assert_allclose(features, tokens[:, 1:], atol=1e-5 * np.abs(tokens).max())
    other, params = load_teacher(str(timm_file), image_size=32, num_heads=4, normalization="half")
    assert np.abs(features - jax.jit(other.features)(params, images)).max() > 0.01


def test_the_teacher_of_a_training_checkpoint_is_taken_unless_another_is_chosen(timm_file, tmp_path, caplog):
    with np.load(timm_file) as arrays:
        state = {name: arrays[name] for name in arrays.files if not name.startswith("head.")}
    head = {"head.last_layer.weight_g": np.ones((3, 1), np.float32)}
    student = {f"module.backbone.{name}": array for name, array in state.items()}
    student["module.backbone.norm.bias"] = state["norm.bias"] + 1
    teacher = {f"backbone.{name}": array for name, array in state.items()} | head
    path = tmp_path / "checkpoint.pth.tar"
    writer.save(path, {"student": student, "teacher": teacher, "epoch": 100})
    caplog.set_level("INFO", logger="absl")
    options = {"image_size": 32, "num_heads": 3, "normalization": "half"}
    _, params = load_teacher(str(path), **options)
    np.testing.assert_array_equal(params["norm"]["bias"], state["norm.bias"])
    assert "state_dict=teacher.backbone: the file also has student" in caplog.text
    assert "not used: head.last_layer.weight_g" in caplog.text
    _, params = load_teacher(str(path), state_dict="student", **options)
    np.testing.assert_array_equal(params["norm"]["bias"], state["norm.bias"] + 1)


def test_the_normalization_beside_the_weights_is_used(timm_file, tmp_path):
    shutil.copy(timm_file, tmp_path / "vit.npz")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    teacher, _ = load_teacher(str(tmp_path / "vit.npz"), image_size=32, num_heads=3)
    assert teacher.normalization == teacher.choices["normalization"] == "half"


def test_clip_features_without_the_projection(tmp_path):
    case = CASES["openai_clip"]
    projected, params = case.load(tmp_path)
    teacher, without = case.load(tmp_path, output="tokens")
    assert (projected.width, teacher.width) == (5, 16)
    tokens = jax.jit(teacher.features)(without, case.pixels)
    np.testing.assert_allclose(tokens @ params["projection"]["kernel"], case.features, atol=1e-4)


def test_a_teacher_with_other_patches_gets_images_with_the_same_grid(tmp_path):
    """Patch 14 for a tokenizer of patch 16: 48-pixel views with 3 x 3 patches become 42-pixel images."""
    case = CASES["hf_dinov2_giant_registers"]
    views = pixels_of(48)
    teacher, params = case.load(tmp_path, image_size=48)
    assert (teacher.input_size, teacher.grid, teacher.network_grid) == (42, (3, 3), (3, 3))
    assert teacher.num_prefix_tokens == 5
    small, same = case.load(tmp_path)
    assert small.input_size == 42
    np.testing.assert_array_equal(params["backbone"]["pos_embed"], same["backbone"]["pos_embed"])
    tokens = jax.jit(small.tokens)(same, normalize(resize(views, 42), *NORMALIZATIONS["imagenet"]))
    features = jax.jit(teacher.features)(params, views)
    np.testing.assert_allclose(features, tokens[:, 5:], atol=1e-5 * np.abs(tokens).max())


def test_features_are_resampled_to_the_grid_of_the_tokenizer(tmp_path):
    """The network gets images of its trained size, 70 pixels, and its 5 x 5 features become 3 x 3."""
    case = CASES["hf_dinov2_giant_registers"]
    teacher, params = case.load(tmp_path, image_size=48, grid_match="resample_features")
    assert (teacher.input_size, teacher.network_grid, teacher.grid) == (70, (5, 5), (3, 3))
    np.testing.assert_array_equal(params["backbone"]["pos_embed"], case.state["embeddings.position_embeddings"])
    views = pixels_of(48)
    features = jax.jit(teacher.features)(params, views)
    assert features.shape == (2, 9, 16)
    tokens = jax.jit(teacher.tokens)(params, normalize(resize(views, 70), *NORMALIZATIONS["imagenet"]))[:, 5:]
    expected = jax.image.resize(tokens.reshape(2, 5, 5, 16), (2, 3, 3, 16), "cubic").reshape(2, 9, 16)
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())
    matched, params = case.load(tmp_path, image_size=48)
    assert np.abs(features - jax.jit(matched.features)(params, views)).max() > 0.01


def test_without_a_grid_the_teacher_s_patch_size_is_used(tmp_path):
    case = CASES["hf_dinov2_giant_registers"]
    teacher, _ = case.load(tmp_path, image_size=56, grid=None)
    assert (teacher.grid, teacher.input_size) == ((4, 4), 56)
    with pytest.raises(UserError, match=r"tokenizer_patch_size"):
        case.load(tmp_path, image_size=57, grid=None)


def test_position_embeddings_are_resized_as_asked():
    embedding = np.random.default_rng(0).normal(size=(1, 1 + 25, 3)).astype(np.float32)
    results = {
        method: resize_position_embedding(embedding, (3, 3), method=method)
        for method in ("bicubic", "offset", "antialias")
    }
    for method, result in results.items():
        np.testing.assert_array_equal(result[:, 0], embedding[:, 0], err_msg=method)
    # antialiasing preserves slopes away from the border
    ramp = np.broadcast_to(np.arange(16.0).reshape(16, 1, 1), (16, 16, 2)).reshape(1, 256, 2).astype(np.float32)
    resized = resize_position_embedding(ramp, (8, 8), method="antialias", num_prefix=0).reshape(8, 8, 2)
    np.testing.assert_allclose(resized[2:6, :, 0], np.broadcast_to(np.arange(4.5, 12, 2)[:, None], (4, 8)), atol=1e-5)
    assert np.abs(results["antialias"] - results["bicubic"]).max() > 0.01


def test_the_hash_depends_on_the_weights(timm_file, tmp_path):
    teacher, _ = load_teacher(str(timm_file), image_size=32, num_heads=3, normalization="half")
    with np.load(timm_file) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    np.savez(tmp_path / "copy.npz", **changed)
    assert (
        load_teacher(str(tmp_path / "copy.npz"), image_size=32, num_heads=3, normalization="half")[0].weights_hash
        == teacher.weights_hash
    )
    changed["norm.bias"] = changed["norm.bias"] + 1e-3
    np.savez(tmp_path / "copy.npz", **changed)
    assert (
        load_teacher(str(tmp_path / "copy.npz"), image_size=32, num_heads=3, normalization="half")[0].weights_hash
        != teacher.weights_hash
    )


def test_a_finetune_run_is_a_teacher_with_its_own_normalization(finetune_run):
    workdir, params = finetune_run
    teacher, loaded = load_teacher(str(workdir), image_size=6)
    with pytest.raises(UserError, match=r"normalization='clip'.*\n.*\n.*teacher\.normalization=imagenet"):
        load_teacher(str(workdir), image_size=6, normalization="clip")
    assert (teacher.name, teacher.grid, teacher.normalization) == ("teacher@17", (3, 3), "imagenet")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    images = normalize(pixels, *NORMALIZATIONS["imagenet"])
    forward = functools.partial(Classifier.from_arguments({"image_size": 6, **MODEL}).apply, method=Classifier.features)
    tokens = jax.jit(forward)({"params": params}, images)
    np.testing.assert_allclose(jax.jit(teacher.features)(loaded, pixels), tokens[:, 1:], atol=1e-6)


def test_positions_of_a_finetune_run_are_resized_to_another_image_size(finetune_run):
    workdir, params = finetune_run
    teacher, loaded = load_teacher(str(workdir), image_size=8)
    assert (teacher.grid, teacher.input_size) == ((4, 4), 8)
    expected = resize_position_embedding(params["backbone"]["pos_embed"], (4, 4))
    np.testing.assert_array_equal(loaded["backbone"]["pos_embed"], expected)
    assert jax.jit(teacher.features)(loaded, pixels_of(8)).shape == (2, 16, 10)


def test_a_mim_run_is_a_teacher_with_normalised_tokens(tmp_path):
    sizes = dict(patch_size=2, width=10, depth=2, num_heads=5, mlp_dim=7)
    model = dict(**sizes, codebook_size=3, early_layer=1, head_depth=1)
    variables = drawn_variables(
        MaskedImageModel.from_arguments({"image_size": 8, **model}),
        jnp.zeros((1, 8, 8, 3)),
        jnp.zeros((1, 16), bool),
        num_masked=5,
    )
    workdir = save_run(tmp_path / "mim", "mim", 8, model, variables["params"])
    teacher, params = load_teacher(str(workdir), image_size=8)
    assert set(params) == {"backbone", "norm"}
    arguments = dict(image_size=8, **sizes, position="relative_shared", layer_scale_init=0.1, mask_token=True)
    images = normalize(pixels_of(8), *NORMALIZATIONS["imagenet"])
    tokens = jax.jit(vit_tokens(NormalisedViT(Backbone(**arguments))))(
        {key: variables["params"][key] for key in params}, images
    )
    np.testing.assert_allclose(jax.jit(teacher.features)(params, pixels_of(8)), tokens[:, 1:], atol=1e-5)
    _, resized = load_teacher(str(workdir), image_size=10)
    table = variables["params"]["backbone"]["rel_pos_bias"]["table"]
    np.testing.assert_array_equal(resized["backbone"]["rel_pos_bias"]["table"], resize_relative_table(table, (5, 5)))


def test_errors_say_what_to_change(timm_file, finetune_run, tmp_path):
    with pytest.raises(UserError, match="no teacher weights"):
        load_teacher(str(tmp_path / "absent.npz"), image_size=32)
    with pytest.raises(UserError, match="num_heads"):
        load_teacher(str(timm_file), image_size=32)
    with pytest.raises(UserError, match=r"teacher\.normalization=imagenet \(DINO, DeiT\), half \(AugReg\)"):
        load_teacher(str(timm_file), image_size=32, num_heads=3)
    for key, value in (("normalization", "halve"), ("output", "token"), ("grid_match", "x"), ("position_resize", "y")):
        given = {"normalization": "half", key: value}
        with pytest.raises(UserError, match=rf"{key} '{value}'.*\n.*\n.*teacher\.{key}="):
            load_teacher(str(timm_file), image_size=32, num_heads=3, **given)
    with pytest.raises(UserError, match=r"teacher\.output=tokens"):
        load_teacher(str(finetune_run[0]), image_size=6, output="projected")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "mim"}))
    with pytest.raises(UserError, match="complete checkpoint"):
        load_teacher(str(tmp_path), image_size=6)


def test_a_run_of_another_stage_is_refused(finetune_run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(finetune_run[0] / "checkpoints")
    (tmp_path / "config.json").write_text(json.dumps({"stage": "vqkd"}))
    with pytest.raises(UserError, match="stage 'vqkd'"):
        load_teacher(str(tmp_path), image_size=6)
