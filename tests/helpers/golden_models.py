"""The masked image model and the classifier against the released ones: every output, loss and gradient."""

import jax
import jax.numpy as jnp
from flax import traverse_util
from golden_files import Golden, channels_last

from beitv2_jax.convert.beit.official import from_official, to_official
from beitv2_jax.convert.positions import resize_position_embedding
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.layers import Block, LayerNorm
from beitv2_jax.models.mim import MaskedImageModel, gather_masked
from beitv2_jax.tasks.losses import accuracy, masked_cross_entropy, smoothed_cross_entropy


def position_of(config):
    """Return our name of the positions that the official arguments ask for; what is not there is off."""
    if config.get("use_shared_rel_pos_bias"):
        return "relative_shared"
    if config.get("use_rel_pos_bias"):
        return "relative"
    return "absolute" if config.get("use_abs_pos_emb") else "none"


def transformer_arguments(config):
    """Return our names and values of what the official models are constructed from."""
    return dict(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        width=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_dim=int(config["embed_dim"] * config["mlp_ratio"]),
        position=position_of(config),
        layer_scale_init=config["init_values"],
    )


def mim_arguments(config, *, patch_aggregation):
    """Return the arguments of a `MaskedImageModel`; the head's are those of the official class with the extra head."""
    head = dict(patch_aggregation=False)
    if patch_aggregation:
        head = dict(
            early_layer=config["early_layers"], head_depth=config["head_layers"], shared_head=config["shared_lm_head"]
        )
    return dict(codebook_size=config["vocab_size"], **transformer_arguments(config), **head)


def classifier_arguments(config):
    return dict(
        num_classes=config["num_classes"],
        pooling="mean" if config["use_mean_pooling"] else "cls",
        **transformer_arguments(config),
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


def flat_rows(array):
    return array.reshape(-1, array.shape[-1])


def check_mim(golden: Golden):
    config = golden.config["model"]
    aggregation = golden.config["cls_head"]
    model = MaskedImageModel.from_arguments(mim_arguments(config, patch_aggregation=aggregation))
    params = from_official("mim", golden.state)["params"]
    images, mask = golden.images, jnp.asarray(golden.arrays["in/mask"])
    num_masked = golden.config["num_mask"]
    targets = gather_masked(jnp.asarray(golden.arrays["in/target_ids"]), mask, num_masked)

    def loss(params):
        output = model.apply({"params": params}, images, mask, num_masked=num_masked)
        heads = [logits for logits in output if logits is not None]
        losses = [masked_cross_entropy(logits, targets).mean() for logits in heads]
        return sum(losses), (heads, losses)

    @jax.jit
    def compute(params):
        return (
            jax.value_and_grad(loss, has_aux=True)(params),
            with_intermediates(model, params, images, mask, method="logits_everywhere"),
            model.apply({"params": params}, images, method="logits_everywhere"),
        )

    ((total, (heads, losses)), gradients), (output, hidden), nothing_hidden = compute(params)
    golden.check("loss", total)
    for index, suffix in enumerate(("", "_cls")[: len(heads)]):
        golden.check(f"logits{suffix}", flat_rows(heads[index]))
        golden.check(f"loss_{index + 1}", losses[index])
        golden.check(f"mlm_acc_{index + 1}", accuracy(heads[index], targets))
    golden.check_gradients(to_official("mim", {"params": gradients}))

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


def check_classifier(golden: Golden):
    config = golden.config["model"]
    arguments = classifier_arguments(config)
    model = Classifier.from_arguments(arguments)
    params = from_official("classifier", golden.state)["params"]
    images, soft_labels = golden.images, jnp.asarray(golden.arrays["in/soft_labels"])
    labels = jnp.asarray(golden.arrays["in/labels"])
    norm = "fc_norm" if config["use_mean_pooling"] else "norm"

    def loss(params):
        logits = model.apply({"params": params}, images)
        return -jnp.mean(jnp.sum(soft_labels * jax.nn.log_softmax(logits), axis=-1)), logits

    @jax.jit
    def compute(params):
        return (
            jax.value_and_grad(loss, has_aux=True)(params),
            with_intermediates(model, params, images)[1],
            model.apply({"params": params}, images, method="features"),
        )

    ((soft_loss, logits), gradients), hidden, tokens = compute(params)
    golden.check("logits", logits)
    golden.check("loss_soft", soft_loss)
    golden.check("loss_hard", smoothed_cross_entropy(logits, labels, 0.0).mean())
    golden.check("loss_label_smoothing_0.1", smoothed_cross_entropy(logits, labels, 0.1).mean())
    golden.check_gradients(to_official("classifier", {"params": gradients}))
    golden.check("all_tokens", tokens)
    golden.check("patch_tokens", tokens[:, 1:])
    golden.check("patch_logits", tokens[:, 1:] @ params["head"]["kernel"] + params["head"]["bias"])
    golden.check("pooled", hidden[norm][0])
    for index in range(config["depth"]):
        golden.check(f"hidden/blocks.{index}", hidden[f"backbone/blocks_{index}"][0])

    for size in golden.config.get("resized", ()):
        grid = (size // config["patch_size"],) * 2
        # the released model resizes at every call, with a tenth of a patch added to the grid
        embedding = resize_position_embedding(golden.state["pos_embed"], grid, method="offset")
        golden.check(f"pos_embed_{size}", embedding)
        resized = Classifier.from_arguments({**arguments, "image_size": size})
        backbone = {**params["backbone"], "pos_embed": embedding}
        apply = jax.jit(lambda params, images, model=resized: model.apply({"params": params}, images))
        golden.check(
            f"logits_{size}", apply({**params, "backbone": backbone}, channels_last(golden.arrays[f"in/image_{size}"]))
        )
