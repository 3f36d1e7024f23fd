"""Weights files of every container, and Hugging Face directories, as flat dicts of NumPy arrays.

The first step of every conversion: names and shapes are still those of the file; the layouts are told apart later.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from beitv2_jax.convert.torch_files.reader import read_torch
from beitv2_jax.errors import UserError

WRAPPERS = ("model", "module", "state_dict")
"""Keys under which training scripts keep the state dict, in the order in which they are looked for."""
_IN_DIRECTORY = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_PARALLEL = "module."


def read_weights(path: str) -> dict[str, np.ndarray]:
    """Return the state dict in a file (.npz, .safetensors, .pth, .pt, .bin, .ckpt) or a Hugging Face directory.

    A state dict under 'model', 'module' or 'state_dict' is taken out, the prefix 'module.' of every name removed.
    Floating-point arrays become float32, integers and truth values stay. Nothing in the file is run.

    Raises:
        UserError: there is no such file, it is damaged or of another kind, asks for code to be run, or holds something
            else than named tensors.
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in _IN_DIRECTORY if (file / name).is_file()), file)
    if not file.is_file():
        raise UserError(
            f"There is no weights file {path}.",
            f"the path is mistyped, or the folder has none of {', '.join(_IN_DIRECTORY)}.",
            "an existing file, or the folder of a Hugging Face model.",
        )
    state = _shards(file) if file.suffix == ".json" else _read_file(file)
    if state and all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): array for name, array in state.items()}
    return {name: _own(array) for name, array in state.items()}


def read_config(path: str) -> dict | None:
    """Return config.json in the directory `path`, or beside the file `path`; None if there is none.

    Raises:
        UserError: it is no JSON object.
    """
    directory = Path(path) if Path(path).is_dir() else Path(path).parent
    return _read_json(directory / "config.json") if (directory / "config.json").is_file() else None


def _own(array: np.ndarray) -> np.ndarray:
    # only what cannot be written to is copied: views of a file die with it
    floating = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    return np.require(array, np.float32 if floating else None, "W")


def _read_file(file: Path) -> dict[str, np.ndarray]:
    if file.suffix not in _READERS:
        raise UserError(
            f"Cannot read {file}: it is of none of the kinds {', '.join(_READERS)}.",
            "it is no weights file, or was renamed.",
            "one of those files, or the folder of a Hugging Face model.",
        )
    try:
        state = _READERS[file.suffix](file)
    except UserError:
        raise
    # the libraries below raise whatever a damaged file makes them trip over
    except Exception as error:
        raise UserError(
            f"Cannot read {file}: {error}.", "the file was not copied or downloaded whole.", "fetch it again."
        ) from error
    for name, array in state.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype.kind in "OSUMm":
            raise _not_a_state_dict(file, f"{name!r}, which is no tensor")
    return state


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_state_dict(file: Path) -> dict:
    tree = read_torch(str(file))
    if not isinstance(tree, dict):
        raise _not_a_state_dict(file, f"a {type(tree).__name__}")
    return next((tree[key] for key in WRAPPERS if isinstance(tree.get(key), dict)), tree)


_READERS = {".npz": _read_npz, ".safetensors": load_file}
_READERS |= dict.fromkeys((".pth", ".pt", ".bin", ".ckpt"), _read_state_dict)


def _shards(index: Path) -> dict[str, np.ndarray]:
    """Return the tensors that an index.json names, from the files beside it."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise _not_a_state_dict(index, "no 'weight_map' from tensors to files")
    state = {}
    for place in sorted(set(places.values())):
        if Path(place).name != place or not (index.parent / place).is_file():
            raise UserError(
                f"{index} names the file {place!r}, which does not lie beside it.",
                "the folder was not fetched whole, or the index was made to reach outside it.",
                "the folder with all its files.",
            )
        shard = _read_file(index.parent / place)
        for name in [name for name in places if places[name] == place]:
            if name not in shard:
                raise _not_a_state_dict(index, f"{name!r} in {place}, which lacks it")
            state[name] = shard[name]
    return state


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read {file}: {error}.", "it was not fetched whole.", "fetch it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object.", "another file was renamed to it.", "fetch it again.")
    return value


def _not_a_state_dict(file: Path, found: str) -> UserError:
    return UserError(
        f"{file} holds {found}.",
        f"it is no state dict, or holds one under another key than {', '.join(map(repr, WRAPPERS))}.",
        "a file that maps names to tensors.",
    )
