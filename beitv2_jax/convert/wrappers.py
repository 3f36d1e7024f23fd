"""Find the state dict of one network inside what training scripts save around it.

A checkpoint may hold several state dicts (trained and averaged weights, student and teacher), each under a key or
under a prefix of the names. What wraps a module (torch.compile, DistributedDataParallel, Lightning) adds prefixes too.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from beitv2_jax.errors import UserError, did_you_mean, nearest

WRAPPERS = (
    *("model", "module", "state_dict", "model_state_dict", "network", "net", "backbone"),
    *("teacher", "student", "online_model", "ema_model", "model_ema", "state_dict_ema", "ema_state_dict", "ema"),
)
"""Known keys and prefixes of state dicts, in the order in which they are tried."""
_INSERTED = re.compile(r"(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, Fabric and FSDP insert anywhere in a name."""
_BLOCK = r"((vision_model|visual|trunk|encoder|decoder|transformer)\.)*(blocks|layers?|resblocks)\.\d+\."
_NETWORK = re.compile(rf"((beit|vit|deit|dinov2|dinov2_with_registers|text|text_model)\.)?{_BLOCK}|decode_head\.")
"""Start of a name of a transformer that nothing wraps."""
_WRAPPED_NETWORK = re.compile(rf"(.+?)\.{_BLOCK}")
_CHUNK = re.compile(r"(.*blocks)\.\d+\.(\d+\..*)")
"""DINOv2 trains with its blocks in chunks: the first number is that of the chunk, the second that of the block."""
_MMPRETRAIN = re.compile(r"(.*\.)?layers\.\d+\.ffn\.layers\.")
_MMPRETRAIN_HEAD = re.compile(r"^head\.(fc|layers\.head)\.")
_MMPRETRAIN_TO_TIMM = (
    (r"^layers\.", "blocks."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"^(blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),
)
"""Names in mmpretrain's transformers -> those of timm, which are those of the released code for BEiT."""
_MAX_KEY = 1000
STATE_DICT_OPTIONS = "--state_dict={0} (python -m beitv2_jax.convert) or --config.teacher.state_dict={0}"
"""How a user chooses a state dict; `format` takes its name."""


class Selection(NamedTuple):
    """A state dict in a file: its `key` ('' is the whole file), the keys of `others`, and the chosen `prefix` in it."""

    state: Mapping
    key: str = ""
    others: tuple[str, ...] = ()
    prefix: str = ""


class StateDict(NamedTuple):
    """The arrays of one network by name.

    `dropped` maps the other names in the file to the reason; `assumptions` says which of several state dicts was taken.
    """

    arrays: dict[str, np.ndarray]
    dropped: dict[str, str]
    assumptions: tuple[str, ...]


def select(tree: Mapping, chosen: str, where: str) -> Selection:
    """Return the state dict in `tree`, which holds arrays or further dicts.

    `chosen` is its key, with dots where it lies deeper ('callbacks.ema'), or a prefix of its names, or a key and a
    prefix ('model.teacher'); '' takes the first of `WRAPPERS`. A tree without state dicts in it is returned whole.
    `where` is the path of the file, for messages.

    Raises:
        UserError: there are state dicts, but none has the chosen or a known key.
    """
    found = _dictionaries(tree)
    keys = [key for key in found if key]
    networks = [key for key in keys if any(_NETWORK.match(name) or _WRAPPED_NETWORK.match(name) for name in found[key])]
    known = [key for key in keys if all(part in WRAPPERS for part in key.split("."))]
    if exact := [key for key in keys if f"{chosen}.".startswith(f"{key}.")]:
        key = max(exact, key=len)
        return Selection(found[key], key, prefix=chosen[len(key) + 1 :])
    if inside := [key for key in keys if chosen and key.startswith(f"{chosen}.")]:
        return Selection(found[inside[0]], inside[0])
    if known:
        with_network = [key for key in known if key in networks] or known
        key = min(with_network, key=lambda key: [WRAPPERS.index(part) for part in key.split(".")])
        return Selection(found[key], key, tuple(other for other in networks if other != key), chosen)
    if networks or (keys and "" not in found):
        raise _no_such(chosen, networks or keys, where)
    return Selection(tree, prefix=chosen)


def unwrap(selection: Selection, where: str) -> StateDict:
    """Return the network in a state dict without the prefixes of wrappers; names of mmpretrain become those of timm.

    Raises:
        UserError: no name has the chosen prefix.
    """
    state = {_INSERTED.sub("", name): array for name, array in selection.state.items()}
    is_mmpretrain = any(map(_MMPRETRAIN.match, state))
    if is_mmpretrain:
        state = {_MMPRETRAIN_HEAD.sub("backbone.head.", name): array for name, array in state.items()}
    taken, others, chosen, dropped = selection.key, list(selection.others), selection.prefix, {}
    while prefix := chosen or _known_prefix(state):
        inside = {name: array for name, array in state.items() if name.startswith(f"{prefix}.")}
        outside = state.keys() - inside.keys()
        if not inside:
            keys = filter(None, (selection.key, *selection.others))
            raise _no_such(chosen, [*keys, *sorted(_network_prefixes(state))], where)
        if outside:
            taken = f"{taken}.{prefix}".lstrip(".")
            others += [] if chosen else sorted(_network_prefixes(outside))
            dropped |= dict.fromkeys(sorted(outside), f"outside of {prefix!r}")
        state, chosen = {name[len(prefix) + 1 :]: array for name, array in inside.items()}, ""
    assumptions = (f"state_dict={taken}: the file also has {', '.join(others)}",) if others else ()
    if is_mmpretrain:
        state = {_in_timm(name): array for name, array in state.items()}
    return StateDict({_CHUNK.sub(r"\1.\2", name): array for name, array in state.items()}, dropped, assumptions)


def wrapping_prefix(names: Iterable[str]) -> str:
    """Return the prefix, such as 'learner.net', with which the names of a transformer begin; '' if there is none."""
    if any(map(_NETWORK.match, names)):
        return ""
    return next((found[1] for found in map(_WRAPPED_NETWORK.match, names) if found), "")


def wrapped(happened: str, prefix: str) -> UserError:
    """Return the error for a network whose names begin with an unknown prefix."""
    return UserError(
        happened,
        f"Did you mean the network whose names begin with {prefix!r}?",
        f"Write {STATE_DICT_OPTIONS.format(prefix)}.",
    )


def _known_prefix(state: Iterable[str]) -> str:
    """Return the prefix to be removed next: that of all names, or that of a network beside other arrays; '' if none."""
    for prefix in WRAPPERS:
        if state and all(name.startswith(f"{prefix}.") for name in state):
            return prefix
    if any(map(_NETWORK.match, state)):
        return ""
    prefixes = _network_prefixes(state)
    return next((prefix for prefix in WRAPPERS if prefix in prefixes), "")


def _network_prefixes(names: Iterable[str]) -> set[str]:
    """Return the first parts of the names of transformers."""
    return {name.partition(".")[0] for name in names if _WRAPPED_NETWORK.match(name)}


def _in_timm(name: str) -> str:
    for pattern, replacement in _MMPRETRAIN_TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def _dictionaries(tree: Mapping) -> dict[str, Mapping]:
    """Return {key: dict} of `tree` (key '') and of the dicts in it, with dots, that hold arrays and have text as names.

    Each dict is looked at once, as dicts in a file may contain each other.
    """
    found, pending, seen = {}, collections.deque([("", tree)]), set()
    while pending:
        key, node = pending.popleft()
        if id(node) in seen or len(key) > _MAX_KEY:
            continue
        seen.add(id(node))
        holds_arrays = any(isinstance(value, np.ndarray) for value in node.values())
        if holds_arrays and all(isinstance(name, str) for name in node):
            found[key] = node
        pending += [(f"{key}.{name}".lstrip("."), value) for name, value in node.items() if isinstance(value, dict)]
    return found


def _no_such(chosen: str, available: list[str], where: str) -> UserError:
    shown = ", ".join(map(repr, available[:5])) or "none"
    guess = (nearest(chosen, available) or available[0]) if available else "NAME"
    meant = did_you_mean(chosen, available) if chosen else f"Did you mean {guess!r}?"
    return UserError(
        f"{where} has no state dict {chosen!r}; it has {shown}."
        if chosen
        else f"{where} holds state dicts under keys that are not known: {shown}.",
        meant if available else "The file may hold one network only.",
        f"Write {STATE_DICT_OPTIONS.format(guess)}." if available else "Leave the name of the state dict out.",
    )
