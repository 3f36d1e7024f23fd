"""Weights as the start of another model: what the released loading rules keep, resize, copy and leave out.

Used by `init_from` of every training stage. What the weights do not have starts fresh, where the rules allow it.
"""

import dataclasses
import re

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import shapes
from beitv2_jax.convert.beit.official import WINDOWS
from beitv2_jax.convert.weights import Weights, resized
from beitv2_jax.errors import UserError

_SHARED_TABLE = "params/backbone/rel_pos_bias/table"

_FRESH = {
    "vqkd": (),
    "mim": ("backbone/mask_token", "norm/", "lm_head/", "aggregation"),
    "classifier": ("fc_norm/", "norm/", "head/"),
    "segmenter": ("fpn1/", "fpn2/", "decode_head/", "auxiliary_head/"),
}
"""Beginnings of the variables that may start fresh where the weights have none such, by kind of the new model."""

_REPLACEABLE = {
    "vqkd": ("decode_task/fc2/",),
    "mim": ("lm_head/", "aggregation_lm_head/"),
    "classifier": ("head/",),
    "segmenter": ("decode_head/classes/", "auxiliary_head/classes/"),
}
"""Beginnings of the variables that also start fresh where theirs have another shape: what counts classes or codes."""

_LEFT_OUT = (
    ("backbone/mask_token", "serves pre-training only"),
    ("norm/", "the pre-trained final norm; the classifier normalises after pooling, afresh"),
    ("fc_norm/", "normalises pooled tokens, which the new model does not have"),
    ("lm_head/", "predicts codes, which the new model does not"),
    ("aggregation", "serves pre-training only"),
    ("head/", "predicts other classes"),
    ("decoder", "reconstructs teacher features, which the new model does not"),
    ("encode_task/", "maps to codes, which the new model does not"),
    ("decode_task/", "reconstructs teacher features, which the new model does not"),
    ("encoder_norm/", "normalises every token, which the new model does not"),
    ("fpn", "serves segmentation only"),
    ("auxiliary_head/", "serves segmentation only"),
    ("decode_head/", "serves segmentation only"),
)
"""Beginnings of the variables that may stay behind where the new model has none such, with the reason."""


def for_run(weights: Weights, kind: str, arguments: dict) -> Weights:
    """Return `weights` as the start of the model of another `kind` or of other `arguments`.

    Its `variables` hold only what the weights give; the rest of the model starts fresh. A shared position table is
    copied to every block of a model with a table per block; a tokenizer gives its encoder; positions are resized to the
    model's image size. `dropped` tells what stayed behind and why.

    Raises:
        UserError: the weights belong to a network of other sizes, or have parts of the network that the model lacks.

    Source: the released loading rules for fine-tuning.
    """
    if kind == "vqkd" and weights.kind != "vqkd":
        raise UserError(
            f"Weights of kind {weights.kind!r} cannot start a tokenizer.",
            "the path of other weights was given.",
            "--config.init_from=PATH of a tokenizer.",
        )
    if weights.arguments["image_size"] not in (None, arguments["image_size"]):
        weights = resized(weights, arguments["image_size"])
    flat = traverse_util.flatten_dict(weights.variables, sep="/")
    if kind != weights.kind == "vqkd":
        flat = _encoder_alone(flat)
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
        if path in WINDOWS:
            dropped[path] = "counts codes of the training it comes from"
        elif path in expected and array.shape == expected[path]:
            kept[path] = array
        elif path in expected and _begins(path, _REPLACEABLE[kind]):
            dropped[path] = f"has the shape {array.shape}, the model {expected[path]}: starts fresh"
        elif path in expected:
            raise _misfit(kind, f"{path} of shape {array.shape} where the model has {expected[path]}", "sizes differ")
        elif reason := next(
            (why for start, why in _LEFT_OUT if _begins(path, (start,)) and not has(expected, start)), None
        ):
            dropped[path] = reason
        else:
            raise _misfit(kind, f"{path}, which the model lacks", "the model is built otherwise")
    for linear in {path.rpartition("/")[0] for path in dropped}:
        # a kernel and its bias start fresh together
        for path in [path for path in kept if path.startswith(f"{linear}/") and _begins(path, _REPLACEABLE[kind])]:
            dropped[path] = "belongs to a map that starts fresh"
            del kept[path]
    for path in expected.keys() - kept.keys() - dropped.keys():
        if not any(_begins(path, (start,)) and not has(flat, start) for start in _FRESH[kind]):
            raise _misfit(kind, f"no {path}", "the model is built otherwise")
    return dataclasses.replace(
        weights, kind=kind, arguments=arguments, variables=traverse_util.unflatten_dict(kept, sep="/"), dropped=dropped
    )


def _encoder_alone(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a tokenizer's params with its encoder, and the norm after it, under the names of a classifier."""
    renamed = {"params/encoder/": "params/backbone/", "params/encoder_norm/": "params/fc_norm/"}
    moved = {}
    for path, array in flat.items():
        start = next((start for start in renamed if path.startswith(start)), None)
        if start is not None:
            moved[renamed[start] + path.removeprefix(start)] = array
        elif path.startswith("params/"):
            moved[path] = array
    return moved


def _begins(path: str, starts: tuple[str, ...]) -> bool:
    # of any collection: batch statistics lie where the params lie that they belong to
    return path.partition("/")[2].startswith(starts)


def _misfit(kind: str, problem: str, meant: str) -> UserError:
    return UserError(
        f"The weights of init_from have {problem}, for a model of kind {kind!r}.",
        f"{meant}: position, layer_scale_init, depth, width, patch_size or code_dim are not those of the weights.",
        "--config.model.KEY=VALUE as `python -m beitv2_jax.convert SOURCE DEST` lists them.",
    )
