"""Stage 1, VQ-KD: train the tokenizer whose codes must reconstruct the teacher's patch features.

Targets come either from the cache that the extract stage wrote (`teacher.features`) or from the teacher itself inside
the step (`teacher.weights`). Both see the same views, so both give the same loss curve up to the cache's rounding.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from beitv2_jax import config as config_lib
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.data.target_cache.encoding import FEATURES, decode_features
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.quantizer import (
    QuantizerOptions,
    codebook_perplexity,
    codebook_usage,
    kmeans,
    roll_window,
    updated_state,
)
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks import targets as targets_lib
from beitv2_jax.tasks.api import Batch, LossParts, Task
from beitv2_jax.tasks.common import init_variables, released_no_decay
from beitv2_jax.tasks.losses import cosine_distillation, weighted_sum
from beitv2_jax.typing import PyTree, TeacherFeatures


def make_model(config, compute: Compute, *, teacher_width: int) -> VQKD:
    """Build the tokenizer that a vqkd config describes; `teacher_width` is the width of its targets."""
    arguments = {**config.model, "image_size": config.views.image_size, "teacher_width": teacher_width}
    return VQKD.from_arguments(arguments, compute)


def stored_features(frozen: PyTree, batch: Batch) -> TeacherFeatures:
    """Return the stored features of a batch, float32."""
    # what the cache holds for an unreadable image is zeros, which have no direction and whose gradient is no number
    return jnp.where(batch["weight"][:, None, None] > 0, decode_features(batch), 1.0)


def vqkd_loss(model: VQKD, targets: Callable[[PyTree, Batch], TeacherFeatures]) -> Callable:
    """Return the `loss` of the tokenizer; `targets` of (frozen, batch) are the features to reconstruct."""

    def loss(params, codebook, frozen, batch, key, step):
        weight = batch["weight"]
        output = model.apply(
            {"params": params, "codebook": codebook},
            to_unit_range(batch["images"]),
            weight,
            train=True,
            rngs={"drop_path": key},
        )
        distance = cosine_distillation(output.reconstruction, targets(frozen, batch))
        metrics = {
            "reconstruction_loss": weighted_sum(distance, weight),
            "commitment_loss": weighted_sum(output.commitment, weight),
        }
        return sum(metrics.values()), LossParts(weight.sum(), metrics, output.statistics)

    return loss


def vqkd_finish(options: QuantizerOptions, window: int) -> Callable:
    """Return the `finish` that moves the codebook; training codes are counted over windows of `window` steps."""

    def finish(codebook, statistics, step):
        state = roll_window(codebook["quantizer"], step, window)
        state = updated_state(state, statistics, options)
        counts = jnp.where(step >= window, state["last_window_counts"], state["window_counts"])
        return {"quantizer": state}, {
            "codebook_usage": codebook_usage(counts),
            "codebook_perplexity": codebook_perplexity(counts),
        }

    return finish


def vqkd_evaluation(model: VQKD, targets: Callable[[PyTree, Batch], TeacherFeatures] | None) -> Callable:
    """Return the `evaluate` of the tokenizer; `targets` as in `vqkd_loss`, None to count the codes alone."""

    def evaluate(params, codebook, frozen, batch):
        output = model.apply({"params": params, "codebook": codebook}, to_unit_range(batch["images"]), train=False)
        weight = batch["weight"].astype(jnp.float32)
        counts = jnp.zeros(model.quantizer.codebook_size).at[output.code_ids].add(weight[:, None])
        sums = {"examples": weight.sum(), "counts": counts}
        if targets is not None:
            distance = cosine_distillation(output.reconstruction, targets(frozen, batch)).mean(axis=-1)
            sums["reconstruction"] = jnp.sum(distance * weight)
        return sums

    return evaluate


def build(config) -> Task:
    """Build the VQ-KD task.

    Raises:
        UserError: the data set, cache or teacher is missing, or the cache was made otherwise than this config says.
    """
    inputs.check_implementations(config)
    return make_task(config, open_inputs(config))


def open_inputs(config) -> inputs.Opened:
    """Open the feature cache or the teacher, the initial weights, and the data; raises as `build` does."""
    patch_size = config.model.encoder.patch_size
    teacher, frozen, stored = None, {}, (None, None)
    if config.teacher.features:
        teacher_width = targets_lib.manifest_of(config.teacher.features, FEATURES)["teacher_width"]
    else:
        teacher, frozen["teacher"] = load_teacher(**targets_lib.teacher_arguments(config, patch_size))
        teacher_width = teacher.width
    initial = inputs.initial_variables(config, "vqkd", make_model(config, Compute(), teacher_width=teacher_width))
    sources = inputs.open_sources(config)
    if config.teacher.features:
        grid = (config.views.image_size // patch_size,) * 2
        made_with = targets_lib.stated_choices(config)
        stored = targets_lib.open_cache(config.teacher.features, config, sources, FEATURES, grid, made_with)
    return inputs.Opened(sources, stored, teacher, frozen, initial)


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the VQ-KD task on inputs that are open."""
    source, eval_source = opened.sources
    stored, teacher = opened.stored, opened.network
    teacher_width = stored[0].manifest["teacher_width"] if teacher is None else teacher.width
    model = make_model(config, inputs.compute(config), teacher_width=teacher_width)
    window = config_lib.steps(config.usage_window, batch_size=config.run.batch_size, num_examples=len(source))

    def targets(frozen, batch):
        if teacher is not None:
            return teacher.features(frozen["teacher"], batch["images"])
        return stored_features(frozen, batch)

    def start_codebook(params, codebook, frozen, batch, key):
        projections = model.apply(
            {"params": params, "codebook": codebook}, to_unit_range(batch["images"]), method=VQKD.project
        )
        samples = projections.reshape(-1, projections.shape[-1])
        weight = jnp.repeat(batch["weight"], projections.shape[1])
        means, _ = kmeans(
            samples, key, config.model.codebook_size, weight=weight, nearest_code=model.compute.nearest_code
        )
        return {"quantizer": {**codebook["quantizer"], "codebook": means}}

    image_shape = (1, config.views.image_size, config.views.image_size, 3)
    return Task(
        name="vqkd",
        init=lambda key: init_variables(model, key, jnp.zeros(image_shape), train=False),
        initial=opened.initial,
        loss=vqkd_loss(model, targets),
        finish=vqkd_finish(model.quantizer, window),
        frozen=opened.frozen,
        sources=opened.sources,
        train_batches=inputs.train_batches(config, source, targets=stored[0]),
        eval_batches=functools.partial(
            inputs.eval_batches_with, targets_lib.stored_views(stored[1]), eval_source, config
        ),
        evaluate=vqkd_evaluation(model, targets),
        summarize=summarize,
        start_codebook=start_codebook if config.kmeans_start and not config.init_from else None,
        no_decay=released_no_decay,
    )


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return reconstruction loss, codebook usage (fraction of codes chosen at all) and perplexity of an evaluation."""
    losses = (
        {"reconstruction_loss": float(sums["reconstruction"] / sums["examples"])} if "reconstruction" in sums else {}
    )
    return {
        **losses,
        "codebook_usage": float(codebook_usage(sums["counts"])),
        "codebook_perplexity": float(codebook_perplexity(sums["counts"])),
    }
