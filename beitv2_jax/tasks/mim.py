"""Stage 2, MIM: predict the codes of hidden patches, from the last layer and through the patch-aggregation head.

Code ids come either from the cache that the tokenize stage wrote (`tokenizer.codes`) or from the tokenizer inside the
step (`tokenizer.run`), which may have a separate view: the same box at another size or with another filter. Every view
is seen with its colour jitter, as in the released recipe.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beitv2_jax.config.checks import check_codebook_size
from beitv2_jax.data.target_cache.encoding import CODE_IDS
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.mim import MaskedImageModel, MaskedTransformer, gather_masked
from beitv2_jax.models.ops.cross_entropy import head_cross_entropy, rounded_cross_entropy
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks import targets as targets_lib
from beitv2_jax.tasks.api import Batch, LossParts, Task
from beitv2_jax.tasks.common import init_variables, normalized, released_no_decay, view_pixels
from beitv2_jax.tasks.losses import masked_cross_entropy, weighted_sum
from beitv2_jax.tasks.tokenize import Tokenizer, TokenizerSizes, check_image_size, load_tokenizer
from beitv2_jax.typing import CodeIds, Images, Mask, PyTree


def make_model(config, compute: Compute) -> MaskedImageModel:
    """Build the masked image model that a mim config describes."""
    return MaskedImageModel.from_arguments({**config.model, "image_size": config.views.image_size}, compute)


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

    `Compute.cross_entropy` decides what is saved of the logits for the backward pass (`models.ops.cross_entropy`).
    """
    compute = model.compute
    call = functools.partial(
        model.apply, {"params": params}, images, mask, num_masked=num_masked, train=train, rngs=rngs
    )
    if compute.cross_entropy == "tiled":
        dtypes = {"dtype": jnp.dtype(compute.dtype), "gradient_dtype": jnp.dtype(compute.gradient_dtype)}
        return {
            name: head_cross_entropy(features, **params[model.output_layer_of(name)], labels=targets, **dtypes)
            for name, features in call(method=MaskedImageModel.masked_features).items()
        }
    cross_entropy = masked_cross_entropy
    if compute.cross_entropy == "rounded":
        cross_entropy = functools.partial(rounded_cross_entropy, dtype=jnp.dtype(compute.dtype))
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

    def loss(params, model_state, frozen, batch, key, step):
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


def mim_evaluation(
    model: MaskedImageModel,
    *,
    num_masked: int,
    normalization: str,
    code_ids: Callable[[PyTree, Batch, Images], CodeIds],
) -> Callable:
    """Return the `evaluate` of masked image modelling; arguments as `mim_loss`."""

    def evaluate(params, model_state, frozen, batch):
        images = view_pixels(batch)
        targets = gather_masked(code_ids(frozen, batch, images), batch["mask"], num_masked)
        found = code_losses(
            model,
            params,
            normalized(images, normalization),
            batch["mask"],
            targets,
            num_masked=num_masked,
            train=False,
        )
        weight = jnp.broadcast_to(batch["weight"].astype(jnp.float32)[:, None], targets.shape)
        sums = {"patches": weight.sum(), "counts": jnp.zeros(model.codebook_size).at[targets].add(weight)}
        for name, (nll, hits) in found.items():
            sums |= {f"{name}_loss": jnp.sum(weight * nll), f"{name}_accuracy": jnp.sum(weight * hits)}
        return sums

    return evaluate


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
        UserError: the data set, code cache or tokenizer is missing, or the tokenizer does not fit the model.
    """
    inputs.check_implementations(config)
    return make_task(config, open_inputs(config))


def open_inputs(config) -> inputs.Opened:
    """Open the initial weights, the code cache or the tokenizer, and the data; raises as `build` does."""
    initial = inputs.initial_variables(config, "mim", make_model(config, Compute()))
    tokenizer, frozen, stored = None, {}, (None, None)
    if config.tokenizer.codes:
        check_codes(config, targets_lib.manifest_of(config.tokenizer.codes, CODE_IDS))
    else:
        image_size, size_key = inputs.tokenizer_view(config).image_size, _size_key(config)
        tokenizer, frozen["tokenizer"] = load_tokenizer(
            config.tokenizer.run, image_size, config.efficiency.dtype, size_key=size_key
        )
        check_tokenizer(config, tokenizer)
    sources = inputs.open_sources(config)
    if config.tokenizer.codes:
        stored = targets_lib.open_cache(config.tokenizer.codes, config, sources, CODE_IDS, patch_grid(config))
    return inputs.Opened(sources, stored, tokenizer, frozen, initial)


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the MIM task on inputs that are open."""
    tokenizer, model = opened.network, make_model(config, inputs.compute(config))

    def code_ids(frozen, batch, images):
        if tokenizer is None:
            return batch["code_ids"]
        if "tokenizer_images" in batch:
            images = view_pixels(batch, "tokenizer_images")
        return tokenizer.encode(frozen["tokenizer"], images)

    masked = dict(
        num_masked=config.masking.num_masked,
        normalization=config.normalization,
        code_ids=code_ids,
    )
    return masked_task(
        config,
        opened,
        model,
        name="mim",
        loss=mim_loss(model, **masked),
        frozen=opened.frozen,
        evaluate=mim_evaluation(model, **masked),
        summarize=summarize,
    )


