"""Plain vision transformers in timm's names and PyTorch's layouts -> our tree: weights for teachers.

The files of DINO and of timm's `vit_*_patch*` models have this form: class token, absolute positions, fused qkv with
full bias, no layer scale. Pure NumPy.
"""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load_file

from beitv2_jax.errors import UserError
from beitv2_jax.typing import PyTree

HEAD_WIDTH = 64
"""Width of one attention head in every published ViT; state dicts do not say how many heads there are."""


class _Entry(NamedTuple):
    ours: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


def read_weights(path: str) -> dict[str, np.ndarray]:
    """Read a flat state dict from a .npz or .safetensors file; floating-point arrays become float32.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"There is no weights file {path}.",
            "the path is mistyped or relative to another folder.",
            "an existing file.",
        )
    if file.suffix not in _READERS:
        raise UserError(
            f"Cannot read {path}: its name ends neither in .npz nor in .safetensors.",
            "it is a PyTorch pickle, which can run code when opened.",
            "save the state dict with safetensors.torch.save_file or numpy.savez, then pass that file.",
        )
    try:
        state = _READERS[file.suffix](file)
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise UserError(
            f"Cannot read {path}: {error}.", "the file was not copied or downloaded whole.", "fetch it again."
        ) from error
    return {name: array.astype(np.float32) for name, array in state.items()}


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


_READERS = {".npz": _read_npz, ".safetensors": load_file}


def vit_from_timm(state: dict[str, np.ndarray], num_heads: int | None = None) -> tuple[dict, PyTree]:
    """Return (keyword arguments of `VisionTransformer`, {'backbone': ..., 'norm': ...}) of a timm state dict.

    Sizes are read from the arrays; without `num_heads` heads are 64 wide. The classifier (`head.*`) is left out.

    Raises:
        UserError: an entry is missing, unknown or of the wrong shape, or `num_heads` does not divide the width.
    """
    sizes = _sizes(state)
    width, heads = sizes["width"], num_heads or sizes["width"] // HEAD_WIDTH
    if heads == 0 or width % heads or (not num_heads and width % HEAD_WIDTH):
        raise UserError(
            f"A width of {width} cannot be cut into {f'{num_heads} heads' if num_heads else f'heads of {HEAD_WIDTH}'}.",
            "the network has an unusual number of heads, which its weights do not tell.",
            "--config.teacher.num_heads=N with the number of heads it was trained with.",
        )
    layout = _layout(**sizes)
    unknown = sorted(name for name in state if name not in layout and not name.startswith("head."))
    if unknown:
        raise _misfit(f"the unknown entry {unknown[0]!r}")
    params = {}
    for name, entry in layout.items():
        array = _require(state, name)
        if array.shape != entry.shape:
            raise _misfit(f"{name!r} of shape {array.shape} where {entry.shape} fits the other entries")
        params[entry.ours] = np.ascontiguousarray(entry.convert(array))
    arguments = {
        "image_size": sizes["side"] * sizes["patch_size"],
        "patch_size": sizes["patch_size"],
        "width": width,
        "depth": sizes["depth"],
        "num_heads": heads,
        "mlp_dim": sizes["mlp_dim"],
        "position": "absolute",
        "qkv_bias": "full",
    }
    return arguments, traverse_util.unflatten_dict(params, sep="/")


def _sizes(state: dict[str, np.ndarray]) -> dict[str, int]:
    width, _, patch_size, _ = _require(state, "patch_embed.proj.weight", ndim=4).shape
    num_patches = _require(state, "pos_embed", ndim=3).shape[1] - 1
    side = round(num_patches**0.5)
    if side**2 != num_patches:
        raise _misfit(f"'pos_embed' for {num_patches} patches, which form no square")
    mlp_dim = _require(state, "blocks.0.mlp.fc1.weight", ndim=2).shape[0]
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    return {"width": width, "patch_size": patch_size, "side": side, "depth": depth, "mlp_dim": mlp_dim}


def _layout(*, width: int, patch_size: int, side: int, depth: int, mlp_dim: int) -> dict[str, _Entry]:
    def linear(theirs, ours, fan_in, fan_out):
        return {
            f"{theirs}.weight": _Entry(f"{ours}/kernel", (fan_out, fan_in), np.transpose),
            f"{theirs}.bias": _Entry(f"{ours}/bias", (fan_out,)),
        }

    def norm(theirs, ours):
        return {
            f"{theirs}.weight": _Entry(f"{ours}/scale", (width,)),
            f"{theirs}.bias": _Entry(f"{ours}/bias", (width,)),
        }

    layout = {
        "cls_token": _Entry("backbone/cls_token", (1, 1, width)),
        "pos_embed": _Entry("backbone/pos_embed", (1, side**2 + 1, width)),
        "patch_embed.proj.weight": _Entry(
            "backbone/patch_embed/kernel",
            (width, 3, patch_size, patch_size),
            lambda kernel: kernel.transpose(2, 3, 1, 0),
        ),
        "patch_embed.proj.bias": _Entry("backbone/patch_embed/bias", (width,)),
        **norm("norm", "norm"),
    }
    for index in range(depth):
        theirs, ours = f"blocks.{index}", f"backbone/blocks_{index}"
        layout |= norm(f"{theirs}.norm1", f"{ours}/norm1") | norm(f"{theirs}.norm2", f"{ours}/norm2")
        layout |= linear(f"{theirs}.attn.qkv", f"{ours}/attn/qkv", width, 3 * width)
        layout |= linear(f"{theirs}.attn.proj", f"{ours}/attn/proj", width, width)
        layout |= linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1", width, mlp_dim)
        layout |= linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2", mlp_dim, width)
    return layout


def _require(state: dict[str, np.ndarray], name: str, ndim: int | None = None) -> np.ndarray:
    if name not in state:
        raise _misfit(f"no entry {name!r}")
    if ndim is not None and state[name].ndim != ndim:
        raise _misfit(f"{name!r} of shape {state[name].shape}, which should have {ndim} axes")
    return state[name]


def _misfit(problem: str) -> UserError:
    return UserError(
        f"The weights have {problem}.",
        "they do not belong to a plain ViT in timm's names (class token, absolute positions, qkv with bias).",
        "weights of a timm vit_*_patch* or a DINO model, as a flat state dict.",
    )
