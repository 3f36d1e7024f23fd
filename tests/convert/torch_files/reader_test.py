"""Reading files of torch without torch: real, malicious and damaged files, without running any code."""

import contextlib
import json
import pickle
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from torch_files import (
    CONTAINERS,
    SIX,
    call,
    glob,
    legacy_file,
    mapping,
    number,
    peak_below,
    program,
    row,
    storage,
    tensor,
    text,
    zip_file,
)

from beitv2_jax.convert.torch_files.reader import read_torch
from beitv2_jax.errors import UserError

REAL = GOLDEN / "torch_files"
REAL_FILES = ("tensors_zip.pth", "tensors_legacy.pth", "checkpoint_zip.pth", "checkpoint_legacy.pth", "script.pt")


def leaves(tree):
    """Return {path: leaf} in which None is a leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


# --- files written by real torch


@pytest.mark.parametrize("file", REAL_FILES)
def test_files_of_real_torch_are_read_exactly(file):
    name = file.split("_")[0].split(".")[0]
    found = leaves(read_torch(str(REAL / file)))
    with np.load(REAL / "expected.npz", allow_pickle=False) as expected:
        plain = json.loads(str(expected["plain"]))[name]
        arrays = {key.removeprefix(name): expected[key] for key in expected.files if key.startswith(f"{name}[")}
    assert found.keys() == arrays.keys() | plain.keys()
    assert len(arrays) > 9
    for path, leaf in found.items():
        if path in plain:
            assert repr(leaf) == plain[path], path
            continue
        dtype = ml_dtypes.bfloat16 if "bfloat16" in path else arrays[path].dtype
        assert leaf.dtype == dtype, path
        np.testing.assert_array_equal(leaf.astype(arrays[path].dtype), arrays[path], path, strict=True)


def test_tensors_are_views_of_the_file():
    for array in read_torch(str(REAL / "tensors_zip.pth")).values():
        assert array.size == 0 or (not array.flags.owndata and not array.flags.writeable)


# --- files that would run code

SYSTEM = {
    "GLOBAL": lambda command: call(glob("os", "system"), text(command)),
    "STACK_GLOBAL": lambda command: text("posix") + text("system") + b"\x93" + row(text(command)) + b"R",
    "INST": lambda command: b"(" + text(command) + b"iposix\nsystem\n",
    "OBJ": lambda command: b"(" + glob("posix", "system") + text(command) + b"o",
    "eval": lambda command: call(glob("builtins", "eval"), text(f"__import__('os').system({command!r})")),
    "exec": lambda command: call(glob("__builtin__", "exec"), text(f"import os; os.system({command!r})")),
    "getattr": lambda command: call(
        call(glob("builtins", "getattr"), call(glob("builtins", "__import__"), text("os")), text("system")),
        text(command),
    ),
    "in a namespace": lambda command: (
        glob("argparse", "Namespace") + b")\x81" + mapping({"lr": call(glob("os", "system"), text(command))}) + b"b"
    ),
    "as a parameter": lambda command: call(
        glob("collections", "OrderedDict"), b"](" + call(glob("os", "system"), text(command)) + b"e"
    ),
}
ASKED_FOR = {"STACK_GLOBAL": "posix.system", "INST": r"INST.*posix system", "OBJ": r"posix\.system"}
ASKED_FOR |= {"eval": "builtins.eval", "exec": "builtins.exec", "getattr": "builtins.getattr"}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", SYSTEM)
def test_a_command_is_refused_by_name_and_does_not_run(how, nested, container, tmp_path, read):
    marker = tmp_path / "marker"
    body = SYSTEM[how](f"touch {marker}")
    with contextlib.suppress(TypeError, ValueError):  # the command has run, and what it returned fitted nowhere
        pickle.loads(program(body))
    assert marker.exists(), "the file is meant to be dangerous to those who unpickle it"
    marker.unlink()
    body = mapping({"model": mapping({"weight": tensor(), "bias": body})}) if nested else body
    with pytest.raises(UserError, match=ASKED_FOR.get(how, "os.system")) as caught:
        read(CONTAINERS[container](body))
    assert "weights.pth" in caught.value.happened and "refused" in caught.value.happened
    assert not marker.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.serialization", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_import_dotted_name"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch", "FooStorage"),
        ("torch", "QInt8Storage"),
        ("numpy", "load"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("argparse", "FileType"),
        ("argparse", "_os.system"),
        ("argparse", "Namespace.__init__"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "defaultdict"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("pickle", "loads"),
        ("subprocess", "Popen"),
        ("transformers.modeling_utils", "PreTrainedModel"),
        ("__main__", "Network"),
    ],
)
def test_names_that_tensors_do_not_need_are_refused(module, name, read):
    for ask in (glob(module, name), text(module) + text(name) + b"\x93"):
        with pytest.raises(UserError) as caught:
            read(zip_file(mapping({"weight": tensor(), "odd": ask})))
        assert f" needs {module}.{name}, " in caught.value.happened


@pytest.mark.parametrize(
    "body",
    [
        call(glob("torch", "FloatStorage"), number(9)),
        call(glob("torch", "float32"), number(9)),
        call(glob("argparse", "Namespace")),
        call(glob("__torch__", "Network.forward"), number(9)),
        call(glob("__torch__.network", "Network"), number(9)),
        glob("torch._utils", "_rebuild_parameter") + b")\x81",
        glob("__torch__.network", "Network") + row(number(9)) + b"\x81",
        glob("argparse", "Namespace") + row(number(9)) + b"\x81",
        # attributes set on a function, a class, a list and a tensor
        glob("torch._utils", "_rebuild_parameter") + row(b"N", mapping({"__defaults__": row(number(9))})) + b"b",
        glob("argparse", "Namespace") + row(b"N", mapping({"__new__": glob("torch", "Size")})) + b"b",
        glob("argparse", "Namespace") + b")\x81" + row(b"N", mapping({"__class__": glob("torch", "Size")})) + b"b",
        b"]" + mapping({"__class__": number(9)}) + b"b",
        tensor() + mapping({"shape": number(9)}) + b"b",
        call(glob("numpy", "dtype"), text("O"), b"\x89", b"\x88"),
        call(glob("numpy", "dtype"), text("V8"), b"\x89", b"\x88"),
        call(glob("numpy", "dtype"), tensor(), b"\x89", b"\x88"),
        call(glob("numpy.core.multiarray", "scalar"), text("f4"), b"C\x04abcd"),
        call(glob("numpy.core.multiarray", "scalar"), call(glob("numpy", "dtype"), text("f8")), b"C\x04abcd"),
        call(glob("_codecs", "encode"), number(9), text("latin1")),
        call(glob("torch._utils", "_rebuild_tensor_v2"), glob("torch", "FloatStorage"), number(0), row(), row()),
        call(glob("torch._utils", "_rebuild_tensor_v2"), tensor(), number(0), row(), row()),
        call(glob("torch._utils", "_rebuild_tensor_v2")),
        call(glob("torch._utils", "_rebuild_parameter")),
        call(text("torch"), number(9)),
        row(text("storage"), glob("collections", "OrderedDict"), text("0"), text("cpu"), number(6)) + b"Q",
        row(text("module"), glob("torch", "FloatStorage"), text("0"), text("cpu"), number(6)) + b"Q",
        row(text("storage"), glob("torch", "FloatStorage"), text("../data.pkl"), text("cpu"), number(6)) + b"Q",
        text("storage") + b"Q",
        b"P0\n",
        b"\x82\x01",
        b"I01\n",
    ],
)
def test_uses_of_known_names_that_torch_never_makes_are_refused(body, read):
    for container in CONTAINERS.values():
        with pytest.raises(UserError, match=r"weights\.pth"):
            read(container(mapping({"weight": tensor(), "odd": body})))
    assert read(zip_file(mapping({"weight": tensor()})))["weight"].shape == (2, 3)


# --- damaged files


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_prefix_of_a_file_is_refused(container, read):
    content = CONTAINERS[container](mapping({"weight": tensor(), "bias": tensor(shape=(6,), strides=(1,))}))
    assert len(read(content)) == 2
    for length in range(len(content)):
        with pytest.raises(UserError):
            read(content[:length])


@pytest.mark.parametrize("file", REAL_FILES)
def test_prefixes_of_real_files_are_refused(file, read):
    content = (REAL / file).read_bytes()
    for length in {*range(0, len(content), 331), len(content) - 1}:
        with pytest.raises(UserError):
            read(content[:length])


def read_or_refuse(path, content):
    """Read `content` and access every number in it; any exception but a UserError fails the test."""
    path.write_bytes(content)
    try:
        tree = read_torch(str(path))
    except UserError:
        return
    for leaf in leaves(tree).values():
        if isinstance(leaf, np.ndarray):
            leaf.tobytes()


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_with_any_one_byte_changed_is_read_or_refused(container, tmp_path):
    content = CONTAINERS[container](mapping({"weight": tensor(), "bias": tensor(shape=(6,), strides=(1,))}))
    rng = np.random.default_rng(0)
    for position in range(len(content)):
        for value in rng.integers(0, 256, 2, dtype=np.uint8):
            read_or_refuse(tmp_path / "w.pth", content[:position] + value.tobytes() + content[position + 1 :])


@pytest.mark.parametrize("file", REAL_FILES)
def test_real_files_with_bytes_changed_are_read_or_refused(file, tmp_path):
    content = (REAL / file).read_bytes()
    changes = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=4)

    @settings(max_examples=100, deadline=None)
    @given(changes, st.integers(0, len(content)), st.integers(0, 3))
    def check(changes, cut, gap):
        damaged = bytearray(content)
        for position, value in changes:
            damaged[position] = value
        read_or_refuse(tmp_path / "w.pth", bytes(damaged[:cut] + damaged[cut + gap :]))

    check()


def test_files_of_other_kinds_are_refused(read, tmp_path):
    for content in (b"", b"PK", b"\x93NUMPY", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\0" * 999):
        with pytest.raises(UserError, match=r"weights\.pth"):
            read(content)
    with pytest.raises(UserError, match=r"magic number of torch\.save"):
        read(program(mapping({"weight": number(3)})))
    for path in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(UserError, match=path.name):
            read_torch(str(path))


# --- zip files


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "archive/../../x",
        "archive/data/../../x",
        "other/x",
        "x",
        "archive\\..\\x",
        "archive/..\\x",
        "C:/x",
    ],
)
def test_an_entry_outside_the_folder_is_refused_by_name(name, read):
    with pytest.raises(UserError, match="outside its folder") as caught:
        read(zip_file(mapping({"weight": tensor()}), extra={name: b"payload"}))
    assert repr(name) in caught.value.happened


def test_exactly_one_folder_with_one_pickle_is_required(read):
    with pytest.raises(UserError, match=r"data\.pkl"):
        read(zip_file(tensor(), extra={"other/data.pkl": program(tensor())}))
    with pytest.raises(UserError, match=r"data\.pkl"):
        read(zip_file(tensor(), folder="archive/deeper"))
    with pytest.raises(UserError, match="outside"):
        read(zip_file(tensor(), folder=".."))
    content = zip_file(tensor(), extra={"archive/data/1": SIX}).replace(b"archive/data/1", b"archive/data/0")
    with pytest.raises(UserError, match="two entries"):
        read(content)
    assert read(zip_file(tensor(), folder="vit-b")).shape == (2, 3)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused_before_decompression(compression, read):
    zeros = bytes(2**26)
    content = zip_file(tensor(storage(length=2**24), shape=(2**24,), strides=(1,)), {"0": zeros})
    assert read(content).shape == (2**24,)
    content = zip_file(tensor(), {"0": zeros}, compression=compression)
    assert len(content) < 2**17
    with pytest.raises(UserError, match="is compressed"), peak_below(2**21):
        read(content)


def test_an_entry_that_claims_more_than_the_file_is_refused(read):
    content = zip_file(tensor(storage(length=2**30), shape=(2**30,), strides=(1,)))
    directory = content.rindex(b"PK\x01\x02")  # of archive/data/0, the last entry
    claimed = content[: directory + 20] + struct.pack("<II", 0xF0000000, 0xF0000000) + content[directory + 28 :]
    with pytest.raises(UserError, match="archive/data/0"), peak_below(2**21):
        read(claimed)


def test_big_endian_and_encrypted_files_are_refused(read):
    with pytest.raises(UserError, match="big-endian"):
        read(zip_file(tensor()).replace(b"little", b"bigbig"))
    with pytest.raises(UserError, match="big-endian"):
        read(legacy_file(tensor(), little_endian=b"\x89"))
    swapped = call(glob("numpy", "dtype"), text("f4"), b"\x89", b"\x88") + row(number(3), text(">"), b"N") + b"b"
    with pytest.raises(UserError, match="big-endian"):
        read(zip_file(call(glob("numpy.core.multiarray", "scalar"), swapped, b"C\x04abcd")))
    content = bytearray(zip_file(tensor()))
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UserError, match="or encrypted"):
        read(bytes(content))


# --- TorchScript


def module(name: str, attributes: dict[str, bytes]) -> bytes:
    """Return the operations that push a module of a TorchScript archive."""
    return glob(f"__torch__.{name}", "Block") + b")\x81" + mapping(attributes) + b"b"


def test_a_torchscript_archive_gives_the_state_dict_of_its_module(read):
    attention = module("a.___torch_mangle_7", {"weight": tensor(), "training": b"\x88", "heads": number(3)})
    blocks = module("b", {"0": attention, "1": module("c", {"bias": tensor(shape=(6,), strides=(1,))})})
    sizes = call(glob("torch.jit._pickle", "build_intlist"), b"](" + number(3) + b"e")
    body = module("network", {"blocks": blocks, "sizes": sizes, "scale": tensor(shape=(), strides=()), "none": b"N"})
    poison = {"archive/code/__torch__.py": b"import os", "archive/constants.pkl": program(glob("os", "system"))}
    state = read(zip_file(body, extra=poison))
    assert {name: array.shape for name, array in state.items()} == {
        "scale": (),
        "blocks.0.weight": (2, 3),
        "blocks.1.bias": (6,),
    }


def test_modules_in_endless_cycles_are_refused(read):
    circle = glob("__torch__.a", "A") + b")\x81q\x00" + mapping({"child": b"h\x00"}) + b"b"
    with pytest.raises(UserError, match="without end"):
        read(zip_file(circle))
    body = module("a", {"weight": tensor()})
    for level in range(40):
        body = module("a", {"left": body + b"q" + bytes([level]), "right": b"h" + bytes([level])})
    with pytest.raises(UserError, match="without end"):
        read(zip_file(body))
