"""Convert the state dict of a published vision transformer to arguments and params of `NormalisedViT`.

The family of names is recognised from the entries (`convert.teachers.layouts`). Every entry is used or dropped for a
known reason; a missing, unknown or wrongly shaped entry is an error that names it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from beitv2_jax.convert.arguments import HEAD_WIDTH, abstract_init
from beitv2_jax.convert.teachers.layouts import FAMILIES, HEAD, PREFIXES, UNUSUAL_HEADS, Family
from beitv2_jax.convert.wrappers import wrapped, wrapping_prefix
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.layers import ROTARY_BASE
from beitv2_jax.models.teachers import NormalisedViT
from beitv2_jax.typing import PyTree

_CONFIG_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_BEIT = r"(attn\.q_bias|relative_position_bias_table)$"
_PLAIN = (
    # a bias of the keys, or in DINOv3, which has none, the layer scale
    r"\.(attn\.qkv\.bias|attention\.key\.bias|self_attn\.k_proj\.bias|attn\.in_proj_bias|layer_scale1\.lambda1)$"
)
_DISTILLATION = "backbone/distillation_token"


class TeacherWeights(NamedTuple):
    """A teacher's network at the image size it was trained with.

    `arguments` and `projection_dim` (0: none) are those of `NormalisedViT`; `dropped` maps each unused entry to the
    reason; `normalization` is that of the family, '' if its networks differ in it.
    """

    arguments: dict
    projection_dim: int
    params: PyTree
    dropped: dict[str, str]
    normalization: str
    position_resize: str


class _State:
    """A state dict with the names of a family, and the original names in the file for messages."""

    def __init__(self, arrays: Mapping[str, np.ndarray], family: Family, prefix: str):
        self.family = family
        self.original = {name.removeprefix(prefix): name for name in arrays}
        self.arrays = {name: np.asarray(arrays[original]) for name, original in self.original.items()}
        self.prefix = prefix

    def mismatch(self, problem: str) -> UserError:
        return UserError(
            f"The weights, recognised as {self.family.title}, have {problem}.",
            "They may belong to another network with similar names, or may have been changed after publication.",
            "Pass the unchanged weights of a network of this family.",
        )

    def require(self, name: str, ndim: int | None = None) -> np.ndarray:
        if name not in self.arrays:
            raise self.mismatch(f"no entry {self.prefix + name!r}")
        array = self.arrays[name]
        if ndim is not None and array.ndim != ndim:
            raise self.mismatch(f"{self.original[name]!r} of shape {array.shape}, where {ndim} axes are expected")
        return array

    def get(self, path: str) -> np.ndarray | None:
        """Return the array for our parameter `path` outside the blocks, in the file's layout, or None."""
        known = path in self.family.trunk or path.rpartition("/")[0] in self.family.trunk
        return self.arrays.get(self.family.names(path)[0]) if known else None


def from_state(
    arrays: Mapping[str, np.ndarray],
    config: dict | None = None,
    *,
    output: str = "",
    activation: str = "",
    num_heads: int = 0,
) -> TeacherWeights:
    """Return the network in a state dict.

    `config` is the config.json beside the file, if any. `output` 'projected' keeps the projection of contrastive
    models, 'tokens' drops it, '' does what the published teacher of the family does. `activation` and `num_heads`
    replace those of the config or the family, unless they are '' and 0.

    Raises:
        UserError: no known family, a missing, unknown or wrongly shaped entry, or an option that must be given.
    """
    family, prefix = recognise(arrays)
    state = _State(arrays, family, prefix)
    vision_config = _vision_config(config) if family.config_activation else None
    sizes = _sizes(state, vision_config)
    if sizes.pop("gated"):
        activation = "swiglu"
    arguments = {
        **sizes,
        "num_heads": _num_heads(sizes["width"], num_heads, family, vision_config),
        "position": "absolute",
        "qkv_bias": "full",
        **family.arguments,
        "activation": activation or _activation(family, vision_config),
    }
    if vision_config is not None and "layer_norm_eps" in vision_config:
        arguments["norm_eps"] = vision_config["layer_norm_eps"]
    if arguments["qkv_bias"] == "qv" and family.names("backbone/blocks_0/attn/q_bias")[0] not in state.arrays:
        arguments["qkv_bias"] = "none"
    if (base := (vision_config or {}).get("rope_theta", ROTARY_BASE)) != ROTARY_BASE:
        raise state.mismatch(f"rope_theta={base} in config.json, where the published networks have {ROTARY_BASE:g}")
    projection_dim = _projection_dim(state, output)
    params, used = _params(state, arguments, projection_dim)
    return TeacherWeights(
        arguments=arguments,
        projection_dim=projection_dim,
        params=params,
        dropped=_dropped(state, used),
        normalization=family.normalization,
        position_resize=family.position_resize,
    )


