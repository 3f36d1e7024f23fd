"""Stage 1, VQ-KD: train the tokenizer whose codes must reconstruct the teacher's patch features.

Targets come either from the cache that the extract stage wrote (`teacher.features`) or from the teacher itself inside
the step (`teacher.weights`). Both see the same views, so both give the same loss curve up to the cache's rounding.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from beitv2_jax import config as config_lib
from beitv2_jax import rng
from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.data.target_cache.encoding import FEATURES, decode_features
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.quantizer import (
    STEPS_UNTIL_DEAD,
    Candidates,
    CodebookStatistics,
    QuantizerOptions,
    codebook_health,
    collapse_of,
    counted,
    dead_codes,
    drawn_candidates,
    kmeans,
    merged_candidates,
    most_revived,
    placed,
    quantization_distance,
    revived,
    roll_window,
    updated_state,
    with_training_counters,
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


TOKENS_PER_CODE = 50
"""Tokens a code over which usage is counted at least, where an epoch has them: of 50 K tokens even a uniform draw
misses no code in practice, exp(-50) of them, and one in 5 K tokens already misses 0.7 %."""
REVIVE_UNTIL = 0.8
"""Fraction of the steps after which no code is revived, so that the codes settle. Source: a choice of ours."""


def vqkd_loss(
    model: VQKD, targets: Callable[[PyTree, Batch], TeacherFeatures], *, revive_seed: int | None = None
) -> Callable:
    """Return the `loss` of the tokenizer; `targets` of (frozen, batch) are the features to reconstruct.

    Its statistics are those of the codebook, with `revive_seed`, the seed of the run, a pair of them and of the tokens
    drawn from the batch that dead codes may take the place of.
    """

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
        total, statistics = sum(metrics.values()), output.statistics
        metrics["quantization_distance"] = weighted_sum(quantization_distance(output.unit, output.codes), weight)
        if revive_seed is not None:
            step_key, count = rng.step_key(revive_seed, "revive", step), most_revived(model.quantizer.codebook_size)
            drawn = drawn_candidates(output.unit, output.codes, weight, batch["example_ids"], step_key, count)
            statistics = statistics, drawn
        return total, LossParts(weight.sum(), metrics, statistics)

    return loss


def vqkd_finish(options: QuantizerOptions, window: int, *, revive_steps: int | None = None) -> Callable:
    """Return the `finish` that moves the codebook; training codes are counted over windows of `window` steps.

    With `revive_steps` dead codes are revived in as many steps from the start of the run on.
    """

    def finish(codebook, statistics, step):
        statistics, candidates = (statistics, None) if revive_steps is None else statistics
        state = counted(updated_state(codebook["quantizer"], statistics, options), statistics.counts)
        state = roll_window(state, step + 1, window)
        counts = jnp.where(step + 1 >= window, state["last_window_counts"], state["window_counts"])
        metrics = codebook_health(counts)
        if "idle_steps" in state:
            dead = dead_codes(counts)
            metrics["codebook_dead_age"] = jnp.sum(state["idle_steps"] * dead) / jnp.maximum(jnp.sum(dead), 1)
        if candidates is not None:
            state = revived(state, candidates, step < revive_steps)
        return {"quantizer": state}, metrics

    return finish


Statistics = tuple[CodebookStatistics, Candidates]


def merged_statistics(one: Statistics, other: Statistics) -> Statistics:
    """Return the statistics of two micro-batches as one: sums are added up, the best candidates are those of both."""
    return jax.tree.map(jnp.add, one[0], other[0]), merged_candidates(one[1], other[1])


def vqkd_evaluation(model: VQKD, targets: Callable[[PyTree, Batch], TeacherFeatures] | None) -> Callable:
    """Return the `evaluate` of the tokenizer; `targets` as in `vqkd_loss`, None to count the codes alone."""

    def evaluate(params, codebook, frozen, batch):
        output = model.apply({"params": params, "codebook": codebook}, to_unit_range(batch["images"]), train=False)
        weight = batch["weight"].astype(jnp.float32)
        counts = jnp.zeros(model.quantizer.codebook_size).at[output.code_ids].add(weight[:, None])
        distance = quantization_distance(output.unit, output.codes)
        sums = {"examples": weight.sum(), "counts": counts, "distance": jnp.sum(distance * weight)}
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
    task = make_task(config, open_inputs(config))
    _warn_of_too_many_codes(config, task.num_train_examples)
    _warn_of_no_revival(config, task.num_train_examples)
    return task


def _warn_of_too_many_codes(config, num_examples: int) -> None:
    tokens, codes = num_examples * _patches(config), config.model.codebook_size
    if tokens < TOKENS_PER_CODE * codes:
        fitting = 2 ** max(3, int(math.log2(max(tokens, 1) / TOKENS_PER_CODE)))
        logging.warning(
            "An epoch has %d patches for model.codebook_size=%d codes, fewer than %d each: many of them will hardly be "
            "used. Write %s or less, or train on more images.",
            tokens,
            codes,
            TOKENS_PER_CODE,
            codebook_of(config.model.quantizer, fitting),
        )


def _warn_of_no_revival(config, num_examples: int) -> None:
    num_steps = config_lib.steps(config.run.duration, batch_size=config.run.batch_size, num_examples=num_examples)
    if config.revive and _revive_steps(num_steps) < STEPS_UNTIL_DEAD:
        logging.warning(
            "revive=True changes nothing in a run of %d steps: no code is dead before step %d, and in the last fifth "
            "of a run none is revived. Write --config.revive=False, or --config.run.duration='%d steps' or more.",
            num_steps,
            STEPS_UNTIL_DEAD,
            next(steps for steps in itertools.count(num_steps) if _revive_steps(steps) >= STEPS_UNTIL_DEAD),
        )


def _revive_steps(num_steps: int) -> int:
    """Return in how many steps from the start of the run on dead codes are revived."""
    return math.ceil(REVIVE_UNTIL * num_steps)


def codebook_of(quantizer: str, codebook_size: int) -> str:
    """Return what to write for a codebook of this size."""
    if quantizer == "fsq":
        return f"--config.model.fsq_levels=LEVELS with a product of {codebook_size}"
    return f"--config.model.codebook_size={codebook_size}"


def _grid(config) -> tuple[int, int]:
    return (config.views.image_size // config.model.encoder.patch_size,) * 2


def _patches(config) -> int:
    return math.prod(_grid(config))


def usage_window(config, num_examples: int) -> int:
    """Return over how many steps codes are counted: `usage_window`, or what `TOKENS_PER_CODE` and an epoch allow."""
    batch_size = config.run.batch_size
    stated = config_lib.steps(config.usage_window, batch_size=batch_size, num_examples=num_examples)
    enough = math.ceil(TOKENS_PER_CODE * config.model.codebook_size / (batch_size * _patches(config)))
    return max(stated, min(enough, num_examples // batch_size))


def open_inputs(config) -> inputs.Opened:
    """Open the feature cache or the teacher, the initial weights, and the data; raises as `build` does."""
    patch_size = config.model.encoder.patch_size
    teacher, frozen, stored = None, {}, (None, None)
    if config.teacher.features:
        manifest = targets_lib.manifest_of(config.teacher.features, FEATURES)
        check_features(config, manifest)
        teacher_width = manifest["teacher_width"]
    else:
        teacher, frozen["teacher"] = load_teacher(**targets_lib.teacher_arguments(config, patch_size))
        teacher_width = teacher.width
    initial = inputs.initial_variables(config, "vqkd", make_model(config, Compute(), teacher_width=teacher_width))
    sources = inputs.open_sources(config)
    if config.teacher.features:
        made_with = targets_lib.stated_choices(config)
        stored = targets_lib.open_cache(config.teacher.features, config, sources, FEATURES, _grid(config), made_with)
    return inputs.Opened(sources, stored, teacher, frozen, initial)


def check_features(config, manifest: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored features that the config names are those of its views, patches and teacher."""
    made_with = targets_lib.stated_choices(config)
    targets_lib.check_targets(manifest, config.teacher.features, config, FEATURES, _grid(config), made_with)


