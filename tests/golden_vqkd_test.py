"""The tokenizer and its quantizer against the released code (tests/golden/README.md)."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testing import quick_jit

from beitv2_jax.convert.official import from_official
from beitv2_jax.models import quantizer as q
from beitv2_jax.models.vqkd import VQKD

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS, GRADIENTS = 1e-5, 2e-5


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("config")))


def assert_close(ours, golden, tolerance=OUTPUTS):
    """Compare relative to the largest absolute value of the golden array, as its README suggests."""
    chex.assert_equal_shape([ours, golden])
    np.testing.assert_allclose(ours, golden, rtol=0, atol=tolerance * np.abs(golden).max())


def to_channels_last(z):
    return jnp.asarray(z).transpose(0, 2, 3, 1).reshape(z.shape[0], -1, z.shape[1])


def from_channels_last(vectors, like):
    return np.asarray(vectors).reshape(like.shape[0], *like.shape[2:], like.shape[1]).transpose(0, 3, 1, 2)


class QuantizerCase:
    """One situation of quantizer.npz: the module, its state in our names, and the golden arrays by short name."""

    def __init__(self, name):
        arrays, config = load("quantizer")
        sizes = config["cases"][name]
        self.module = q.Quantizer(
            codebook_size=sizes["n_embed"],
            code_dim=sizes["dim"],
            ema_decay=sizes["decay"],
            commitment_weight=sizes["beta"],
        )
        self.inputs = {key.split("/")[2]: value for key, value in arrays.items() if key.startswith(f"in/{name}/")}
        self.golden = {key.split("/")[2]: value for key, value in arrays.items() if key.startswith(f"out/{name}/")}
        zeros = jnp.zeros(sizes["n_embed"])
        self.state = {
            "codebook": jnp.asarray(arrays[f"sd/{name}.embedding.weight"]),
            "cluster_counts": jnp.asarray(arrays[f"sd/{name}.cluster_size"]),
            "window_counts": zeros,
            "last_window_counts": zeros,
        }

    def step(self, z, train):
        out, new = self.module.apply({"codebook": self.state}, to_channels_last(z), train=train, mutable=["codebook"])
        self.state = new["codebook"]
        return out


def test_quantizer_basic_step_and_gradient():
    case = QuantizerCase("basic")
    probe, variables = to_channels_last(case.inputs["probe"]), {"codebook": case.state}

    def objective(vectors):
        out = case.module.apply(variables, vectors, train=True)
        return jnp.sum(out.codes * probe) + out.commitment_loss

    z = case.inputs["z"]
    gradient = jax.grad(objective)(to_channels_last(z))
    assert_close(from_channels_last(gradient, z), case.golden["grad_z"], GRADIENTS)
    out = case.step(z, train=True)
    np.testing.assert_array_equal(out.code_ids.reshape(case.golden["ids"].shape), case.golden["ids"])
    assert_close(from_channels_last(out.codes, z), case.golden["z_q"])
    assert_close(out.commitment_loss, case.golden["loss"])
    assert_close(case.state["codebook"], case.golden["codebook_after"])
    assert_close(case.state["cluster_counts"], case.golden["cluster_size_after"])


def test_quantizer_five_steps_with_unused_codes():
    case = QuantizerCase("unused")
    for step in range(5):
        z = case.inputs["z"][step]
        out = case.step(z, train=True)
        golden_ids = case.golden[f"ids_{step}"]
        np.testing.assert_array_equal(out.code_ids.reshape(golden_ids.shape), golden_ids)
        assert_close(out.commitment_loss, case.golden[f"loss_{step}"])
        assert_close(case.state["codebook"], case.golden[f"codebook_after{step + 1}"])
        assert_close(case.state["cluster_counts"], case.golden[f"cluster_size_after{step + 1}"])
    assert_close(from_channels_last(out.codes, z), case.golden["z_q_4"])


def test_quantizer_eval_mode():
    case = QuantizerCase("evalmode")
    before = case.state["codebook"]
    for step in range(2):
        out = case.step(case.inputs["z"][step], train=False)
        golden_ids = case.golden[f"ids_{step}"]
        np.testing.assert_array_equal(out.code_ids.reshape(golden_ids.shape), golden_ids)
        assert_close(out.commitment_loss, case.golden[f"loss_{step}"])
        assert_close(case.state["cluster_counts"], case.golden[f"cluster_size_after{step + 1}"])
    np.testing.assert_array_equal(case.state["codebook"], before)


@pytest.mark.parametrize("name", ["kmeans", "kmeans_empty"])
def test_quantizer_kmeans_start(name):
    case = QuantizerCase(name)
    z, golden = case.inputs["z"], case.golden
    unit = q.l2_normalise(to_channels_last(z)).reshape(-1, z.shape[1])
    assert_close(unit, golden["samples_l2"])
    initial = unit[case.inputs["init_indices"]]
    for rounds in (1, 10):
        means, counts = q.kmeans_from(unit, initial, rounds)
        assert_close(means, golden[f"means_iter{rounds}"])
        np.testing.assert_array_equal(counts, golden[f"bins_iter{rounds}"])
    case.state = {**case.state, "codebook": means}
    out = case.step(z, train=True)
    np.testing.assert_array_equal(out.code_ids.reshape(golden["ids"].shape), golden["ids"])
    assert_close(from_channels_last(out.codes, z), golden["z_q"])
    assert_close(out.commitment_loss, golden["loss"])
    assert_close(case.state["codebook"], golden["codebook_after"])
    assert_close(case.state["cluster_counts"], golden["cluster_size_after"])


@pytest.fixture(scope="module")
def tokenizer():
    arrays, config = load("vqkd")
    sizes = {side: config[side] for side in ("encoder", "decoder")}
    transformers = {
        side: dict(width=s["embed_dim"], depth=s["depth"], num_heads=s["num_heads"], mlp_dim=4 * s["embed_dim"])
        for side, s in sizes.items()
    }
    model = VQKD(
        image_size=sizes["encoder"]["img_size"],
        encoder=dict(patch_size=sizes["encoder"]["patch_size"], **transformers["encoder"]),
        decoder=transformers["decoder"],
        codebook_size=config["n_embed"],
        code_dim=config["embed_dim"],
        teacher_width=config["decoder_out_dim"],
        ema_decay=config["decay"],
    )
    state = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/")}
    return model, jax.tree.map(jnp.asarray, from_official("vqkd", state)), arrays


def in_tokenizer_range(images):
    """Golden images are [0, 1], channels first; ours are [-1, 1], channels last."""
    return jnp.asarray(images).transpose(0, 2, 3, 1) * 2.0 - 1.0


def reconstruction_loss(out, target):
    ours, target = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (out.reconstruction, jnp.asarray(target)))
    return jnp.mean(1.0 - jnp.sum(ours * target, axis=-1))


def test_tokenizer_eval_outputs(tokenizer):
    model, variables, arrays = tokenizer
    golden = {key.removeprefix("out/eval/"): value for key, value in arrays.items() if key.startswith("out/eval/")}
    images = in_tokenizer_range(arrays["in/image"])
    assert_close(images.transpose(0, 3, 1, 2), golden["pre_processed"])
    forward = quick_jit(lambda images: model.apply(variables, images, train=False, mutable=["codebook"]))
    out, new = forward(images)
    np.testing.assert_array_equal(out.code_ids, golden["token_ids"])
    encode = quick_jit(lambda images: model.apply(variables, images, method=model.encode))
    np.testing.assert_array_equal(encode(images), golden["token_ids"])
    assert_close(out.encoder_features, golden["encoder_patch_features"])
    assert_close(out.projections, golden["to_quantizer_features"])
    assert_close(out.unit, golden["z_l2"])
    assert_close(from_channels_last(out.codes, golden["z_q"]), golden["z_q"])
    state = new["codebook"]["quantizer"]
    assert_close(state["codebook"][out.code_ids], golden["code_vectors"])
    assert_close(state["cluster_counts"], golden["cluster_size_after"])
    assert_close(out.decoder_features, golden["decoder_patch_features"])
    assert_close(out.reconstruction, golden["rec"])
    loss = reconstruction_loss(out, arrays["in/target"])
    assert_close(loss, golden["rec_loss"])
    assert_close(out.commitment_loss, golden["commit_loss"])
    assert_close(loss + out.commitment_loss, golden["total_loss"])


def test_tokenizer_training_gradients_and_codebook(tokenizer):
    model, variables, arrays = tokenizer

    def loss(params, codebook, images, target):
        out, new = model.apply({"params": params, "codebook": codebook}, images, train=True, mutable=["codebook"])
        reconstruction = reconstruction_loss(out, target)
        return reconstruction + out.commitment_loss, (reconstruction, out, new["codebook"])

    value_and_gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))
    params, codebook = variables["params"], variables["codebook"]
    for step in range(3):
        images, target = in_tokenizer_range(arrays["in/images_train"][step]), arrays["in/targets_train"][step]
        (total, (reconstruction, out, codebook)), gradients = value_and_gradient(params, codebook, images, target)
        golden = {key: arrays[f"out/train/step{step}/{key}"] for key in ("token_ids", "total_loss", "rec_loss")}
        np.testing.assert_array_equal(out.code_ids, golden["token_ids"])
        assert_close(total, golden["total_loss"])
        assert_close(reconstruction, golden["rec_loss"])
        assert_close(out.commitment_loss, arrays[f"out/train/step{step}/commit_loss"])
        if step == 0:
            assert_gradients_close(gradients, arrays)
        if step in (0, 2):
            state = codebook["quantizer"]
            assert_close(state["codebook"], arrays[f"out/train/after{step + 1}/codebook"])
            assert_close(state["cluster_counts"], arrays[f"out/train/after{step + 1}/cluster_size"])


def assert_gradients_close(gradients, arrays):
    prefix = "out/train/grad/"
    golden = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    # gradients have their parameters' layouts; the buffers that complete a state dict are borrowed and then ignored
    buffers = {key.removeprefix("sd/"): value for key, value in arrays.items() if key.startswith("sd/quantize.")}
    expected = from_official("vqkd", {**buffers, **golden})["params"]
    chex.assert_trees_all_equal_shapes(gradients, expected)
    assert len(golden) == len(jax.tree.leaves(expected)) == 72
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < GRADIENTS, f"{jax.tree_util.keystr(path)}: {error:.1e}"
