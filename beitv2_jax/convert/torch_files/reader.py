"""Files written by torch.save or torch.jit.save, read without torch and without running anything that they hold.

Three containers: zip files (since torch 1.6), the row of pickles before that, and TorchScript archives, which are zip
files of a module. Their pickles go through `convert.torch_files.unpickle`. Tensors are read-only views of the file, so
that only what is used is ever loaded; `convert.files` makes state dicts of them.
"""

import io
import mmap
import re
import reprlib
import struct
import zipfile

import numpy as np

from beitv2_jax.convert.torch_files.unpickle import MAX_NAME, ForbiddenError, Machine, Module
from beitv2_jax.errors import UserError

MAX_PICKLE_BYTES = 4 * 2**20
"""Longest pickle that is read, in bytes; names and shapes of a thousand tensors take a tenth of a megabyte."""
MIN_BUDGET = 64 * 2**20
"""Bytes that the tensors of a small file may take together; those of a larger one, four times its size."""
_MAX_ATTRIBUTES = 100_000
_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LENGTH = struct.Struct("<q")


def read_torch(path: str) -> object:
    """Return what torch.save wrote, as dicts, lists, tuples and scalars with NumPy arrays in place of tensors.

    Namespaces become dicts of their attributes, a TorchScript archive the state dict of its module (every tensor
    attribute under its dotted name), sets lists, dtypes their names, paths and devices tuples. Arrays are read-only
    views of the file: copy what is to outlive it. Checksums are not verified.

    Raises:
        UserError: no such file, not written by torch, damaged, compressed, big-endian, larger unfolded than a file of
            its size may be, or asking for anything that tensors do not need.
    """
    try:
        with open(path, "rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            tree = _read_zip(file, memory) if memory[:4] == _ZIP_MAGIC else _read_legacy(memory)
        return _state_dict(tree) if isinstance(tree, Module) else tree
    except ForbiddenError as error:
        raise UserError(
            f"{path} asks for {error} while it is read, which is refused.",
            "it holds more than tensors; to rebuild that, torch would run code that the file chooses.",
            "a file of the weights alone from a source you trust, best as .safetensors.",
        ) from error
    # a damaged file may trip the reader anywhere, and whatever trips it, the file is at fault
    except Exception as error:
        reason = error if isinstance(error, ValueError | OSError | zipfile.BadZipFile) else repr(error)
        raise UserError(
            f"Cannot read {path}: {reason}.",
            "the file is damaged, was not fetched whole, or was not written by torch.save.",
            "fetch it again, or get the weights as .safetensors.",
        ) from error


def _read_zip(file: io.BufferedReader, memory: memoryview) -> object:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("it has two entries of one name")
    folder = _folder(list(entries))

    def content(name: str) -> memoryview:
        if folder + name not in entries:
            raise ValueError(f"it has no entry {reprlib.repr(folder + name)}")
        return _stored(memory, entries[folder + name])

    if f"{folder}byteorder" in entries and content("byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    pickle = content("data.pkl")
    if len(pickle) > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is longer than {MAX_PICKLE_BYTES} bytes")
    return Machine(lambda key, _: content(f"data/{key}"), _budget(memory)).run(io.BytesIO(pickle))


def _folder(names: list[str]) -> str:
    """Return the one folder that holds everything, with its slash."""
    folders = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise ValueError("it is a zip file, but without the one data.pkl in a folder that torch.save writes")
    for name in names:
        if not name.startswith(folders[0]) or ".." in name.split("/") or "\\" in name:
            raise ValueError(f"its entry {reprlib.repr(name)} lies outside its folder")
    return folders[0]


def _stored(memory: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """Return the bytes of an entry; one that unfolds to more than lies in the file is refused, whatever its factor."""
    name = reprlib.repr(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ValueError(f"its entry {name} is compressed or encrypted, which torch never does to tensors")
    magic, *lengths = _LOCAL_HEADER.unpack(_part(memory, entry.header_offset, _LOCAL_HEADER.size, name))
    if magic != _ZIP_MAGIC:
        raise ValueError(f"its entry {name} is not where it should be")
    return _part(memory, entry.header_offset + _LOCAL_HEADER.size + sum(lengths), entry.file_size, name)


def _read_legacy(memory: memoryview) -> object:
    """Read five pickles (magic number, version, byte order, tree, storage keys), then one storage for each key."""

    def refuse(key: str, _: np.dtype) -> None:
        raise ValueError(f"its storage {key} stands outside the tree")

    stream = io.BytesIO(memory[:MAX_PICKLE_BYTES])
    magic = Machine(refuse, 0).run(stream)
    if magic != _MAGIC:
        raise ValueError("it does not begin as the files of torch.save do")
    _version, byte_order = Machine(refuse, 0).run(stream), Machine(refuse, 0).run(stream)
    if byte_order["little_endian"] is not True:
        raise ValueError("its numbers are big-endian")
    # where a storage lies follows from dtypes that stand in the tree, so the tree is gone through twice
    tree_start, dtypes = stream.tell(), {}

    def measure(key: str, dtype: np.dtype) -> None:
        if dtypes.setdefault(key, dtype) != dtype:
            raise ValueError(f"its storage {key} has two dtypes")

    Machine(measure, _budget(memory)).run(stream)
    keys = Machine(refuse, 0).run(stream)
    storages, position = {}, stream.tell()
    for key in keys:
        if not isinstance(key, str) or key not in dtypes:
            raise ValueError("it stores numbers that no tensor uses")
        (length,) = _LENGTH.unpack(_part(memory, position, _LENGTH.size, key))
        storages[key] = _part(memory, position + _LENGTH.size, length * dtypes[key].itemsize, key)
        position += _LENGTH.size + len(storages[key])
    stream.seek(tree_start)
    return Machine(lambda key, _: storages[key], _budget(memory)).run(stream)


def _part(memory: memoryview, start: int, size: int, name: str) -> memoryview:
    if start < 0 or size < 0 or start + size > len(memory):
        raise ValueError(f"{name} should take {size} bytes from byte {start} of a file of {len(memory)}")
    return memory[start : start + size]


def _budget(memory: memoryview) -> int:
    return max(MIN_BUDGET, 4 * len(memory))


def _state_dict(root: Module) -> dict[str, np.ndarray]:
    state, pending, seen = {}, [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        seen += 1 + len(module)
        # modules may hold each other in circles, or one another so often that the walk would not end
        if seen > _MAX_ATTRIBUTES or len(prefix) > MAX_NAME:
            raise ValueError("its modules are nested without end")
        state |= {f"{prefix}{name}": value for name, value in module.items() if isinstance(value, np.ndarray)}
        children = [(f"{prefix}{name}.", value) for name, value in module.items() if isinstance(value, Module)]
        pending += reversed(children)
    return state
