"""Names and layouts of the released PyTorch state dicts, to and from our parameter trees.

Pure NumPy. Linear weights are transposed, patch convolutions go to (height, width, in, out); query, key and value rows
keep their order. Entries that the released code never reads, or that follow from others, are dropped on the way in and
written again on the way out.
"""

import dataclasses
import re

import numpy as np
from flax import traverse_util

from beitv2_jax.errors import UserError
from beitv2_jax.models.layers import relative_position_index
from beitv2_jax.typing import PyTree

_LINEAR = {"weight": "kernel", "bias": "bias"}
_NORM = {"weight": "scale", "bias": "bias"}
_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"
_CODEBOOK = "codebook/quantizer"
_WINDOWS = ("window_counts", "last_window_counts")
_UNREAD_BY_TOKENIZER = re.compile(r"quantize\.embedding\.(cluster_size|embed_avg|initted)$|loss|teacher|scaling")


def _pairs(official: str, ours: str, leaves: dict[str, str]) -> dict[str, str]:
    return {f"{official}.{theirs}": f"{ours}/{mine}" for theirs, mine in leaves.items()}


_BLOCK = (
    _pairs("norm1", "norm1", _NORM)
    | _pairs("norm2", "norm2", _NORM)
    | {"attn.qkv.weight": "attn/qkv/kernel"}
    | _pairs("attn.proj", "attn/proj", _LINEAR)
    | _pairs("mlp.fc1", "mlp/fc1", _LINEAR)
    | _pairs("mlp.fc2", "mlp/fc2", _LINEAR)
)
_BLOCK_OPTIONS = (
    {"gamma_1": "gamma_1", "gamma_2": "gamma_2"},
    {"attn.q_bias": "attn/q_bias", "attn.v_bias": "attn/v_bias"},
    {f"attn.{_TABLE}": "attn/rel_pos_bias/table"},
)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Official name -> our path: always there; groups whole or absent; lists of blocks; groups to choose one from."""

    required: dict[str, str]
    options: tuple[dict[str, str], ...]
    stacks: dict[str, str]
    one_of: tuple[dict[str, str], ...] = ({},)


def _transformer(official: str, ours: str) -> _Layout:
    stem = f"{official}." if official else ""
    return _Layout(
        {f"{stem}cls_token": f"{ours}/cls_token"} | _pairs(f"{stem}patch_embed.proj", f"{ours}/patch_embed", _LINEAR),
        (
            {f"{stem}pos_embed": f"{ours}/pos_embed"},
            {f"{stem}rel_pos_bias.{_TABLE}": f"{ours}/rel_pos_bias/table"},
        ),
        {f"{stem}blocks": f"{ours}/blocks"},
    )


def _layouts() -> dict[str, _Layout]:
    backbone = _transformer("", "params/backbone")
    encoder, decoder = _transformer("encoder", "params/encoder"), _transformer("decoder", "params/decoder")
    tokenizer = encoder.required | decoder.required
    for side, task in (("encoder", "encode_task"), ("decoder", "decode_task")):
        tokenizer |= _pairs(f"{side}.fc_norm", f"params/{side}_norm", _NORM)
        tokenizer |= _pairs(f"{task}_layer.0", f"params/{task}/fc1", _LINEAR)
        tokenizer |= _pairs(f"{task}_layer.2", f"params/{task}/fc2", _LINEAR)
    tokenizer |= {
        "quantize.embedding.weight": f"{_CODEBOOK}/codebook",
        "quantize.cluster_size": f"{_CODEBOOK}/cluster_counts",
    }
    return {
        "vqkd": _Layout(tokenizer, encoder.options + decoder.options, encoder.stacks | decoder.stacks),
        "mim": _Layout(
            backbone.required
            | {"mask_token": "params/backbone/mask_token"}
            | _pairs("norm", "params/norm", _NORM)
            | _pairs("lm_head", "params/lm_head", _LINEAR),
            (
                *backbone.options,
                _pairs("cls_pt_norm", "params/aggregation_norm", _NORM)
                | _pairs("cls_pt_lm_head", "params/aggregation_lm_head", _LINEAR),
            ),
            backbone.stacks | {"cls_pt_layers": "params/aggregation"},
        ),
        "classifier": _Layout(
            backbone.required | _pairs("head", "params/head", _LINEAR),
            backbone.options,
            backbone.stacks,
            (_pairs("fc_norm", "params/fc_norm", _NORM), _pairs("norm", "params/norm", _NORM)),
        ),
    }


_LAYOUTS = _layouts()


def from_official(kind: str, state: dict[str, np.ndarray]) -> dict[str, PyTree]:
    """Return {'params': ..., 'codebook': ...} from a released state dict; `kind` is 'vqkd', 'mim' or 'classifier'.

    Teachers inside a tokenizer file, relative-position indices and the dead quantizer buffers are dropped; the usage
    windows, which are ours alone, start at zero. `codebook` is empty for the other kinds.

    Raises:
        UserError: a name that the kind does not have, or a missing one.
    """
    state = {name: array for name, array in state.items() if not name.endswith(_INDEX)}
    if kind == "vqkd":
        state = {name: array for name, array in state.items() if not _UNREAD_BY_TOKENIZER.match(name)}
    names = _names(kind, state)
    flat = {names[name]: _transposed(names[name], np.asarray(array), to_ours=True) for name, array in state.items()}
    if kind == "vqkd":
        counts = flat[f"{_CODEBOOK}/cluster_counts"]
        flat |= {f"{_CODEBOOK}/{window}": np.zeros_like(counts) for window in _WINDOWS}
    return {"params": {}, "codebook": {}} | traverse_util.unflatten_dict(flat, sep="/")


def to_official(kind: str, variables: dict[str, PyTree]) -> dict[str, np.ndarray]:
    """Return the released state dict of our {'params': ..., 'codebook': ...}: the inverse of `from_official`.

    Raises:
        UserError: a path that the released model of this kind does not have, or a missing one.
    """
    flat = traverse_util.flatten_dict({key: dict(tree) for key, tree in variables.items()}, sep="/")
    flat = {
        path: array for path, array in flat.items() if not path.startswith(_CODEBOOK) or not path.endswith(_WINDOWS)
    }
    state = {}
    for path, array in flat.items():
        state[_official_name(kind, path)] = _transposed(path, np.asarray(array), to_ours=False)
    _names(kind, state)
    for name in [name for name in state if name.endswith(_TABLE)]:
        side = (round((state[name].shape[0] - 3) ** 0.5) + 1) // 2
        state[name.replace(_TABLE, _INDEX)] = relative_position_index((side, side)).astype(np.int64)
    if kind == "vqkd":
        state["quantize.embedding.cluster_size"] = state["quantize.cluster_size"]
        state["quantize.embedding.embed_avg"] = state["quantize.embedding.weight"]
        state["quantize.embedding.initted"] = np.ones(1, np.float32)
    return state


def _transposed(path: str, array: np.ndarray, *, to_ours: bool) -> np.ndarray:
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:
        return array.transpose((2, 3, 1, 0) if to_ours else (3, 2, 0, 1))
    return array.T


def _names(kind: str, state: dict[str, np.ndarray]) -> dict[str, str]:
    """Return official name -> our path for every name in `state`, having checked that it is complete."""
    layout = _LAYOUTS[kind]
    names = layout.required | next((group for group in layout.one_of if group.keys() & state.keys()), layout.one_of[0])
    for group in layout.options:
        names |= group if group.keys() & state.keys() else {}
    block_stems = {}
    for official, ours in layout.stacks.items():
        indices = [int(m[1]) for name in state if (m := re.match(rf"{re.escape(official)}\.(\d+)\.", name))]
        # a model without patch aggregation has no cls_pt_layers, but no transformer is without blocks
        depth = max(indices, default=-1 if official == "cls_pt_layers" else 0) + 1
        block_stems |= {f"{official}.{index}": f"{ours}_{index}" for index in range(depth)}
    block = dict(_BLOCK)
    for group in _BLOCK_OPTIONS:
        block |= group if any(name.endswith(tuple(f".{leaf}" for leaf in group)) for name in state) else {}
    for official, ours in block_stems.items():
        names |= {f"{official}.{theirs}": f"{ours}/{mine}" for theirs, mine in block.items()}
    _refuse(kind, "lacks", sorted(names.keys() - state.keys()))
    _refuse(kind, "has the unknown entry", sorted(state.keys() - names.keys()))
    return names


def _official_name(kind: str, path: str) -> str:
    layout = _LAYOUTS[kind]
    for group in (layout.required, *layout.options, *layout.one_of):
        for official, ours in group.items():
            if ours == path:
                return official
    leaves = {mine: theirs for group in (_BLOCK, *_BLOCK_OPTIONS) for theirs, mine in group.items()}
    for official, ours in layout.stacks.items():
        match = re.match(rf"{ours}_(\d+)/(.+)", path)
        if match and match[2] in leaves:
            return f"{official}.{match[1]}.{leaves[match[2]]}"
    raise UserError(
        f"The parameter {path} has no place in a released model of kind {kind!r}.",
        "the weights are of another kind, or use a part that the released models do not have.",
        f"give the kind the weights belong to: {', '.join(_LAYOUTS)}.",
    )


def _refuse(kind: str, problem: str, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise UserError(
        f"The state dict {problem} {names[0]!r}{more} for a model of kind {kind!r}.",
        "it belongs to another kind of model, or is wrapped in an outer dict ('model', 'module', 'state_dict').",
        f"pass the inner dict, and the kind it belongs to: {', '.join(_LAYOUTS)}.",
    )
