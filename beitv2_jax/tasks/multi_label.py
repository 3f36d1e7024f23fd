"""Classification where an image may have several classes: loss, metrics and evaluation, one sigmoid for each class.

The stage `finetune` takes them where its data set is multi-label; everything else of it stays as it is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float

from beitv2_jax.errors import listed
from beitv2_jax.models import mixing
from beitv2_jax.tasks.api import LossParts, Rows
from beitv2_jax.tasks.common import normalized, view_pixels
from beitv2_jax.tasks.losses import weighted_sum

THRESHOLD = 0.5
"""Probability from which on a class counts as predicted."""


def binary_cross_entropy(
    logits: Float[Array, "b k"],
    targets: Float[Array, "b k"],
    label_smoothing: float,
    class_weights: Float[Array, "2 k"] | None = None,
) -> Float[Array, "b k"]:
    """Return w (-y log p - (1 - y) log(1 - p)) of every class, in nats, with p = sigmoid(logit) and y smoothed.

        y = (1 - s) target + s / 2
        w = (1 - target) class_weights[0] + target class_weights[1], which smoothing does not enter; 1 without them

    Source: label smoothing of two classes, as in Keras's BinaryCrossentropy.
    """
    smoothed = (1.0 - label_smoothing) * targets + label_smoothing / 2
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), smoothed)
    if class_weights is None:
        return cross_entropy
    negative, positive = class_weights
    return cross_entropy * (negative + targets * (positive - negative))


def multi_label_loss(
    model,
    *,
    normalization: str,
    label_smoothing: float,
    class_weights: Float[np.ndarray, "2 k"] | None = None,
    **augment: float,
) -> Callable:
    """Return the `loss` of multi-label classification: `binary_cross_entropy`, in the mean over the classes.

    The arguments are those of `finetune.finetune_loss`; mixed images have mixed targets. `precision_at_1` is the
    fraction of images whose most probable class is one of theirs, of a mixture by its share.

    Source: the baseline of Ridnik et al. 2021 (Asymmetric Loss); `BinaryCrossEntropy` of timm.
    """

    def loss(params, model_state, frozen, batch, key, step):
        key_drop, key_erase, key_mix = jax.random.split(key, 3)
        images, targets, weight = normalized(view_pixels(batch), normalization), batch["labels"], batch["weight"]
        images, targets = mixing.augmented(images, targets, weight, key_erase, key_mix, **augment)
        logits = model.apply({"params": params}, images, train=True, rngs={"drop_path": key_drop})
        cross_entropy = binary_cross_entropy(logits, targets, label_smoothing, class_weights)
        hits = jnp.take_along_axis(targets, jnp.argmax(logits, axis=-1)[:, None], axis=-1)
        metrics = {"precision_at_1": weighted_sum(hits, weight)}
        return weighted_sum(cross_entropy, weight), LossParts(weight.sum(), metrics)

    return loss


def multi_label_evaluation(logits_of: Callable) -> Callable:
    """Return the `evaluate` of multi-label classification: logits and labels of all rows, which `summarize` judges."""

    def evaluate(params, model_state, frozen, batch):
        return {"rows": Rows({"logits": logits_of(params, batch), "labels": batch["labels"]}, batch["weight"])}

    return evaluate


class Judged(NamedTuple):
    """What the predictions of every class are worth; NaN for a class without positives.

    Attributes:
        positives: images that have the class.
        average_precision: see `average_precisions`.
        precision, recall, f1: of the predictions of at least `THRESHOLD`; the precision of no predictions is 0.
        micro_f1: F1 of the decisions on all classes together.
    """

    positives: Float[np.ndarray, "k"]
    average_precision: Float[np.ndarray, "k"]
    precision: Float[np.ndarray, "k"]
    recall: Float[np.ndarray, "k"]
    f1: Float[np.ndarray, "k"]
    micro_f1: float

    @property
    def means(self) -> dict[str, float]:
        """Means over the classes that have positives, NaN where none has, and the F1 of all decisions."""
        return {
            "mean_average_precision": _mean(self.average_precision),
            "macro_f1": _mean(self.f1),
            "micro_f1": self.micro_f1,
        }


def judge(logits: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]) -> Judged:
    """Compare the logits of all images with their labels, by arithmetic in NumPy."""
    is_positive, predicted = labels > 0, logits >= np.log(THRESHOLD / (1 - THRESHOLD))
    hits, positives = (is_positive & predicted).sum(axis=0), is_positive.sum(axis=0)
    predictions, exists = predicted.sum(axis=0), positives > 0

    def of_classes(numerator, denominator):
        return np.where(exists, numerator / np.maximum(denominator, 1), np.nan)

    return Judged(
        positives,
        average_precisions(logits, is_positive),
        precision=of_classes(hits, predictions),
        recall=of_classes(hits, positives),
        f1=of_classes(2 * hits, positives + predictions),
        micro_f1=float(2 * hits.sum() / max(1, positives.sum() + predictions.sum())),
    )


def average_precisions(
    scores: Float[np.ndarray, "n k"], is_positive: Bool[np.ndarray, "n k"]
) -> Float[np.ndarray, "k"]:
    """Return the average precision of each class, the area under its curve of precision over recall without
    interpolation; NaN for a class without positives.

        AP = sum over thresholds t of (recall_t - recall_(t-1)) precision_t,   from the highest score to the lowest

    Images of one score are one threshold, so their order does not matter.

    Source: scikit-learn's `average_precision_score`; without equal scores the mean of the precision at every positive,
    as multi-label results on COCO and VOC are reported.
    """
    found = np.full(scores.shape[1], np.nan)
    for label in np.flatnonzero(is_positive.any(axis=0)):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked = scores[order, label]
        last_of_score = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        hits = np.cumsum(is_positive[order, label])[last_of_score]
        found[label] = np.sum(np.diff(hits, prepend=0) * hits / (last_of_score + 1)) / hits[-1]
    return found


def summarize(class_names: Sequence[str], sums: dict[str, Rows]) -> dict[str, float]:
    """Return `Judged.means` and the binary cross entropy (nats, in the mean over images and classes) of an evaluation.

    The log names once the classes that no image has, of which there is no average precision.
    """
    logits, labels = (sums["rows"].values[name].astype(np.float64) for name in ("logits", "labels"))
    found = judge(logits, labels)
    if empty := tuple(name for name, count in zip(class_names, found.positives, strict=True) if not count):
        _warn_of_empty(empty)
    return {**found.means, "loss": mean_cross_entropy(logits, labels)}


def mean_cross_entropy(logits: Float[np.ndarray, "n k"], labels: Float[np.ndarray, "n k"]) -> float:
    """Return the binary cross entropy in nats, in the mean over images and classes."""
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


@functools.cache  # every evaluation meets them
def _warn_of_empty(names: tuple[str, ...]) -> None:
    logging.warning("no image of the evaluation has these classes, which no mean counts: %s", listed(names))


def _mean(values: Float[np.ndarray, "k"]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else math.nan
