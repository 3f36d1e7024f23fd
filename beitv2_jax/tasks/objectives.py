"""What each trained stage minimises: functions of a model and a batch that know no config, no data and no file.

The files of the stages build them from configs, the benchmarks from sizes alone, where nothing that reads data is
installed. Every function of the form `loss` and `finish` is what `tasks.api.Task` says.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from beitv2_jax.data.target_cache.encoding import decode_features
from beitv2_jax.models import mixing, preprocess
from beitv2_jax.models.mim import MaskedImageModel, gather_masked
from beitv2_jax.models.ops.cross_entropy import head_cross_entropy, rounded_cross_entropy
from beitv2_jax.models.quantizer import codebook_perplexity, codebook_usage, roll_window, updated_state
from beitv2_jax.models.upernet import BATCH_STATS, Segmenter, moved_statistics
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks.api import Batch, LossParts
from beitv2_jax.tasks.losses import (
    cosine_distillation,
    masked_cross_entropy,
    segmentation_loss,
    smoothed_cross_entropy,
    smoothed_targets,
    soft_cross_entropy,
    weighted_sum,
)
from beitv2_jax.typing import CodeIds, Images, Mask, PyTree, TeacherFeatures


def init_variables(model, key, *args, **kwargs) -> dict[str, PyTree]:
    """Return {"params", "codebook"} of a fresh model; the codebook is empty for models without one."""
    variables = model.init({"params": key, "drop_path": key}, *args, **kwargs)
    return {"params": variables["params"], "codebook": variables.get("codebook", {})}


def init_segmenter(model: Segmenter, key) -> dict[str, PyTree]:
    """Return {"params", "codebook"} of a fresh segmentation model, whose "codebook" is batch norm's statistics."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    variables = model.init({"params": key, "drop_path": key}, images, train=False)
    return {"params": variables["params"], "codebook": variables[BATCH_STATS]}


def released_no_decay(path: str) -> bool:
    """Tell whether the released recipes exempt the parameter at `path` ('a/b/c') from weight decay.

    Exempt are all vectors (biases, norms, layer scale), `cls_token` and `pos_embed`. Relative position tables and the
    mask token are decayed, as released.
    """
    return re.search(r"(bias|scale|gamma_[12]|cls_token|pos_embed)$", path) is not None


def layer_of(path: str, *, depth: int) -> int:
    """Return the layer id of a parameter for layer decay: 0 embeddings, i + 1 block i, depth + 1 the rest.

    Source: the released fine-tuning recipe; the rate of layer id `j` is layer_decay^(depth + 1 - j) of the full rate.
    """
    parts = path.split("/")
    if parts[0] == "backbone":
        if parts[1] in ("cls_token", "mask_token", "pos_embed", "patch_embed"):
            return 0
        if parts[1].startswith("blocks_"):
            return int(parts[1].removeprefix("blocks_")) + 1
    return depth + 1


def view_pixels(batch: Batch, view: str = "images") -> Images:
    """Return the pixels of a view, float32 0..255, after the colour jitter drawn for the image (if any)."""
    if "jitter_factors" in batch:
        return preprocess.color_jitter(
            batch[view], batch["jitter_factors"], batch["jitter_order"], batch["jitter_gray"]
        )
    return batch[view].astype(jnp.float32)


def normalized(images: Images, normalization: str) -> Images:
    """Return the network's input of pixels 0..255; `normalization` names the range (`preprocess.NORMALIZATIONS`)."""
    return preprocess.normalize(images, *preprocess.NORMALIZATIONS[normalization])


def encode(model: VQKD, variables: PyTree, images: Images) -> CodeIds:
    """Return the code id of every patch of pixels 0..255 by a frozen tokenizer; no gradient passes."""
    ids = model.apply(variables, preprocess.to_unit_range(images), method=VQKD.encode)
    return jax.lax.stop_gradient(ids)


