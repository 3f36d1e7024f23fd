"""The full training step of every config and preset, traced without data or computation; exact parameter counts."""

import functools

import jax
import jax.numpy as jnp
import pytest
from without_data import FakeSource, no_data

from beitv2_jax import config as config_lib
from beitv2_jax.models.mim import MaskedImageModel
from beitv2_jax.tasks import finetune, inputs, mim, segment, vqkd
from beitv2_jax.training import optim, sharding, state
from beitv2_jax.training.step import make_train_step
from tests.config.configs_test import FOLDER, presets

TEACHER_WIDTH = 512  # of the released CLIP teacher
BUILDERS = {
    "finetune": finetune.build,
    "vqkd": vqkd.build,
    "mim": mim.build,
    "segment": lambda config: segment.make_task(config, inputs.Opened((FakeSource(0),) * 2)),
}
TRAINED = [(name, arg) for name in ("teacher", "vqkd", "mim", "finetune") for arg in ("", *presets(name))]
TRAINED += [("segment", arg) for arg in ("", "smoke")]  # the others differ in rates and sizes alone
TRAINED += [("mim", "large,300ep"), ("mim", "base,300ep")]
CHAINED = [(name, arg) for name in ("pipeline", "quickstart") for arg in ("", *presets(name))]


@pytest.fixture(autouse=True)
def _no_data():
    with no_data(TEACHER_WIDTH):
        yield


