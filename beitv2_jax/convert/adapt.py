"""Initialise a model from the weights of another one, by the loading rules of the released code.

Used for `init_from` of every training stage. Variables that the weights do not have are newly initialised, where the
rules allow it.
"""

import dataclasses
import re

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import MODELS, shapes
from beitv2_jax.convert.beit.official import USAGE_COUNTERS
from beitv2_jax.convert.weights import Weights, backbone_of, resized
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.preprocess import HALF, NORMALIZATIONS

TITLES = {
    "vqkd": "a tokenizer",
    "mim": "a masked image model",
    "regressor": "a masked regression model",
    "classifier": "a classifier",
    "segmenter": "a segmentation model",
    "vit": "a plain vision transformer",
}
_SIZES = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "stem", "qkv_bias")
_FIXED = ("activation", "pre_norm", "patch_bias", "class_token", "num_registers", "rotary")
"""Fields of `Backbone` that no stage of this package has a key for."""
_SHARED_TABLE = "params/backbone/rel_pos_bias/table"
_PATCHES = "params/encoder/patch_embed/kernel"

_NEWLY_INITIALISED = {
    "vqkd": (),
    "mim": ("backbone/mask_token", "norm/", "lm_head/", "aggregation", "aggregation_lm_head/"),
    "regressor": (
        *("backbone/mask_token", "norm/", "regression_head/"),
        *("aggregation", "aggregation_regression_head/"),
    ),
    "classifier": ("fc_norm/", "norm/", "head/"),
    "segmenter": ("fpn1/", "fpn2/", "decode_head/", "auxiliary_head/"),
}
"""Kind of the new model -> prefixes of the variables that are newly initialised if the weights have none of them."""

_NEW_ON_A_TRUNK = ("decoder", "encode_task/", "decode_task/", "quantizer/")
"""Prefixes of the variables of a tokenizer that are newly initialised where only its encoder is given."""
_TRUNKS = ("vit", "classifier")
"""Kinds of weights that may start the encoder of a tokenizer."""

_REPLACEABLE = {
    "vqkd": ("decode_task/fc2/",),
    "mim": ("lm_head/", "aggregation_lm_head/"),
    "regressor": ("regression_head/", "aggregation_regression_head/"),
    "classifier": ("head/",),
    "segmenter": ("decode_head/classes/", "auxiliary_head/classes/"),
}
"""Kind -> prefixes of the variables that are newly initialised if the shapes differ: outputs for classes or codes."""

_DROPPABLE = (
    ("backbone/mask_token", "used in pre-training only"),
    ("norm/", "the pre-trained final norm; the classifier has a new norm after pooling"),
    ("fc_norm/", "norm of pooled tokens, which the new model does not have"),
    ("lm_head/", "predicts codes, which the new model does not"),
    ("aggregation_lm_head/", "predicts codes, which the new model does not"),
    ("regression_head/", "predicts pixels or features, which the new model does not"),
    ("aggregation_regression_head/", "predicts pixels or features, which the new model does not"),
    ("aggregation", "used in pre-training only"),
    ("head/", "predicts classes, which the new model does not"),
    ("decoder", "reconstructs teacher features, which the new model does not"),
    ("encode_task/", "computes codes, which the new model does not"),
    ("quantizer/", "decides codes, which the new model does not"),
    ("decode_task/", "reconstructs teacher features, which the new model does not"),
    ("encoder_norm/", "norm of every token, which the new model does not have"),
    ("fpn", "used in segmentation only"),
    ("auxiliary_head/", "used in segmentation only"),
    ("decode_head/", "used in segmentation only"),
)
"""Prefixes of the variables that may be dropped if the new model has none of them, with the reason."""


