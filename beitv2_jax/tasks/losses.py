"""Losses of the stages, each a pure function of arrays; all are computed in float32."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from beitv2_jax.data.segmentation.labels import IGNORED
from beitv2_jax.models.upernet import resize
from beitv2_jax.typing import Scalar, TeacherFeatures


def cosine_distillation(reconstruction: TeacherFeatures, teacher_features: TeacherFeatures) -> Float[Array, "b n"]:
    """Return 1 - cos(reconstruction, teacher_features) of every patch, in [0, 2].

    Norms are divided by plainly, without an epsilon, as released. Source: BEiT v2 section 2.2; the released loss is the
    mean of this over batch and patches.
    """
    reconstruction = reconstruction.astype(jnp.float32)
    teacher_features = teacher_features.astype(jnp.float32)
    product = jnp.sum(reconstruction * teacher_features, axis=-1)
    norms = jnp.linalg.norm(reconstruction, axis=-1) * jnp.linalg.norm(teacher_features, axis=-1)
    return 1.0 - product / norms


def masked_cross_entropy(logits: Float[Array, "b m k"], code_ids: Int[Array, "b m"]) -> Float[Array, "b m"]:
    """Return -log softmax(logits)[code_ids] of every masked patch, in nats (chance: ln k).

    Source: BEiT v2 equation 7; the released loss is the mean over all masked patches of the batch.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), code_ids)


def smoothed_cross_entropy(
    logits: Float[Array, "b k"], labels: Int[Array, "b"], label_smoothing: float
) -> Float[Array, "b"]:
    """Return (1 - s) * nll + s * mean over classes of -log p, in nats, with s = `label_smoothing` (probability)."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    return (1.0 - label_smoothing) * nll - label_smoothing * log_probabilities.mean(axis=-1)


def smoothed_targets(
    labels: Int[Array, "b"], num_classes: int, label_smoothing: float
) -> Float[Array, "b {num_classes}"]:
    """Return smoothed one-hot labels: s / k for every class, and 1 - s more for the class of the label."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def soft_cross_entropy(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, "b"]:
    """Return - sum over classes of target * log p, in nats.

    With `smoothed_targets` this is `smoothed_cross_entropy`; with mixed ones it is the loss of mixup and CutMix.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def accuracy(logits: Float[Array, "*b k"], labels: Int[Array, "*b"]) -> Scalar:
    """Return the fraction of arg-max hits, in [0, 1]."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def weighted_sum(values: Float[Array, "b ..."], weight: Float[Array, "b"]) -> Scalar:
    """Return the sum over the rows of `weight[i]` times the mean of `values[i]`.

    Divided by the sum of the weights it is the mean over batch and patches. Rows of weight 0 are unreadable images:
    their values do not matter, be they infinite or not a number, and no gradient passes through them.
    """
    values = values.astype(jnp.float32)
    counted = weight.astype(jnp.float32).reshape(-1, *(1,) * (values.ndim - 1))
    total = jnp.sum(jnp.where(counted > 0, counted * values, 0.0))
    return total / (values.size // values.shape[0])


def segmentation_loss(
    logits: Float[Array, "b h w k"],
    auxiliary_logits: Float[Array, "b p q k"],
    labels: Int[Array, "b H W"],
    weight: Float[Array, "b"],
    *,
    auxiliary_weight: float = 0.4,
    count_unlabelled: bool = True,
) -> tuple[Scalar, Scalar, dict[str, Scalar]]:
    """Return decode + auxiliary_weight * auxiliary cross entropy in nats, the pixels that count, and metrics; all sums.

    Divided by the pixels they are means over the rows of `weight` above 0. Both logits are resized to the label map
    first. Pixels of the label 255 have no loss and are never hit, but count, unless `count_unlabelled` is off.
    `auxiliary_loss` is returned with its weight, as released.

    Source: mmsegmentation 0.11, which counts the ignored pixels in its means. PyTorch's own cross entropy does not.
    """
    counted = jnp.broadcast_to(weight.astype(jnp.float32)[:, None, None], labels.shape)
    if not count_unlabelled:
        counted = jnp.where(labels != IGNORED, counted, 0.0)
    metrics, factors = {}, {"decode": 1.0, "auxiliary": auxiliary_weight}
    for (name, factor), maps in zip(factors.items(), (logits, auxiliary_logits), strict=True):
        maps = resize(maps, labels.shape[1:])
        metrics[f"{name}_loss"] = factor * counted_sum(pixel_cross_entropy(maps, labels), counted)
        metrics[f"{name}_accuracy"] = counted_sum(jnp.argmax(maps, axis=-1) == labels, counted)
    return metrics["decode_loss"] + metrics["auxiliary_loss"], counted.sum(), metrics


def pixel_cross_entropy(logits: Float[Array, "b H W k"], labels: Int[Array, "b H W"]) -> Float[Array, "b H W"]:
    """Return -log softmax(logits)[label] of every pixel, in nats, and 0 at pixels of the label 255."""
    seen = labels != IGNORED
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(seen, labels, 0))
    return jnp.where(seen, nll, 0.0)


def counted_sum(values: Float[Array, "b H W"], counted: Float[Array, "b H W"]) -> Scalar:
    """Return the sum of `values` times `counted`; where that is 0 a value does not matter, be it no number."""
    return jnp.sum(jnp.where(counted > 0, counted * values.astype(jnp.float32), 0.0))
