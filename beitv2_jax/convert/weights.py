"""Read trained weights of any layout, resize them to another image size, and write them in any layout.

A layout is how a file names its arrays: 'official' (the released PyTorch code), 'timm', 'huggingface' (a folder with
config.json), or 'run' (a run directory of this package). The kind of model is recognised from the names. 'stablehlo'
and 'onnx' can only be written: a function with the weights in it.
"""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import (
    HEAD_WIDTH,
    MODELS,
    fill_unknown,
    infer_arguments,
    published_early_layer,
    published_out_layers,
    with_defaults,
)
from beitv2_jax.convert.beit import huggingface, timm
from beitv2_jax.convert.beit.official import USAGE_COUNTERS, dropped_entries, from_official, recognise, to_official
from beitv2_jax.convert.class_names import INPUTS_FILE, class_names_of, is_multi_label
from beitv2_jax.convert.files import read_config, read_weights, write_safetensors
from beitv2_jax.convert.input_statistics import crop_fraction_of, normalization_of
from beitv2_jax.convert.model_card import CARD_FILE, NOTHING_STATED, Licenses, make_card
from beitv2_jax.convert.positions import resize_positions
from beitv2_jax.convert.runs import Run, check_stage, is_run, read_run, write_run
from beitv2_jax.convert.teachers.terms import teachers_of_run
from beitv2_jax.convert.teachers.weights import classifier_from_state, from_state, is_plain_vit, refuse_plain_vit
from beitv2_jax.convert.torch_files import writer
from beitv2_jax.convert.wrappers import StateDict
from beitv2_jax.data.augment import eval_crop_fraction
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.runtime.disk_checks import refuse_pattern
from beitv2_jax.sizes import MASKED_FRACTION
from beitv2_jax.typing import PyTree

STAGES = {
    "vqkd": "vqkd",
    "cluster": "cluster",
    "mim": "mim",
    "regressor": "regress",
    "classifier": "finetune",
    "segmenter": "segment",
}
"""Kind of weights -> the stage that trains them."""
TOKENIZER_STAGES = ("vqkd", "cluster")
"""Stages that make a tokenizer, which are also the kinds of its weights."""
MASKED_KINDS = ("mim", "regressor")
"""Kinds that are trained on images with hidden patches."""
_MODEL_STATE = {"segmenter": "batch_stats"}
"""Kind of weights -> the collection that its runs store as 'model_state'."""
TEACHER_FILE = "teacher.json"
"""File in a run of stage 'cluster' that says what its teacher is (`convert.teachers.load.read_teacher`)."""

_OPTION = "python -m beitv2_jax.convert with --normalization"
RELEASED_EPSILON = 1e-6
"""Layer norm epsilon of every released model."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Trained weights and the arguments of their model.

    Attributes:
        kind: 'vqkd', 'cluster' (a teacher with a codebook of clusters of its features, of which `arguments["teacher"]`
            is the description), 'mim', 'regressor', 'classifier' or 'segmenter'; or 'vit', the trunk and last norm of a
            plain ViT, which can start a model or be probed but not be converted.
        arguments: keyword arguments of the model of that kind; of a 'vit' those of its `Backbone`.
        variables: {'params', 'codebook', 'batch_stats'} as NumPy trees; the latter two may be empty or absent.
        layout: of the source: 'official', 'timm', 'huggingface' or 'run'; 'plain' for a vision transformer that is no
            BEiT.
        dropped: {name: reason} of the entries that were not used.
        assumptions: sentences on what the source does not say and was therefore assumed.
        normalization: name of the input normalisation; '' for a tokenizer, whose images are in [-1, 1] (as 'half').
        normalization_known: False if the source does not say which one it is, and the usual one was assumed.
        stated_crop_fraction: fraction of the resized shorter side that the central crops of an evaluation keep; 0 if
            the source does not say one, or that of the released evaluation.
        class_names: of the classes that the model predicts, in the order of its outputs; () if the source has none.
        multi_label: whether an image may have several of them, each with the sigmoid of its logit for a probability.
        source: the path that the weights were read from; '' if they were not read.
    """

    kind: str
    arguments: dict
    variables: dict[str, PyTree]
    layout: str
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    normalization: str = ""
    normalization_known: bool = True
    stated_crop_fraction: float = 0.0
    class_names: tuple[str, ...] = ()
    multi_label: bool = False
    source: str = ""

    @property
    def crop_fraction(self) -> float:
        """Fraction of the resized shorter side that the central crops of an evaluation keep."""
        return eval_crop_fraction(self.arguments["image_size"], self.stated_crop_fraction)

    @property
    def model_state(self) -> PyTree:
        """What no optimizer updates: the codebook, or the statistics of batch norm."""
        return self.variables.get(_MODEL_STATE.get(self.kind, "codebook"), {})

    @property
    def num_params(self) -> int:
        """Number of trained parameters, without codebook and batch statistics."""
        return sum(array.size for array in traverse_util.flatten_dict(self.variables["params"]).values())

    @property
    def num_arrays(self) -> int:
        """Number of arrays in all collections."""
        return len(traverse_util.flatten_dict(self.variables))


