"""The cost of a traced step: against numbers worked out by hand, published ones, and the CPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from paths import CONFIGS

from beitv2_jax import config as config_lib
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.layers import Block
from beitv2_jax.models.ops.attention import attend
from beitv2_jax.planning import planner, traced
from beitv2_jax.planning.traced import PROBE_BATCH, traced_flops
from beitv2_jax.training import sharding
from tests.planning.small_configs import small


def cost_of(stage, **keys):
    return planner.prepare(small(stage, **keys), 1000).cost


def named(cost):
    return {component.name: component for component in cost.components}


def block_flops(tokens, width, mlp_dim):
    """Return the forward FLOPs of a block: 2 for each multiply-add of its four linear maps and of its attention."""
    return 2 * tokens * (4 * width**2 + 2 * width * mlp_dim) + 2 * (2 * tokens**2 * width)


def test_a_small_classifier_by_hand():
    cost = cost_of("finetune")
    parts = named(cost)
    # 3 x 3 patches of 16 x 16 pixels and [CLS]; the backward pass costs twice the forward pass, but no gradient reaches
    # the pixels
    assert parts["backbone/blocks"].flops == 3 * 3 * block_flops(10, 24, 40)
    assert parts["backbone/patch_embed"].flops == 2 * 2 * 9 * (3 * 16 * 16) * 24
    assert parts["head"].flops == 3 * 2 * 24 * 13
    assert cost.flops == sum(parts[name].flops for name in ("backbone/blocks", "backbone/patch_embed", "head"))
    assert parts["head"].parameters == 24 * 13 + 13
    assert parts["backbone/patch_embed"].parameters == 3 * 16 * 16 * 24 + 24


def test_a_published_network():
    # ViT-B/16 at 224 pixels is known as 17.58 GFLOPs forward (multiply-adds), with a head of 1000 classes
    config = config_lib.load(f"{CONFIGS / 'finetune'}.py:")
    cost = planner.prepare(config).cost
    # all but the patch embedding run three times, the patch embedding twice
    embedding = named(cost)["backbone/patch_embed"].flops
    assert ((cost.flops - embedding) / 3 + embedding / 2) / 2 == pytest.approx(17.58e9, rel=1e-3)


def test_the_small_tokenizer_by_hand():
    parts = named(cost_of("vqkd"))
    assert parts["encoder/blocks"].flops == 3 * 3 * block_flops(10, 24, 40)
    assert parts["decoder/blocks"].flops == 3 * 2 * block_flops(10, 20, 36)
    assert parts["quantizer"].flops == parts["quantizer"].exact_flops == 2 * 9 * 29 * 6
    # the codes are projected in full precision, their gradients are not
    assert parts["encode_task/fc1"].exact_flops == 2 * 9 * 24 * 24
    assert parts["encode_task/fc1"].flops == 3 * 2 * 9 * 24 * 24


def test_the_heads_of_masked_image_modelling_by_hand():
    parts = named(cost_of("mim"))
    assert parts["aggregation"].flops == 3 * 2 * block_flops(10, 24, 40)
    assert parts["lm_head"].flops == 2 * (3 * 2 * 5 * 24 * 29)  # one head for two branches, on the masked patches alone


@pytest.mark.parametrize("stage", ["mim", "vqkd", "finetune", pytest.param("segment", marks=pytest.mark.long)])
def test_every_product_and_parameter_belongs_to_a_component(stage):
    step = planner._planned(small(stage), 1000, ())
    task, batch, function, state = planner._train_step(step.config, 1000)
    whole = traced_flops(function, state, task.frozen, batch)
    # a segmentation also multiplies weights of its pooling with each other, once for a batch
    assert whole == pytest.approx(step.config.run.batch_size * step.cost.flops, rel=1e-4 if stage == "segment" else 0)
    assert step.cost.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_accumulation_and_bfloat16_run_the_same_products():
    config = small("mim", "bfloat16", **{"efficiency.accumulation_steps": 7})
    task, batch, function, state = planner._train_step(config, 1000)
    assert traced_flops(function, state, task.frozen, batch) == 7 * cost_of("mim").flops


@pytest.mark.parametrize(
    ("stage", "live", "network"), [("mim", "tokenizer.codes", "VQKD"), ("vqkd", "teacher.features", "NormalisedViT")]
)
def test_frozen_networks_in_the_step_run_forward_only(stage, live, network):
    stored, running = cost_of(stage), cost_of(stage, **{live: ""})
    frozen = named(running)[network]
    assert frozen.frozen and frozen.parameters == 0 and frozen.saved_bytes == 0
    assert running.flops - stored.flops == pytest.approx(frozen.flops)
    assert 12 * block_flops(10, 768, 3072) < frozen.flops < 1.1 * 12 * block_flops(10, 768, 3072)
    assert running.parameters == stored.parameters


def test_remat_saves_less_and_computes_more():
    none, dots, full = (named(cost_of("finetune", **{"efficiency.remat": remat})) for remat in ("none", "dots", "full"))
    blocks = "backbone/blocks"
    assert full[blocks].saved_bytes < none[blocks].saved_bytes / 3 < dots[blocks].saved_bytes < none[blocks].saved_bytes
    assert none[blocks].flops == 9 * block_flops(10, 24, 40)
    # "dots" saves what the linear maps give, and runs the products of the attention again
    assert dots[blocks].flops - none[blocks].flops == 3 * 2 * (2 * 10**2 * 24)
    # "full" runs all again, as the gradient of the layer scale needs the last product of a block too
    assert full[blocks].flops - none[blocks].flops == 3 * block_flops(10, 24, 40)
    # the input of each block in float32; that of the first one is made outside the blocks
    assert full[blocks].saved_bytes == 2 * 4 * 10 * 24


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, use_bias=False, name="out")(jnp.tanh(nn.Dense(7, use_bias=False, name="hidden_0")(x)))


def test_saved_and_live_bytes_by_hand():
    model, images = Mlp(), jax.ShapeDtypeStruct((PROBE_BATCH, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    def gradients(params, images):
        return jax.grad(lambda params: jnp.sum(model.apply({"params": params}, images) ** 2))(params)

    cost = traced.step_cost(gradients, params, params, images)
    parts = named(cost)
    assert parts["hidden"].parameters == 21 and parts["out"].parameters == 35
    assert parts["hidden"].flops == 2 * (2 * 3 * 7) and parts["out"].flops == 3 * (2 * 7 * 5)
    # saved are tanh and its derivative, and twice the output for the square
    saved = {name: component.saved_bytes for name, component in parts.items()}
    assert sum(saved.values()) == 4 * (7 + 7 + 5)
    assert cost.output_sizes == {"hidden_0": 7, "out": 5}
    read_and_written = (3 + 7) + (7 + 5)  # forward
    read_and_written += (5 + 7) + (5 + 7) + (7 + 3)  # gradients of the hidden layer and of both weights
    assert cost.product_bytes == 4 * read_and_written and cost.num_products == 5
    # what is saved, and the output and the gradient of its square
    assert cost.live_images.max() == 4 * (19 + 5 + 5)
    # both gradients, and one of them before it is transposed
    assert cost.live_weights.max() == 4 * (21 + 35 + 21)
    assert cost.peak_live_bytes(0) == 4 * 77 and cost.peak_live_bytes(0, 0.5) == 2 * 77
    assert cost.peak_live_bytes(1000) == pytest.approx(1000 * cost.live_images.max(), rel=0.01)


def test_the_compiler_counts_the_same_products_and_some_arithmetic_more():
    block = Block(Backbone(image_size=8, patch_size=1, width=256, depth=1, num_heads=4, mlp_dim=1024))
    tokens = jax.ShapeDtypeStruct((16, 65, 256), jnp.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), tokens)

    def loss(params, tokens):
        return jnp.sum(block.apply(params, tokens) ** 2)

    gradients = jax.grad(loss, argnums=(0, 1))
    counted = jax.jit(gradients).lower(params, tokens).compile().cost_analysis()["flops"]
    by_hand = 16 * 3 * block_flops(65, 256, 1024)
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
    assert traced.device_bytes(shapes) == 4 * (3 * 5 + 10) + 3