def adapt_weights(weights: Weights, kind: str, arguments: dict) -> Weights:
    """Return the part of `weights` that initialises a model of this `kind` with these `arguments`.

    The other variables of the model are newly initialised. A shared position table is copied to every block of a model
    with one table per block; from a tokenizer the encoder is used, and a plain ViT or a classifier gives one to a
    tokenizer; positions are resized to the model's image size. `dropped` has the variables that are not used, with the
    reasons.

    Raises:
        UserError: the weights belong to a network of other sizes, or have parts that the model lacks.

    Source: the released loading rules for fine-tuning.
    """
    if kind == "vqkd" and weights.kind not in ("vqkd", *_TRUNKS):
        raise UserError(
            f"The weights of init_from are those of {TITLES[weights.kind]}, which cannot initialise a tokenizer.",
            "The path may be that of other weights.",
            "Write --config.init_from=PATH with the path of a tokenizer, a run of stage 'vqkd', or with that of its "
            "teacher, a plain ViT or a run of stage 'finetune'.",
        )
    _check_backbone(weights, kind, arguments)
    if weights.arguments["image_size"] not in (None, arguments["image_size"]):
        weights = resized(weights, arguments["image_size"])
    flat = traverse_util.flatten_dict(weights.variables, sep="/")
    if kind != weights.kind == "vqkd":
        flat = _encoder_as_backbone(flat)
    if kind == "vqkd" != weights.kind:
        flat = _backbone_as_encoder(flat, weights.normalization)
    expected = shapes(kind, arguments)
    if _SHARED_TABLE in flat and _SHARED_TABLE not in expected:
        table = flat.pop(_SHARED_TABLE)
        copies = [
            path for path in expected if re.fullmatch(r"params/backbone/blocks_\d+/attn/rel_pos_bias/table", path)
        ]
        flat |= dict.fromkeys(copies, table) if copies else {_SHARED_TABLE: table}

    def has(paths, start: str) -> bool:
        return any(_begins(path, (start,)) for path in paths)

    kept, dropped = {}, {}
    for path, array in flat.items():
        if path in USAGE_COUNTERS:
            dropped[path] = "a counter of the training run"
        elif path in expected and array.shape == expected[path]:
            kept[path] = array
        elif path in expected and _begins(path, _REPLACEABLE[kind]):
            dropped[path] = f"has the shape {array.shape}, but the model {expected[path]}"
        elif path in expected:
            raise _mismatch(weights, kind, f"{path} of shape {array.shape}, but the model has {expected[path]}")
        elif reason := next(
            (why for start, why in _DROPPABLE if _begins(path, (start,)) and not has(expected, start)), None
        ):
            dropped[path] = reason
        else:
            raise _mismatch(weights, kind, f"{path}, which the model lacks")
    for linear in {path.rpartition("/")[0] for path in dropped}:
        # a kernel and its bias are newly initialised together
        for path in [path for path in kept if path.startswith(f"{linear}/") and _begins(path, _REPLACEABLE[kind])]:
            dropped[path] = "belongs to a layer that is newly initialised"
            del kept[path]
    new = _NEW_ON_A_TRUNK if kind == "vqkd" != weights.kind else _NEWLY_INITIALISED[kind]
    for path in expected.keys() - kept.keys() - dropped.keys():
        if not any(_begins(path, (start,)) and not has(flat, start) for start in new):
            raise _mismatch(weights, kind, f"no {path}, which the model needs")
    return dataclasses.replace(
        weights, kind=kind, arguments=arguments, variables=traverse_util.unflatten_dict(kept, sep="/"), dropped=dropped
    )


