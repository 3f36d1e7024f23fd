"""The training step of every structure in the configs, traced without data; published parameter counts."""

import functools

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from beitv2_jax import config as config_lib
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.planning import abstract_task
from beitv2_jax.training import optim, sharding, state
from beitv2_jax.training.step import make_train_step
from tests.config.configs_test import FOLDER, presets

NUM_EXAMPLES = 1_281_167
TRAINED = [(name, arg) for name in ("teacher", "vqkd", "mim", "finetune") for arg in ("", *presets(name))]
TRAINED += [("regress", "smoke")]
TRAINED += [("segment", arg) for arg in ("", "smoke")]  # the others differ in rates and sizes alone
TRAINED += [("mim", "large,300ep"), ("mim", "base,300ep")]
CHAINED = [(name, arg) for name in ("pipeline", "quickstart") for arg in ("", *presets(name))]


def traced_step(config):
    """Return (state before, state after, metrics) of one step as shapes."""
    described = abstract_task.describe(config, NUM_EXAMPLES)
    task = described.task
    optimizer, schedule = optim.for_task(task, config.optim, warmup_steps=2, num_steps=10)
    mesh = sharding.make_mesh()
    before = state.abstract(task, optimizer, mesh, config.seed, keep_average=config.optim.weight_average > 0)
    step = make_train_step(
        task, optimizer, schedule=schedule, seed=config.seed, average_decay=config.optim.weight_average
    )
    after, metrics = jax.eval_shape(step, before, task.frozen, described.batch)
    return before, after, metrics


def stored(config):
    """Return the config without open ends and with its targets from a target cache, so that no network is loaded."""
    config = config.copy_and_resolve_references().unlock()
    if config.stage == "vqkd":
        config.teacher.update(features="somewhere", weights="")
    elif config.stage == "mim":
        config.tokenizer.update(codes="somewhere", run="")
    return abstract_task.complete(config)[0].unlock()


STRUCTURE = ("stage", "model", "views.image_size", "views.color_jitter", "augment", "masking", "kmeans_start")
"""Sections and keys of a config on which the program of its step depends; the others are rates and durations."""


def structure(config):
    flat = config_lib.flatten(config)
    return tuple(
        (key, value) for key, value in flat.items() if any(f"{key}.".startswith(f"{name}.") for name in STRUCTURE)
    )


def shorten(model):
    """Give every network of a model two blocks at most: the others are traced alike and take time."""
    for key, value in model.items():
        if isinstance(value, ConfigDict):
            shorten(value)
        elif key in ("depth", "early_layer", "head_depth"):
            model[key] = min(value, 2)
        elif key == "out_layers":
            model[key] = (1, 1, 2, 2)


def every_structure():
    """Return {name: config} with one config of each structure, networks with two blocks at most."""
    found, seen = {}, set()
    chained = [
        (f"{name}:{arg} {stage}", config)
        for name, arg in CHAINED
        for stage, config in config_lib.load(f"{FOLDER / name}.py:{arg}").stages.items()
        if config.stage in abstract_task.TRAINED_STAGES
    ]
    for name, config in [
        *((f"{name}:{arg}", config_lib.load(f"{FOLDER / name}.py:{arg}")) for name, arg in TRAINED),
        *chained,
    ]:
        config = stored(config)
        shorten(config.model)
        if structure(config) not in seen:
            seen.add(structure(config))
            found[name] = config
    return found


EVERY_STRUCTURE = every_structure()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.endswith(":") else pytest.mark.long) for name in EVERY_STRUCTURE]
)
def test_the_step_of_every_structure(name):
    before, after, metrics = traced_step(EVERY_STRUCTURE[name])
    shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert shapes(after) == shapes(before)
    assert {"loss", "grad_norm", "learning_rate", "nonfinite_steps"} <= set(metrics)
    assert all(value.shape == () for value in metrics.values())


def count_parameters(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "arg", "published"),
    [
        ("vqkd", "", 108_829_216),
        ("vqkd", "decoder1", 94_655_008),
        ("mim", "", 106_143_056),
        ("mim", "large", 336_728_512),
        ("finetune", "", 86_530_984),
        ("finetune", "large1600", 304_430_568),
        ("finetune", "21kbase", 102_557_713),
        ("finetune", "21klarge", 325_792_593),
        ("segment", "", 163_080_812),
        ("segment", "large1600", 440_398_636),
    ],
)
def test_published_parameter_counts(name, arg, published):
    task = abstract_task.describe(stored(config_lib.load(f"{FOLDER / name}.py:{arg}")), NUM_EXAMPLES).task
    assert count_parameters(jax.eval_shape(task.init, jax.random.key(0))["params"]) == published


def test_without_aggregation_the_model_is_beit_v1():
    config = config_lib.load(f"{FOLDER / 'mim'}.py")
    model = MaskedImageModel.from_arguments({**config.model, "image_size": 224, "patch_aggregation": False})
    mask = jax.ShapeDtypeStruct((1, 196), jnp.bool_)
    shapes = jax.eval_shape(
        functools.partial(model.init, num_masked=75), jax.random.key(0), jnp.zeros((1, 224, 224, 3)), mask
    )
    assert count_parameters(shapes["params"]) == 91_965_776