def stored_features(frozen: PyTree, batch: Batch) -> TeacherFeatures:
    """Return the stored features of a batch, float32."""
    # what a store holds for an unreadable image is zeros, which have no direction and whose gradient is no number
    return jnp.where(batch["weight"][:, None, None] > 0, decode_features(batch), 1.0)


def code_losses(
    model: MaskedImageModel,
    params: PyTree,
    images: Images,
    mask: Mask,
    targets: Int[Array, "b m"],
    *,
    num_masked: int,
    train: bool,
    rngs: dict[str, jax.Array] | None = None,
) -> dict[str, tuple[Float[Array, "b m"], Bool[Array, "b m"]]]:
    """Return by branch ('final', 'aggregation') the loss of every masked patch in nats, and whether its code is hit.

    The model's `cross_entropy` says what of the logits is kept for the backward pass (`models.ops.cross_entropy`).
    """
    call = functools.partial(
        model.apply, {"params": params}, images, mask, num_masked=num_masked, train=train, rngs=rngs
    )
    if model.cross_entropy == "tiled":
        dtypes = {"dtype": jnp.dtype(model.dtype), "gradient_dtype": jnp.dtype(model.gradient_dtype)}
        return {
            name: head_cross_entropy(features, **params[model.output_layer_of(name)], labels=targets, **dtypes)
            for name, features in call(method=MaskedImageModel.masked_features).items()
        }
    cross_entropy = masked_cross_entropy
    if model.cross_entropy == "rounded":
        cross_entropy = functools.partial(rounded_cross_entropy, dtype=jnp.dtype(model.dtype))
    output = call()
    logits = {"final": output.logits, "aggregation": output.aggregation_logits}
    return {
        name: (cross_entropy(values, targets), jnp.argmax(values, axis=-1) == targets)
        for name, values in logits.items()
        if values is not None
    }


def mim_loss(
    model: MaskedImageModel,
    *,
    num_masked: int,
    normalization: str,
    code_ids: Callable[[PyTree, Batch, Images], CodeIds],
) -> Callable:
    """Return the `loss` of masked image modelling; `code_ids` of (frozen, batch, pixels 0..255) are the targets."""

    def loss(params, codebook, frozen, batch, key, step):
        images = view_pixels(batch)
        targets = gather_masked(code_ids(frozen, batch, images), batch["mask"], num_masked)
        weight, losses, metrics = batch["weight"], [], {}
        found = code_losses(
            model,
            params,
            normalized(images, normalization),
            batch["mask"],
            targets,
            num_masked=num_masked,
            train=True,
            rngs={"drop_path": key},
        )
        for name, (nll, hits) in found.items():
            losses.append(weighted_sum(nll, weight))
            metrics |= {f"{name}_loss": losses[-1], f"{name}_accuracy": weighted_sum(hits, weight)}
        return sum(losses), LossParts(weight.sum(), metrics)

    return loss


def vqkd_loss(model: VQKD, targets: Callable[[PyTree, Batch], TeacherFeatures]) -> Callable:
    """Return the `loss` of the tokenizer; `targets` of (frozen, batch) are the features to reconstruct."""

    def loss(params, codebook, frozen, batch, key, step):
        weight = batch["weight"]
        output = model.apply(
            {"params": params, "codebook": codebook},
            preprocess.to_unit_range(batch["images"]),
            weight,
            train=True,
            rngs={"drop_path": key},
        )
        distance = cosine_distillation(output.reconstruction, targets(frozen, batch))
        metrics = {
            "reconstruction_loss": weighted_sum(distance, weight),
            "commitment_loss": weighted_sum(output.commitment, weight),
        }
        return sum(metrics.values()), LossParts(weight.sum(), metrics, output.statistics)

    return loss


def vqkd_finish(ema_decay: float, window: int) -> Callable:
    """Return the `finish` that moves the codebook; training codes are counted over windows of `window` steps."""

    def finish(codebook, statistics, step):
        state = roll_window(codebook["quantizer"], step, window)
        state = updated_state(state, statistics, ema_decay)
        counts = jnp.where(step >= window, state["last_window_counts"], state["window_counts"])
        return {"quantizer": state}, {
            "codebook_usage": codebook_usage(counts),
            "codebook_perplexity": codebook_perplexity(counts),
        }

    return finish


