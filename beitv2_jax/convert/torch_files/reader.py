"""Read files written by torch.save or torch.jit.save, without torch and without running any code in them.

There are three formats: zip files (since torch 1.6), the sequence of pickles used before that, and TorchScript
archives, which are zip files of a module. Pickles are interpreted by `convert.torch_files.unpickle`. Tensors are
read-only views of the file, so only those that are used are loaded; `convert.files` turns them into state dicts.
"""

import io
import mmap
import re
import reprlib
import struct
import zipfile

import numpy as np

from beitv2_jax.convert.torch_files.unpickle import MAX_NAME, ForbiddenError, Interpreter, ScriptModule
from beitv2_jax.errors import UserError

MAX_PICKLE_BYTES = 4 * 2**20
"""Maximum size of a pickle in bytes; names and shapes of a thousand tensors take 0.1 MB."""
MIN_BUDGET = 64 * 2**20
"""Bytes that the tensors of a file may take in total, or four times the size of the file if that is more."""
_MAX_ATTRIBUTES = 100_000
_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LENGTH = struct.Struct("<q")


def read_torch(path: str) -> object:
    """Return what torch.save wrote, as dicts, lists, tuples and scalars, with NumPy arrays for tensors.

    A namespace becomes a dict of its attributes, a TorchScript archive the state dict of its module (every tensor
    attribute with its dotted name), a set a list, a dtype its name, a path or device a tuple. Arrays are read-only
    views of the file: copy those that must outlive it. Checksums are not verified.

    Raises:
        UserError: the file does not exist, was not written by torch, is damaged, compressed or big-endian, would take
            far more memory than its size, or needs anything that tensors do not need.
    """
    try:
        with open(path, "rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            tree = _read_zip(file, memory) if memory[:4] == _ZIP_MAGIC else _read_legacy(memory)
        return _state_dict(tree) if isinstance(tree, ScriptModule) else tree
    except ForbiddenError as error:
        raise UserError(
            f"Reading {path} needs {error}, which is refused.",
            "The file holds more than tensors, and loading it with torch would run code that the file chooses.",
            "If you trust its source, load it with the program that wrote it, save the weights alone by "
            "torch.save(model.state_dict(), FILE), and pass FILE.",
        ) from error
    # a damaged file may raise any type of exception anywhere in the reader
    except Exception as error:
        reason = error if isinstance(error, ValueError | OSError | zipfile.BadZipFile) else repr(error)
        raise UserError(
            f"Cannot read {path}: {reason}.",
            "The file may be damaged, not downloaded completely, or not written by torch.save.",
            "Download it again, or get the weights in .safetensors format.",
        ) from error


def _read_zip(file: io.BufferedReader, memory: memoryview) -> object:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("it has two entries with the same name")
    folder = _folder(list(entries))

    def content(name: str) -> memoryview:
        if folder + name not in entries:
            raise ValueError(f"it has no entry {reprlib.repr(folder + name)}")
        return _entry_bytes(memory, entries[folder + name])

    if f"{folder}byteorder" in entries and content("byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    pickle = content("data.pkl")
    if len(pickle) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
    return Interpreter(lambda key, _: content(f"data/{key}"), _budget(memory)).run(io.BytesIO(pickle))


def _folder(names: list[str]) -> str:
    """Return the name of the folder that holds all entries, with its slash."""
    folders = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise ValueError("it is a zip file without exactly one FOLDER/data.pkl, which torch.save writes")
    for name in names:
        if not name.startswith(folders[0]) or ".." in name.split("/") or "\\" in name:
            raise ValueError(f"its entry {reprlib.repr(name)} is outside its folder")
    return folders[0]


def _entry_bytes(memory: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """Return the bytes of an entry; compressed entries are refused, as they could expand to any size."""
    name = reprlib.repr(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ValueError(f"its entry {name} is compressed or encrypted, which torch never does to tensors")
    magic, *lengths = _LOCAL_HEADER.unpack(_slice(memory, entry.header_offset, _LOCAL_HEADER.size, name))
    if magic != _ZIP_MAGIC:
        raise ValueError(f"its entry {name} is not at the position in the table of contents")
    return _slice(memory, entry.header_offset + _LOCAL_HEADER.size + sum(lengths), entry.file_size, name)


def _read_legacy(memory: memoryview) -> object:
    """Read five pickles (magic number, version, byte order, tree, storage keys), then one storage for each key."""

    def refuse(key: str, _: np.dtype) -> None:
        raise ValueError(f"its storage {key} is outside the tree")

    stream = io.BytesIO(memory[:MAX_PICKLE_BYTES])
    magic = Interpreter(refuse, 0).run(stream)
    if magic != _MAGIC:
        raise ValueError("it does not begin with the magic number of torch.save")
    _version, byte_order = Interpreter(refuse, 0).run(stream), Interpreter(refuse, 0).run(stream)
    if byte_order["little_endian"] is not True:
        raise ValueError("its numbers are big-endian")
    # the positions of the storages depend on dtypes in the tree, so the tree is interpreted twice
    tree_start, dtypes = stream.tell(), {}

    def measure(key: str, dtype: np.dtype) -> None:
        if dtypes.setdefault(key, dtype) != dtype:
            raise ValueError(f"its storage {key} has two dtypes")

    Interpreter(measure, _budget(memory)).run(stream)
    keys = Interpreter(refuse, 0).run(stream)
    storages, position = {}, stream.tell()
    for key in keys:
        if not isinstance(key, str) or key not in dtypes:
            raise ValueError("it has a storage that no tensor uses")
        (length,) = _LENGTH.unpack(_slice(memory, position, _LENGTH.size, key))
        storages[key] = _slice(memory, position + _LENGTH.size, length * dtypes[key].itemsize, key)
        position += _LENGTH.size + len(storages[key])
    stream.seek(tree_start)
    return Interpreter(lambda key, _: storages[key], _budget(memory)).run(stream)


def _slice(memory: memoryview, start: int, size: int, name: str) -> memoryview:
    if start < 0 or size < 0 or start + size > len(memory):
        raise ValueError(f"{name} should take {size} bytes from byte {start} on, but the file has {len(memory)} bytes")
    return memory[start : start + size]


def _budget(memory: memoryview) -> int:
    return max(MIN_BUDGET, 4 * len(memory))


def _state_dict(root: ScriptModule) -> dict[str, np.ndarray]:
    state, pending, seen = {}, [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        seen += 1 + len(module)
        # modules may contain each other in cycles, or so often that this loop would not end
        if seen > _MAX_ATTRIBUTES or len(prefix) > MAX_NAME:
            raise ValueError("its modules are nested without end")
        state |= {f"{prefix}{name}": value for name, value in module.items() if isinstance(value, np.ndarray)}
        children = [(f"{prefix}{name}.", value) for name, value in module.items() if isinstance(value, ScriptModule)]
        pending += reversed(children)
    return state
