"""Stage 2, MIM: predict the codes of hidden patches, from the last layer and through the patch-aggregation head.

Code ids come either from the store that the tokenize stage wrote (`tokenizer.codes`) or from the tokenizer inside the
step (`tokenizer.run`). Both see the same pixels, colour jitter included, as in the released recipe.
"""

import functools

import jax.numpy as jnp
import numpy as np

from beitv2_jax.errors import UserError
from beitv2_jax.models import preprocess
from beitv2_jax.models.mim import MaskedImageModel, gather_masked
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import Task
from beitv2_jax.tasks.losses import accuracy, masked_cross_entropy
from beitv2_jax.tasks.tokenize import load_tokenizer


def make_model(config, *, dtype: str, remat: bool = False) -> MaskedImageModel:
    """Build the masked image model described by a mim config."""
    return MaskedImageModel(image_size=config.views.image_size, dtype=dtype, remat=remat, **config.model.to_dict())


def mask_arguments(config) -> dict:
    """Return the keyword arguments of `block_mask`; `max_patches=0` in the config means no limit below `num_masked`."""
    masking = config.masking
    return {
        "num_masked": masking.num_masked,
        "min_patches": masking.min_patches,
        "max_patches": masking.max_patches or None,
    }


def build(config) -> Task:
    """Build the MIM task.

    Raises:
        UserError: the data set, code store or tokenizer is missing, or the tokenizer does not fit the model.
    """
    source, eval_source = inputs.open_sources(config)
    model = make_model(config, **config.efficiency)
    grid = (config.views.image_size // config.model.patch_size,) * 2
    tokenizer, frozen, stored = None, {}, (None, None)
    if config.tokenizer.codes:
        stored = inputs.open_store(config.tokenizer.codes, config, (source, eval_source), grid)
        codebook_size = stored[0].card["codebook_size"]
    else:
        tokenizer, frozen["tokenizer"] = load_tokenizer(
            config.tokenizer.run, config.views.image_size, config.efficiency.dtype
        )
        _check_grid(tokenizer, grid, config)
        codebook_size = tokenizer.model.codebook_size
    if codebook_size != config.model.codebook_size:
        raise UserError(
            f"The tokenizer has {codebook_size} codes, the model predicts {config.model.codebook_size}.",
            "the tokenizer was trained with another codebook_size.",
            f"--config.model.codebook_size={codebook_size}",
        )

    def code_ids(frozen, batch, images):
        return (
            batch["code_ids"].astype(jnp.int32) if tokenizer is None else tokenizer.encode(frozen["tokenizer"], images)
        )

    def student_images(images):
        return preprocess.normalize(images, *preprocess.NORMALIZATIONS[config.normalization])

    def loss(params, codebook, frozen, batch, key, step):
        images = inputs.view_pixels(batch)
        output = model.apply(
            {"params": params},
            student_images(images),
            batch["mask"],
            num_masked=config.masking.num_masked,
            train=True,
            rngs={"drop_path": key},
        )
        targets = gather_masked(code_ids(frozen, batch, images), batch["mask"], config.masking.num_masked)
        total = final = masked_cross_entropy(output.logits, targets).mean()
        metrics = {"final_loss": final, "final_accuracy": accuracy(output.logits, targets)}
        if output.aggregation_logits is not None:
            aggregated = masked_cross_entropy(output.aggregation_logits, targets).mean()
            total = final + aggregated
            metrics["aggregation_loss"] = aggregated
            metrics["aggregation_accuracy"] = accuracy(output.aggregation_logits, targets)
        return total, (codebook, metrics)

    def evaluate(params, codebook, frozen, batch):
        images = batch["images"].astype(jnp.float32)
        num_masked = config.masking.num_masked
        output = model.apply(
            {"params": params}, student_images(images), batch["mask"], num_masked=num_masked, train=False
        )
        targets = gather_masked(code_ids(frozen, batch, images), batch["mask"], num_masked)
        weight = jnp.broadcast_to(batch["weight"].astype(jnp.float32)[:, None], targets.shape)
        sums = {"patches": weight.sum(), "counts": jnp.zeros(config.model.codebook_size).at[targets].add(weight)}
        for name, logits in (("final", output.logits), ("aggregation", output.aggregation_logits)):
            if logits is not None:
                sums[f"{name}_loss"] = jnp.sum(weight * masked_cross_entropy(logits, targets))
                sums[f"{name}_accuracy"] = jnp.sum(weight * (jnp.argmax(logits, axis=-1) == targets))
        return sums

    masking = mask_arguments(config)
    eval_targets = inputs.stored_views("code_ids", stored[1])
    eval_masks = inputs.eval_masks(config, grid, masking)
    image_shape = (1, config.views.image_size, config.views.image_size, 3)
    first_mask = jnp.arange(grid[0] * grid[1])[None] < config.masking.num_masked
    return Task(
        name="mim",
        init=lambda key: inputs.init_variables(
            model, key, jnp.zeros(image_shape), first_mask, num_masked=config.masking.num_masked, train=False
        ),
        initial=inputs.initial_variables(config, "mim", model),
        loss=loss,
        frozen=frozen,
        num_train_examples=len(source),
        train_batches=inputs.train_batches(config, source, mask={"grid": grid, **masking}, targets=stored[0]),
        eval_batches=functools.partial(
            inputs.eval_batches_with, lambda batch: eval_targets(batch) | eval_masks(batch), eval_source, config
        ),
        evaluate=evaluate,
        summarize=summarize,
        no_decay=inputs.released_no_decay,
    )


def _check_grid(tokenizer, grid: tuple[int, int], config) -> None:
    """Raise UserError unless the tokenizer gives one code per patch of the model's `grid`."""
    if tuple(tokenizer.grid) != grid:
        rows, columns = tokenizer.grid
        raise UserError(
            f"The tokenizer {tokenizer.name} gives {rows}x{columns} codes at {config.views.image_size} pixels, the "
            f"model has {grid[0]}x{grid[1]} patches.",
            "the two have different patch sizes.",
            f"--config.model.patch_size={config.views.image_size // rows}, or another tokenizer.",
        )


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return losses (nats) and accuracies over all masked patches, beside the accuracy of the best constant guess."""
    patches = sums["patches"]
    means = {key: float(value / patches) for key, value in sums.items() if key not in ("patches", "counts")}
    return {**means, "majority_accuracy": float(sums["counts"].max() / patches)}