def finetune_loss(
    model,
    *,
    num_classes: int,
    normalization: str,
    label_smoothing: float,
    mixup: float,
    cutmix: float,
    mix_probability: float,
    switch_probability: float,
    erasing: float,
) -> Callable:
    """Return the `loss` of classification; the last five say how images change inside the step, as `mixing` does."""

    def loss(params, codebook, frozen, batch, key, step):
        key_drop, key_erase, key_mix = jax.random.split(key, 3)
        images, labels, weight = normalized(view_pixels(batch), normalization), batch["labels"], batch["weight"]
        if erasing:
            images = mixing.random_erasing(images, key_erase, probability=erasing)
        targets = None
        if mixup or cutmix:
            images, targets = mixing.mix(
                images,
                smoothed_targets(labels, num_classes, label_smoothing),
                weight,
                key_mix,
                mixup=mixup,
                cutmix=cutmix,
                probability=mix_probability,
                switch_probability=switch_probability,
            )
            # what an image mostly shows counts as its label
            labels = jnp.argmax(targets, axis=-1)
        logits = model.apply({"params": params}, images, train=True, rngs={"drop_path": key_drop})
        if targets is None:
            cross_entropy = smoothed_cross_entropy(logits, labels, label_smoothing)
        else:
            cross_entropy = soft_cross_entropy(logits, targets)
        hits = jnp.argmax(logits, axis=-1) == labels
        metrics = {"accuracy": weighted_sum(hits, weight)}
        return weighted_sum(cross_entropy, weight), LossParts(weight.sum(), metrics)

    return loss


def normalized_inside(images: Images, sizes: Float[Array, "b 2"], normalization: str) -> Images:
    """Return the network's input of pixels 0..255, with zeros beyond the `sizes` (rows and columns) of each image."""
    rows, columns = (jnp.arange(length) < sizes[:, axis, None] for axis, length in enumerate(images.shape[1:3]))
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(inside, normalized(images, normalization), 0.0)


def segment_loss(model: Segmenter, *, normalization: str, auxiliary_weight: float, count_unlabelled: bool) -> Callable:
    """Return the `loss` of segmentation; its statistics are those of the batch norms, times the rows."""

    def loss(params, codebook, frozen, batch, key, step):
        key_drop, key_dropout = jax.random.split(key)
        pixels = preprocess.photometric_distortion(batch["images"], batch["distortion"])
        output, moved = model.apply(
            {"params": params, BATCH_STATS: codebook},
            normalized_inside(pixels, batch["sizes"], normalization),
            train=True,
            weight=batch["weight"],
            rngs={"drop_path": key_drop, "dropout": key_dropout},
            mutable=[BATCH_STATS],
        )
        total, pixel_count, metrics = segmentation_loss(
            output.logits,
            output.auxiliary_logits,
            batch["label_maps"].astype(jnp.int32),
            batch["weight"],
            auxiliary_weight=auxiliary_weight,
            count_unlabelled=count_unlabelled,
        )
        rows = batch["weight"].astype(jnp.float32).sum()
        statistics = {"rows": rows, BATCH_STATS: jax.tree.map(lambda of_rows: rows * of_rows, moved[BATCH_STATS])}
        return total, LossParts(pixel_count, metrics, statistics)

    return loss


def segment_finish(codebook, statistics, step):
    """Move the running statistics towards the mean of the micro-batches' own; rows that do not count move nothing."""
    rows = statistics["rows"]
    of_batch = jax.tree.map(lambda total: total / jnp.maximum(rows, 1.0), statistics[BATCH_STATS])
    moved = moved_statistics(codebook, of_batch)
    return jax.tree.map(lambda new, old: jnp.where(rows > 0, new, old), moved, codebook), {}
