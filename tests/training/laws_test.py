"""Laws of training that no stored numbers cover: bfloat16 and stochastic depth, on the published stages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import CONFIGS
from testing import variables_of
from without_data import no_data

from beitv2_jax import config as config_lib
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import inputs, mim, vqkd

BATCH, SIZE, PATCHES, CODES, TEACHER = 8, 12, 9, 19, 5
ENCODER = dict(patch_size=4, width=24, depth=1, num_heads=2, mlp_dim=36)
DECODER = dict(width=20, depth=1, num_heads=2, mlp_dim=28)
# bfloat16 keeps 8 bits: 0.4 % a product, of which a few layers in a row make some per cent of the whole tensor
BFLOAT16_BOUND = 0.04


def tokenizer_task(dtype="float32", **changes):
    config = config_lib.load(f"{CONFIGS / 'vqkd'}.py")
    config.views.image_size = SIZE
    config.model.encoder.update(ENCODER)
    config.model.decoder.update(DECODER)
    config.model.update(codebook_size=CODES, code_dim=7)
    config.model.update(changes)
    config.optim.update(clip_norm=1.0, eps=1e-3)  # a small eps magnifies the rounding of gradients near zero
    config.teacher.features = "somewhere"
    config.efficiency.dtype = dtype
    with no_data(TEACHER):
        return vqkd.build(config), config


def mim_task(dtype="float32", **changes):
    config = config_lib.load(f"{CONFIGS / 'mim'}.py")
    config.views.image_size = SIZE
    config.masking.num_masked = 4
    config.model.update({**ENCODER, **changes}, codebook_size=CODES, early_layer=1, head_depth=1)
    config.tokenizer.codes = "somewhere"
    config.efficiency.dtype = dtype
    with no_data(TEACHER):
        return mim.build(config), config


def batch_of(seed):
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8),
        "teacher_features": rng.normal(size=(BATCH, PATCHES, TEACHER)).astype(np.float32),
        "code_ids": rng.integers(0, CODES, (BATCH, PATCHES)),
        "mask": rng.permuted(np.tile(np.arange(PATCHES) < 4, (BATCH, 1)), axis=1),
        "weight": np.ones(BATCH, np.float32),
    }


def loss_and_gradient(task, variables, batch):
    def loss(params):
        total, parts = task.loss(params, variables["model_state"], {}, batch, jax.random.key(0), jnp.int32(0))
        return total / parts.weight

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


def difference(ours, exact):
    """Return |ours - exact| / |exact| of two trees, each taken as one vector."""
    squares = jax.tree.map(lambda a, b: (jnp.sum((a - b) ** 2), jnp.sum(b**2)), ours, exact)
    pairs = jax.tree.leaves(squares, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return float(np.sqrt(sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)))


@pytest.mark.parametrize("build", [pytest.param(tokenizer_task, marks=pytest.mark.long), mim_task])
def test_bfloat16_stays_near_float32(build):
    batch = {key: jnp.asarray(value) for key, value in batch_of(5).items()}
    (exact, _), (rounded, _) = build(), build("bfloat16")
    variables = variables_of(exact)
    exact_loss, exact_gradient = loss_and_gradient(exact, variables, batch)
    loss, gradient = loss_and_gradient(rounded, variables, batch)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((loss, gradient)))
    assert 0 < abs(loss - exact_loss) < BFLOAT16_BOUND * exact_loss
    assert 1e-4 < difference(gradient, exact_gradient) < 2 * BFLOAT16_BOUND


def test_codes_of_a_bfloat16_tokenizer_are_decided_in_float32():
    images = jnp.asarray(batch_of(6)["images"]) / 127.5 - 1.0
    task, config = tokenizer_task("bfloat16")
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=TEACHER)
    variables = variables_of(task)
    rng = np.random.default_rng(0)
    codes = 1.0 + 1e-3 * rng.normal(size=(CODES, 7))  # neighbours whose inner products bfloat16 cannot tell apart
    codes = (codes / np.linalg.norm(codes, axis=-1, keepdims=True)).astype(np.float32)
    variables["model_state"]["quantizer"]["codebook"] = jnp.asarray(codes)
    variables = {"params": variables["params"], "codebook": variables["model_state"]}
    project = jax.jit(lambda images: model.apply(variables, images, method=VQKD.project))
    encode = jax.jit(lambda images: model.apply(variables, images, method=VQKD.encode))
    unit = np.asarray(project(images), np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    distances = np.sum(codes.astype(np.float64) ** 2, axis=-1) - 2.0 * unit @ codes.astype(np.float64).T
    best = np.sort(distances, axis=-1)
    clear = best[..., 1] - best[..., 0] > 1e-6  # beyond float32's rounding of an inner product of unit vectors
    ids = np.asarray(encode(images))
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ids[clear], np.argmin(distances, axis=-1)[clear])
    coarse = jnp.einsum("bnc,kc->bnk", unit.astype(jnp.bfloat16), codes.astype(jnp.bfloat16))
    assert np.mean(np.argmax(coarse, axis=-1) == ids) < 0.9


def test_stochastic_depth_drops_whole_branches_of_a_sample_and_is_right_in_the_mean():
    """The last of two blocks drops with the full rate, the first never; with silent attention one branch is left."""
    rate, copies = 0.4, 4001
    task, config = mim_task(drop_path_rate=rate, depth=2, patch_aggregation=False, position="none")
    model = mim.make_model(config, Compute())
    images = jnp.broadcast_to(jnp.asarray(batch_of(7)["images"][:1]) / 255.0, (copies, SIZE, SIZE, 3))
    params = variables_of(task)["params"]
    last = params["backbone"]["blocks_1"]
    last["gamma_1"], last["gamma_2"] = jnp.zeros_like(last["gamma_1"]), jnp.ones_like(last["gamma_2"])
    bare = {**params, "backbone": {**params["backbone"], "blocks_1": {**last, "gamma_2": last["gamma_1"]}}}

    def tokens(params, images, train):
        rngs = {"drop_path": jax.random.key(3)}
        backbone = lambda model, images: model.vit(images, train=train).tokens  # noqa: E731
        return np.asarray(model.apply({"params": params}, images, rngs=rngs, method=backbone))

    still, without = tokens(params, images[:1], False)[0], tokens(bare, images[:1], False)[0]
    branch = still - without
    noisy = tokens(params, images, True)
    kept = np.abs(noisy - without).max(axis=(1, 2)) > 1e-3
    np.testing.assert_allclose(noisy[~kept], np.broadcast_to(without, noisy[~kept].shape), atol=1e-5)
    np.testing.assert_allclose(
        noisy[kept] - without, np.broadcast_to(branch / (1 - rate), noisy[kept].shape), atol=1e-5
    )
    # the mean of n draws of branch * keep / (1 - rate) has the standard deviation branch * sqrt(rate / (1 - rate) / n)
    bound = 4.0 * np.sqrt(rate / (1.0 - rate) / copies) * np.abs(branch) + 1e-5
    np.testing.assert_array_less(np.abs(noisy.mean(axis=0, dtype=np.float64) - still), bound)
