"""Checks of a config before any computation: choices, durations, and sizes that must fit each other."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from beitv2_jax import choices
from beitv2_jax.config.durations import parse_duration, steps
from beitv2_jax.config.load import flatten
from beitv2_jax.config.paths import PATH_KEYS, WEIGHT_KEYS, may_be_in_bucket, refuse_remote
from beitv2_jax.config.pipelines import stage_errors
from beitv2_jax.config.settings import undecided
from beitv2_jax.config.train_labels import parse_train_labels
from beitv2_jax.errors import UserError, did_you_mean, nearest
from beitv2_jax.sizes import MASKED_FRACTION

_DURATION_KEYS = (
    *("duration", "warmup", "log_every", "checkpoint_every", "keep_every", "eval_every"),
    *("usage_window", "kmeans_again"),
)
_CHOICES = {
    "stage": (
        "finetune",
        "extract",
        "vqkd",
        "cluster",
        "tokenize",
        "mim",
        "regress",
        "probe",
        "segment",
        "dense",
        "segment_linear",
        "pipeline",
    ),
    "probe.protocol": choices.PROBE_PROTOCOLS,
    "views.interpolation": choices.INTERPOLATIONS,
    "views.tokenizer_interpolation": ("", *choices.INTERPOLATIONS),
    "teacher.normalization": ("", *choices.NORMALIZATIONS),
    "teacher.output": ("", *choices.TEACHER_OUTPUTS),
    "teacher.activation": ("", *choices.TEACHER_ACTIVATIONS),
    "teacher.grid_match": choices.GRID_MATCHES,
    "teacher.position_resize": ("", *choices.POSITION_RESIZES),
    "normalization": choices.NORMALIZATIONS,
    "class_weights": choices.CLASS_WEIGHTS,
    "model.position": choices.POSITIONS,
    "model.pooling": choices.POOLING,
    "model.stem": choices.STEMS,
    "model.qkv_bias": choices.QKV_BIASES,
    "model.param_init": choices.PARAM_INITS,
    "model.encoder.stem": choices.STEMS,
    "model.quantizer": choices.QUANTIZERS,
    "model.quantizer_gradient": choices.QUANTIZER_GRADIENTS,
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

_POSITIVE_DURATIONS = ("run.duration", "probe.duration", "usage_window")
_FRACTIONS = (
    "max_bad_fraction",
    "validation_fraction",
    "min_scale",
    "label_smoothing",
    "drop_path_rate",
    "dropout_rate",
    "weight_average",
    "ema_decay",
    "erasing",
    "mix_probability",
    "switch_probability",
    "crop_fraction",
)
"""Numbers from 0 to 1, by the last part of their key."""
_AT_LEAST_ONE = {
    "batch_size": 512,
    "image_size": 224,
    "patch_size": 16,
    "tokenizer_patch_size": 16,
    "min_patches": 16,
    "long_side": 2048,
    "width": 768,
    "depth": 12,
    "mlp_dim": 3072,
    "codebook_size": 8192,
    "code_dim": 32,
    "head_depth": 2,
    "channels": 768,
    "aux_channels": 256,
    "knn_neighbors": 20,
    "shard_examples": 8192,
    "iterations": 25,
    "max_iterations": 1000,
    "layer": 12,
}
"""Numbers that must be positive, by the last part of their key, with a published value."""

_OF_SOME_QUANTIZERS = {
    "model.fsq_levels": (("fsq",), ()),
    "model.quantizer_gradient": (("ema", "simvq"), "straight_through"),
    "model.commitment_weight": (("ema", "simvq"), 1.0),
    "model.ema_decay": (("ema",), 0.99),
    "kmeans_tokens": (("ema",), 0),
    "kmeans_again": (("ema",), "0 steps"),
    "revive": (("ema",), False),
}
"""Key -> the values of `model.quantizer` that have a use for it, and the value that says nothing."""


def validate(config: ConfigDict, num_examples: int | None = None) -> None:
    """Check what can be checked before any computation: choices, durations, sizes that must fit each other.

    Keys that weights, stored targets or data will decide (`settings.undecided`) are not looked at.

    Args:
        config: one stage, or a pipeline, whose stages are then checked one by one.
        num_examples: examples of the training split where known; needed to compare durations of different units, and
            the batch size with the data.

    Raises:
        UserError: the first fault found, naming the keys at fault.
    """
    if config.get("stage") == "pipeline":
        for name, stage in config.stages.items():
            with stage_errors(config, name):
                _validate_stage(stage, num_examples)
    else:
        _validate_stage(config, num_examples)


def _validate_stage(config: ConfigDict, num_examples: int | None) -> None:
    later = undecided(config)
    flat = {key: value for key, value in flatten(config).items() if key not in later}

    def refuse(key: str, problem: str, meant: str, *values, other: str = "") -> None:
        instead = " or ".join(f"--config.{key}={value}" for value in values)
        raise UserError(f"{key}={flat.get(key)!r} is not valid: {problem}.", meant, f"Write {instead}{other}.")

    for key in PATH_KEYS:
        buckets = may_be_in_bucket(key, flat.get("data.source", ""))
        refuse_remote(f"--config.{key}", flat.get(key, ""), buckets=buckets, weights=key in WEIGHT_KEYS)
    for key, valid in _CHOICES.items():
        if key in flat and flat[key] not in valid:
            names = tuple(filter(None, valid))
            guess = nearest(str(flat[key]), names)
            refuse(
                key,
                f"it must be one of {', '.join(names)}",
                did_you_mean(str(flat[key]), names),
                *([guess] if guess else names),
            )
    for key, usual in ((key, _AT_LEAST_ONE.get(key.split(".")[-1])) for key in flat):
        if usual is not None and flat[key] < 1:
            refuse(key, "it must be at least 1", "Did you mean the published value?", usual)
    for key in (key for key in flat if key.split(".")[-1] in _FRACTIONS):
        if not 0 <= flat[key] <= 1:
            fitting = min(abs(flat[key]) / 100, 1)
            refuse(key, "a fraction lies between 0 and 1", "Did you mean per cent?", f"{fitting:g}")
    if num_examples is not None and "run.duration" in flat and flat["run.batch_size"] > num_examples:
        refuse(
            "run.batch_size",
            f"the training split has {num_examples} examples",
            "Did you choose the batch size for a larger data set?",
            num_examples,
        )
    _check_durations(flat, refuse, num_examples)
    _check_sizes(flat, refuse)
    _check_quantizer(flat, refuse)
    _check_kmeans_start(flat, refuse)
    _check_layers(flat, refuse)
    _check_reading(flat, refuse)
    _check_probe(flat, refuse)
    _check_dense(flat, refuse)
    _check_clustering(flat, refuse)
    _check_efficiency(flat, refuse)
    _check_windows(flat, refuse)
    _check_inputs(config.stage, flat, refuse)


def _check_durations(flat: dict[str, Any], refuse: Callable, num_examples: int | None) -> None:
    amounts = {}
    for key in (key for key in flat if key.split(".")[-1] in _DURATION_KEYS):
        try:
            amounts[key], _ = parse_duration(flat[key])
        except UserError as error:
            refuse(key, error.happened.rstrip("."), error.meant, "'100 epochs'", "'1000 steps'")
        if num_examples is not None:
            batch_key = "probe.batch_size" if key.startswith("probe.") else "run.batch_size"
            amounts[key] = steps(flat[key], batch_size=flat[batch_key], num_examples=num_examples, batch_key=batch_key)
        if key in _POSITIVE_DURATIONS and not amounts[key]:
            refuse(key, "it must be at least one step", "Did you mean a short one, to try something?", "'100 steps'")
    again, duration = flat.get("kmeans_again", "0 steps"), flat.get("run.duration")
    comparable = num_examples is not None or (duration and parse_duration(again)[1] == parse_duration(duration)[1])
    if comparable and amounts.get("kmeans_again", 0) and amounts["kmeans_again"] >= amounts["run.duration"]:
        amount, unit = parse_duration(duration)
        refuse(
            "kmeans_again",
            f"the run ends before, after run.duration={duration!r}",
            "Did you shorten the run?",
            f"'{amount / 10:g} {unit}'",
            "'0 steps'",
        )
    if "optim.warmup" not in flat:
        return
    warmup, duration = flat["optim.warmup"], flat["run.duration"]
    if num_examples is None and parse_duration(warmup)[1] != parse_duration(duration)[1]:
        return
    if amounts["optim.warmup"] >= amounts["run.duration"]:
        amount, unit = parse_duration(duration)
        num_steps = amounts["run.duration"] if num_examples is not None or unit == "steps" else math.inf
        refuse(
            "optim.warmup",
            f"it must be shorter than run.duration={duration!r}",
            "Did you shorten the run but not its warm-up?",
            f"'{amount / 10:g} {unit}'" if num_steps >= 10 else "'0 steps'",
        )


def _check_sizes(flat: dict[str, Any], refuse: Callable) -> None:
    for section in ("model.", "model.encoder.", "model.decoder."):
        width, heads = flat.get(f"{section}width"), flat.get(f"{section}num_heads")
        if None in (width, heads):
            continue
        if heads < 1:
            fitting = max(1, width // 64)
            while width % fitting:
                fitting -= 1
            meant = "Did you mean heads of width 64, as in the published models?"
            refuse(f"{section}num_heads", "it must be at least 1", meant, fitting)
        if width % heads:
            refuse(
                f"{section}width",
                f"it must be divisible by {section}num_heads={heads}",
                "Did you mean a whole number of channels per head?",
                heads * max(1, round(width / heads)),
            )
    patch_keys = ("model.encoder.patch_size", "teacher.tokenizer_patch_size")
    patch_key = next((key for key in patch_keys if key in flat), "model.patch_size")
    image_size, patch_size = flat.get("views.image_size"), flat.get(patch_key)
    are_known = None not in (image_size, patch_size)
    if are_known and image_size % patch_size:
        refuse(
            "views.image_size",
            f"it must be divisible by {patch_key}={patch_size}",
            "Did you mean a whole number of patches per side?",
            patch_size * max(1, round(image_size / patch_size)),
        )
    betas = flat.get("optim.betas", (0.9, 0.999))
    if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        refuse(
            "optim.betas",
            "Adam takes two decay rates in [0, 1)",
            "Did you mean the usual pair?",
            "'(0.9, 0.999)'",
        )
    if are_known and "masking.num_masked" in flat:
        num_patches = (image_size // patch_size) ** 2
        if not 1 <= flat["masking.num_masked"] <= num_patches:
            refuse(
                "masking.num_masked",
                f"views.image_size={image_size} and {patch_key}={patch_size} give {num_patches} patches",
                "Did you mean the published fraction, 75 of 196?",
                max(1, round(num_patches * MASKED_FRACTION)),
            )
    for section in ("model.", "model.encoder."):
        if flat.get(f"{section}stem") == "conv" and patch_size is not None and patch_size & (patch_size - 1):
            problem = (
                f"small convolutions cannot make patches of {patch_key}={patch_size} pixels, which is no power of two"
            )
            refuse(f"{section}stem", problem, "Did you mean the published stem?", "linear")


def _check_quantizer(flat: dict[str, Any], refuse: Callable) -> None:
    """Check that the quantizer has a use for the options that are set, and that the levels of 'fsq' make its codes."""
    quantizer = flat.get("model.quantizer")
    if quantizer is None:
        return
    key = "model.fsq_levels"
    levels = flat.get(key, ())
    are_levels = all(isinstance(level, int) and level > 1 for level in levels)
    if key in flat and (not are_levels or (quantizer == "fsq" and not levels)):
        usual = (
            "'(8, 8, 5, 5, 5)' --config.model.quantizer=fsq --config.model.codebook_size=8000 --config.model.code_dim=5"
        )
        refuse(key, "fsq needs two levels or more of each dimension", "Did you mean those of 8000 codes?", usual)
    sizes = {"model.codebook_size": math.prod(levels), "model.code_dim": len(levels)}
    fitting = " ".join(f"--config.{name}={size}" for name, size in sizes.items())
    for name, (users, default) in _OF_SOME_QUANTIZERS.items():
        if quantizer not in users and flat.get(name, default) != default:
            other = f" or --config.model.quantizer={users[0]}" if quantizer != "fsq" else ""
            refuse(
                name,
                f"model.quantizer={quantizer} has no use for it",
                f"Did you mean model.quantizer={users[0]}?",
                repr(str(default)) if isinstance(default, str | tuple) else default,
                other=f"{other} {fitting}" if users == ("fsq",) else other,
            )
    if quantizer == "fsq" and key in flat and any(flat.get(name, size) != size for name, size in sizes.items()):
        stated = " and ".join(f"{name}={flat[name]}" for name in sizes if name in flat)
        refuse(
            key,
            f"they make {sizes['model.codebook_size']} codes of {len(levels)} dimensions, not {stated}",
            "Did you mean the sizes that follow from the levels?",
            f"'{tuple(levels)}' {fitting}",
        )


def _check_kmeans_start(flat: dict[str, Any], refuse: Callable) -> None:
    """Check that k-means has a patch for each code: it cannot start more codes than it has samples."""
    tokens = flat.get("kmeans_tokens", 0)
    if tokens < 0:
        refuse("kmeans_tokens", "no code has fewer than 0 tokens", "Did you mean the published start?", 0)
    if tokens and not flat["kmeans_start"] and not parse_duration(flat.get("kmeans_again", "0 steps"))[0]:
        refuse(
            "kmeans_tokens",
            "nothing starts by k-means",
            "Did you mean to switch k-means on?",
            0,
            other=" or --config.kmeans_start=True",
        )
    image_size, patch_size = flat.get("views.image_size"), flat.get("model.encoder.patch_size")
    starts = flat.get("kmeans_start") and flat.get("model.quantizer", "ema") == "ema" and not flat["init_from"]
    if tokens or not starts or None in (image_size, patch_size):
        return
    batch_size, codes = flat["run.batch_size"], flat["model.codebook_size"]
    patches = batch_size * (image_size // patch_size) ** 2
    if patches < codes:
        refuse(
            "run.batch_size",
            f"the {patches} patches of the first batch start the model.codebook_size={codes} codes (kmeans_start), and "
            "the codes beyond them would never be used",
            "Did you make the batch or the images smaller but not the codebook?",
            batch_size * math.ceil(codes / patches),
            other=" or --config.kmeans_start=False",
        )


def _check_layers(flat: dict[str, Any], refuse: Callable) -> None:
    """Check keys that name blocks of the backbone, counted from 1."""
    depth, early_layer = flat.get("model.depth"), flat.get("model.early_layer")
    if depth is None:
        return
    if flat.get("model.patch_aggregation") and early_layer is not None and not 1 <= early_layer <= depth:
        refuse(
            "model.early_layer",
            f"the backbone has model.depth={depth} blocks, counted from 1",
            "Did you mean three quarters of the depth, as published (9 of 12)?",
            max(1, round(0.75 * depth)),
        )
    out_layers = flat.get("model.out_layers")
    if out_layers is not None and (len(out_layers) != 4 or not all(1 <= layer <= depth for layer in out_layers)):
        refuse(
            "model.out_layers",
            f"it must name four of the model.depth={depth} blocks, counted from 1",
            "Did you mean the last block of every quarter?",
            f"'{tuple(math.ceil(depth * quarter / 4) for quarter in (1, 2, 3, 4))}'",
        )


def check_codebook_size(predicted: int, codebook_size: int) -> None:
    """Raise UserError unless as many codes are predicted as the tokenizer has."""
    if codebook_size != predicted:
        raise UserError(
            f"The tokenizer has {codebook_size} codes, the model predicts {predicted}.",
            "Did you mean the codebook_size that the tokenizer was trained with?",
            f"Write --config.model.codebook_size={codebook_size}.",
        )


def check_layer(layer: int, depth: int) -> None:
    """Raise UserError unless the block whose patch tokens are to be read is one of the `depth` of its backbone."""
    if not 1 <= layer <= depth:
        raise UserError(
            f"backbone.layer={layer} is not valid: the backbone has {depth} blocks, counted from 1.",
            "Did you mean the last block?",
            f"Write --config.backbone.layer={depth}.",
        )


def check_probed_layers(layers: Sequence[int], depth: int) -> None:
    """Raise UserError unless the blocks that the probe is to read are among the `depth` of its backbone."""
    if not layers or not all(1 <= layer <= depth for layer in layers):
        raise UserError(
            f"probe.layers={tuple(layers)} is not valid: the backbone of the probe has {depth} blocks, counted from 1.",
            "Did you mean three quarters of the depth and the last block, as published (9 and 12 of 12)?",
            f"Write --config.probe.layers='({max(1, round(0.75 * depth))}, {depth})'.",
        )


def _check_reading(flat: dict[str, Any], refuse: Callable) -> None:
    for key in ("data.num_threads", "data.num_workers"):
        if flat.get(key, 0) < 0:
            refuse(key, "the number cannot be negative", "Did you mean none?", 0)
    train_labels = flat.get("data.train_labels", "")
    if train_labels and not parse_train_labels(train_labels):
        problem = "it must be a part of each class, above 0% and up to 100%, or a number of its images"
        refuse("data.train_labels", problem, "Did you forget the unit?", "10%", "'5 shots'")
    if flat.get("optim.spike_factor", 0.0) and flat["optim.spike_factor"] <= 1:
        refuse(
            "optim.spike_factor",
            "it must be 0 (off) or greater than 1",
            "Did you mean to skip steps of ten times the usual loss?",
            0,
            10,
        )
    if flat.get("run.hang_timeout", 0) < 0:
        refuse("run.hang_timeout", "a time in seconds cannot be negative", "Did you mean no watchdog?", 0)


def _check_probe(flat: dict[str, Any], refuse: Callable) -> None:
    if "probe.learning_rates" not in flat:
        return
    rates = flat["probe.learning_rates"]
    if not rates or min(rates) <= 0:
        problem = "it must hold at least one rate, and rates are positive"
        refuse("probe.learning_rates", problem, "Did you mean the published rate?", "'(0.004,)'")
    if not 0 < flat["probe.validation_fraction"] < 1:
        problem = "some images must choose among the probes, and some must train them"
        refuse("probe.validation_fraction", problem, "Did you mean a tenth of the images?", 0.1)
    if flat["probe.knn_temperature"] <= 0:
        refuse("probe.knn_temperature", "it must be positive", "Did you mean that of DINO?", 0.07)


def _check_dense(flat: dict[str, Any], refuse: Callable) -> None:
    if "dense.neighbors" not in flat:
        return
    if not flat["dense.neighbors"] or min(flat["dense.neighbors"]) < 1:
        refuse("dense.neighbors", "at least one patch votes", "Did you mean those of CAPI?", "'(1, 3, 10, 30)'")
    if not flat["dense.strengths"] or min(flat["dense.strengths"]) <= 0:
        refuse("dense.strengths", "they must be positive", "Did you mean to try a single one?", "'(1.0,)'")
    if not 0 < flat["dense.validation_fraction"] < 1:
        problem = "some images must be held out, and some must be left to learn from"
        refuse("dense.validation_fraction", problem, "Did you mean a tenth of the images?", 0.1)
    if flat["dense.max_patches"] < 0:
        refuse("dense.max_patches", "a number of patches cannot be negative", "Did you mean all of them?", 0)


def _check_clustering(flat: dict[str, Any], refuse: Callable) -> None:
    if "clustering.max_tokens" not in flat:
        return
    codes = flat["model.codebook_size"]
    if flat["clustering.max_tokens"] < codes:
        problem = f"model.codebook_size={codes} clusters need as many tokens"
        refuse("clustering.max_tokens", problem, "Did you mean about fifty tokens for each cluster?", 50 * codes)
    if flat["clustering.components"] < 0:
        problem = "a number of principal components cannot be negative"
        refuse("clustering.components", problem, "Did you mean the features as they are?", 0)


def _check_efficiency(flat: dict[str, Any], refuse: Callable) -> None:
    steps, batch_size = flat.get("efficiency.accumulation_steps", 1), flat.get("run.batch_size", 1)
    if steps < 1 or batch_size % steps:
        fitting = max(count for count in range(1, max(steps, 1) + 1) if batch_size % count == 0)
        problem = f"run.batch_size={batch_size} cannot be divided into as many equal parts"
        refuse("efficiency.accumulation_steps", problem, "Did you mean a divisor of the batch size?", fitting)


def _check_windows(flat: dict[str, Any], refuse: Callable) -> None:
    """Check what a segmentation cuts out of its images, to train on and to evaluate."""
    if "evaluation.stride" not in flat:
        return
    side = flat.get("views.image_size")
    if side is not None and not 1 <= flat["evaluation.stride"] <= side:
        refuse(
            "evaluation.stride",
            f"windows of {side} pixels would leave gaps",
            "Did you mean two thirds of the window?",
            round(2 * side / 3),
        )
    for section in ("views", "evaluation"):
        long_side, short_side = flat[f"{section}.long_side"], flat[f"{section}.short_side"]
        if not 1 <= short_side <= long_side:
            refuse(
                f"{section}.short_side",
                f"{section}.long_side={long_side} is shorter",
                "Did you exchange the two sides?",
                long_side,
            )
    if not flat["evaluation.scales"] or min(flat["evaluation.scales"]) <= 0:
        refuse("evaluation.scales", "scales must be positive", "Did you mean the unscaled image only?", "'(1.0,)'")
    largest = flat["views.max_ratio"]
    if largest <= 0:
        refuse("views.max_ratio", "a ratio must be positive", "Did you mean the published value?", 2.0)
    if not 0 < flat["views.min_ratio"] <= largest:
        problem = f"it must lie between 0 and views.max_ratio={largest}"
        refuse("views.min_ratio", problem, "Did you mean a smaller one?", min(0.5, largest))
    if not 0 < flat["views.max_class_fraction"] <= 1:
        refuse("views.max_class_fraction", "a fraction lies between 0 and 1", "Did you mean the published value?", 0.75)


def _check_inputs(stage: str, flat: dict[str, Any], refuse: Callable) -> None:
    """Check that the config says where the inputs of its stage are, and that stored inputs have numbered views."""
    needed = {
        "extract": "teacher.weights",
        "cluster": "teacher.features",
        "tokenize": "tokenizer.run",
        "probe": "backbone.run",
        "dense": "backbone.run",
        "segment_linear": "backbone.run",
    }
    for required in ("data.source", *filter(None, [needed.get(stage)])):
        if not flat.get(required, required):
            place = "folder:PATH" if required == "data.source" else "PATH"
            refuse(required, "this stage cannot run without it", "Did you forget to set it?", place)
    either = {"vqkd": ("teacher.features", "teacher.weights"), "mim": ("tokenizer.codes", "tokenizer.run")}.get(stage)
    stored = stage in ("extract", "cluster", "tokenize") or (stage == "regress" and bool(flat["teacher.features"]))
    if either is not None:
        stored_key, live_key = either
        stored = bool(flat[stored_key])
        if stored == bool(flat[live_key]):
            value = "''" if stored else "DIR"
            refuse(
                stored_key,
                f"exactly one of {stored_key} and {live_key}={flat[live_key]!r} must be set",
                f"Targets come either from a target cache ({stored_key}) or from the live network ({live_key}).",
                value,
                other=f" or --config.{live_key}={value if stored else 'PATH'}",
            )
    if stored and flat.get("views.num_views", 1) < 1:
        refuse(
            "views.num_views",
            "stored targets belong to numbered views",
            "Did you mean the number of stored views per image?",
            4,
        )