def _check_backbone(weights: Weights, kind: str, arguments: dict) -> None:
    """Raise UserError, with both values, unless the backbone of the weights is that of the model but for its grid."""
    theirs = backbone_of(weights)
    model = MODELS[kind].from_arguments(arguments)
    ours = model.encoder if kind == "vqkd" else model.backbone
    if kind == "vqkd" and theirs.qkv_bias == "full":
        theirs = dataclasses.replace(theirs, qkv_bias="qv")  # `_backbone_as_encoder` leaves the biases of the keys out
    if different := [name for name in _FIXED if getattr(theirs, name) != getattr(ours, name)]:
        raise UserError(
            f"The weights of init_from are those of {TITLES[weights.kind]} with {_values(theirs, different)}, which no "
            "stage can train.",
            "Did you mean to use them as the teacher of a tokenizer?",
            "Write --config.teacher.weights=PATH for a vqkd or extract stage, or another --config.init_from: a BEiT "
            "model, or a plain ViT such as those of AugReg, DeiT and DINO.",
        )
    assumed = [text.partition("=")[0] for text in weights.assumptions]
    different = [name for name in _SIZES if name not in assumed and getattr(theirs, name) != getattr(ours, name)]
    if theirs.position.removesuffix("_shared") != ours.position.removesuffix("_shared"):
        different.append("position")
    if bool(theirs.layer_scale_init) != bool(ours.layer_scale_init):
        different.append("layer_scale_init")
    if different:
        section, usual = ("model.encoder", "vqkd") if kind == "vqkd" else ("model", "mim")
        fitting = dataclasses.asdict(theirs) | {"layer_scale_init": theirs.layer_scale_init or 0.0}
        flags = " ".join(f"--config.{section}.{name}={fitting[name]}" for name in different)
        raise UserError(
            f"The weights of init_from, those of {TITLES[weights.kind]}, do not fit {TITLES[kind]} with the sizes of "
            f"the config: they have {_values(theirs, different)}, the config {_values(ours, different)}.",
            "Did you mean the pre-trained model and not its tokenizer?"
            if kind != weights.kind == "vqkd"
            else "Did you mean a preset of another size, or other weights?",
            f"Write {flags}, or leave out the preset and the flags that set these keys; or write "
            f"--config.init_from=PATH of other weights, such as a run of stage '{usual}'.",
        )


def _values(backbone: Backbone, names: list[str]) -> str:
    return ", ".join(f"{name}={getattr(backbone, name)!r}" for name in names)


def _encoder_as_backbone(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a tokenizer's params with the encoder and its norm renamed to backbone and norm of a classifier."""
    renamed = {"params/encoder/": "params/backbone/", "params/encoder_norm/": "params/fc_norm/"}
    moved = {}
    for path, array in flat.items():
        start = next((start for start in renamed if path.startswith(start)), None)
        if start is not None:
            moved[renamed[start] + path.removeprefix(start)] = array
        elif path.startswith("params/"):
            moved[path] = array
    return moved


def _backbone_as_encoder(flat: dict[str, np.ndarray], normalization: str) -> dict[str, np.ndarray]:
    """Return a trunk and its last norm as the encoder of a tokenizer, which reads images in [-1, 1].

    The outputs stay the same: the patch embedding takes in the normalisation, W (x - m) / s + b of pixels x in [0, 1]
    as W / (2 s) (2 x - 1) + b + W (0.5 - m) / s, and the biases of keys, which cancel in the softmax, are left out.
    """
    renamed = {"params/backbone/": "params/encoder/", "params/fc_norm/": "params/encoder_norm/"}
    renamed |= {"params/norm/": "params/encoder_norm/"}
    moved = {}
    for path, array in flat.items():
        start = next((start for start in renamed if path.startswith(start)), None)
        path = path if start is None else renamed[start] + path.removeprefix(start)
        if path.startswith("params/encoder/") and path.endswith("/attn/qkv/bias"):
            block = path.removesuffix("qkv/bias")
            moved[f"{block}q_bias"], _, moved[f"{block}v_bias"] = np.split(array, 3)
        else:
            moved[path] = array
    kernel = moved.get(_PATCHES)
    if kernel is not None:
        mean, std = (np.asarray(values, np.float32) for values in NORMALIZATIONS[normalization])
        bias = _PATCHES.replace("kernel", "bias")
        moved[bias] = moved[bias] + np.einsum("hwco,c->o", kernel, (np.float32(HALF) - mean) / std)
        moved[_PATCHES] = kernel / (2.0 * std[:, None])
    return moved


def _begins(path: str, starts: tuple[str, ...]) -> bool:
    # without the collection: batch statistics have the paths of their params
    return path.partition("/")[2].startswith(starts)


def _mismatch(weights: Weights, kind: str, problem: str) -> UserError:
    return UserError(
        f"The weights of init_from, those of {TITLES[weights.kind]}, do not fit {TITLES[kind]} with the sizes of the "
        f"config: they have {problem}.",
        "The sizes of the heads, the code_dim or the quantizer of the config may differ from theirs.",
        "Write --config.model.KEY=VALUE with the values that `python -m beitv2_jax.convert SOURCE DEST` prints.",
    )