def read(
    path: str,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    normalization: str | None = None,
    average: bool = False,
    state_dict: str = "",
    plain_vit: bool = False,
) -> Weights:
    """Read weights of any layout.

    Args:
        path: of a file, a Hugging Face folder or a run directory.
        image_size: positions are resized to it; None keeps the size of the weights.
        num_heads: needed if the width is no multiple of 64 and neither position tables nor a config.json give it.
        normalization: name of the input normalisation, if it is known to differ from the stored or usual one; ignored
            for tokenizers, which have a fixed one.
        average: read the averaged weights of a run; ignored for files.
        state_dict: which of several state dicts in a file to read, as in `files.read_weights`; ignored for runs.
        plain_vit: also read image classifiers that are plain vision transformers (timm, Hugging Face), which cannot be
            written or trained here.

    Raises:
        UserError: nothing readable at `path`; an unknown, missing or wrongly shaped entry; or sizes that do not fit.
    """
    if is_run(path):
        weights = _from_run(path, normalization, average)
    else:
        found = read_weights(path, state_dict)
        weights = _classifier_from_plain_vit(path, found.arrays, num_heads, normalization) if plain_vit else None
        if weights is None:
            refuse_plain_vit(path, found.arrays)
            weights = _from_state(path, found.arrays, num_heads, normalization)
        weights = dataclasses.replace(
            weights, dropped=weights.dropped | found.dropped, assumptions=found.assumptions + weights.assumptions
        )
    num_classes = weights.arguments.get("num_classes", 0)
    weights = dataclasses.replace(
        weights,
        class_names=class_names_of(path, num_classes),
        multi_label=weights.kind == "classifier" and num_classes > 0 and is_multi_label(path),
        source=path,
    )
    if weights.arguments["image_size"] is None and image_size is None:
        raise UserError(
            f"The image size of {path} is unknown: the model has no position embeddings or tables.",
            "It may have been trained without positions.",
            "Run python -m beitv2_jax.convert with --image_size=N, the image size that it was trained with.",
        )
    if weights.layout != "run":
        crop_fraction = crop_fraction_of(path, weights.arguments["image_size"] or image_size)
        weights = dataclasses.replace(weights, stated_crop_fraction=crop_fraction)
    if image_size is None or image_size == weights.arguments["image_size"]:
        return weights
    return resized(weights, image_size)


def read_backbone(path: str, *, image_size: int | None = None) -> Weights:
    """Read weights whose backbone is to be used: those of `read`, and the trunk of a plain ViT as kind 'vit'.

    Raises:
        UserError: as `read`.
    """
    if not is_run(path) and is_plain_vit((found := read_weights(path)).arrays):
        weights = _from_plain_vit(path, found)
        return weights if image_size is None else resized(weights, image_size)
    weights = read(path, image_size=image_size)
    _refuse_cluster_tokenizer(weights, path)
    return weights


def describe(path: str) -> Weights:
    """Return what `read_backbone` would read; of a run only the config is read, and `variables` is empty.

    Raises:
        UserError: as `read`.
    """
    if not is_run(path):
        return read_backbone(path)
    weights = describe_run(path)
    _refuse_cluster_tokenizer(weights, path)
    return weights