def classifier_from_state(
    arrays: Mapping[str, np.ndarray], config: dict | None = None, *, num_heads: int = 0
) -> TeacherWeights | None:
    """Return the image classifier in a state dict with the arguments of `Classifier`; None if it has no linear head.

    The head follows the norm of [CLS], or, where the norm is called `fc_norm`, that of the mean patch (timm).

    Raises:
        UserError: as `from_state`, or a head of another kind.
    """
    name = next((name for name in ("head", "classifier") if f"{name}.weight" in arrays), None)
    if name is None:
        return None
    pooling = "mean" if "fc_norm.weight" in arrays else "cls"
    renamed = {re.sub("^fc_norm", "norm", entry): array for entry, array in arrays.items()}
    network = from_state(renamed, config, output="tokens", num_heads=num_heads)
    head = {"kernel": np.ascontiguousarray(arrays[f"{name}.weight"].T), "bias": arrays.get(f"{name}.bias")}
    width, known = network.arguments["width"], {f"{name}.weight", f"{name}.bias"}
    others = [entry for entry, reason in network.dropped.items() if reason == HEAD[1] and entry not in known]
    is_usual = network.arguments.get("class_token", True) and not (
        pooling == "mean" and network.arguments["num_registers"]
    )
    if others or not is_usual or head["bias"] is None or head["kernel"].shape != (width, len(head["bias"])):
        raise UserError(
            "The classifier in these weights is not a linear map of the normalised [CLS] or mean patch.",
            "It may be a distilled network with two heads, or one that pools its tokens by attention.",
            "Pass a classifier with one linear head, or use the network as a teacher.",
        )
    norm = {"mean": "fc_norm", "cls": "norm"}[pooling]
    params = {"backbone": network.params["backbone"], norm: network.params["norm"], "head": head}
    arguments = {"layer_scale_init": 0.0, **network.arguments, "num_classes": len(head["bias"]), "pooling": pooling}
    dropped = {entry: reason for entry, reason in network.dropped.items() if entry not in known}
    return network._replace(arguments=arguments, params=params, dropped=dropped)


def recognise(arrays: Mapping[str, np.ndarray]) -> tuple[Family, str]:
    """Return the family of names and their prefix in this file.

    Raises:
        UserError: no family matches, or the weights are those of a BEiT model.
    """
    if any(name.startswith("quantize.") for name in arrays):
        raise UserError(
            "The weights are those of a tokenizer, which cannot be a teacher.",
            "Did you mean the network that it was trained with, such as CLIP?",
            "Write --config.teacher.weights=PATH with the weights of a vision transformer.",
        )
    if any(re.search(_BEIT, name) for name in arrays):
        raise UserError(
            "The weights are those of a BEiT model, which must be converted before it can be a teacher.",
            "They may come from the released code, timm or Hugging Face.",
            "Run python -m beitv2_jax.convert WEIGHTS RUN, then write --config.teacher.weights=RUN.",
        )
    for prefix in PREFIXES:
        names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]

        def found(pattern: str, names: list[str] = names) -> bool:
            return any(re.match(pattern, name) for name in names)

        for family in FAMILIES:
            if all(map(found, family.has)) and not any(map(found, family.lacks)):
                registers = arrays.get(prefix + family.trunk.get("backbone/register_tokens", ""))
                if family.num_registers in (0, registers is not None and registers.shape[1]):
                    return family, prefix
    some = ", ".join(sorted(arrays)[:3])
    happened = f"The weights belong to no known family of teachers; their first entries are {some}."
    if prefix := wrapping_prefix(arrays):
        raise wrapped(happened, prefix)
    raise UserError(
        happened,
        "They may not be a vision transformer.",
        f"Pass weights of one of these families: {'; '.join(family.title for family in FAMILIES)}.",
    )


def is_plain_vit(arrays: Mapping[str, np.ndarray]) -> bool:
    """Tell whether the weights are those of a transformer that is no BEiT."""
    return any(re.search(_PLAIN, name) for name in arrays)


