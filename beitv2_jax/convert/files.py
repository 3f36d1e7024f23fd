"""Read weights files of any format, and folders of Hugging Face and timm, as flat state dicts of NumPy arrays.

This is the first step of every conversion: names and shapes are still those of the file.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from beitv2_jax.convert.hub import FILES_IN_FOLDER, local_path
from beitv2_jax.convert.torch_files.reader import read_torch
from beitv2_jax.convert.wrappers import Selection, StateDict, select, unwrap
from beitv2_jax.errors import UserError
from beitv2_jax.runtime.buckets import AnyPath, absolute, as_path, local_copy


def read_weights(path: str, state_dict: str = "") -> StateDict:
    """Return the state dict in a file (.npz, .safetensors, .pth, .pth.tar, .pt, .bin, .ckpt) or a folder.

    The folder is that of a model of Hugging Face or timm; either may lie on the Hugging Face hub (`convert.hub`). What
    training scripts put around the state dict is removed (`convert.wrappers`); of several `state_dict` names the one to
    read. Floating-point arrays become float32; integers and booleans stay. No code in the file is run.

    Raises:
        UserError: the file does not exist, is damaged or of another format, needs code to be run, holds something
            other than named tensors, or has no such state dict.
    """
    file = local_copy(local_path(path))
    if file.is_dir():
        file = next((file / name for name in FILES_IN_FOLDER if (file / name).is_file()), file)
    if not file.is_file():
        folder_lacks = f", or the folder has none of {', '.join(FILES_IN_FOLDER)}" if file.is_dir() else ""
        raise UserError(
            f"There is no weights file at {path}.",
            f"The path may be mistyped{folder_lacks}.",
            "Pass an existing weights file, the folder of a Hugging Face model, or the directory of a run.",
        )
    selection = Selection(_shards(file), prefix=state_dict) if file.suffix == ".json" else _read_file(file, state_dict)
    found = unwrap(selection, str(file))
    return found._replace(arrays={name: _writable(array) for name, array in found.arrays.items()})


def read_config(path: str, name: str = "config.json") -> dict | None:
    """Return the JSON file `name` in the folder `path`, or beside the file `path`; None if there is none.

    The folder of a checkpoint stands for that of its run.

    Raises:
        UserError: the file is not a JSON object.
    """
    place = located(path)
    directory = run_directory(path) if place.is_dir() else place.parent
    return _read_json(directory / name) if (directory / name).is_file() else None


def located(source: str) -> AnyPath:
    """Return the path that `source` names, also in a bucket; what it names on the hub is fetched."""
    return as_path(absolute(local_path(source)))


def run_directory(path: str) -> AnyPath:
    """Return the directory of the run that `path` names: itself, or RUN where it is RUN/checkpoints/STEP."""
    directory = located(path)
    is_checkpoint = directory.name.isdecimal() and directory.parent.name == "checkpoints"
    return directory.parent.parent if is_checkpoint else directory


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write contiguous arrays to a .safetensors file with the usual permissions, as the umask has them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(arrays, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library leaves the file to its owner alone


def group_by_reason(entries: dict[str, str]) -> list[str]:
    """Return 'NAME and N more (REASON)' for each reason in {name: reason}, for logs."""
    names_of: dict[str, list[str]] = {}
    for name, reason in entries.items():
        names_of.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
        for reason, names in names_of.items()
    ]


def _writable(array: np.ndarray) -> np.ndarray:
    # read-only arrays are views of the file and become invalid with it, so they are copied
    floating = array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16
    return np.require(array, np.float32 if floating else None, "W")


def _read_file(file: Path, state_dict: str = "") -> Selection:
    if file.suffix not in _READERS:
        raise UserError(
            f"Cannot read {file}: its name ends in none of {', '.join(_READERS)}.",
            "It may be a file of another format, or may have been renamed.",
            "Pass a file of one of these formats or the folder of a Hugging Face model.",
        )
    try:
        tree = _READERS[file.suffix](file)
        if not isinstance(tree, dict):
            raise _not_a_state_dict(file, f"a {type(tree).__name__}")
        selection = select(tree, state_dict, str(file))
    except UserError:
        raise
    # for a damaged file the libraries raise many types of exceptions
    except Exception as error:
        raise UserError(
            f"Cannot read {file}: {error}.",
            "The file may not have been copied or downloaded completely.",
            "Copy or download it again.",
        ) from error
    for name, array in selection.state.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype.kind in "OSUMm":
            raise _not_a_state_dict(file, f"{name!r}, which is not a tensor")
    return selection


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


_READERS = {".npz": _read_npz, ".safetensors": load_file}
_READERS |= dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), lambda file: read_torch(str(file)))


def _shards(index: Path) -> dict[str, np.ndarray]:
    """Return the tensors that an index.json lists, read from the files beside it."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _not_a_state_dict(index, "no 'weight_map' from tensors to files")
    state = {}
    for shard_name in sorted(set(weight_map.values())):
        if Path(shard_name).name != shard_name or not (index.parent / shard_name).is_file():
            raise UserError(
                f"{index} lists the file {shard_name!r}, which is not in the same folder.",
                "The folder may not have been downloaded completely, or the index points outside it.",
                "Download the folder with all its files.",
            )
        shard = _read_file(index.parent / shard_name).state
        for name in [name for name in weight_map if weight_map[name] == shard_name]:
            if name not in shard:
                raise _not_a_state_dict(index, f"{name!r} as a tensor of {shard_name}, which does not have it")
            state[name] = shard[name]
    return state


def _read_json(file: AnyPath) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"Cannot read {file}: {error}.",
            "The file may not have been copied or downloaded completely.",
            "Copy or download it again.",
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{file} holds JSON, but not a JSON object.",
            "Another file may have been renamed to it.",
            "Copy or download it again.",
        )
    return value


def _not_a_state_dict(file: Path, found: str) -> UserError:
    return UserError(
        f"{file} holds {found}.",
        "It may hold more than a state dict, or be no weights file.",
        "Save the state dict alone, as a map from names to tensors, and pass that file.",
    )
