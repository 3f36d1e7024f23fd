"""Configs: presets, durations, files, text form and the checks made before any computation (floor 0).

A config is a locked `ConfigDict` that a file in `configs/` builds. This module knows their keys, but no model, task or
loop. The config files import nothing of the package but this module.
"""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax.errors import UserError, nearest

UNITS = ("epochs", "steps", "examples")
HARMLESS = (
    "efficiency",
    "mesh",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_every",
    "run.hang_timeout",
    "run.on_failed_save",
    "data.num_threads",
    "data.num_workers",
    "data.max_bad_share",
    "output.verify_examples",
    "data.data_dir",
)
"""Sections and keys that may change between two starts of one run.

They move no result, or only its rounding; `efficiency.accumulation_steps` also moves what is drawn in the step
(stochastic depth, mixup), as every micro-batch draws anew.
"""

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s+([A-Za-z]+)\s*")
_DURATION_KEYS = ("duration", "warmup", "log_every", "checkpoint_every", "keep_every", "eval_every", "usage_window")
_CHOICES = {
    "stage": ("finetune", "extract", "vqkd", "tokenize", "mim", "probe", "segment", "pipeline"),
    "views.interpolation": ("bicubic", "bilinear", "lanczos"),
    "views.tokenizer_interpolation": ("", "bicubic", "bilinear", "lanczos"),
    "teacher.normalization": ("", "half", "imagenet", "clip"),
    "teacher.output": ("", "projected", "tokens"),
    "teacher.activation": ("", "gelu", "quick_gelu", "gelu_tanh"),
    "teacher.grid_match": ("resize_input", "resample_features"),
    "teacher.position_resize": ("", "bicubic", "offset", "antialias"),
    "normalization": ("half", "imagenet", "clip"),
    "model.position": ("absolute", "relative_shared", "relative", "none"),
    "model.pooling": ("mean", "cls"),
    "model.stem": ("linear", "conv"),
    "model.param_init": ("normal", "clipped", "scaled"),
    "model.encoder.stem": ("linear", "conv"),
    "run.on_failed_save": ("continue", "stop"),
    "optim.schedule": ("cosine", "linear"),
    "efficiency.dtype": ("float32", "bfloat16", "float16"),
    "efficiency.gradient_dtype": ("float32", "bfloat16"),
    "efficiency.remat": ("none", "dots", "full"),
    "efficiency.attention": ("auto", "reference", "cudnn", "pallas"),
    "efficiency.nearest_code": ("auto", "reference", "scan", "pallas"),
    "efficiency.cross_entropy": ("auto", "reference", "rounded", "tiled"),
    "output.dtype": ("int8", "bfloat16", "float16", "float32"),
}


def parse_duration(duration: str) -> tuple[float, str]:
    """Split a duration such as '300 epochs' or '1 step' into its amount and its unit, one of `UNITS`.

    Raises:
        UserError: no string, no unit, a negative amount or an unknown unit.
    """
    match = _DURATION.fullmatch(duration) if isinstance(duration, str) else None
    if match is None:
        raise UserError(
            f"{duration!r} is not a duration.",
            "the unit is missing or the amount is not a plain number.",
            f"an amount and one unit of {', '.join(UNITS)}, such as '300 epochs'.",
        )
    amount, unit = float(match[1]), match[2].lower()
    plural = unit if unit.endswith("s") else unit + "s"
    if plural not in UNITS:
        guess = nearest(plural, UNITS)
        raise UserError(
            f"{duration!r} has the unknown unit '{match[2]}'.", f"'{guess}' was meant.", f"'{match[1]} {guess}'"
        )
    return amount, plural


