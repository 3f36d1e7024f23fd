"""Stage 3, classification: fine-tune a pre-trained backbone on labels, or train a classifier from scratch.

The published recipe changes images in three places: random views and RandAugment on the host, random erasing, mixup and
CutMix inside the step (`config.augment`). Loss and metrics of data sets with several classes an image are those of
`multi_label`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.data.sources.label_sets import is_multi_label
from beitv2_jax.data.sources.labels import class_counts, log_classes
from beitv2_jax.errors import UserError
from beitv2_jax.models import mixing
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.tasks import inputs, multi_label
from beitv2_jax.tasks.api import LossParts, Task
from beitv2_jax.tasks.common import init_variables, layer_of, normalized, released_no_decay, view_pixels
from beitv2_jax.tasks.losses import smoothed_cross_entropy, smoothed_targets, soft_cross_entropy, weighted_sum


def make_model(config, compute: Compute) -> Classifier:
    """Build the classifier that a finetune config describes."""
    return Classifier.from_arguments({**config.model, "image_size": config.views.image_size}, compute)


def finetune_loss(
    model,
    *,
    num_classes: int,
    normalization: str,
    label_smoothing: float,
    class_weights: Float[np.ndarray, "k"] | None = None,
    **augment: float,
) -> Callable:
    """Return the `loss` of classification; `augment` says how images change in the step (`mixing.augmented`).

    With `class_weights` w the cross entropy of an image is multiplied by w[label], that of a mixture by
    lambda w[label] + (1 - lambda) w[partner's label]; smoothing of the labels does not enter. The loss is the sum over
    the number of images, as without them.
    """

    def loss(params, model_state, frozen, batch, key, step):
        key_drop, key_erase, key_mix = jax.random.split(key, 3)
        images, labels, weight = normalized(view_pixels(batch), normalization), batch["labels"], batch["weight"]
        targets, class_weight = None, None if class_weights is None else jnp.asarray(class_weights)[labels]
        if augment["mixup"] or augment["cutmix"]:
            targets = smoothed_targets(labels, num_classes, label_smoothing)
            if class_weight is not None:  # mixed like the targets
                targets = jnp.concatenate([targets, class_weight[:, None]], axis=1)
        images, targets = mixing.augmented(images, targets, weight, key_erase, key_mix, **augment)
        if targets is not None:
            if class_weight is not None:
                targets, class_weight = targets[:, :-1], targets[:, -1]
            # what an image mostly shows counts as its label
            labels = jnp.argmax(targets, axis=-1)
        logits = model.apply({"params": params}, images, train=True, rngs={"drop_path": key_drop})
        if targets is None:
            cross_entropy = smoothed_cross_entropy(logits, labels, label_smoothing)
        else:
            cross_entropy = soft_cross_entropy(logits, targets)
        if class_weight is not None:
            cross_entropy *= class_weight
        hits = jnp.argmax(logits, axis=-1) == labels
        metrics = {"accuracy": weighted_sum(hits, weight)}
        return weighted_sum(cross_entropy, weight), LossParts(weight.sum(), metrics)

    return loss


def logits_of(model: Classifier, normalization: str) -> Callable:
    """Return the function (params, batch) -> logits of an evaluation batch."""
    return lambda params, batch: model.apply(
        {"params": params}, normalized(view_pixels(batch), normalization), train=False
    )


def finetune_evaluation(logits_of: Callable) -> Callable:
    """Return the `evaluate` of classification: sums of what `judged` says of the rows, and their number."""

    def evaluate(params, model_state, frozen, batch):
        weight = batch["weight"].astype(jnp.float32)
        rows = judged(logits_of(params, batch), batch["labels"])
        return {**{name: jnp.sum(weight * values) for name, values in rows.items()}, "examples": weight.sum()}

    return evaluate


def judged(logits: Float[Array, "b k"], labels: Int[Array, "b"]) -> dict[str, Array]:
    """Return for each row whether the class of the largest logit is that of the label, and the nll in nats."""
    hits = jnp.argmax(logits, axis=-1) == labels
    return {"hits": hits, "nll": smoothed_cross_entropy(logits, labels, 0.0)}


def build(config) -> Task:
    """Build the classification task.

    Raises:
        UserError: the initial weights or the data set are missing, or do not fit the model.
    """
    inputs.check_implementations(config)
    initial = inputs.initial_variables(config, "classifier", make_model(config, Compute()))
    sources = inputs.open_labelled_sources(config)
    source = sources[0]
    if source.num_classes != config.model.num_classes:
        raise UserError(
            f"{source.name} has {source.num_classes} classes, the model {config.model.num_classes}.",
            "Did you set num_classes for another data set?",
            f"Write --config.model.num_classes={source.num_classes}.",
        )
    log_classes(*sources)
    class_weights = None
    if config.get("class_weights", "none") == "balanced":
        counts = class_counts(source)
        if is_multi_label(source):  # each class is a problem of two: without it, and with it
            pairs = [balanced_class_weights(np.array([len(source) - count, count])) for count in counts]
            class_weights = np.stack(pairs, axis=1)
        else:
            class_weights = balanced_class_weights(counts)
    return make_task(config, inputs.Opened(sources, initial=initial, class_weights=class_weights))


def balanced_class_weights(counts: Int[np.ndarray, "k"]) -> Float[np.ndarray, "k"]:
    """Return n / (m counts[c]) for each class c with images, for n images in m such classes; 0 for the others.

    The weights of all images of a class have the same sum for every class, and the mean over the images is 1.

    Source: scikit-learn's `compute_class_weight("balanced")`.
    """
    present = counts > 0
    weights = np.zeros(len(counts), np.float32)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the classification task on data that are open."""
    source, eval_source = opened.sources
    model = make_model(config, inputs.compute(config))
    logits = logits_of(model, config.normalization)
    changes = {
        "normalization": config.normalization,
        "label_smoothing": config.label_smoothing,
        "mixup": config.augment.mixup,
        "cutmix": config.augment.cutmix,
        "mix_probability": config.augment.mix_probability,
        "switch_probability": config.augment.switch_probability,
        "erasing": config.augment.erasing,
        "class_weights": opened.class_weights,
    }
    if is_multi_label(source):
        of_labels = {
            "loss": multi_label.multi_label_loss(model, **changes),
            "evaluate": multi_label.multi_label_evaluation(logits),
            "summarize": functools.partial(multi_label.summarize, source.class_names),
        }
    else:
        of_labels = {
            "loss": finetune_loss(model, num_classes=config.model.num_classes, **changes),
            "evaluate": finetune_evaluation(logits),
            "summarize": summarize,
        }
    image_shape = (1, config.views.image_size, config.views.image_size, 3)
    return Task(
        name="finetune",
        init=lambda key: init_variables(model, key, jnp.zeros(image_shape), train=False),
        initial=opened.initial,
        frozen={},
        sources=opened.sources,
        train_batches=inputs.train_batches(config, source, randaugment=rand_augment(config)),
        eval_batches=functools.partial(inputs.eval_batches, eval_source, config),
        no_decay=released_no_decay,
        layer_of=functools.partial(layer_of, depth=config.model.depth),
        num_layers=config.model.depth,
        **of_labels,
    )


def rand_augment(config) -> RandAugment | None:
    """Return the RandAugment of a finetune config; None where it has no operations."""
    augment = config.augment
    if not augment.randaugment_ops:
        return None
    return RandAugment(augment.randaugment_ops, augment.randaugment_magnitude, augment.randaugment_std)


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return top-1 accuracy and negative log likelihood (nats) of an evaluation."""
    return {"accuracy": float(sums["hits"] / sums["examples"]), "loss": float(sums["nll"] / sums["examples"])}
