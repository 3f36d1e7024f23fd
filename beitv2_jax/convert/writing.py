"""Write trained weights in any layout.

Beside the layouts that `convert.weights` reads there are 'stablehlo' and 'onnx': a function with the weights in it.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from beitv2_jax.convert import functions
from beitv2_jax.convert.arguments import HEAD_WIDTH, published_early_layer, published_out_layers, with_defaults
from beitv2_jax.convert.beit import huggingface, timm
from beitv2_jax.convert.beit.official import USAGE_COUNTERS, to_official
from beitv2_jax.convert.class_names import INPUTS_FILE
from beitv2_jax.convert.files import write_safetensors
from beitv2_jax.convert.model_card import CARD_FILE, NOTHING_STATED, Licenses, make_card
from beitv2_jax.convert.runs import is_run, write_run
from beitv2_jax.convert.teachers.terms import teachers_of_run
from beitv2_jax.convert.torch_files import writer
from beitv2_jax.convert.weights import (
    MASKED_KINDS,
    RELEASED_EPSILON,
    STAGES,
    TEACHER_FILE,
    TOKENIZER_STAGES,
    Weights,
    usual_normalization,
)
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.disk_checks import refuse_pattern
from beitv2_jax.sizes import MASKED_FRACTION

_Save = Callable[[Path], None]


def write(weights: Weights, path: str, layout: str, licenses: Licenses = NOTHING_STATED) -> dict[str, str]:
    """Write weights to a new file or folder and return {name: reason} of what the layout cannot store.

    'official' and 'timm' are files: .safetensors, .npz or .pth ({'model': state dict}, as the released scripts load
    it). 'huggingface', 'run', 'stablehlo', 'onnx', and 'timm' for a path without a suffix, are folders; those of
    Hugging Face and timm have a model card, which states `licenses`. Nothing is left at `path` unless all of it was
    written.

    Raises:
        UserError: `path` exists or cannot be written, or the layout has no such model.
    """
    target = Path(path)
    if target.exists():
        raise UserError(
            f"{path} already exists.",
            "An earlier conversion may have written it.",
            "Pass another path, or remove the existing one first.",
        )
    if layout not in _LAYOUTS_OF_ANY_MODEL:
        _refuse_stem(weights, layout)
        _refuse_clusters(weights, layout)
        _refuse_regressor(weights, layout)
        _refuse_quantizer(weights, layout)
    save, not_written = _WRITERS[layout](weights, target, licenses)
    # written beside the target, so that it is renamed on one disk; the suffix is kept, as it determines the format
    unfinished = target.with_name(f".unfinished-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save(unfinished)
        unfinished.rename(target)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error}.",
            "The disk may be full, or its folder may not be writable.",
            "Free disk space, or pass a path in a folder that you can write to.",
        ) from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        elif unfinished.exists():
            unfinished.unlink()
    return not_written


def _official_writer(weights: Weights, target: Path, licenses: Licenses) -> tuple[_Save, dict[str, str]]:
    state = to_official(weights.kind, weights.variables)
    counters = {path: "a counter of the training run" for path in USAGE_COUNTERS if weights.kind == "vqkd"}
    return _state_saver(state, target), counters | _not_stored(weights, weights.kind)


def _timm_writer(weights: Weights, target: Path, licenses: Licenses) -> tuple[_Save, dict[str, str]]:
    state, not_written = timm.to_timm(weights.kind, to_official(weights.kind, weights.variables))
    not_stored = _not_stored(weights, "classifier")
    if target.suffix:
        return _state_saver(state, target), not_written | not_stored
    arguments = with_defaults(weights.kind, weights.arguments)
    config = timm.make_config(
        weights.kind, arguments, weights.normalization, weights.class_names, weights.crop_fraction, weights.multi_label
    )
    in_config = ("normalization", "num_heads", "crop_fraction", "multi_label")
    not_stored = {name: reason for name, reason in not_stored.items() if name not in in_config}
    state, card = _contiguous(state), _card(weights, "timm", licenses)
    return lambda path: _save_folder(path, card, timm.save, state, config), not_written | not_stored


def _huggingface_writer(weights: Weights, target: Path, licenses: Licenses) -> tuple[_Save, dict[str, str]]:
    official = to_official(weights.kind, weights.variables)
    state, not_written = huggingface.to_huggingface(weights.kind, official)
    arguments = with_defaults(weights.kind, weights.arguments)
    config = huggingface.make_config(weights.kind, arguments, weights.class_names, weights.multi_label)
    preprocessor = huggingface.make_preprocessor(
        weights.kind, weights.normalization, weights.arguments["image_size"], weights.crop_fraction
    )
    state, card = _contiguous(state), _card(weights, "transformers", licenses)
    return lambda path: _save_folder(path, card, huggingface.save, state, config, preprocessor), not_written


def _run_writer(weights: Weights, target: Path, licenses: Licenses) -> tuple[_Save, dict[str, str]]:
    refuse_pattern(target)
    config = run_config(weights)
    variables = {"params": weights.variables["params"], "model_state": weights.model_state}

    def save(path: Path) -> None:
        write_run(str(path), config, variables)
        if weights.kind == "cluster":
            (path / TEACHER_FILE).write_text(json.dumps(weights.arguments["teacher"], indent=2) + "\n")
        teachers = teachers_of_run(weights.source) if weights.source and is_run(weights.source) else []
        if weights.class_names or weights.multi_label or teachers:
            train = {"classes": list(weights.class_names)} | ({"multi_label": True} if weights.multi_label else {})
            inputs = {"train": train, "teachers": teachers}
            (path / INPUTS_FILE).write_text(json.dumps(inputs, indent=2) + "\n")

    return save, {}


def _function_writer(layout: str, weights: Weights, target: Path, licenses: Licenses) -> tuple[_Save, dict[str, str]]:
    function = functions.EXPORTS[layout](weights)
    returned = "tokens" if weights.kind in MASKED_KINDS else "codes"
    reason = f"the exported function returns {returned}"
    before_tokens = r"(norm|lm_head|regression_head|aggregation)"
    unused = {**dict.fromkeys(MASKED_KINDS, before_tokens), "vqkd": r"(decoder|decode_task)"}.get(weights.kind, "(?!)")
    not_written = {name: reason for name in weights.variables["params"] if re.match(unused, name)}
    return lambda path: functions.save(path, function), not_written


_WRITERS = {
    "official": _official_writer,
    "timm": _timm_writer,
    "huggingface": _huggingface_writer,
    "run": _run_writer,
    "stablehlo": functools.partial(_function_writer, "stablehlo"),
    "onnx": functools.partial(_function_writer, "onnx"),
}
_LAYOUTS_OF_ANY_MODEL = ("run", "stablehlo", "onnx")


def _card(weights: Weights, library: str, licenses: Licenses) -> str:
    arguments = with_defaults(weights.kind, weights.arguments)
    kind = "backbone" if arguments.get("num_classes") == 0 else weights.kind
    return make_card(
        kind,
        arguments,
        weights.normalization,
        weights.crop_fraction,
        weights.source,
        library,
        licenses,
        multi_label=weights.multi_label,
    )


def _save_folder(path: Path, card: str, save: Callable[..., None], *content) -> None:
    save(path, *content)
    (path / CARD_FILE).write_text(card, encoding="utf-8")


def _refuse_stem(weights: Weights, layout: str) -> None:
    parts = (weights.arguments, *(part for part in weights.arguments.values() if isinstance(part, dict)))
    if all(part.get("stem", "linear") == "linear" for part in parts):
        return
    raise UserError(
        f"The model embeds patches by small convolutions (model.stem=conv), which the layout {layout!r} cannot hold: "
        "its models embed a patch by one linear map.",
        "Did you mean to use the model without this package?",
        "Write --layout=stablehlo, which holds every model, or train one with --config.model.stem=linear.",
    )


def _refuse_clusters(weights: Weights, layout: str) -> None:
    if weights.kind == "cluster":
        raise UserError(
            f"The layout {layout!r} is one of BEiT's own networks, and {weights.source} is a teacher with a codebook.",
            "Did you mean to use the tokenizer without this package?",
            "Write --layout=stablehlo or --layout=onnx, which hold every model, or --layout=run.",
        )


def _refuse_regressor(weights: Weights, layout: str) -> None:
    if weights.kind == "regressor":
        raise UserError(
            f"The layout {layout!r} has no model that predicts pixels or features of hidden patches, as "
            f"{weights.source} does.",
            "Did you mean to use its transformer without this package?",
            "Write --layout=stablehlo or --layout=onnx, which hold every model, or fine-tune it by --config.init_from.",
        )


def _refuse_quantizer(weights: Weights, layout: str) -> None:
    quantizer = weights.arguments.get("quantizer", "ema")
    if quantizer != "ema":
        raise UserError(
            f"The tokenizer has model.quantizer={quantizer}, which the layout {layout!r} cannot hold: "
            "its tokenizer looks codes up in a codebook that follows a moving average.",
            "Did you mean to use the tokenizer without this package?",
            "Write --layout=stablehlo or --layout=onnx, which hold every model, or --layout=run.",
        )


def run_config(weights: Weights) -> dict:
    """Return the part of a run's config that later stages read; a run cannot be resumed with it.

    Raises:
        UserError: a classifier without a head.
    """
    if weights.arguments.get("num_classes") == 0:
        raise UserError(
            "The classifier has no head, and a run directory cannot hold a classifier without one.",
            "The weights may be those of a backbone alone, which --config.init_from reads without conversion.",
            "Write --layout=huggingface or --layout=timm.",
        )
    model = dict(weights.arguments)
    image_size = model.pop("image_size")
    config = {"stage": STAGES[weights.kind], "views": {"image_size": image_size}}
    if weights.kind in TOKENIZER_STAGES:
        del model["teacher_width" if weights.kind == "vqkd" else "teacher"]
    else:
        config["normalization"] = weights.normalization
    if weights.stated_crop_fraction:
        config["evaluation"] = {"crop_fraction": weights.stated_crop_fraction}
    if weights.kind in MASKED_KINDS:
        config["masking"] = {"num_masked": max(1, round((image_size // model["patch_size"]) ** 2 * MASKED_FRACTION))}
    return config | {"model": model}


def _not_stored(weights: Weights, read_as: str) -> dict[str, str]:
    """Return {argument: reason} of what files without a config cannot store and readers will therefore assume wrongly.

    Readers assume the published values, so only arguments that differ from these are listed. `read_as` is the kind that
    a reader sees.
    """
    arguments = with_defaults(weights.kind, weights.arguments)
    epsilon = arguments.get("norm_eps", RELEASED_EPSILON)
    not_stored = {}
    if epsilon != RELEASED_EPSILON:
        not_stored["norm_eps"] = f"the layout cannot store {epsilon:g}; it will be read as {RELEASED_EPSILON:g}"
    usual = usual_normalization(read_as, arguments)
    if weights.normalization not in ("", usual):
        not_stored["normalization"] = (
            f"the layout cannot store {weights.normalization}; read the file with --normalization"
        )
    if weights.stated_crop_fraction:
        not_stored["crop_fraction"] = (
            f"the layout cannot store {weights.stated_crop_fraction:g}; evaluate the file with --crop_fraction"
        )
    if weights.multi_label:
        not_stored["multi_label"] = (
            "the layout cannot store that an image may have several classes; its logits will be read as those of one"
        )
    for part in (arguments, arguments.get("encoder") or {}, arguments.get("decoder") or {}):
        has_table = part.get("position", "absolute").startswith("relative")
        if part.get("width", 0) != HEAD_WIDTH * part.get("num_heads", 0) and not has_table:
            not_stored["num_heads"] = f"the layout cannot store {part['num_heads']}; read the file with --num_heads"
    if arguments.get("patch_aggregation") and arguments["early_layer"] != published_early_layer(arguments["depth"]):
        not_stored["early_layer"] = (
            f"the layout cannot store {arguments['early_layer']}; it will be read as three layers before the last"
        )
    if "out_layers" in arguments and tuple(arguments["out_layers"]) != published_out_layers(arguments["depth"]):
        not_stored["out_layers"] = (
            f"the layout cannot store {arguments['out_layers']}; they will be read as the published ones"
        )
    return not_stored


def _state_saver(state: dict[str, np.ndarray], target: Path) -> _Save:
    savers = {
        ".safetensors": lambda path: write_safetensors(path, _contiguous(state)),
        ".npz": lambda path: np.savez(path, **state),
        ".pth": lambda path: writer.save(path, {"model": _contiguous(state)}),
    }
    if target.suffix not in savers:
        raise UserError(
            f"The name {target} ends in none of {', '.join(savers)}.",
            f"Did you mean {target.with_suffix('.safetensors')}, or a folder of another --layout?",
            f"Write {target.with_suffix('.safetensors')}.",
        )
    return savers[target.suffix]


def _contiguous(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(array, order="C") for name, array in state.items()
    }  # ascontiguousarray adds an axis to scalars
