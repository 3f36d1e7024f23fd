"""Stage 3, classification: fine-tune a pre-trained backbone on labels, or train a classifier from scratch.

The published recipe changes images in three places: random views and RandAugment on the host, random erasing, mixup and
CutMix inside the step (`config.augment`).
"""

import functools

import jax.numpy as jnp
import numpy as np

from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.errors import UserError
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import Task
from beitv2_jax.tasks.losses import smoothed_cross_entropy
from beitv2_jax.tasks.objectives import (
    finetune_loss,
    init_variables,
    layer_of,
    normalized,
    released_no_decay,
    view_pixels,
)


def make_model(config) -> Classifier:
    """Build the classifier described by a finetune config."""
    compute = inputs.compute_arguments(config)
    return Classifier(image_size=config.views.image_size, **compute, **config.model.to_dict())


def build(config) -> Task:
    """Build the classification task.

    Raises:
        UserError: the data set is missing or has no labels, or its class count differs from the model's.
    """
    sources = inputs.open_sources(config)
    source = sources[0]
    if source.num_classes != config.model.num_classes:
        raise UserError(
            f"{source.name} has {source.num_classes} classes, the model {config.model.num_classes}.",
            "num_classes belongs to another data set.",
            f"--config.model.num_classes={source.num_classes}",
        )
    return make_task(config, inputs.Opened(sources))


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the classification task on data that are open."""
    source, eval_source = opened.sources
    model = make_model(config)

    def evaluate(params, codebook, frozen, batch):
        logits = model.apply({"params": params}, normalized(view_pixels(batch), config.normalization), train=False)
        weight = batch["weight"].astype(jnp.float32)
        hits = jnp.argmax(logits, axis=-1) == batch["labels"]
        nll = smoothed_cross_entropy(logits, batch["labels"], 0.0)
        return {"hits": jnp.sum(weight * hits), "nll": jnp.sum(weight * nll), "examples": weight.sum()}

    image_shape = (1, config.views.image_size, config.views.image_size, 3)
    return Task(
        name="finetune",
        init=lambda key: init_variables(model, key, jnp.zeros(image_shape), train=False),
        initial=inputs.initial_variables(config, "classifier", model),
        loss=finetune_loss(
            model,
            num_classes=config.model.num_classes,
            normalization=config.normalization,
            label_smoothing=config.label_smoothing,
            mixup=config.augment.mixup,
            cutmix=config.augment.cutmix,
            mix_probability=config.augment.mix_probability,
            switch_probability=config.augment.switch_probability,
            erasing=config.augment.erasing,
        ),
        frozen={},
        num_train_examples=len(source),
        splits=(source.split, eval_source.split),
        train_batches=inputs.train_batches(config, source, randaugment=rand_augment(config)),
        eval_batches=functools.partial(inputs.eval_batches, eval_source, config),
        evaluate=evaluate,
        summarize=summarize,
        no_decay=released_no_decay,
        layer_of=functools.partial(layer_of, depth=config.model.depth),
        num_layers=config.model.depth,
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