def refuse_plain_vit(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise UserError if the weights at `path` are those of a transformer that is no BEiT."""
    if not is_plain_vit(arrays):
        return
    try:
        title = f" ({recognise(arrays)[0].title})"
    except UserError:
        title = ""
    raise UserError(
        f"{path} holds the weights of a vision transformer that is not a BEiT{title}.",
        "Did you mean to use it as the teacher of a tokenizer?",
        f"Write --config.teacher.weights={path} for a vqkd or extract stage, or --config.init_from={path} to fine-tune "
        "it; conversion needs the weights of a BEiT v1 or v2 model.",
    )


def _vision_config(config: dict | None) -> dict | None:
    """Return the part of a Hugging Face config.json that describes the image network; None if it does not."""
    if config is None or "vision_fn" in config:  # that of TIPS's own code names the network only
        return None
    return config.get("vision_config", config)


def _activation(family: Family, vision_config: dict | None) -> str:
    if vision_config is None:
        activation = family.activation
    elif "hidden_act" in vision_config:
        activation = _CONFIG_ACTIVATIONS.get(vision_config["hidden_act"], "")
    else:
        activation = family.config_activation
    if not activation:
        raise UserError(
            f"The activation of the network ({family.title}) is unknown.",
            "Networks of this family were trained with different ones, which their weights do not show.",
            "Write --config.teacher.activation=quick_gelu (OpenAI CLIP and networks trained like it), gelu (most of "
            "OpenCLIP) or gelu_tanh (SigLIP).",
        )
    return activation


def _num_heads(width: int, num_heads: int, family: Family, vision_config: dict | None) -> int:
    stated = {} if vision_config is None else {"num_attention_heads": family.config_heads, **vision_config}
    given = num_heads or stated.get("num_attention_heads", 0)
    heads = given or UNUSUAL_HEADS.get(width, width // HEAD_WIDTH)
    unit, detail = (4, " whose width is a multiple of 4") if family.arguments.get("rotary") else (1, "")
    if heads == 0 or width % (unit * heads) or (not given and width not in UNUSUAL_HEADS and width % HEAD_WIDTH):
        parts = f"{given} heads{detail}" if given else f"heads of {HEAD_WIDTH}"
        raise UserError(
            f"A width of {width} cannot be divided into {parts}.",
            "The network may have an unusual number of heads, which its weights do not show.",
            'Write {"num_attention_heads": N} into a file config.json beside the weights, or, of a teacher, '
            "--config.teacher.num_heads=N, with the number of heads that it was trained with.",
        )
    return heads


def _sizes(state: _State, vision_config: dict | None) -> dict[str, int]:
    family = state.family
    (kernel_name,) = family.names("backbone/patch_embed/kernel")
    if kernel_name in state.arrays and state.arrays[kernel_name].ndim == 2 and family.flat_tokens:
        raise UserError(
            f"{state.original[kernel_name]!r} takes flattened patches, as in NaFlex networks, which are not supported.",
            "Did you mean a SigLIP 2 checkpoint with a fixed resolution?",
            "Pass the weights of a checkpoint such as siglip2-base-patch16-224.",
        )
    width, _, patch_size, _ = state.require(kernel_name, ndim=4).shape
    pattern = re.escape(family.blocks).replace(r"\{\}", r"(\d+)")
    depth = 1 + max(int(match[1]) for name in state.arrays if (match := re.match(pattern, name)))
    gated = bool(family.gated) and family.names("backbone/blocks_0/mlp/fc1/kernel", gated=True)[0] in state.arrays
    fc1, fc2 = (
        [state.require(name, ndim=2) for name in family.names(f"backbone/blocks_0/mlp/{layer}/kernel", gated=gated)]
        for layer in ("fc1", "fc2")
    )
    mlp_dim = fc2[0].shape[1]
    if family.config_image_size:
        image_size = (vision_config or {}).get("image_size", family.config_image_size)
    else:
        image_size = _position_rows(state)[1] * patch_size
    registers = state.get("backbone/register_tokens")
    num_registers = 0 if registers is None else registers.shape[1]
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_registers": num_registers + (state.get(_DISTILLATION) is not None),
        "gated": sum(len(rows) for rows in fc1) == 2 * mlp_dim,
    }


def _position_rows(state: _State) -> tuple[int, int]:
    """Return the number of rows before the patches in the position embedding, and the side of the patch grid."""
    (name,) = state.family.names("backbone/pos_embed")
    rows = state.require(name, ndim=2 if state.family.flat_tokens else 3).shape[-2]
    side = int(rows**0.5)
    special = state.family.arguments.get("class_token", True) + (state.get(_DISTILLATION) is not None)
    if side == 0 or rows - side**2 not in {0, special}:
        raise state.mismatch(
            f"{state.original[name]!r} with {rows} rows, which are not a square grid of patches, with or without the "
            f"other tokens such as 'cls_token'"
        )
    return rows - side**2, side


def _projection_dim(state: _State, output: str) -> int:
    family = state.family
    wanted = family.projected if not output else output == "projected"
    if not wanted:
        return 0
    path = "projection/kernel"
    kernel = state.get(path)
    if kernel is None:
        named = f" {family.names(path)[0]!r}" if family.projected else ""
        raise UserError(
            f"The weights ({family.title}) have no projection{named}.",
            "Only contrastive models have one, and some files hold their transformer alone.",
            "Write --config.teacher.output=tokens for the normalised tokens before the projection.",
        )
    if kernel.ndim != 2:
        raise state.mismatch(f"{family.names(path)[0]!r} of shape {kernel.shape}, where 2 axes are expected")
    return kernel.shape[0] if family.names(path)[0].endswith("weight") else kernel.shape[1]


def _params(state: _State, arguments: dict, projection_dim: int) -> tuple[PyTree, set[str]]:
    """Return our params and the names of the entries that they use."""
    size, width = arguments["image_size"], arguments["width"]
    model = NormalisedViT(Backbone(**arguments), projection_dim)
    shapes = abstract_init(model, size, arguments["patch_size"])
    flat, used = {}, set()
    for path, leaf in traverse_util.flatten_dict(shapes["params"], sep="/").items():
        if path in ("backbone/pos_embed", "backbone/register_tokens"):
            continue
        names = state.family.names(path, gated=arguments["activation"] == "swiglu")
        stored = (width,) if path == "backbone/cls_token" and state.family.flat_tokens else None
        flat[path] = _array(state, names, leaf.shape, stored)
        used |= set(names)
    tokens, names = _positions(state, width, arguments["num_registers"])
    return traverse_util.unflatten_dict(flat | tokens, sep="/"), used | names


def _array(
    state: _State, names: tuple[str, ...], shape: tuple[int, ...], stored: tuple[int, ...] | None = None
) -> np.ndarray:
    """Return the concatenation of the entries `names` in our layout, with the given shape.

    Arrays called 'weight' are transposed; others have our shape or, if given, the shape `stored`.
    """
    axes = tuple(range(len(shape)))
    if stored is None and names[0].endswith("weight"):
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(len(shape), axes)
    expected = list(stored or (shape[axes.index(axis)] for axis in range(len(shape))))
    expected[0] //= len(names)
    for name in names:
        found = state.require(name).shape
        if found != tuple(expected):
            raise state.mismatch(
                f"{state.original[name]!r} of shape {found}, but the other entries require {tuple(expected)}"
            )
    joined = np.concatenate([state.arrays[name] for name in names])
    return np.ascontiguousarray(joined.transpose(axes) if stored is None else joined.reshape(shape))


def _positions(state: _State, width: int, num_registers: int) -> tuple[dict[str, np.ndarray], set[str]]:
    """Return position embedding and registers, and the names of the entries that they use.

    If the file has no position for [CLS], it is zero. DeiT's distillation token becomes a register, with its position
    added to it.
    """
    family = state.family
    distilled = state.get(_DISTILLATION) is not None
    tokens, names = {}, set()
    if num_registers:
        register_names = family.names(_DISTILLATION if distilled else "backbone/register_tokens")
        tokens["backbone/register_tokens"] = _array(state, register_names, (1, num_registers, width))
        names |= set(register_names)
    if family.arguments.get("position") == "none":
        return tokens, names
    before, side = _position_rows(state)
    position_names = family.names("backbone/pos_embed")
    rows = before + side**2
    positions = _array(state, position_names, (1, rows, width), (rows, width) if family.flat_tokens else None)
    if family.arguments.get("class_token", True) and before == 0:
        positions = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    if distilled and before:
        tokens["backbone/register_tokens"] = tokens["backbone/register_tokens"] + positions[:, 1:2]
        positions = np.delete(positions, 1, axis=1)
    return {"backbone/pos_embed": positions, **tokens}, {*position_names, *names}


def _dropped(state: _State, used: set[str]) -> dict[str, str]:
    dropped = {}
    for name in sorted(state.arrays.keys() - used):
        reasons = [reason for pattern, reason in state.family.dropped if re.match(pattern, name)]
        if state.family.projected and name in state.family.names("projection/kernel"):
            reasons.append("projection; the features are the tokens before it")
        if not reasons:
            raise state.mismatch(f"the unknown entry {state.original[name]!r}")
        dropped[state.original[name]] = reasons[0]
    return dropped
