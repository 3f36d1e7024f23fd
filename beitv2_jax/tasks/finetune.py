"""Stage 3, classification: train a classifier on labels, here from scratch (the quickstart's teacher is one)."""

import functools

import jax.numpy as jnp
import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.models import preprocess
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import Task
from beitv2_jax.tasks.losses import accuracy, smoothed_cross_entropy


def make_model(config) -> Classifier:
    """Build the classifier described by a finetune config."""
    return Classifier(image_size=config.views.image_size, **config.efficiency, **config.model.to_dict())


def build(config) -> Task:
    """Build the classification task.

    Raises:
        UserError: the data set is missing or has no labels, or its class count differs from the model's.
    """
    source, eval_source = inputs.open_sources(config)
    if source.num_classes != config.model.num_classes:
        raise UserError(
            f"{source.name} has {source.num_classes} classes, the model {config.model.num_classes}.",
            "num_classes belongs to another data set.",
            f"--config.model.num_classes={source.num_classes}",
        )
    model = make_model(config)

    def student_images(batch):
        return preprocess.normalize(inputs.view_pixels(batch), *preprocess.NORMALIZATIONS[config.normalization])

    def loss(params, codebook, frozen, batch, key, step):
        logits = model.apply({"params": params}, student_images(batch), train=True, rngs={"drop_path": key})
        cross_entropy = smoothed_cross_entropy(logits, batch["labels"], config.label_smoothing).mean()
        return cross_entropy, (codebook, {"accuracy": accuracy(logits, batch["labels"])})

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
        train_batches=inputs.train_batches(config, source),
        eval_batches=functools.partial(inputs.eval_batches, eval_source, config),
        evaluate=evaluate,
        summarize=summarize,
        no_decay=inputs.released_no_decay,
        layer_of=functools.partial(layer_of, depth=config.model.depth),
        num_layers=config.model.depth,
    )


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
