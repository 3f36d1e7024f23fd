"""Released PyTorch state dicts to our variables and back, by the names of `convert.beit.names`.

Entries that the released code never reads, or that follow from others, are dropped on the way in and written again on
the way out. Which entries there must be, and of which shapes, is what the recognised model itself says.
"""

import re
from collections.abc import Callable

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import Unfit, infer, shapes
from beitv2_jax.convert.beit.names import CODEBOOK, INDEX, NAMES, TABLE, official_name, our_path, transposed
from beitv2_jax.convert.positions import grid_of_table
from beitv2_jax.errors import UserError
from beitv2_jax.models.layers import relative_position_index
from beitv2_jax.typing import PyTree

State = dict[str, np.ndarray]

WINDOWS = (f"{CODEBOOK}/window_counts", f"{CODEBOOK}/last_window_counts")
"""Variables that only our tokenizer has: counters of its training."""

_COUNTER = "num_batches_tracked"
_FOLLOWS = "follows from the grid"
_DROPPED = {
    "vqkd": {
        r"quantize\.embedding\.(cluster_size|embed_avg|initted)": "a buffer of the quantizer that nothing reads",
        r"teacher_model\..*": "the frozen teacher, which is no part of the tokenizer",
        r"scaling_layer\..*": "the teacher's input statistics, which are constants",
        r"loss.*": "nothing of the loss is needed to make codes",
    },
    "mim": {},
    "classifier": {r"mask_token": "serves pre-training only"},
    "segmenter": {rf".*\.{_COUNTER}": "a counter that nothing reads"},
}
_MARKS = {
    "vqkd": ("encode_task_layer.", "decode_task_layer.", "quantize.", "encoder.blocks.", "decoder.blocks."),
    "segmenter": ("decode_head.", "auxiliary_head.", "backbone."),
    "mim": ("lm_head.", "cls_pt_"),
    "classifier": ("cls_token", "patch_embed.", "blocks.", "head."),
}
"""How names begin that only one kind has, in the order in which they are looked for."""


def recognise(state: State) -> str:
    """Return the kind of a released state dict: 'vqkd', 'mim', 'classifier' or 'segmenter'.

    Raises:
        UserError: the names are those of none of these.
    """
    for kind, prefixes in _MARKS.items():
        if any(name.startswith(prefixes) for name in state):
            return kind
    shown = ", ".join(map(repr, sorted(state)[:3])) or "none"
    raise UserError(
        f"The {len(state)} names in the state dict ({shown}) are those of no model of this project.",
        "it belongs to another architecture, or is wrapped in an outer dict.",
        "a tokenizer, masked image model, classifier or UPerNet of BEiT v1 or v2.",
    )


def dropped(kind: str, state: State) -> dict[str, str]:
    """Return {name: reason} of the entries of `state` that are knowingly left out."""
    reasons = {rf"(.*\.)?{INDEX}": _FOLLOWS} | _DROPPED[kind]
    found = {name: next((why for rule, why in reasons.items() if re.fullmatch(rule, name)), None) for name in state}
    return {name: why for name, why in found.items() if why is not None}


def from_official(kind: str, state: State, spell: Callable[[str], str] = str) -> dict[str, PyTree]:
    """Return {'params': ..., 'codebook': ...} from a released state dict; `kind` is one of `NAMES`.

    What `dropped` lists is left out; the usage windows, which are ours alone, start at zero. `codebook` is empty but
    for a tokenizer; a segmenter has `batch_stats` too. A classifier without head becomes one of no classes. `spell`
    turns an official name into what the entry is called in the file at hand, for messages.

    Raises:
        UserError: a name that the kind does not have, a missing one, or an array that does not fit the others.
    """
    left_out = dropped(kind, state)
    paths = {name: our_path(kind, name) for name in state if name not in left_out}
    _refuse(kind, "has the unknown entry", sorted(spell(name) for name, path in paths.items() if path is None))
    flat = {path: transposed(path, np.asarray(state[name]), to_ours=True) for name, path in paths.items()}
    cls_token = flat.get("params/backbone/cls_token")
    if kind == "classifier" and cls_token is not None and not any(path.startswith("params/head/") for path in flat):
        flat["params/head/kernel"] = np.zeros((cls_token.shape[-1], 0), np.float32)
        flat["params/head/bias"] = np.zeros(0, np.float32)
    counts = flat.get(f"{CODEBOOK}/cluster_counts")
    if counts is not None:
        flat |= {window: np.zeros_like(counts) for window in WINDOWS}
    _check(kind, flat, spell)
    _check_indices(kind, state, spell)
    return {"params": {}, "codebook": {}} | traverse_util.unflatten_dict(flat, sep="/")


