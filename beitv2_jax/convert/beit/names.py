"""Names and kernel layouts of the released PyTorch models, for each of our variables.

`convert.beit.official` uses these tables to convert whole state dicts.
"""

import re

import numpy as np

from beitv2_jax.errors import UserError

TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"
CODEBOOK = "codebook/quantizer"

_LINEAR = {"weight": "kernel", "bias": "bias"}
_NORM = {"weight": "scale", "bias": "bias"}


def _pairs(official: str, ours: str, leaves: dict[str, str]) -> dict[str, str]:
    return {f"{official}.{theirs}": f"{ours}/{mine}" for theirs, mine in leaves.items()}


_BLOCK = (
    _pairs("norm1", "norm1", _NORM)
    | _pairs("norm2", "norm2", _NORM)
    | {"attn.qkv.weight": "attn/qkv/kernel", "attn.q_bias": "attn/q_bias", "attn.v_bias": "attn/v_bias"}
    | {"gamma_1": "gamma_1", "gamma_2": "gamma_2", f"attn.{TABLE}": "attn/rel_pos_bias/table"}
    | _pairs("attn.proj", "attn/proj", _LINEAR)
    | _pairs("mlp.fc1", "mlp/fc1", _LINEAR)
    | _pairs("mlp.fc2", "mlp/fc2", _LINEAR)
)
"""Official name -> our path, inside one block."""


def _transformer(official: str, ours: str) -> dict[str, str]:
    names = {name: f"{ours}/{name}" for name in ("cls_token", "mask_token", "pos_embed")}
    names |= {f"rel_pos_bias.{TABLE}": f"{ours}/rel_pos_bias/table"}
    names |= _pairs("patch_embed.proj", f"{ours}/patch_embed", _LINEAR)
    return {f"{official}{name}": path for name, path in names.items()}


def _tokenizer() -> dict[str, str]:
    names = {
        "quantize.embedding.weight": f"{CODEBOOK}/codebook",
        "quantize.cluster_size": f"{CODEBOOK}/cluster_counts",
    }
    for side, task in (("encoder", "encode_task"), ("decoder", "decode_task")):
        names |= _transformer(f"{side}.", f"params/{side}")
        names |= _pairs(f"{side}.fc_norm", f"params/{side}_norm", _NORM)
        names |= _pairs(f"{task}_layer.0", f"params/{task}/fc1", _LINEAR)
        names |= _pairs(f"{task}_layer.2", f"params/{task}/fc2", _LINEAR)
    return names


def _batch_norm(official: str, ours: str) -> dict[str, str]:
    running = {"running_mean": "mean", "running_var": "var"}
    return _pairs(official, f"params/{ours}", _NORM) | _pairs(official, f"batch_stats/{ours}", running)


def _convolution(official: str, ours: str) -> dict[str, str]:
    return {f"{official}.conv.weight": f"params/{ours}/conv/kernel"} | _batch_norm(f"{official}.bn", f"{ours}/norm")


def _segmenter() -> dict[str, str]:
    """Return the names of mmsegmentation's UPerNet on a released backbone."""
    names = _transformer("backbone.", "params/backbone")
    names |= _pairs("backbone.fpn1.0", "params/fpn1/up_0", _LINEAR) | _batch_norm("backbone.fpn1.1", "fpn1/norm")
    names |= _pairs("backbone.fpn1.3", "params/fpn1/up_1", _LINEAR)
    names |= _pairs("backbone.fpn2.0", "params/fpn2", _LINEAR)
    convolutions = {"bottleneck": "bottleneck", "fpn_bottleneck": "fusion"}
    convolutions |= {f"psp_modules.{index}.1": f"pool_{index}" for index in range(4)}
    for index in range(3):
        convolutions |= {f"lateral_convs.{index}": f"lateral_{index}", f"fpn_convs.{index}": f"smooth_{index}"}
    for theirs, mine in convolutions.items():
        names |= _convolution(f"decode_head.{theirs}", f"decode_head/{mine}")
    names |= _convolution("auxiliary_head.convs.0", "auxiliary_head/conv_0")
    for head in ("decode_head", "auxiliary_head"):
        names |= _pairs(f"{head}.conv_seg", f"params/{head}/classes", _LINEAR)
    return names


