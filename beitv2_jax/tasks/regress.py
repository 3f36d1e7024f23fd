"""Regress: MIM without a tokenizer, on the pixels of hidden patches or on the teacher's features of them.

The masked transformer, its masks and its views are those of the stage mim; only what is predicted differs. Of a hidden
patch with normalised pixels x, the target is (x - mean(x)) / sqrt(var(x) + 1e-6) and the loss the mean squared error;
with stored features f it is 1 - cos(prediction, f), the loss of VQ-KD without its codebook.

Source: He et al. 2021, Masked autoencoders (arXiv 2111.06377), for pixels, here in a transformer that sees the hidden
patches as mask tokens; Wei et al. 2022, MVP (arXiv 2203.05175) and Fang et al. 2022, EVA (arXiv 2211.07636), for
features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from beitv2_jax.data.target_cache.encoding import FEATURES
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.mim import MaskedRegressor, gather_masked
from beitv2_jax.models.preprocess import patches_of
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks import targets as targets_lib
from beitv2_jax.tasks.api import Batch, LossParts, Task
from beitv2_jax.tasks.common import normalized, view_pixels
from beitv2_jax.tasks.losses import cosine_distillation, weighted_sum
from beitv2_jax.tasks.mim import masked_task, patch_grid
from beitv2_jax.tasks.vqkd import stored_features
from beitv2_jax.typing import Images, PyTree

EPSILON = 1e-6
"""Of the variance of a patch. Source: the released code of He et al."""

Targets = Float[Array, "b m t"]


def make_model(config, compute: Compute, *, target_width: int | None = None) -> MaskedRegressor:
    """Build the model that a regress config describes; `target_width` is that of the features, None for pixels."""
    arguments = {**config.model, "image_size": config.views.image_size, "target_width": target_width}
    return MaskedRegressor.from_arguments(arguments, compute)


def normalised_patches(images: Images, grid: tuple[int, int]) -> Float[Array, "b n p"]:
    """Return the values of each patch minus their mean, divided by sqrt(their variance + 1e-6)."""
    patches = patches_of(images, grid)
    centred = patches - patches.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)


def squared_error(predictions: Targets, targets: Targets) -> Float[Array, "b m"]:
    """Return the mean over its values of the squared error of every patch."""
    return jnp.mean((predictions.astype(jnp.float32) - targets) ** 2, axis=-1)


def regression_losses(
    model: MaskedRegressor, *, num_masked: int, normalization: str, of_features: bool
) -> Callable[..., dict[str, Float[Array, "b m"]]]:
    """Return (params, batch, ...) -> by branch ('final', 'aggregation') the loss of every hidden patch."""

    def losses(params: PyTree, batch: Batch, *, train: bool, rngs: dict[str, jax.Array] | None = None):
        images, mask = normalized(view_pixels(batch), normalization), batch["mask"]
        targets = stored_features({}, batch) if of_features else normalised_patches(images, model.backbone.grid)
        targets = gather_masked(targets, mask, num_masked)
        predictions = model.apply({"params": params}, images, mask, num_masked=num_masked, train=train, rngs=rngs)
        distance = cosine_distillation if of_features else squared_error
        return {name: distance(values, targets) for name, values in predictions.items()}

    return losses


def regress_loss(losses: Callable[..., dict[str, Float[Array, "b m"]]]) -> Callable:
    """Return the `loss` of the task; `losses` are those of `regression_losses`."""

    def loss(params, model_state, frozen, batch, key, step):
        weight = batch["weight"]
        found = losses(params, batch, train=True, rngs={"drop_path": key})
        metrics = {f"{name}_loss": weighted_sum(values, weight) for name, values in found.items()}
        return sum(metrics.values()), LossParts(weight.sum(), metrics)

    return loss


def regress_evaluation(losses: Callable[..., dict[str, Float[Array, "b m"]]]) -> Callable:
    """Return the `evaluate` of the task; `losses` are those of `regression_losses`."""

    def evaluate(params, model_state, frozen, batch):
        weight = batch["weight"].astype(jnp.float32)
        found = losses(params, batch, train=False)
        return {"images": weight.sum(), **{f"{name}_loss": weighted_sum(each, weight) for name, each in found.items()}}

    return evaluate


def build(config) -> Task:
    """Build the task.

    Raises:
        UserError: the data set or the stored features are missing, or the features are of other views or patches.
    """
    inputs.check_implementations(config)
    return make_task(config, open_inputs(config))


def open_inputs(config) -> inputs.Opened:
    """Open the initial weights, the stored features, if there are any, and the data; raises as `build` does."""
    folder, target_width = config.teacher.features, None
    if folder:
        manifest = targets_lib.manifest_of(folder, FEATURES)
        check_features(config, manifest)
        target_width = manifest["teacher_width"]
    initial = inputs.initial_variables(config, "regressor", make_model(config, Compute(), target_width=target_width))
    sources = inputs.open_sources(config)
    stored = targets_lib.open_cache(folder, config, sources, FEATURES, patch_grid(config)) if folder else (None, None)
    return inputs.Opened(sources, stored, initial=initial)


def check_features(config, manifest: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored features that the config names are those of its views and patches."""
    targets_lib.check_targets(manifest, config.teacher.features, config, FEATURES, patch_grid(config))


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the task on inputs that are open."""
    reader, _ = opened.stored
    target_width = None if reader is None else reader.manifest["teacher_width"]
    model = make_model(config, inputs.compute(config), target_width=target_width)
    losses = regression_losses(
        model,
        num_masked=config.masking.num_masked,
        normalization=config.normalization,
        of_features=reader is not None,
    )
    return masked_task(
        config,
        opened,
        model,
        name="regress",
        loss=regress_loss(losses),
        evaluate=regress_evaluation(losses),
        summarize=summarize,
    )


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the losses, each the mean over all hidden patches."""
    return {key: float(value / sums["images"]) for key, value in sums.items() if key != "images"}