def to_official(kind: str, variables: dict[str, PyTree]) -> State:
    """Return the released state dict of {'params': ..., 'codebook': ..., ...}: the inverse of `from_official`.

    Raises:
        UserError: a path that the released model of this kind does not have, or a missing one.
    """
    flat = traverse_util.flatten_dict({key: dict(tree) for key, tree in variables.items()}, sep="/")
    names = {path: official_name(kind, path) for path in flat if path not in WINDOWS}
    flat = {path: np.asarray(array) for path, array in flat.items()}
    _check(kind, flat, str)
    # a classifier of no classes has no head there
    state = {name: transposed(path, flat[path], to_ours=False) for path, name in names.items() if flat[path].size}
    indices: dict[int, np.ndarray] = {}
    for name in [name for name in state if name.endswith(TABLE)]:
        side = grid_of_table(len(state[name]))
        if side not in indices:
            indices[side] = relative_position_index((side, side)).astype(np.int64)
        state[name.replace(TABLE, INDEX)] = indices[side]
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name.replace("running_mean", _COUNTER)] = np.zeros((), np.int64)
    if kind == "vqkd":
        state["quantize.embedding.cluster_size"] = state["quantize.cluster_size"]
        state["quantize.embedding.embed_avg"] = state["quantize.embedding.weight"]
        state["quantize.embedding.initted"] = np.ones(1, np.float32)
    return state


def _check(kind: str, flat: State, spell: Callable[[str], str]) -> None:
    """Raise UserError unless `flat` has exactly the variables of the model whose sizes it shows, in their shapes."""

    def name(path: str) -> str:
        return spell(official_name(kind, path))

    known = {path: array.shape for path, array in flat.items()}
    try:
        expected = shapes(kind, infer(kind, known))
    except Unfit as unfit:
        _refuse(kind, unfit.problem, [name(path) for path in unfit.paths])
    _refuse(kind, "lacks", sorted(name(path) for path in expected.keys() - known.keys() - set(WINDOWS)))
    _refuse(kind, "has the unknown entry", sorted(name(path) for path in known.keys() - expected.keys()))
    for path, shape in expected.items():
        if path in known and known[path] != shape:
            have, fits = (transposed(path, np.broadcast_to(0, s), to_ours=False).shape for s in (known[path], shape))
            _refuse(kind, f"has the shape {have}, where {fits} fits its other arrays, for", [name(path)])


def _check_indices(kind: str, state: State, spell: Callable[[str], str]) -> None:
    """Raise UserError if a stored relative-position index orders offsets in another way than the published models."""
    expected: dict[int, np.ndarray] = {}
    for name in (name for name in state if name.endswith(INDEX)):
        table = state.get(name.replace(INDEX, TABLE))
        if table is None:
            _refuse(kind, "has no table for the index", [spell(name)])
        side = grid_of_table(len(table))
        if side not in expected:
            expected[side] = relative_position_index((side, side))
        if not np.array_equal(state[name], expected[side]):
            _refuse(kind, "orders the offsets of its table in an unknown way, by", [spell(name)])


def _refuse(kind: str, problem: str, names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    raise UserError(
        f"The state dict {problem} {', '.join(map(repr, names[:2]))}{more}, read as a model of kind {kind!r}.",
        "the file is damaged, belongs to another kind of model, or is wrapped in an outer dict.",
        f"a whole state dict of one kind: {', '.join(NAMES)}.",
    )