def make_task(config, opened: inputs.Opened) -> Task:
    """Build the VQ-KD task on inputs that are open."""
    source, eval_source = opened.sources
    stored, teacher = opened.stored, opened.network
    teacher_width = stored[0].manifest["teacher_width"] if teacher is None else teacher.width
    model = make_model(config, inputs.compute(config), teacher_width=teacher_width)
    durations = dict(batch_size=config.run.batch_size, num_examples=len(source))
    window, num_steps = usage_window(config, len(source)), config_lib.steps(config.run.duration, **durations)
    again = config_lib.steps(config.kmeans_again, **durations)
    starts_anew = config.model.quantizer == "ema" and config.kmeans_start and "model_state" not in opened.initial
    starts = ((0,) if starts_anew else ()) + ((again,) if again else ())
    needed = config.kmeans_tokens * config.model.codebook_size
    start_batches = max(1, math.ceil(needed / (config.run.batch_size * _patches(config))))

    def targets(frozen, batch):
        if teacher is not None:
            return teacher.features(frozen["teacher"], batch["images"])
        return stored_features(frozen, batch)

    def start_codebook(params, codebook, frozen, batches, key):
        def project(images):
            variables = {"params": params, "codebook": codebook}
            return model.apply(variables, to_unit_range(images), method=VQKD.project)

        projections = jax.lax.map(project, batches["images"])
        samples = projections.reshape(-1, projections.shape[-1])
        weight = jnp.repeat(batches["weight"].reshape(-1), projections.shape[-2])
        means, _ = kmeans(
            samples, key, config.model.codebook_size, weight=weight, nearest_code=model.compute.nearest_code
        )
        return {"quantizer": placed(codebook["quantizer"], means)}

    image_shape = (1, config.views.image_size, config.views.image_size, 3)

    def init(key):
        variables = init_variables(model, key, jnp.zeros(image_shape), train=False)
        state = with_training_counters(variables["model_state"]["quantizer"], revive=config.revive)
        return {**variables, "model_state": {"quantizer": state}}

    revive_steps = _revive_steps(num_steps) if config.revive else None

    def advise(metrics, steps):
        # the counts are those of the last finished window; while codes are still revived they say nothing of the end
        judged = steps // window * window >= window + (revive_steps or 0)
        collapse = collapse_of(metrics, config.model.codebook_size) if judged else ""
        return collapse and f"{collapse} {_advice(config, metrics, num_steps)}"

    return Task(
        name="vqkd",
        init=init,
        initial=opened.initial,
        loss=vqkd_loss(model, targets, revive_seed=config.seed if config.revive else None),
        finish=vqkd_finish(model.quantizer, window, revive_steps=revive_steps),
        merge=merged_statistics if config.revive else Task.merge,
        frozen=opened.frozen,
        sources=opened.sources,
        train_batches=inputs.train_batches(config, source, targets=stored[0]),
        eval_batches=functools.partial(
            inputs.eval_batches_with, targets_lib.stored_views(stored[1]), eval_source, config
        ),
        evaluate=vqkd_evaluation(model, targets),
        summarize=summarize,
        start_codebook=start_codebook if starts else None,
        codebook_starts=starts,
        start_batches=start_batches,
        advise=advise,
        no_decay=released_no_decay,
    )


