"""Convert released PyTorch state dicts to our variables and back, with the names in `convert.beit.names`.

Entries that the released code never reads, or that follow from others, are dropped when reading and restored when
writing. The required entries and their shapes are those of the recognised model.
"""

import re
from collections.abc import Callable

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import ShapeMismatch, infer_arguments, shapes
from beitv2_jax.convert.beit.names import CODEBOOK, INDEX, NAMES, TABLE, official_name, our_path, transposed
from beitv2_jax.convert.positions import grid_of_table
from beitv2_jax.convert.wrappers import wrapped, wrapping_prefix
from beitv2_jax.errors import UserError
from beitv2_jax.models.layers import relative_position_index
from beitv2_jax.typing import PyTree

State = dict[str, np.ndarray]

USAGE_COUNTERS = (f"{CODEBOOK}/window_counts", f"{CODEBOOK}/last_window_counts")
"""Counters of a training run, which only our tokenizer has."""

_COUNTER = "num_batches_tracked"
_FOLLOWS = "computed from the grid"
_DROPPED = {
    "vqkd": {
        r"quantize\.embedding\.(cluster_size|embed_avg|initted)": "an unused buffer of the quantizer",
        r"teacher_model\..*": "the frozen teacher, which is not part of the tokenizer",
        r"scaling_layer\..*": "constants of the teacher's input normalisation",
        r"loss.*": "part of the loss, not needed to compute codes",
    },
    "mim": {},
    "classifier": {r"mask_token": "used in pre-training only"},
    "segmenter": {rf".*\.{_COUNTER}": "an unused counter"},
}
_MARKS = {
    "vqkd": ("encode_task_layer.", "decode_task_layer.", "quantize.", "encoder.blocks.", "decoder.blocks."),
    "segmenter": ("decode_head.", "auxiliary_head.", "backbone."),
    "mim": ("lm_head.", "cls_pt_"),
    "classifier": ("cls_token", "patch_embed.", "blocks.", "head."),
}
"""Prefixes of names that only one kind has, in the order in which they are tried."""


def recognise(state: State) -> str:
    """Return the kind of a released state dict: 'vqkd', 'mim', 'classifier' or 'segmenter'.

    Raises:
        UserError: the names belong to none of these.
    """
    for kind, prefixes in _MARKS.items():
        if any(name.startswith(prefixes) for name in state):
            return kind
    shown = ", ".join(map(repr, sorted(state)[:3])) or "none"
    happened = f"The {len(state)} names in the state dict ({shown}) belong to no model of this project."
    if prefix := wrapping_prefix(state):
        raise wrapped(happened, prefix)
    raise UserError(
        happened,
        "The file may hold another architecture.",
        "Pass weights of a tokenizer, masked image model, classifier or UPerNet of BEiT v1 or v2.",
    )


def dropped_entries(kind: str, state: State) -> dict[str, str]:
    """Return {name: reason} of the entries of `state` that are not used."""
    reasons = {rf"(.*\.)?{INDEX}": _FOLLOWS} | _DROPPED[kind]
    found = {name: next((why for rule, why in reasons.items() if re.fullmatch(rule, name)), None) for name in state}
    return {name: why for name, why in found.items() if why is not None}


def from_official(kind: str, state: State, name_in_file: Callable[[str], str] = str) -> dict[str, PyTree]:
    """Return {'params': ..., 'codebook': ...} from a released state dict; `kind` is one of `NAMES`.

    Entries in `dropped_entries` are not used; the usage counters, which only our tokenizer has, are zero. `codebook` is
    empty except for a tokenizer; a segmenter also has `batch_stats`. A classifier without a head gets a head with no
    classes. For error messages, `name_in_file` maps an official name to the name in the file.

    Raises:
        UserError: an unknown or missing entry, or an array whose shape does not fit the others.
    """
    unused = dropped_entries(kind, state)
    paths = {name: our_path(kind, name) for name in state if name not in unused}
    _refuse(kind, "has the unknown entry", sorted(name_in_file(name) for name, path in paths.items() if path is None))
    flat = {path: transposed(path, np.asarray(state[name]), to_ours=True) for name, path in paths.items()}
    cls_token = flat.get("params/backbone/cls_token")
    if kind == "classifier" and cls_token is not None and not any(path.startswith("params/head/") for path in flat):
        flat["params/head/kernel"] = np.zeros((cls_token.shape[-1], 0), np.float32)
        flat["params/head/bias"] = np.zeros(0, np.float32)
    counts = flat.get(f"{CODEBOOK}/cluster_counts")
    if counts is not None:
        flat |= {window: np.zeros_like(counts) for window in USAGE_COUNTERS}
    _check(kind, flat, name_in_file)
    _check_indices(kind, state, name_in_file)
    return {"params": {}, "codebook": {}} | traverse_util.unflatten_dict(flat, sep="/")


