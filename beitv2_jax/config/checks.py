"""Checks of a config before any computation: choices, durations, and sizes that must fit each other."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax import choices
from beitv2_jax.config.durations import parse_duration, steps
from beitv2_jax.config.load import flatten
from beitv2_jax.errors import UserError, nearest

_DURATION_KEYS = ("duration", "warmup", "log_every", "checkpoint_every", "keep_every", "eval_every", "usage_window")
_CHOICES = {
    "stage": ("finetune", "extract", "vqkd", "tokenize", "mim", "probe", "segment", "pipeline"),
    "views.interpolation": choices.INTERPOLATIONS,
    "views.tokenizer_interpolation": ("", *choices.INTERPOLATIONS),
    "teacher.normalization": ("", *choices.NORMALIZATIONS),
    "teacher.output": ("", *choices.TEACHER_OUTPUTS),
    "teacher.activation": ("", *choices.TEACHER_ACTIVATIONS),
    "teacher.grid_match": choices.GRID_MATCHES,
    "teacher.position_resize": ("", *choices.POSITION_RESIZES),
    "normalization": choices.NORMALIZATIONS,
    "model.position": choices.POSITIONS,
    "model.pooling": choices.POOLING,
    "model.stem": choices.STEMS,
    "model.param_init": choices.PARAM_INITS,
    "model.encoder.stem": choices.STEMS,
    "run.on_failed_save": choices.ON_FAILED_SAVE,
    "optim.schedule": choices.SCHEDULES,
    "efficiency.dtype": choices.DTYPES,
    "efficiency.gradient_dtype": choices.GRADIENT_DTYPES,
    "efficiency.remat": choices.REMAT,
    "efficiency.attention": ("auto", *choices.ATTENTION),
    "efficiency.nearest_code": ("auto", *choices.NEAREST_CODE),
    "efficiency.cross_entropy": ("auto", *choices.CROSS_ENTROPY),
    "output.dtype": choices.FEATURE_DTYPES,
}


def validate(config: ConfigDict, num_examples: int | None = None) -> None:
    """Check what can be checked before any computation: choices, durations, sizes that must fit each other.

    Args:
        config: one stage, or a pipeline, whose stages are then checked one by one.
        num_examples: examples of the training split where known; needed to compare durations of different units.

    Raises:
        UserError: the first fault found, naming the keys at fault.
    """
    if config.get("stage") == "pipeline":
        for name, stage in config.stages.items():
            _validate_stage(stage, f"stages.{name}.", num_examples)
    else:
        _validate_stage(config, "", num_examples)


def _validate_stage(config: ConfigDict, prefix: str, num_examples: int | None) -> None:
    flat = flatten(config)

    def refuse(key: str, problem: str, meant: str, *values) -> None:
        instead = " or ".join(f"--config.{prefix}{key}={value}" for value in values)
        raise UserError(f"{prefix}{key}={flat.get(key)!r}: {problem}", meant, instead)

    for key, valid in _CHOICES.items():
        if key in flat and flat[key] not in valid:
            refuse(key, f"not one of {', '.join(valid)}.", "a slip of spelling.", nearest(str(flat[key]), valid))
    for key in (key for key in flat if key.endswith("batch_size")):
        if flat[key] < 1:
            refuse(key, "a step needs at least one example.", "the global batch size was meant.", 512)
    _check_durations(flat, refuse, num_examples)
    _check_sizes(flat, refuse)
    _check_reading(flat, refuse)
    _check_efficiency(flat, refuse)
    _check_windows(flat, refuse)
    _check_inputs(config.stage, flat, refuse)


def _check_durations(flat: dict[str, Any], refuse: Callable, num_examples: int | None) -> None:
    for key in (key for key in flat if key.split(".")[-1] in _DURATION_KEYS):
        try:
            parse_duration(flat[key])
        except UserError as error:
            refuse(key, error.happened, error.meant, "'100 epochs'", "'1000 steps'")
    if "optim.warmup" not in flat:
        return
    warmup, duration = flat["optim.warmup"], flat["run.duration"]
    (warmup_amount, warmup_unit), (amount, unit) = parse_duration(warmup), parse_duration(duration)
    if num_examples is not None:
        sizes = {"batch_size": flat["run.batch_size"], "num_examples": num_examples}
        warmup_amount, amount = steps(warmup, **sizes), steps(duration, **sizes)
    elif warmup_unit != unit:
        return
    if warmup_amount >= amount:
        shorter = f"'{amount / 10:g} {unit}'"
        refuse("optim.warmup", f"not shorter than run.duration={duration!r}.", "a shortened run.", shorter)


def _check_sizes(flat: dict[str, Any], refuse: Callable) -> None:
    for section in ("model.", "model.encoder.", "model.decoder."):
        width, heads = flat.get(f"{section}width"), flat.get(f"{section}num_heads")
        if width is not None and (heads < 1 or width % heads):
            refuse(
                f"{section}width",
                f"not divisible by {section}num_heads={heads}.",
                "heads of 64 numbers each, as in the published models.",
                64 * max(1, round(width / 64)),
            )
    patch_keys = ("model.encoder.patch_size", "teacher.tokenizer_patch_size")
    patch_key = next((key for key in patch_keys if key in flat), "model.patch_size")
    image_size, patch_size = flat.get("views.image_size"), flat.get(patch_key)
    if patch_size is not None and image_size % patch_size:
        refuse(
            "views.image_size",
            f"not divisible by {patch_key}={patch_size}.",
            "a whole number of patches per side.",
            patch_size * max(1, round(image_size / patch_size)),
        )
    betas = flat.get("optim.betas", (0.9, 0.999))
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        refuse("optim.betas", "Adam takes two decay rates in [0, 1).", "the usual pair.", "'(0.9, 0.999)'")
    if "masking.num_masked" in flat:
        num_patches = (image_size // patch_size) ** 2
        if not 1 <= flat["masking.num_masked"] <= num_patches:
            refuse(
                "masking.num_masked",
                f"views.image_size={image_size} and {patch_key}={patch_size} give {num_patches} patches.",
                "the published share of 75 in 196.",
                round(num_patches * 75 / 196),
            )
    if flat.get("model.patch_aggregation") and not 1 <= flat["model.early_layer"] <= flat["model.depth"]:
        depth = flat["model.depth"]
        refuse(
            "model.early_layer",
            f"the backbone has model.depth={depth} blocks.",
            "an early layer at three quarters of the depth, as published (9 of 12).",
            max(1, round(0.75 * depth)),
        )


def _check_reading(flat: dict[str, Any], refuse: Callable) -> None:
    for key in ("data.num_threads", "data.num_workers"):
        if flat.get(key, 0) < 0:
            refuse(key, "there is no such number of them.", "none.", 0)
    if flat.get("optim.spike_factor", 0.0) and flat["optim.spike_factor"] <= 1:
        refuse("optim.spike_factor", "every other step would be a spike.", "no guard, or many times the usual.", 0, 10)
    if flat.get("run.hang_timeout", 0) < 0:
        refuse("run.hang_timeout", "there is no such time.", "no watch at all.", 0)
    share = flat.get("data.max_bad_fraction", 0.0)
    if not 0 <= share <= 1:
        refuse("data.max_bad_fraction", "a share lies between 0 and 1.", "per cent.", share / 100)


def _check_efficiency(flat: dict[str, Any], refuse: Callable) -> None:
    steps, batch_size = flat.get("efficiency.accumulation_steps", 1), flat.get("run.batch_size", 1)
    if steps < 1 or batch_size % steps:
        fitting = max(count for count in range(1, max(steps, 1) + 1) if batch_size % count == 0)
        problem = f"run.batch_size={batch_size} cannot be cut into so many equal parts."
        refuse("efficiency.accumulation_steps", problem, "a divisor of the batch size.", fitting)


def _check_windows(flat: dict[str, Any], refuse: Callable) -> None:
    """Check what a segmentation cuts out of its images, to train on and to evaluate."""
    if "evaluation.stride" not in flat:
        return
    side = flat["views.image_size"]
    if not 1 <= flat["evaluation.stride"] <= side:
        refuse("evaluation.stride", f"windows of {side} pixels would leave gaps.", "two thirds.", round(2 * side / 3))
    for section in ("views", "evaluation"):
        long_side, short_side = flat[f"{section}.long_side"], flat[f"{section}.short_side"]
        if not 1 <= short_side <= long_side:
            refuse(f"{section}.short_side", f"{section}.long_side={long_side} is shorter.", "the other way.", long_side)
    if not flat["evaluation.scales"] or min(flat["evaluation.scales"]) <= 0:
        refuse("evaluation.scales", "an image has no such size.", "the plain image alone.", "'(1.0,)'")
    if not 0 < flat["views.min_ratio"] <= flat["views.max_ratio"]:
        largest = flat["views.max_ratio"]
        refuse("views.min_ratio", f"not between 0 and views.max_ratio={largest}.", "a smaller one.", 0.5)
    if not 0 < flat["views.max_class_fraction"] <= 1:
        refuse("views.max_class_fraction", "a share lies between 0 and 1.", "the published one.", 0.75)


def _check_inputs(stage: str, flat: dict[str, Any], refuse: Callable) -> None:
    """Check that the stage is told where its inputs are, and that stored inputs have numbered views."""
    needed = {"extract": "teacher.weights", "tokenize": "tokenizer.run", "probe": "backbone.run"}
    required = needed.get(stage, "data.source")
    if not flat[required]:
        refuse(required, "this stage cannot run without it.", "it was left to be given.", "PATH")
    either = {"vqkd": ("teacher.features", "teacher.weights"), "mim": ("tokenizer.codes", "tokenizer.run")}.get(stage)
    if either is None:
        stored = stage in ("extract", "tokenize")
    else:
        stored_key, live_key = either
        stored = bool(flat[stored_key])
        if stored == bool(flat[live_key]):
            refuse(
                stored_key,
                f"exactly one of {stored_key} and {live_key}={flat[live_key]!r} must be set.",
                f"targets come either from a store ({stored_key}) or from the live network ({live_key}).",
                "DIR",
            )
    if stored and flat["views.num_views"] < 1:
        refuse("views.num_views", "stored targets belong to numbered views.", "the number of views stored.", 4)