def _advice(config, metrics: Mapping[str, float], num_steps: int) -> str:
    """Return what to write where few codes are in use in a run of `num_steps`."""
    options, fitting = [], fitting_codebook_size(metrics)
    if fitting < config.model.codebook_size:
        options.append(codebook_of(config.model.quantizer, fitting))
    options += ["--config.optim.peak_lr=3e-4"] if config.optim.peak_lr > 3e-4 else []
    can_revive = config.model.quantizer == "ema" and _revive_steps(num_steps) >= STEPS_UNTIL_DEAD
    options += ["--config.revive=True"] if can_revive and not config.revive else []
    if not config.init_from:
        options.append("--config.init_from=PATH (the weights of the teacher, if it has the sizes of the encoder)")
    if not options:
        return "Train on more images."
    return (
        f"For another run write {' or '.join(options)}, or train on more images. "
        "More codes in use are not better features by themselves: compare the probe after pre-training."
    )


def fitting_codebook_size(metrics: Mapping[str, float]) -> int:
    """Return the power of two from 8 on that is next to twice the perplexity of a codebook."""
    return 2 ** max(3, round(math.log2(2.0 * metrics["codebook_perplexity"])))


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Return reconstruction loss, `codebook_health` and mean `quantization_distance` of an evaluation."""
    losses = (
        {"reconstruction_loss": float(sums["reconstruction"] / sums["examples"])} if "reconstruction" in sums else {}
    )
    return {
        **losses,
        **{name: float(value) for name, value in codebook_health(sums["counts"]).items()},
        "quantization_distance": float(sums["distance"] / sums["examples"]),
    }
