"""Losses of the stages, each a pure function of arrays; all are computed in float32."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

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
    """Return the probabilities that a label stands for: s / k for every class, 1 - s more for its own."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def soft_cross_entropy(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, "b"]:
    """Return - sum over classes of target * log p, in nats.

    With `smoothed_targets` this is `smoothed_cross_entropy`; with mixed ones it is the loss of mixup and CutMix.
    """
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def accuracy(logits: Float[Array, "*b k"], labels: Int[Array, "*b"]) -> Scalar:
    """Return the share of arg-max hits, in [0, 1]."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def weighted_mean(values: Float[Array, "b ..."], weight: Float[Array, "b"]) -> Scalar:
    """Return the mean of `values` over the global batch, row i counting `weight[i]` times; 0 if no row counts.

    With all weights 1 this is the plain mean. Rows of weight 0 are unreadable images: their values do not matter, be
    they infinite or not a number, and no gradient passes through them.
    """
    values = values.astype(jnp.float32)
    counted = weight.astype(jnp.float32).reshape(-1, *(1,) * (values.ndim - 1))
    total = jnp.sum(jnp.where(counted > 0, counted * values, 0.0))
    per_row = values.size // values.shape[0]
    return total / jnp.maximum(per_row * counted.sum(), 1.0)


def segmentation_loss(
    logits: Float[Array, "b h w k"],
    auxiliary_logits: Float[Array, "b p q k"],
    labels: Int[Array, "b H W"],
    *,
    auxiliary_weight: float = 0.4,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Return decode + auxiliary_weight * auxiliary cross entropy, in nats, and figures of both heads.

    Both logits are resized to the label map first. `auxiliary_loss` is returned with its weight, as released.
    """
    logits, auxiliary_logits = (resize(maps, labels.shape[1:]) for maps in (logits, auxiliary_logits))
    decode = pixel_cross_entropy(logits, labels)
    auxiliary = auxiliary_weight * pixel_cross_entropy(auxiliary_logits, labels)
    return decode + auxiliary, {
        "decode_loss": decode,
        "auxiliary_loss": auxiliary,
        "decode_accuracy": accuracy(logits, labels),
        "auxiliary_accuracy": accuracy(auxiliary_logits, labels),
    }


def pixel_cross_entropy(
    logits: Float[Array, "b H W k"], labels: Int[Array, "b H W"], ignored_label: int = 255
) -> Scalar:
    """Return the mean over all pixels of -log softmax(logits)[label], in nats, with 0 at pixels of `ignored_label`.

    Source: mmsegmentation 0.11, which counts the ignored pixels in the mean (and in its accuracy, where they are never
    hit). Differs from PyTorch's own cross entropy, which leaves them out of sum and count.
    """
    seen = labels != ignored_label
    nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(seen, labels, 0))
    return jnp.mean(jnp.where(seen, nll, 0.0))