def masked_task(config, opened: inputs.Opened, model: MaskedTransformer, **of_stage: Any) -> Task:
    """Build the task of a stage with hidden patches from inputs that are open; `of_stage` are its own fields."""
    (source, eval_source), stored, grid = opened.sources, opened.stored, patch_grid(config)
    masking, num_masked = mask_arguments(config), config.masking.num_masked
    eval_targets = targets_lib.stored_views(stored[1])
    eval_masks = inputs.eval_masks(config.seed, grid, masking)
    image_shape = (1, config.views.image_size, config.views.image_size, 3)
    first_mask = jnp.arange(grid[0] * grid[1])[None] < num_masked
    return Task(
        init=lambda key: init_variables(
            model, key, jnp.zeros(image_shape), first_mask, num_masked=num_masked, train=False
        ),
        initial=opened.initial,
        sources=opened.sources,
        train_batches=inputs.train_batches(config, source, mask={"grid": grid, **masking}, targets=stored[0]),
        eval_batches=functools.partial(
            inputs.eval_batches_with, lambda batch: eval_targets(batch) | eval_masks(batch), eval_source, config
        ),
        no_decay=released_no_decay,
        **of_stage,
    )


def patch_grid(config) -> tuple[int, int]:
    """Return the rows and columns of patches of the config of a stage with hidden patches."""
    return (config.views.image_size // config.model.patch_size,) * 2


def _size_key(config) -> str:
    return "views.tokenizer_image_size" if config.views.tokenizer_image_size else "views.image_size"


def check_codes(config, manifest: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored codes that the config names are those of its views, patches and codebook."""
    check_codebook_size(config.model.codebook_size, manifest["codebook_size"])
    targets_lib.check_targets(manifest, config.tokenizer.codes, config, CODE_IDS, patch_grid(config))


def check_tokenizer(config, tokenizer: Tokenizer | TokenizerSizes) -> None:
    """Raise UserError unless the tokenizer that the config names reads its views and codes the model's patches."""
    check_image_size(
        config.tokenizer.run, tokenizer.image_size, inputs.tokenizer_view(config).image_size, _size_key(config)
    )
    grid = patch_grid(config)
    if tuple(tokenizer.grid) != grid:
        rows, columns = tokenizer.grid
        image_size, patch_size = config.views.image_size, config.model.patch_size
        own_size = tokenizer.image_size
        fitting = f"--config.views.image_size={rows * patch_size} --config.views.tokenizer_image_size={own_size}"
        if image_size % rows == 0:
            fitting = f"--config.model.patch_size={image_size // rows} or {fitting}"
        raise UserError(
            f"The tokenizer {tokenizer.name} gives {rows}x{columns} codes at {own_size} pixels, the model has "
            f"{grid[0]}x{grid[1]} patches.",
            "Did you mean one code for each patch?",
            f"Write {fitting}, or use another tokenizer.",
        )
    check_codebook_size(config.model.codebook_size, tokenizer.codebook_size)


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return losses (nats) and accuracies over all masked patches, beside the accuracy of the best constant guess."""
    patches = sums["patches"]
    means = {key: float(value / patches) for key, value in sums.items() if key not in ("patches", "counts")}
    return {**means, "majority_accuracy": float(sums["counts"].max() / patches)}