_BACKBONE = _transformer("", "params/backbone")
_FINAL_NORM = _pairs("norm", "params/norm", _NORM)

NAMES = {
    "vqkd": _tokenizer(),
    "mim": _BACKBONE
    | _FINAL_NORM
    | _pairs("lm_head", "params/lm_head", _LINEAR)
    | _pairs("cls_pt_norm", "params/aggregation_norm", _NORM)
    | _pairs("cls_pt_lm_head", "params/aggregation_lm_head", _LINEAR),
    "classifier": _BACKBONE
    | _FINAL_NORM
    | _pairs("fc_norm", "params/fc_norm", _NORM)
    | _pairs("head", "params/head", _LINEAR),
    "segmenter": _segmenter(),
}
"""Kind -> official name -> our path, for everything outside the blocks."""

_STACKS = {
    "vqkd": {"encoder.blocks": "params/encoder/blocks", "decoder.blocks": "params/decoder/blocks"},
    "mim": {"blocks": "params/backbone/blocks", "cls_pt_layers": "params/aggregation"},
    "classifier": {"blocks": "params/backbone/blocks"},
    "segmenter": {"backbone.blocks": "params/backbone/blocks"},
}
"""Kind -> official prefix -> our prefix of every list of blocks."""

_UPSAMPLING = re.compile(r"params/(fpn1/up_[01]|fpn2)/kernel")
_POINTWISE = re.compile(r"params/(decode|auxiliary)_head/classes/kernel")


def our_path(kind: str, name: str) -> str | None:
    """Return our path for the official `name`, None if the kind has no such name."""
    if name in NAMES[kind]:
        return NAMES[kind][name]
    for official, ours in _STACKS[kind].items():
        found = re.fullmatch(rf"{re.escape(official)}\.(\d+)\.(.+)", name)
        if found and found[2] in _BLOCK:
            return f"{ours}_{int(found[1])}/{_BLOCK[found[2]]}"
    return None


def official_name(kind: str, path: str) -> str:
    """Return the name of the variable at our `path` in the released model.

    Raises:
        UserError: no released model has such a variable.
    """
    for official, ours in NAMES[kind].items():
        if ours == path:
            return official
    for official, ours in _STACKS[kind].items():
        if found := re.fullmatch(rf"{ours}_(\d+)/(.+)", path):
            for theirs, mine in _BLOCK.items():
                if mine == found[2]:
                    return f"{official}.{found[1]}.{theirs}"
    raise UserError(
        f"The released model of kind {kind!r} has no parameter for {path}.",
        "The weights may be of another kind, or use a part that the released models do not have.",
        "Write --layout=run, which stores every model.",
    )


def transposed(path: str, array: np.ndarray, *, to_ours: bool) -> np.ndarray:
    """Return the array of the variable at our `path` with its axes in PyTorch's order, or in ours with `to_ours`.

    Only kernels differ. Linear: (out, in) in PyTorch, (in, out) here. Convolution: (out, in, h, w) in PyTorch, (h, w,
    in, out) here; transposed convolution: (in, out, h, w) in PyTorch. The 1x1 convolutions before the segmentation
    logits are linear layers here. The shapes of arrays with a wrong number of axes are checked by the caller.
    """
    if not path.endswith("/kernel"):
        return array
    if _POINTWISE.fullmatch(path):
        if to_ours:
            return array[..., 0, 0].T if array.ndim == 4 and array.shape[2:] == (1, 1) else array
        return array.T[..., None, None] if array.ndim == 2 else array
    if array.ndim != 4:
        return array.T
    if _UPSAMPLING.fullmatch(path):
        return array.transpose(2, 3, 0, 1)
    return array.transpose((2, 3, 1, 0) if to_ours else (3, 2, 0, 1))