def abstract_batch(config):
    size = config.views.image_size
    patch_size = config.model.encoder.patch_size if config.stage == "vqkd" else config.model.patch_size
    num_patches = (size // patch_size) ** 2
    batch_size = config.run.batch_size
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batch = {
        "images": jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "weight": spec((batch_size,)),
    }
    if config.stage == "segment":
        batch["label_maps"] = jax.ShapeDtypeStruct((batch_size, size, size), jnp.uint8)
        batch["sizes"] = jax.ShapeDtypeStruct((batch_size, 2), jnp.int32)
        batch["distortion"] = spec((batch_size, 5))
    elif config.views.color_jitter:
        batch["jitter_factors"] = spec((batch_size, 3))
        batch["jitter_gray"] = spec((batch_size,))
        batch["jitter_order"] = jax.ShapeDtypeStruct((batch_size, 3), jnp.int32)
    if config.stage == "vqkd":
        batch["teacher_features"] = spec((batch_size, num_patches, TEACHER_WIDTH))
    if config.stage == "mim":
        batch["mask"] = jax.ShapeDtypeStruct((batch_size, num_patches), jnp.bool_)
        batch["code_ids"] = jax.ShapeDtypeStruct((batch_size, num_patches), jnp.int32)
    return batch


def traced_step(config):
    """Return (state before, state after, metrics) of one step as shapes."""
    task = BUILDERS[config.stage](config)
    optimizer, schedule = optim.for_task(task, config.optim, warmup_steps=2, num_steps=10)
    mesh = sharding.make_mesh()
    before = state.abstract(task, optimizer, mesh, config.seed, keep_ema=config.optim.ema_decay > 0)
    step = make_train_step(task, optimizer, schedule=schedule, seed=config.seed, ema_decay=config.optim.ema_decay)
    after, metrics = jax.eval_shape(step, before, task.frozen, abstract_batch(config))
    return before, after, metrics


def stored(config):
    """Return the config with its targets from a store, so that no network must be loaded."""
    config = config.copy_and_resolve_references().unlock()
    if config.stage == "vqkd":
        config.teacher.update(features="somewhere", weights="")
    elif config.stage == "mim":
        config.tokenizer.update(codes="somewhere", run="")
    return config


def check(config):
    before, after, metrics = traced_step(config)
    shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert shapes(after) == shapes(before)
    assert {"loss", "grad_norm", "learning_rate", "nonfinite_steps"} <= set(metrics)
    assert all(value.shape == () for value in metrics.values())
    assert count_parameters(before.params) == expected_parameters(config)


@pytest.mark.parametrize(("name", "arg"), TRAINED)
def test_the_step_of_every_preset(name, arg):
    check(stored(config_lib.load(f"{FOLDER / name}.py:{arg}")))


@pytest.mark.parametrize(("name", "arg"), CHAINED)
def test_the_steps_of_every_pipeline(name, arg):
    stages = config_lib.load(f"{FOLDER / name}.py:{arg}").stages
    for stage in (stage for stage in stages.values() if stage.stage in BUILDERS):
        check(stored(stage))


def count_parameters(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def linear(inputs_, outputs):
    return inputs_ * outputs + outputs


def block(width, mlp_dim, layer_scale):
    """Two norms, qkv without key bias, projection, two MLP layers, two gammas."""
    attention = 3 * width * width + 2 * width + linear(width, width)
    mlp = linear(width, mlp_dim) + linear(mlp_dim, width)
    return 4 * width + attention + mlp + (2 * width if layer_scale else 0)


def patch_embedding(part):
    """One linear map, or 3x3 convolutions of doubling width down to one token and a linear map."""
    if part.stem == "linear":
        return linear(3 * part.patch_size**2, part.width)
    total, channels = linear(part.width, part.width), 3
    side = part.patch_size
    while side > 1:
        out = part.width * 2 // side
        total += linear(9 * channels, out)
        channels, side = out, side // 2
    return total


def expected_parameters(config):
    """Count the trainable numbers by arithmetic from the facts' shapes."""
    model, size = config.model, config.views.image_size
    if config.stage == "vqkd":
        encoder, decoder = model.encoder, model.decoder
        tokens = (size // encoder.patch_size) ** 2 + 1
        total = 0
        for part, embedding in (
            (encoder, patch_embedding(encoder)),
            (decoder, linear(model.code_dim, decoder.width)),
        ):
            total += embedding + (1 + tokens) * part.width + 2 * part.width
            total += part.depth * block(part.width, part.mlp_dim, layer_scale=False)
        total += linear(encoder.width, encoder.width) + linear(encoder.width, model.code_dim)
        return total + linear(decoder.width, decoder.width) + linear(decoder.width, TEACHER_WIDTH)
    side = size // model.patch_size
    table = ((2 * side - 1) ** 2 + 3) * model.num_heads
    one = block(model.width, model.mlp_dim, layer_scale=bool(model.get("layer_scale_init", 0.1)))
    total = patch_embedding(model) + model.width + model.depth * one  # patches, [CLS], blocks
    total += {"relative_shared": table, "relative": model.depth * table, "absolute": (side**2 + 1) * model.width}[
        model.position
    ]
    if config.stage == "finetune":
        return total + 2 * model.width + linear(model.width, model.num_classes)
    if config.stage == "segment":
        return total + segmentation_heads(model)
    return total + model.width + model.head_depth * one + 2 * model.width + linear(model.width, model.codebook_size)


def segmentation_heads(model):
    """Three upsampling maps, a norm; laterals, pools, bottleneck, smoothings, fusion, classes; the auxiliary head."""
    width, channels, aux = model.width, model.channels, model.aux_channels

    def convolution(size, inputs_, outputs):
        return size * size * inputs_ * outputs + 2 * outputs

    total = 3 * (4 * width * width + width) + 2 * width
    total += 7 * convolution(1, width, channels) + convolution(3, width + 4 * channels, channels)
    total += 3 * convolution(3, channels, channels) + convolution(3, 4 * channels, channels)
    total += linear(channels, model.num_classes)
    return total + convolution(3, width, aux) + linear(aux, model.num_classes)


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
    config = stored(config_lib.load(f"{FOLDER / name}.py:{arg}"))
    assert expected_parameters(config) == published


def test_without_aggregation_the_model_is_beit_v1():
    config = config_lib.load(f"{FOLDER / 'mim'}.py")
    model = MaskedImageModel.from_arguments({**config.model, "image_size": 224, "patch_aggregation": False})
    mask = jax.ShapeDtypeStruct((1, 196), jnp.bool_)
    shapes = jax.eval_shape(
        functools.partial(model.init, num_masked=75), jax.random.key(0), jnp.zeros((1, 224, 224, 3)), mask
    )
    assert count_parameters(shapes["params"]) == 91_965_776
