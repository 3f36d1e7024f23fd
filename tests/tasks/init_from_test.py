"""`init_from`: training starts at the given weights, drawn ones fill the rest, a checkpoint of the run goes first."""

import contextlib
import dataclasses
import importlib

import numpy as np
import pytest
import training_toy as toy
from convert_states import drawn_weights
from flax import traverse_util
from paths import ROOT

from beitv2_jax import config as config_lib
from beitv2_jax.convert.writing import write
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.tasks import finetune, inputs, mim, segment, tokenize, vqkd
from beitv2_jax.training import loop, optim, sharding, state

CONFIGS = ROOT / "configs"


def smoke(name):
    config = config_lib.load(f"{CONFIGS / name}.py:smoke").unlock()
    config.data.source = "embedded/tiny"
    return config


def small_vit(config, **changes):
    """Give the model the sizes of `convert_states.arguments_of`, at image size 9."""
    config.views.image_size = 9
    return dict(patch_size=3, width=10, num_heads=2, mlp_dim=31, depth=2, layer_scale_init=0.1) | changes


def optimizer():
    return optim.make_optimizer(
        schedule=lambda step: 0.02,
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=lambda step: 0.1,
        no_decay=lambda path: False,
        clip_norm=0.0,
    )


def started(task, **options):
    return state.create(task, optimizer(), sharding.make_mesh(2, 2, 2), seed=5, **options)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_a_pre_trained_run_starts_fine_tuning(tmp_path):
    source = drawn_weights("mim", position="relative_shared")
    write(source, str(tmp_path / "mim"), "run")
    config = smoke("teacher")
    config.model.update(small_vit(config, position="relative", num_classes=10))
    config.init_from = str(tmp_path / "mim")
    task = finetune.build(config)
    begun, scratch = started(task, keep_average=True), started(dataclasses.replace(task, initial={}))
    theirs = flat(source.variables["params"])
    for path, leaf in flat(begun.params).items():
        name = "backbone/rel_pos_bias/table" if path.endswith("/table") else path
        expected = theirs[name] if path.startswith("backbone/") else flat(scratch.params)[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
        assert leaf.sharding == flat(scratch.params)[path].sharding, path
        np.testing.assert_array_equal(flat(begun.averaged_params)[path], expected, err_msg=path)
    assert int(begun.step) == 0


def test_a_released_file_starts_pre_training(tmp_path):
    source = drawn_weights("mim", position="relative_shared")
    write(source, str(tmp_path / "mim.pth"), "official")
    config = smoke("mim")
    config.model.update(small_vit(config, position="relative_shared", codebook_size=23, early_layer=1))
    config.model.update(patch_aggregation=True, head_depth=2, shared_head=False)
    config.init_from = str(tmp_path / "mim.pth")
    model = mim.make_model(config, inputs.compute(config))
    initial = inputs.initial_variables(config, "mim", model)
    theirs, ours = flat(source.variables["params"]), flat(initial["params"])
    heads = {f"{head}/{leaf}" for head in ("lm_head", "aggregation_lm_head") for leaf in ("kernel", "bias")}
    assert theirs.keys() - ours.keys() == heads
    for path, array in ours.items():
        np.testing.assert_array_equal(array, theirs[path])
    config.init_from = ""
    assert inputs.initial_variables(config, "mim", model) == {}


@pytest.mark.long
def test_a_tokenizer_keeps_its_codebook(tmp_path):
    source = drawn_weights("vqkd")
    write(source, str(tmp_path / "vqkd"), "run")
    teacher = drawn_weights("classifier", head_width=3)
    write(teacher, str(tmp_path / "teacher"), "run")
    config = smoke("vqkd")
    assert config.kmeans_start
    sizes = small_vit(config)
    config.model.encoder.update(sizes)
    del sizes["patch_size"]
    config.model.decoder.update(sizes | {"width": 6, "depth": 1})
    config.model.decoder.num_heads = 2
    config.model.update(codebook_size=19, code_dim=4)
    config.teacher.weights = str(tmp_path / "teacher")
    assert vqkd.build(config).start_codebook is not None
    config.init_from = str(tmp_path / "vqkd")
    task = vqkd.build(config)
    assert task.start_codebook is None
    begun = started(task)
    theirs = source.variables["codebook"]["quantizer"]
    ours = begun.model_state["quantizer"]
    for name in ("codebook", "cluster_counts"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert not np.any(ours["window_counts"]) and not np.any(ours["last_window_counts"])
    np.testing.assert_array_equal(
        begun.params["encode_task"]["fc2"]["kernel"], source.variables["params"]["encode_task"]["fc2"]["kernel"]
    )


@pytest.mark.parametrize(
    "stage, key",
    [
        ("extract", "teacher.weights"),
        ("vqkd", "teacher.weights"),
        ("vqkd", "teacher.features"),
        ("vqkd", "init_from"),
        ("tokenize", "tokenizer.run"),
        ("mim", "tokenizer.run"),
        ("mim", "tokenizer.codes"),
        ("mim", "init_from"),
        ("finetune", "init_from"),
        ("segment", "init_from"),
        ("probe", "backbone.run"),
    ],
)
def test_paths_of_weights_are_checked_before_the_data_are_opened(stage, key, tmp_path, monkeypatch):
    def opened(*_):
        raise AssertionError("the data were opened")

    monkeypatch.setattr(inputs, "open_splits", opened)
    monkeypatch.setattr(segment, "open_label_maps", opened)
    config = config_lib.load(f"{CONFIGS / stage}.py:smoke").unlock()
    if (stage, key) == ("vqkd", "init_from"):
        write(drawn_weights("classifier", head_width=64), str(tmp_path / "teacher"), "run")
        config.teacher.weights = str(tmp_path / "teacher")
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        importlib.import_module(f"beitv2_jax.tasks.{stage}").build(config)


@pytest.mark.parametrize("used, trained, warned", [("imagenet", "half", 1), ("half", "half", 0)])
def test_another_normalization_than_that_of_the_weights_is_logged(used, trained, warned, tmp_path, caplog):
    config = smoke("teacher")
    config.model.update(small_vit(config, position="relative", num_classes=10))
    config.normalization, config.init_from = used, str(tmp_path / "mim")
    source = dataclasses.replace(drawn_weights("mim", position="relative"), normalization=trained)
    write(source, config.init_from, "run")
    inputs.initial_variables(config, "classifier", finetune.make_model(config, Compute()))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == warned
    assert all(f"write --config.normalization={trained}" in line for line in lines)


def test_a_file_given_as_a_run_is_to_be_converted(tmp_path):
    write(drawn_weights("vqkd"), str(tmp_path / "vqkd.pth"), "official")
    config = config_lib.load(f"{CONFIGS / 'tokenize'}.py:smoke").unlock()
    config.tokenizer.run = str(tmp_path / "vqkd.pth")
    with pytest.raises(UserError, match=r"vqkd\.pth is not the directory of a run") as raised:
        tokenize.build(config)
    assert f"convert {tmp_path / 'vqkd.pth'} RUN" in raised.value.instead


def test_weights_of_another_network_are_refused(tmp_path):
    write(drawn_weights("mim", position="absolute"), str(tmp_path / "mim"), "run")
    config = smoke("teacher")
    config.model.update(small_vit(config, position="relative", num_classes=10))
    config.init_from = str(tmp_path / "mim")
    with pytest.raises(UserError, match="they have position='absolute', the config position='relative'"):
        finetune.build(config)
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        finetune.build(config)


@pytest.mark.long
def test_the_run_s_own_checkpoint_goes_before_init_from(tmp_path, caplog):
    fresh = toy.make_task()
    kernel = np.full_like(started(fresh).params["fc1"]["kernel"], 0.25)
    initial = {"params": {"fc1": {"kernel": kernel}}}
    caplog.set_level("INFO", logger="absl")
    for stop_at, ends, chosen in (
        (3, pytest.raises(KeyboardInterrupt), "starting at step 0 from init_from"),
        (-1, contextlib.nullcontext(), "continuing from the checkpoint"),
    ):
        config = toy.config()
        config.run.duration = "4 steps"
        config.run.checkpoint_every = "2 steps"
        config.optim.warmup = "1 step"
        caplog.clear()
        with ends:
            loop.train(dataclasses.replace(toy.make_task(stop_at=stop_at), initial=initial), config, tmp_path)
        assert [line for line in caplog.messages if chosen in line], caplog.messages
    caplog.clear()
    config = toy.config()
    config.run.duration = "2 steps"
    config.optim.warmup = "1 step"
    loop.train(fresh, config, tmp_path / "scratch")
    assert any("starting at step 0 from scratch" in line for line in caplog.messages)
