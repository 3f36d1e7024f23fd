"""Parity with the released PyTorch models on stored numbers: every output, loss and gradient (golden/README.md)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from testing import quick_jit

from beitv2_jax.convert.official import from_official, to_official
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.layers import Block, LayerNorm
from beitv2_jax.models.mim import MaskedImageModel, gather_masked

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5
MIM_FILES = ("mim_cls", "mim_cls_unshared", "mim_v1", "mim_v1_abs")


class Golden:
    """One fixture file: official state dict, inputs, expected arrays."""

    def __init__(self, directory, name):
        with np.load(directory / f"{name}.npz", allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.config = json.loads(str(self.arrays.pop("config")))
        self.state = self.section("sd/")
        self.images = jnp.asarray(self.arrays["in/image"].transpose(0, 2, 3, 1))

    def section(self, prefix):
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def check(self, name, value, tolerance=OUTPUT_TOLERANCE):
        """Compare with out/`name` relative to the array's largest magnitude and tick it off."""
        expected = self.arrays.pop(f"out/{name}")
        assert expected.shape == np.shape(value), name
        scale = np.abs(expected).max()
        error = np.abs(np.asarray(value, np.float64) - expected).max()
        assert error <= tolerance * scale, f"{name}: off by {error / scale:.1e} of its range"

    def check_gradients(self, kind, gradients):
        expected = {key.removeprefix("grad/") for key in self.section("out/") if key.startswith("grad/")}
        official = to_official(kind, {"params": gradients})
        assert {key for key in official if not key.endswith("relative_position_index")} == expected
        for key in sorted(expected):
            self.check(f"grad/{key}", official[key], GRADIENT_TOLERANCE)

    def check_nothing_left(self):
        assert not self.section("out/"), "stored numbers that no check used"


def shapes(config):
    """Return our constructor arguments for the ones the official models share."""
    if config["use_shared_rel_pos_bias"]:
        position = "relative_shared"
    elif config["use_rel_pos_bias"]:
        position = "relative"
    else:
        position = "absolute" if config["use_abs_pos_emb"] else "none"
    return dict(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        width=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_dim=int(config["embed_dim"] * config["mlp_ratio"]),
        position=position,
        layer_scale_init=config["init_values"],
    )


def with_intermediates(model, params, *args, method="__call__"):
    """Return the output and {'a/b': outputs} of every block and layer norm of the forward pass, in order of calls."""
    output, captured = model.apply(
        {"params": params},
        *args,
        method=method,
        capture_intermediates=lambda module, name: isinstance(module, Block | LayerNorm) and name == "__call__",
    )
    flat = traverse_util.flatten_dict(captured["intermediates"], sep="/")
    return output, {path.removesuffix("/__call__"): outputs for path, outputs in flat.items()}


def cross_entropy(logits, soft_labels):
    return -jnp.mean(jnp.sum(soft_labels * jax.nn.log_softmax(logits), axis=-1))


def one_hot(labels, logits):
    return jax.nn.one_hot(labels, logits.shape[-1])


def flat_rows(array):
    return array.reshape(-1, array.shape[-1])


@pytest.mark.parametrize("name", MIM_FILES)
def test_masked_image_model_equals_the_released_one(name, golden_dir):
    golden = Golden(golden_dir, name)
    config = golden.config["model"]
    aggregation = golden.config["cls_head"]
    head = dict(patch_aggregation=False)
    if aggregation:
        head = dict(
            early_layer=config["early_layers"],
            head_depth=config["head_layers"],
            shared_head=config["shared_lm_head"],
        )
    model = MaskedImageModel(codebook_size=config["vocab_size"], **shapes(config), **head)
    params = from_official("mim", golden.state)["params"]
    mask = jnp.asarray(golden.arrays["in/mask"])
    num_masked = golden.config["num_mask"]
    targets = gather_masked(jnp.asarray(golden.arrays["in/target_ids"]), mask, num_masked).reshape(-1)

    def loss(params):
        output = model.apply({"params": params}, golden.images, mask, num_masked=num_masked)
        heads = [flat_rows(logits) for logits in output if logits is not None]
        losses = [cross_entropy(logits, one_hot(targets, logits)) for logits in heads]
        return sum(losses), (heads, losses)

    @quick_jit
    def compute(params):
        images = golden.images
        return (
            jax.value_and_grad(loss, has_aux=True)(params),
            with_intermediates(model, params, images, mask, method="logits_everywhere"),
            model.apply({"params": params}, images, method="logits_everywhere"),
        )

    ((total, (heads, losses)), gradients), (output, hidden), nothing_hidden = compute(params)
    golden.check("loss", total)
    for index, suffix in enumerate(("", "_cls")[: len(heads)]):
        golden.check(f"logits{suffix}", heads[index])
        golden.check(f"loss_{index + 1}", losses[index])
        golden.check(f"mlm_acc_{index + 1}", jnp.mean(jnp.argmax(heads[index], axis=-1) == targets))
    golden.check_gradients("mim", gradients)

    for suffix, everywhere in (("", output), ("_nomask", nothing_hidden)):
        golden.check(f"logits_all{suffix}", everywhere.logits)
        if aggregation:
            golden.check(f"logits_all{suffix}_cls", everywhere.aggregation_logits)
    for index in range(config["depth"]):
        golden.check(f"hidden/blocks.{index}", hidden[f"backbone/blocks_{index}"][0])
    golden.check("patch_tokens", hidden["norm"][0])
    if aggregation:
        for index in range(config["head_layers"]):
            golden.check(f"hidden/cls_pt_layers.{index}", hidden[f"aggregation_{index}"][0])
        shared = config["shared_lm_head"]
        golden.check("patch_tokens_cls", hidden["norm"][1] if shared else hidden["aggregation_norm"][0])
    golden.check_nothing_left()


def test_classifier_equals_the_released_one(golden_dir):
    golden = Golden(golden_dir, "finetune")
    config = golden.config["model"]
    model = Classifier(num_classes=config["num_classes"], qkv_bias="qv", **shapes(config))
    params = from_official("classifier", golden.state)["params"]
    soft_labels = jnp.asarray(golden.arrays["in/soft_labels"])

    def loss(params):
        logits = model.apply({"params": params}, golden.images)
        return cross_entropy(logits, soft_labels), logits

    @quick_jit
    def compute(params):
        return (
            jax.value_and_grad(loss, has_aux=True)(params),
            with_intermediates(model, params, golden.images)[1],
            model.apply({"params": params}, golden.images, method="features"),
        )

    ((soft_loss, logits), gradients), hidden, tokens = compute(params)
    hard_labels = one_hot(golden.arrays["in/labels"], logits)
    golden.check("logits", logits)
    golden.check("loss_soft", soft_loss)
    golden.check("loss_hard", cross_entropy(logits, hard_labels))
    golden.check("loss_label_smoothing_0.1", cross_entropy(logits, 0.9 * hard_labels + 0.1 / config["num_classes"]))
    golden.check_gradients("classifier", gradients)

    golden.check("all_tokens", tokens)
    golden.check("patch_tokens", tokens[:, 1:])
    golden.check("patch_logits", tokens[:, 1:] @ params["head"]["kernel"] + params["head"]["bias"])
    golden.check("pooled", hidden["fc_norm"][0])
    for index in range(config["depth"]):
        golden.check(f"hidden/blocks.{index}", hidden[f"backbone/blocks_{index}"][0])
    golden.check_nothing_left()