def _refuse_cluster_tokenizer(weights: Weights, path: str) -> None:
    """Raise UserError if the weights are those of a cluster tokenizer, whose network is that of its teacher."""
    if weights.kind == "cluster":
        raise UserError(
            f"{path} holds a tokenizer of the stage 'cluster', which has trained no network.",
            f"Did you mean its teacher, {weights.arguments['teacher']['name']}?",
            "Pass the weights of the teacher, or a run of another stage.",
        )


def backbone_of(weights: Weights) -> Backbone:
    """Return the transformer in the weights: the encoder of a tokenizer, the backbone of every other model."""
    if weights.kind == "vit":
        return Backbone(**weights.arguments)
    # a run's config leaves the width of the teacher's features open
    model = MODELS[weights.kind].from_arguments(
        {"teacher_width": 1, **weights.arguments} if weights.kind == "vqkd" else weights.arguments
    )
    return model.encoder if weights.kind == "vqkd" else model.backbone


def resized(weights: Weights, image_size: int) -> Weights:
    """Return the weights for another image size, with positions resized as in the released loaders.

    Raises:
        UserError: `image_size` is not a multiple of the patch size.
    """
    if weights.kind == "cluster":
        made = weights.arguments["image_size"]
        raise UserError(
            f"The cluster tokenizer {weights.source} reads images of {made} pixels, not of {image_size}: its clusters "
            "are those of features at that size.",
            "Did you mean the image size that the features were extracted at?",
            f"Write {made}, or run the stages extract and cluster at {image_size} pixels.",
        )
    patch_size = check_image_size(weights, image_size)
    flat = traverse_util.flatten_dict(weights.variables, sep="/", keep_empty_nodes=True)
    has_cls = weights.arguments.get("class_token", True)  # which some plain ViTs lack
    flat = resize_positions(flat, (image_size // patch_size,) * 2, num_prefix=int(has_cls))
    return dataclasses.replace(
        weights,
        arguments={**weights.arguments, "image_size": image_size},
        variables=traverse_util.unflatten_dict(flat, sep="/"),
    )


def check_image_size(weights: Weights, image_size: int) -> int:
    """Return the patch size of the weights; raise UserError unless images of this size hold whole patches."""
    patch_size = weights.arguments.get("encoder", weights.arguments)["patch_size"]
    if image_size % patch_size:
        fitting = patch_size * max(1, round(image_size / patch_size))
        raise UserError(
            f"Images of {image_size} pixels cannot be divided into patches of {patch_size} pixels.",
            f"Did you mean {fitting} pixels?",
            f"Write --image_size={fitting}, or --config.views.image_size={fitting} for a training run.",
        )
    return patch_size


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


def _from_run(path: str, normalization: str | None, average: bool) -> Weights:
    weights = weights_of_run(path, read_run(path, average=average))
    return dataclasses.replace(
        weights, normalization=weights.normalization and (normalization or weights.normalization)
    )


def weights_of_run(path: str, run: Run) -> Weights:
    """Return the weights of a run at `path` whose checkpoint is read already."""
    described = describe_run(path)
    arguments = described.arguments
    if described.kind == "vqkd":
        arguments["teacher_width"] = run.params["decode_task"]["fc2"]["kernel"].shape[-1]
    if described.kind == "regressor":
        arguments["target_width"] = run.params["regression_head"]["kernel"].shape[-1]
    return dataclasses.replace(
        described,
        arguments=arguments,
        variables={"params": run.params, "codebook": {}, _MODEL_STATE.get(described.kind, "codebook"): run.model_state},
    )


def describe_run(path: str) -> Weights:
    """Return what the config of a run says of its weights; `arguments` lack the width of targets."""
    check_stage(path, STAGES.values(), "")
    weights = describe_config(read_config(path))
    if weights.kind == "cluster":
        weights.arguments["teacher"] = read_config(path, TEACHER_FILE)
    return weights


def describe_config(config: Mapping[str, Any]) -> Weights:
    """Return what the config of a stage of `STAGES` says of its weights, as `describe_run` does; without a teacher."""
    kind = next(kind for kind, stage in STAGES.items() if stage == config["stage"])
    arguments = {**config["model"], "image_size": config["views"]["image_size"]}
    if kind == "segmenter":
        arguments["out_layers"] = tuple(arguments["out_layers"])  # JSON has lists only
    return Weights(
        kind=kind,
        arguments=arguments,
        variables={},
        layout="run",
        normalization="" if kind in TOKENIZER_STAGES else config["normalization"],
        stated_crop_fraction=config.get("evaluation", {}).get("crop_fraction", 0.0),
    )


def _from_plain_vit(path: str, found: StateDict) -> Weights:
    network = from_state(found.arrays, read_config(path), output="tokens", num_heads=_stated_heads(path) or 0)
    normalization = normalization_of(path, given="", usual=network.normalization, option="--config.normalization")
    assumptions = () if normalization else ("normalization=imagenet: the weights do not say which one they need",)
    return Weights(
        kind="vit",
        arguments=network.arguments,
        variables={"params": network.params},
        layout="plain",
        dropped=network.dropped | found.dropped,
        assumptions=found.assumptions + assumptions,
        normalization=normalization or "imagenet",
        normalization_known=bool(normalization),
    )


def _stated_heads(path: str) -> int | None:
    """Return the number of attention heads that a config.json of Hugging Face or timm beside weights states."""
    config = read_config(path) or {}
    return config.get("num_attention_heads") or timm.stated_heads(config)


def _classifier_from_plain_vit(
    path: str, arrays: dict[str, np.ndarray], num_heads: int | None, normalization: str | None
) -> Weights | None:
    """Return the classifier in the state dict of a plain vision transformer; None for another state dict."""
    if not is_plain_vit(arrays):
        return None
    network = classifier_from_state(arrays, read_config(path), num_heads=num_heads or _stated_heads(path) or 0)
    if network is None:
        return None
    usual = network.normalization
    normalization = normalization_of(path, given=normalization or "", usual=usual, option="--normalization")
    if not normalization:
        raise UserError(
            f"{path} does not say how its input images are normalised.",
            "Classifiers with these names were trained with different normalisations.",
            "Write --normalization=half (AugReg and most of timm), imagenet (DeiT, MAE) or clip.",
        )
    return Weights(
        kind="classifier",
        arguments=network.arguments,
        variables={"params": network.params, "codebook": {}},
        layout="plain",
        dropped=network.dropped,
        normalization=normalization,
    )


def _from_state(path: str, state: dict[str, np.ndarray], num_heads: int | None, normalization: str | None) -> Weights:
    layout, name_in_file, known, assumptions = "official", str, {}, ()
    if huggingface.is_huggingface(state):
        layout = "huggingface"
        state, name_in_file = huggingface.to_released_names(state)
        known, assumptions = huggingface.read_settings(read_config(path) or {})
        num_heads = known.pop("num_heads", None) or num_heads
    kind = recognise(state)
    variables = from_official(kind, state, name_in_file)
    if layout == "official" and timm.is_timm(kind, state):
        layout = "timm"
    num_heads = num_heads or timm.stated_heads(read_config(path) or {})
    flat = traverse_util.flatten_dict(variables, sep="/")
    inferred = infer_arguments(kind, {path: array.shape for path, array in flat.items()})
    inferred |= {name: value for name, value in known.items() if name in inferred or name == "norm_eps"}
    arguments, assumed = fill_unknown(inferred, num_heads)
    assumptions += assumed
    if kind == "vqkd":
        normalization, known = "", True
    else:
        normalization = normalization_of(path, given=normalization or "", usual="", option=_OPTION)
        known = bool(normalization)
    if not known:
        normalization = _usual_normalization(kind, arguments)
        assumptions += (f"normalization={normalization}: BEiT v2 uses imagenet, most of BEiT v1 half",)
    return Weights(
        kind=kind,
        arguments=arguments,
        variables=variables,
        layout=layout,
        dropped={name_in_file(name): reason for name, reason in dropped_entries(kind, state).items()},
        assumptions=assumptions,
        normalization=normalization,
        normalization_known=known,
    )


def _usual_normalization(kind: str, arguments: dict) -> str:
    return "half" if kind == "mim" and not arguments.get("patch_aggregation") else "imagenet"


_Save = Callable[[Path], None]


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
    from beitv2_jax.convert import functions  # it takes weights, and so imports this module

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
    usual = _usual_normalization(read_as, arguments)
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
