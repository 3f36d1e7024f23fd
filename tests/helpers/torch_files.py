"""Files in torch's containers put together byte by byte, so that they can hold what torch would never write."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np

from beitv2_jax.convert.torch_files.reader import read_torch


def glob(module: str, name: str) -> bytes:
    """Return the operation that asks for module.name."""
    return b"c" + f"{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """Return the operation that pushes a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """Return the operation that pushes an integer."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def row(*items: bytes) -> bytes:
    """Return the operations that push a tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    """Return the operations that call a function."""
    return function + row(*arguments) + b"R"


def mapping(items: dict[str, bytes]) -> bytes:
    """Return the operations that push a dict."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(kind: str = "FloatStorage", key: str = "0", length: int = 6) -> bytes:
    """Return the operations that push a storage."""
    return row(text("storage"), glob("torch", kind), text(key), text("cpu"), number(length)) + b"Q"


def tensor(below: bytes | None = None, *, offset=0, shape=(2, 3), strides=(3, 1)) -> bytes:
    """Return the operations that push a tensor over the storage `below`."""
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"),
        storage() if below is None else below,
        number(offset),
        row(*map(number, shape)),
        row(*map(number, strides)),
        b"\x89",
        call(glob("collections", "OrderedDict")),
    )


def program(body: bytes) -> bytes:
    """Return a whole pickle of protocol 2."""
    return b"\x80\x02" + body + b"."


SIX = np.arange(6, dtype=np.float32).tobytes()


def zip_file(body: bytes, storages=None, *, extra=None, folder="archive", compression=zipfile.ZIP_STORED) -> bytes:
    """Return a zip file whose pickle is `body`; `extra` are more entries, by full name."""
    entries = {f"{folder}/data.pkl": program(body), f"{folder}/byteorder": b"little"}
    entries |= {f"{folder}/data/{key}": raw for key, raw in ({"0": SIX} if storages is None else storages).items()}
    entries |= extra or {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, raw in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, raw)
    return buffer.getvalue()


def legacy_file(body: bytes, storages=None, *, lengths=None, little_endian=b"\x88") -> bytes:
    """Return a file of the format before zip files; `lengths` are the numbers said to lie in the storages."""
    storages = {"0": SIX} if storages is None else storages
    head = [number(0x1950A86A20F9469CFC6C), number(1001), mapping({"little_endian": little_endian}), body]
    head.append(b"](" + b"".join(map(text, storages)) + b"e")
    parts = [program(part) for part in head]
    for key, raw in storages.items():
        parts += [struct.pack("<q", (lengths or {}).get(key, len(raw) // 4)), raw]
    return b"".join(parts)


CONTAINERS = {"zip": zip_file, "legacy": legacy_file}


def reader(directory):
    """Return a function that writes bytes to a file in `directory` and reads that."""

    def write_and_read(content: bytes):
        (directory / "weights.pth").write_bytes(content)
        return read_torch(str(directory / "weights.pth"))

    return write_and_read


class peak_below:
    """Fail if Python and NumPy allocate more than `limit` bytes at once."""

    def __init__(self, limit: int):
        self._limit = limit

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, *_):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < self._limit