def steps(duration: str, *, batch_size: int, num_examples: int) -> int:
    """Return the number of steps in a duration.

    An epoch has floor(num_examples / batch_size) steps (source: the released loaders drop the last, partial batch), so
    '300 epochs' of ImageNet-1k at batch 2048 are 300 * 625. Examples round up to whole steps, fractions of an epoch
    down; only a zero amount gives zero steps.

    Args:
        duration: '300 epochs', '1000 steps' or '5000 examples'.
        batch_size: global examples per step.
        num_examples: examples of the training split.

    Raises:
        UserError: the text is no duration, or an epoch holds no whole batch.
    """
    amount, unit = parse_duration(duration)
    if unit == "epochs":
        if num_examples < batch_size:
            raise UserError(
                f"An epoch of {num_examples} examples holds no batch of {batch_size}.",
                "batch_size is meant for a larger data set.",
                f"--config.run.batch_size={max(num_examples, 1)} or less.",
            )
        count = math.floor(amount * (num_examples // batch_size) + 1e-9)
    else:
        count = math.ceil((amount if unit == "steps" else amount / batch_size) - 1e-9)
    return max(count, 1) if amount > 0 else 0


def apply_presets(
    config: ConfigDict, arg: str | None, presets: Mapping[str, Callable[[ConfigDict], None]]
) -> ConfigDict:
    """Apply the comma separated preset names in `arg` to `config`, in the order they are written, and return it.

    Raises:
        UserError: `arg` names no preset of this file.
    """
    for name in (part.strip() for part in arg.split(",")) if arg else ():
        if name not in presets:
            raise UserError(
                f"This config has no preset '{name}'.",
                f"'{nearest(name, presets)}' was meant." if presets else "a preset of another config was meant.",
                f"one or more of {', '.join(sorted(presets)) or '(none)'}, separated by commas.",
            )
        presets[name](config)
    return config


def load(spec: str) -> ConfigDict:
    """Build the config that `spec` names: 'vqkd', 'vqkd:large' or 'path/to/vqkd.py:large'.

    A bare name is a sibling of the calling file, which is how one config file builds on another.

    Raises:
        UserError: there is no such file, or no such preset in it.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    if path.suffix != ".py":
        path = Path(sys._getframe(1).f_globals["__file__"]).parent / f"{name}.py"
    if not path.is_file():
        others = sorted(other.stem for other in path.parent.glob("*.py"))
        raise UserError(
            f"There is no config file {path}.",
            f"'{nearest(path.stem, others)}.py' was meant." if others else f"{path.parent} is the wrong directory.",
            f"one of {', '.join(f'{path.parent / other}.py' for other in others)}." if others else "configs/NAME.py",
        )
    module_spec = importlib.util.spec_from_file_location(f"beitv2_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(arg)


def link(target: ConfigDict, source: ConfigDict) -> None:
    """Let each key of `target` follow the key of that name in `source`, until it is set itself; pipelines share so."""
    for key in target:
        if key in source:
            target[key] = source.get_oneway_ref(key)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return {'section.key': value} of every leaf."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def _freeze(value: Any, *, workdir: str | None = None) -> Any:
    """Copy a tree of settings: mappings become ConfigDicts that keep their order, lists tuples, references values."""
    if isinstance(value, (Mapping, ConfigDict)):
        copy = ConfigDict(sort_keys=False)
        for key, inner in value.items():
            copy[key] = _freeze(inner, workdir=workdir)
        return copy
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(inner, workdir=workdir) for inner in value)
    if isinstance(value, str) and workdir is not None:
        return value.replace("{workdir}", workdir)
    return value


def resolve(config: ConfigDict, workdir: str) -> ConfigDict:
    """Return a locked copy in which every '{workdir}' inside a string is replaced and no reference is left."""
    return _freeze(config, workdir=str(workdir)).lock()


def to_json(config: ConfigDict) -> str:
    """Return the config as text: keys in a stable order (alphabetical, stages in the order they run)."""
    return json.dumps(_plain(config), indent=2) + "\n"


def _plain(value: Any) -> Any:
    """Return the JSON form of a tree of settings: dicts, lists and scalars."""
    if isinstance(value, (Mapping, ConfigDict)):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def from_json(text: str | Mapping[str, Any]) -> ConfigDict:
    """Return the locked config that `to_json` wrote, from its text or from the dict read out of it."""
    return _freeze(json.loads(text) if isinstance(text, str) else text).lock()


def changed(old: ConfigDict, new: ConfigDict, *, harmless: bool = False) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of every setting that differs and would change results.

    `HARMLESS` keys are left out; with `harmless` it is they alone that are returned. A key that one side lacks has None
    there; tuples are compared as lists.
    """
    before, after = flatten(_plain(old)), flatten(_plain(new))
    keys = [key for key in sorted(before | after) if _harmless(key) == harmless]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _harmless(key: str) -> bool:
    key = re.sub(r"^stages\.[^.]+\.", "", key)
    return any(key == name or key.startswith(name + ".") for name in HARMLESS)


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

    if str(flat.get("efficiency.remat")).lower() in ("true", "false"):
        kept = {"true": "full", "false": "none"}[str(flat["efficiency.remat"]).lower()]
        refuse("efficiency.remat", "it names a policy.", "the switch of an earlier version.", kept)
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
    share = flat.get("data.max_bad_share", 0.0)
    if not 0 <= share <= 1:
        refuse("data.max_bad_share", "a share lies between 0 and 1.", "per cent.", share / 100)


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
    if not 0 < flat["views.max_class_share"] <= 1:
        refuse("views.max_class_share", "a share lies between 0 and 1.", "the published one.", 0.75)


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
