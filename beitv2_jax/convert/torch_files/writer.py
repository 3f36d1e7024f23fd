"""Write PyTorch's zip format without PyTorch: nested dicts with arrays as leaves, which `torch.load` reads.

The pickle names only what tensors need, so `torch.load(weights_only=True)` accepts it.
"""

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

from beitv2_jax.errors import UserError

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def save(path: Path, tree: dict) -> None:
    """Write `tree` (dicts with string keys, arrays as leaves) to `path`.

    Raises:
        UserError: an array of a dtype that PyTorch does not have.
    """
    arrays: list[np.ndarray] = []
    program = pickle.PROTO + b"\x02" + _pickled(tree, arrays) + pickle.STOP
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for index, array in enumerate(arrays):
            archive.writestr(f"archive/data/{index}", array.astype(array.dtype.newbyteorder("<")).tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(value, arrays: list[np.ndarray]) -> bytes:
    """Return the pickle opcodes that push `value`; arrays are appended to `arrays` and referred to by index."""
    if isinstance(value, dict):
        items = b"".join(_pickled(key, arrays) + _pickled(inner, arrays) for key, inner in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, int):
        return pickle.LONG1 + b"\x08" + struct.pack("<q", value)
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(_pickled(inner, arrays) for inner in value) + pickle.TUPLE
    return _tensor(np.asarray(value), arrays)


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    if array.dtype.name not in _STORAGES:
        raise UserError(
            f"PyTorch files cannot hold arrays of dtype {array.dtype}.",
            "The weights may have been converted to an unusual dtype.",
            f"Convert the arrays to one of {', '.join(_STORAGES)}.",
        )
    arrays.append(array)
    strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
    storage = pickle.MARK + _pickled("storage", arrays) + _named("torch", _STORAGES[array.dtype.name])
    storage += b"".join(_pickled(part, arrays) for part in (str(len(arrays) - 1), "cpu", array.size)) + pickle.TUPLE
    hooks = _named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    layout = b"".join(_pickled(part, arrays) for part in (0, array.shape, strides, False))
    rebuilt = pickle.MARK + storage + pickle.BINPERSID + layout + hooks + pickle.TUPLE
    return _named("torch._utils", "_rebuild_tensor_v2") + rebuilt + pickle.REDUCE


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
