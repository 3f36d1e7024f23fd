"""FLOPs, parameters and bytes by arithmetic: against numbers worked out by hand, jax's trace, and the CPU compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from paths import CONFIGS

from beitv2_jax import config as config_lib
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.layers import Block
from beitv2_jax.models.ops import implementations
from beitv2_jax.models.ops.attention import attend
from beitv2_jax.planning import abstract_task, accounting
from beitv2_jax.planning.accounting import traced_flops
from beitv2_jax.planning.components import components
from beitv2_jax.planning.parts import Transformer, total_flops
from beitv2_jax.training import optim, sharding, state
from beitv2_jax.training.step import make_train_step

SMALL = {
    "mim": {
        "views.image_size": 48,
        "masking.num_masked": 5,
        "masking.min_patches": 2,
        "model.width": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.mlp_dim": 40,
        "model.codebook_size": 29,
        "model.early_layer": 2,
        "tokenizer.codes": "somewhere",
        "run.batch_size": 7,
    },
    "vqkd": {
        "views.image_size": 48,
        "model.encoder.width": 24,
        "model.encoder.depth": 3,
        "model.encoder.num_heads": 3,
        "model.encoder.mlp_dim": 40,
        "model.decoder.width": 20,
        "model.decoder.depth": 2,
        "model.decoder.num_heads": 5,
        "model.decoder.mlp_dim": 36,
        "model.codebook_size": 29,
        "model.code_dim": 6,
        "teacher.features": "somewhere",
        "run.batch_size": 7,
    },
    "finetune": {
        "views.image_size": 48,
        "model.width": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.mlp_dim": 40,
        "model.num_classes": 13,
        "run.batch_size": 7,
    },
    "segment": {
        "views.image_size": 160,  # a map of 5 x 5 at the coarsest, which no pooling leaves as it is
        "model.width": 24,
        "model.depth": 3,
        "model.num_heads": 3,
        "model.mlp_dim": 40,
        "model.num_classes": 13,
        "model.out_layers": (1, 2, 2, 3),
        "model.channels": 20,
        "model.aux_channels": 12,
        "run.batch_size": 7,
    },
}


def small(stage, dtype="float32", **keys):
    config = config_lib.load(f"{CONFIGS / stage}.py").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({**SMALL[stage], "efficiency.dtype": dtype, **keys})
    config.efficiency.update(implementations.resolve_auto(config.efficiency, "tpu"))
    return abstract_task.complete(config.lock())[0]


def step_of(config):
    description = abstract_task.describe(config, 1000)
    optimizer, schedule = optim.for_task(description.task, config.optim, 2, 10)
    before = state.abstract(description.task, optimizer, sharding.make_mesh(), config.seed)
    step = make_train_step(
        description.task,
        optimizer,
        schedule=schedule,
        seed=0,
        ema_decay=0.0,
        accumulation_steps=config.efficiency.accumulation_steps,
    )
    return description, (step, before, description.task.frozen, description.batch)


def test_a_block_by_hand():
    block = Transformer(tokens=197, width=768, depth=1, mlp_dim=3072, num_heads=12)
    # 12 d^2 products a token, and 2 l d for the attention, a multiply-add being two
    assert sum(block.block_flops().values()) == 2 * 197 * (12 * 768**2 + 2 * 197 * 768)
    assert block.block_params() == 12 * 768**2 + 13 * 768 - 768  # no key bias
    assert dataclasses.replace(block, layer_scale=True).block_params() - block.block_params() == 2 * 768


def test_a_published_network_by_hand():
    # ViT-B/16 at 224 pixels is known as 17.6 GFLOPs forward (multiply-adds), its head of 1000 classes included
    blocks = Transformer(tokens=197, width=768, depth=12, mlp_dim=3072, num_heads=12)
    forward = blocks.flops(frozen=True) + 2 * 196 * 768 * 768 + 2 * 768 * 1000
    assert forward / 2 == pytest.approx(17.58e9, rel=1e-3)


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("mim", {}),
        ("mim", {"efficiency.remat": "full"}),
        ("mim", {"model.shared_head": False, "model.position": "relative"}),
        ("mim", {"model.patch_aggregation": False, "model.position": "absolute", "model.layer_scale_init": 0.0}),
        ("mim", {"efficiency.remat": "dots"}),
        ("mim", {"efficiency.accumulation_steps": 7}),
        ("mim", {"efficiency.dtype": "bfloat16"}),
        ("vqkd", {}),
        ("vqkd", {"efficiency.remat": "full"}),
        ("vqkd", {"efficiency.remat": "dots"}),
        ("finetune", {}),
        ("finetune", {"efficiency.remat": "full", "model.position": "relative_shared"}),
        ("segment", {}),
        ("segment", {"efficiency.remat": "full"}),
    ],
)
def test_arithmetic_is_the_traced_program(stage, keys):
    config = small(stage, **keys)
    description, step = step_of(config)
    parts = components(config, description.frozen_vit)
    # a segmentation also multiplies weights of its pooling with each other, once a batch
    assert traced_flops(*step) == pytest.approx(
        config.run.batch_size * total_flops(parts), rel=1e-6 if stage == "segment" else 0, abs=0
    )
    assert sum(part.params for part in parts) == sum(leaf.size for leaf in jax.tree.leaves(step[1].params))


@pytest.mark.parametrize(("stage", "live"), [("mim", "tokenizer.codes"), ("vqkd", "teacher.features")])
def test_frozen_networks_in_the_step_count_forward_only(stage, live):
    with_store = total_flops(components(small(stage)))
    config = small(stage, **{live: ""})
    description, step = step_of(config)
    parts = components(config, description.frozen_vit)
    assert traced_flops(*step) == config.run.batch_size * total_flops(parts)
    base = Transformer(tokens=10, width=768, depth=12, mlp_dim=3072, num_heads=12).flops(frozen=True)
    assert base < total_flops(parts) - with_store < 1.1 * base
    assert {part.name for part in parts if part.frozen} >= {live.split(".")[0]}


def test_the_compiler_counts_the_same_products_and_some_arithmetic_more():
    block = Block(Backbone(image_size=8, patch_size=1, width=256, depth=1, num_heads=4, mlp_dim=1024))
    tokens = jax.ShapeDtypeStruct((16, 65, 256), jnp.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), tokens)

    def loss(params, tokens):
        return jnp.sum(block.apply(params, tokens) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1))
    counted = jax.jit(gradients).lower(params, tokens).compile().cost_analysis()["flops"]
    by_hand = 16 * Transformer(tokens=65, width=256, depth=1, mlp_dim=1024, num_heads=4).flops()
    assert traced_flops(gradients, params, tokens) == by_hand
    assert by_hand < counted < 1.04 * by_hand


def test_a_scan_is_counted_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x, weights = jax.ShapeDtypeStruct((64, 96), jnp.float32), jax.ShapeDtypeStruct((5, 96, 96), jnp.float32)
    assert traced_flops(layers, x, weights) == 5 * 2 * 64 * 96 * 96


def test_a_kernel_counts_for_every_program_of_its_grid():
    batch, length, num_heads, width = 9, 5, 4, 256
    qkv, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((9, 5, 768), (num_heads, length, length)))

    def forward(qkv, bias):
        return attend(qkv, bias, num_heads, implementation="pallas")

    product = 2 * batch * length**2 * width
    assert traced_flops(forward, qkv, bias) == 2 * product
    gradients = jax.grad(lambda qkv, bias: (forward(qkv, bias) ** 2).sum())
    assert traced_flops(gradients, qkv, bias) == 7 * product  # the logits are made again


def test_nested_scans_conditions_and_calls():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=3)[0]

    def outer(x, w):
        x = jax.lax.scan(lambda x, _: (inner(x, w), None), x, None, length=2)[0]
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.jit(jnp.matmul)(x, w), lambda x: x, x)

    x, w = jax.ShapeDtypeStruct((7, 5), jnp.float32), jax.ShapeDtypeStruct((5, 5), jnp.float32)
    one = 2 * 7 * 5 * 5
    assert traced_flops(outer, x, w) == 7 * one


def test_of_a_choice_by_platform_the_tpu_counts():
    def chosen(x):
        x = jax.lax.platform_dependent(x, cuda=lambda x: x @ x @ x, default=lambda x: x)
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x @ x)

    assert traced_flops(chosen, jax.ShapeDtypeStruct((5, 5), jnp.float32)) == 2 * 5**3


def test_convolutions_are_counted():
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def stem(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert traced_flops(stem, image, kernel) == 2 * (2 * 4 * 4 * 5) * 27


def test_bytes_of_a_device():
    mesh = sharding.make_mesh(2, 2, 2)
    tree = {"fc1": {"kernel": jnp.zeros((6, 10)), "bias": jnp.zeros((10,))}, "ids": jnp.zeros((3,), jnp.int8)}
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        sharding.param_shardings(tree, mesh),
    )
    assert accounting.device_bytes(shapes) == 4 * (3 * 5 + 10) + 3


def test_remat_keeps_less_and_computes_more():
    plain = Transformer(tokens=197, width=768, depth=12, mlp_dim=3072, num_heads=12)
    remat, dots = (dataclasses.replace(plain, remat=policy) for policy in ("full", "dots"))
    assert remat.kept() + remat.held() < plain.kept() / 3 < dots.kept() < plain.kept()
    assert plain.flops() < dots.flops() < 1.05 * plain.flops()
    assert 1.2 * plain.flops() < remat.flops() < 4 / 3 * plain.flops()
    assert dataclasses.replace(remat, layer_scale=True).flops() * 3 == plain.flops() * 4