def to_official(kind: str, variables: dict[str, PyTree]) -> State:
    """Return the released state dict of {'params': ..., 'codebook': ..., ...}: the inverse of `from_official`.

    Raises:
        UserError: a variable that the released model of this kind does not have, or a missing one.
    """
    flat = traverse_util.flatten_dict({key: dict(tree) for key, tree in variables.items()}, sep="/")
    names = {path: official_name(kind, path) for path in flat if path not in USAGE_COUNTERS}
    flat = {path: np.asarray(array) for path, array in flat.items()}
    _check(kind, flat, str)
    # a head with no classes is not written
    state = {name: transposed(path, flat[path], to_ours=False) for path, name in names.items() if flat[path].size}
    for name in [name for name in state if name.endswith(TABLE)]:
        state[name.replace(TABLE, INDEX)] = _index_of_table(state[name])
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name.replace("running_mean", _COUNTER)] = np.zeros((), np.int64)
    if kind == "vqkd":
        state["quantize.embedding.cluster_size"] = state["quantize.cluster_size"]
        state["quantize.embedding.embed_avg"] = state["quantize.embedding.weight"]
        state["quantize.embedding.initted"] = np.ones(1, np.float32)
    return state


def _check(kind: str, flat: State, name_in_file: Callable[[str], str]) -> None:
    """Raise UserError unless `flat` has exactly the variables and shapes of the model inferred from it."""

    def name(path: str) -> str:
        return name_in_file(official_name(kind, path))

    known = {path: array.shape for path, array in flat.items()}
    try:
        expected = shapes(kind, infer_arguments(kind, known))
    except ShapeMismatch as mismatch:
        _refuse(kind, mismatch.problem, [name(path) for path in mismatch.paths])
    _refuse(kind, "lacks", sorted(name(path) for path in expected.keys() - known.keys() - set(USAGE_COUNTERS)))
    _refuse(kind, "has the unknown entry", sorted(name(path) for path in known.keys() - expected.keys()))
    for path, shape in expected.items():
        if path in known and known[path] != shape:
            have, fits = (transposed(path, np.broadcast_to(0, s), to_ours=False).shape for s in (known[path], shape))
            _refuse(kind, f"has the shape {have}, but its other arrays require {fits}, for", [name(path)])


def _check_indices(kind: str, state: State, name_in_file: Callable[[str], str]) -> None:
    """Raise UserError if a stored relative position index orders offsets differently from the published models."""
    for name in (name for name in state if name.endswith(INDEX)):
        table = state.get(name.replace(INDEX, TABLE))
        if table is None:
            _refuse(kind, "has no table for the index", [name_in_file(name)])
        if not np.array_equal(state[name], _index_of_table(table)):
            _refuse(kind, "has an unknown order of relative position offsets in", [name_in_file(name)])


def _index_of_table(table: np.ndarray) -> np.ndarray:
    side = grid_of_table(len(table))
    return relative_position_index((side, side)).astype(np.int64)


def _refuse(kind: str, problem: str, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    raise UserError(
        f"The state dict, read as a model of kind {kind!r}, {problem} {', '.join(map(repr, names[:2]))}{more}.",
        "The file may be damaged, or hold another kind of model.",
        f"Pass a complete state dict of one of the kinds {', '.join(NAMES)}.",
    )
