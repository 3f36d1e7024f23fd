"""A published vision transformer's state dict -> arguments and params of `models.teachers.NormalisedViT`.

The family of names is recognised from the entries (`convert.teachers.layouts`). Every entry is used, or dropped for a
stated reason; a missing, unknown or wrongly shaped one is an error that names it.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from beitv2_jax.convert.teachers.layouts import FAMILIES, HEAD_WIDTH, UNUSUAL_HEADS, WHOLE_MODEL, Family
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone
from beitv2_jax.models.preprocess import NORMALIZATIONS
from beitv2_jax.models.teachers import NormalisedViT
from beitv2_jax.typing import PyTree

OUTPUTS = ("projected", "tokens")
_CONFIG_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_BEIT = r"(attn\.q_bias|relative_position_bias_table)$"
_DISTILLATION = "backbone/distillation_token"


class TeacherWeights(NamedTuple):
    """A network at the image size it was trained with.

    `arguments` and `projection_dim` (0: none) are those of `NormalisedViT`; `dropped` maps each unused entry to the
    reason; `normalization` is '' where nothing settles it.
    """

    arguments: dict
    projection_dim: int
    params: PyTree
    dropped: dict[str, str]
    normalization: str
    position_resize: str


class _State:
    """A state dict under the names that a family knows, the names in the file kept for messages."""

    def __init__(self, arrays: Mapping[str, np.ndarray], family: Family, prefix: str):
        self.family = family
        self.original = {name.removeprefix(prefix): name for name in arrays}
        self.arrays = {name: np.asarray(arrays[original]) for name, original in self.original.items()}
        self.prefix = prefix

    def misfit(self, problem: str) -> UserError:
        return UserError(
            f"The weights have {problem}.",
            f"they do not belong to a network of the kind they look like ({self.family.title}).",
            "weights of one of the kinds that README.md lists under teachers, as they were published.",
        )

    def require(self, name: str, ndim: int | None = None) -> np.ndarray:
        if name not in self.arrays:
            raise self.misfit(f"no entry {self.prefix + name!r}")
        array = self.arrays[name]
        if ndim is not None and array.ndim != ndim:
            raise self.misfit(f"{self.original[name]!r} of shape {array.shape}, which should have {ndim} axes")
        return array

    def get(self, path: str) -> np.ndarray | None:
        """Return the array of our trunk parameter `path` in its own layout, None where the file has none."""
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
    """Return the network that a state dict holds.

    `config` is the config.json beside the file, if any. `output` 'projected' keeps the projection of contrastive
    models, 'tokens' drops it, '' does as the family's published teacher does. `activation` and `num_heads` ('' and 0:
    as the config or the family says) override.

    Raises:
        UserError: no known family, an entry missing, unknown or wrongly shaped, or a choice that is left to the user.
    """
    family, prefix = recognise(arrays)
    state = _State(arrays, family, prefix)
    described = _described(config) if family.config_activation else None
    sizes = _sizes(state)
    if sizes.pop("gated"):
        activation = "swiglu"
    arguments = {
        **sizes,
        "num_heads": _num_heads(sizes["width"], num_heads, described),
        "position": "absolute",
        "qkv_bias": "full",
        **family.arguments,
        "activation": activation or _activation(family, described),
    }
    if described is not None and "layer_norm_eps" in described:
        arguments["norm_eps"] = described["layer_norm_eps"]
    projection_dim = _projection_dim(state, output)
    params, used = _params(state, arguments, projection_dim)
    return TeacherWeights(
        arguments=arguments,
        projection_dim=projection_dim,
        params=params,
        dropped=_dropped(state, used),
        normalization=_normalization(config) or family.normalization,
        position_resize=family.position_resize,
    )


def recognise(arrays: Mapping[str, np.ndarray]) -> tuple[Family, str]:
    """Return the family of names and what precedes them in this file.

    Raises:
        UserError: no family fits, or they are weights of a BEiT model.
    """
    if any(re.search(_BEIT, name) for name in arrays):
        raise UserError(
            "The weights are of a BEiT model.",
            "a checkpoint of the released code, of timm or of Hugging Face, whose layouts are converted first.",
            "python -m beitv2_jax.convert WEIGHTS RUN, then --config.teacher.weights=RUN",
        )
    for prefix in WHOLE_MODEL:
        names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]

        def found(pattern: str, names: list[str] = names) -> bool:
            return any(re.match(pattern, name) for name in names)

        for family in FAMILIES:
            if all(map(found, family.has)) and not any(map(found, family.lacks)):
                return family, prefix
    some = ", ".join(sorted(arrays)[:3])
    raise UserError(
        f"The weights are of no known kind of teacher: their entries are {some} ...",
        "they are no vision transformer, or are wrapped in an outer dict.",
        f"weights of one of these kinds: {'; '.join(family.title for family in FAMILIES)}.",
    )


def _described(config: dict | None) -> dict | None:
    """Return the part of a Hugging Face config that describes the image network."""
    return None if config is None else config.get("vision_config", config)


def _normalization(config: dict | None) -> str:
    """Return the input range that the config.json of a timm repository states, '' where it states none."""
    stated = (config or {}).get("pretrained_cfg", {})
    for name, statistics in NORMALIZATIONS.items():
        if "mean" in stated and np.allclose((stated["mean"], stated["std"]), statistics, atol=1e-4):
            return name
    return ""


def _activation(family: Family, described: dict | None) -> str:
    if described is None:
        activation = family.activation
    elif "hidden_act" in described:
        activation = _CONFIG_ACTIVATIONS.get(described["hidden_act"], "")
    else:
        activation = family.config_activation
    if not activation:
        raise UserError(
            f"Nothing beside the weights ({family.title}) tells the activation of their network.",
            "networks of this kind were trained with different ones.",
            "--config.teacher.activation=quick_gelu (OpenAI CLIP and its kin), gelu (most of OpenCLIP) or gelu_tanh "
            "(SigLIP).",
        )
    return activation


def _num_heads(width: int, num_heads: int, described: dict | None) -> int:
    given = num_heads or (described or {}).get("num_attention_heads", 0 if described is None else 12)
    heads = given or UNUSUAL_HEADS.get(width, width // HEAD_WIDTH)
    if heads == 0 or width % heads or (not given and width not in UNUSUAL_HEADS and width % HEAD_WIDTH):
        raise UserError(
            f"A width of {width} cannot be cut into {f'{given} heads' if given else f'heads of {HEAD_WIDTH}'}.",
            "the network has an unusual number of heads, which its weights do not tell.",
            "--config.teacher.num_heads=N with the number of heads it was trained with.",
        )
    return heads


def _sizes(state: _State) -> dict[str, int]:
    family = state.family
    (kernel_name,) = family.names("backbone/patch_embed/kernel")
    if kernel_name in state.arrays and state.arrays[kernel_name].ndim == 2 and family.flat_tokens:
        raise UserError(
            f"{state.original[kernel_name]!r} maps flat patches: these are weights of a NaFlex network.",
            "SigLIP 2 has checkpoints of two kinds; those with flexible image shapes are not supported.",
            "a SigLIP 2 checkpoint of a fixed resolution, such as siglip2-base-patch16-224.",
        )
    width, _, patch_size, _ = state.require(kernel_name, ndim=4).shape
    pattern = re.escape(family.blocks).replace(r"\{\}", r"(\d+)")
    depth = 1 + max(int(match[1]) for name in state.arrays if (match := re.match(pattern, name)))
    gated = bool(family.gated) and family.names("backbone/blocks_0/mlp/fc2/kernel", gated=True)[0] in state.arrays
    fc1, fc2 = (
        state.require(family.names(f"backbone/blocks_0/mlp/{layer}/kernel", gated=gated)[0], ndim=2)
        for layer in ("fc1", "fc2")
    )
    _, side = _position_rows(state)
    registers = state.get("backbone/register_tokens")
    num_registers = 0 if registers is None else registers.shape[1]
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "width": width,
        "depth": depth,
        "mlp_dim": fc2.shape[1],
        "num_registers": num_registers + (state.get(_DISTILLATION) is not None),
        "gated": fc1.shape[0] == 2 * fc2.shape[1],
    }


def _position_rows(state: _State) -> tuple[int, int]:
    """Return how many rows of the position embedding precede the patches, and the side of the patch grid."""
    (name,) = state.family.names("backbone/pos_embed")
    rows = state.require(name, ndim=2 if state.family.flat_tokens else 3).shape[-2]
    side = int(rows**0.5)
    special = state.family.arguments.get("class_token", True) + (state.get(_DISTILLATION) is not None)
    if side == 0 or rows - side**2 not in {0, special}:
        raise state.misfit(
            f"{state.original[name]!r} for {rows} places, which are no square of patches with or without the other "
            f"tokens ('cls_token' ...) that are there"
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
            "only contrastive models have one, and some files hold their transformer alone.",
            "--config.teacher.output=tokens for the normalised tokens in front of it.",
        )
    if kernel.ndim != 2:
        raise state.misfit(f"{family.names(path)[0]!r} of shape {kernel.shape}, which should have 2 axes")
    return kernel.shape[0] if family.names(path)[0].endswith("weight") else kernel.shape[1]


def _params(state: _State, arguments: dict, projection_dim: int) -> tuple[PyTree, set[str]]:
    """Return our tree and the names of the entries in it."""
    size, width = arguments["image_size"], arguments["width"]
    model = NormalisedViT(Backbone(**arguments), projection_dim)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
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
    """Return the entries `names`, one below the other, in our layout of the given shape.

    PyTorch's 'weight' arrays are transposed, others are as ours or, with `stored`, of another shape.
    """
    axes = tuple(range(len(shape)))
    if stored is None and names[0].endswith("weight"):
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(len(shape), axes)
    expected = list(stored or (shape[axes.index(axis)] for axis in range(len(shape))))
    expected[0] //= len(names)
    for name in names:
        found = state.require(name).shape
        if found != tuple(expected):
            raise state.misfit(
                f"{state.original[name]!r} of shape {found} where {tuple(expected)} fits the other entries"
            )
    joined = np.concatenate([state.arrays[name] for name in names])
    return np.ascontiguousarray(joined.transpose(axes) if stored is None else joined.reshape(shape))


def _positions(state: _State, width: int, num_registers: int) -> tuple[dict[str, np.ndarray], set[str]]:
    """Return position embedding and registers, and the names of the entries they come from.

    Positions of [CLS] that a file leaves out are zeros. DeiT's distillation token is a register to which its position
    has been added.
    """
    family = state.family
    before, side = _position_rows(state)
    names = family.names("backbone/pos_embed")
    rows = before + side**2
    positions = _array(state, names, (1, rows, width), (rows, width) if family.flat_tokens else None)
    if family.arguments.get("class_token", True) and before == 0:
        positions = np.pad(positions, ((0, 0), (1, 0), (0, 0)))
    if not num_registers:
        return {"backbone/pos_embed": positions}, set(names)
    distilled = state.get(_DISTILLATION) is not None
    register_names = family.names(_DISTILLATION if distilled else "backbone/register_tokens")
    registers = _array(state, register_names, (1, num_registers, width))
    if distilled and before:
        registers = registers + positions[:, 1:2]
        positions = np.delete(positions, 1, axis=1)
    return {"backbone/pos_embed": positions, "backbone/register_tokens": registers}, {*names, *register_names}


def _dropped(state: _State, used: set[str]) -> dict[str, str]:
    dropped = {}
    for name in sorted(state.arrays.keys() - used):
        reasons = [reason for pattern, reason in state.family.dropped if re.match(pattern, name)]
        if state.family.projected and name in state.family.names("projection/kernel"):
            reasons.append("projection: features are the tokens in front of it")
        if not reasons:
            raise state.misfit(f"the unknown entry {state.original[name]!r}")
        dropped[state.original[name]] = reasons[0]
    return dropped
