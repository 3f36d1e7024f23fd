"""Stage 3, classification: fine-tune a pre-trained backbone on labels, or train a classifier from scratch.

The published recipe changes images in three places: random views and RandAugment on the host, random erasing, mixup and
CutMix inside the step (`config.augment`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from beitv2_jax.data.randaugment import RandAugment
from beitv2_jax.errors import UserError
from beitv2_jax.models import mixing, preprocess
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import Task
from beitv2_jax.tasks.losses import smoothed_cross_entropy, smoothed_targets, soft_cross_entropy, weighted_mean


def make_model(config) -> Classifier:
    """Build the classifier described by a finetune config."""
    return Classifier(image_size=config.views.image_size, **config.efficiency, **config.model.to_dict())


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

    def student_images(batch):
        return preprocess.normalize(inputs.view_pixels(batch), *preprocess.NORMALIZATIONS[config.normalization])

    augment = config.augment

    def mixed(images, labels, weight, key):
        """Return images and their targets after mixup or CutMix."""
        targets = smoothed_targets(labels, config.model.num_classes, config.label_smoothing)
        return mixing.mix(
            images,
            targets,
            weight,
            key,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            probability=augment.mix_probability,
            switch_probability=augment.switch_probability,
        )

    def loss(params, codebook, frozen, batch, key, step):
        key_drop, key_erase, key_mix = jax.random.split(key, 3)
        images, labels, weight = student_images(batch), batch["labels"], batch["weight"]
        if augment.erasing:
            images = mixing.random_erasing(images, key_erase, probability=augment.erasing)
        targets = None
        if augment.mixup or augment.cutmix:
            images, targets = mixed(images, labels, weight, key_mix)
            # what an image mostly shows counts as its label
            labels = jnp.argmax(targets, axis=-1)
        logits = model.apply({"params": params}, images, train=True, rngs={"drop_path": key_drop})
        if targets is None:
            cross_entropy = smoothed_cross_entropy(logits, labels, config.label_smoothing)
        else:
            cross_entropy = soft_cross_entropy(logits, targets)
        hits = jnp.argmax(logits, axis=-1) == labels
        return weighted_mean(cross_entropy, weight), (codebook, {"accuracy": weighted_mean(hits, weight)})

    def evaluate(params, codebook, frozen, batch):
        logits = model.apply({"params": params}, student_images(batch), train=False)
        weight = batch["weight"].astype(jnp.float32)
        hits = jnp.argmax(logits, axis=-1) == batch["labels"]
        nll = smoothed_cross_entropy(logits, batch["labels"], 0.0)
        return {"hits": jnp.sum(weight * hits), "nll": jnp.sum(weight * nll), "examples": weight.sum()}

    image_shape = (1, config.views.image_size, config.views.image_size, 3)
    return Task(
        name="finetune",
        init=lambda key: inputs.init_variables(model, key, jnp.zeros(image_shape), train=False),
        initial=inputs.initial_variables(config, "classifier", model),
        loss=loss,
        frozen={},
        num_train_examples=len(source),
        splits=(source.split, eval_source.split),
        train_batches=inputs.train_batches(config, source, randaugment=rand_augment(config)),
        eval_batches=functools.partial(inputs.eval_batches, eval_source, config),
        evaluate=evaluate,
        summarize=summarize,
        no_decay=inputs.released_no_decay,
        layer_of=functools.partial(layer_of, depth=config.model.depth),
        num_layers=config.model.depth,
    )


def rand_augment(config) -> RandAugment | None:
    """Return the RandAugment of a finetune config; None where it has no operations."""
    augment = config.augment
    if not augment.randaugment_ops:
        return None
    return RandAugment(augment.randaugment_ops, augment.randaugment_magnitude, augment.randaugment_std)


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


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return top-1 accuracy and negative log likelihood (nats) of an evaluation."""
    return {"accuracy": float(sums["hits"] / sums["examples"]), "loss": float(sums["nll"] / sums["examples"])}
