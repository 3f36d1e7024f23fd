"""Read trained weights of any layout, and resize them to another image size; `convert.writing` writes them.

A layout is how a file names its arrays: 'official' (the released PyTorch code), 'timm', 'huggingface' (a folder with
config.json), or 'run' (a run directory of this package). The kind of model is recognised from the names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import MODELS, fill_unknown, infer_arguments
from beitv2_jax.convert.beit import huggingface, timm
from beitv2_jax.convert.beit.official import dropped_entries, from_official, recognise
from beitv2_jax.convert.class_names import class_names_of, is_multi_label
from beitv2_jax.convert.files import read_config, read_weights
from beitv2_jax.convert.input_statistics import crop_fraction_of, normalization_of
from beitv2_jax.convert.positions import resize_positions
from beitv2_jax.convert.runs import Run, check_stage, is_run, read_run
from beitv2_jax.convert.teachers.weights import classifier_from_state, from_state, is_plain_vit, refuse_plain_vit
from beitv2_jax.convert.wrappers import StateDict
from beitv2_jax.data.augment import eval_crop_fraction
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
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


def _from_run(path: str, normalization: str | None, average: bool) -> Weights:
    check_stage(path, STAGES.values(), "")  # a stage that trains nothing has no checkpoint
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
        normalization = usual_normalization(kind, arguments)
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


def usual_normalization(kind: str, arguments: dict) -> str:
    """Return the normalization that is assumed of weights whose file does not state one: that of the released ones."""
    return "half" if kind == "mim" and not arguments.get("patch_aggregation") else "imagenet"
