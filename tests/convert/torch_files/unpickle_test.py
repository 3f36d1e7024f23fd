"""The pickle interpreter: tensors that do not fit their storages, and files that try to exhaust time or memory."""

import functools
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    CONTAINERS,
    SIX,
    call,
    glob,
    legacy_file,
    mapping,
    number,
    peak_below,
    row,
    storage,
    tensor,
    text,
    zip_file,
)

from beitv2_jax.convert.torch_files import reader as reader_lib
from beitv2_jax.convert.torch_files.reader import MIN_BUDGET
from beitv2_jax.errors import UserError

# --- shapes and storages


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (7,), (1,)),
        (1, (2, 3), (3, 1)),
        (6, (1,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (3, 2), (1, 4)),
        (0, (2**30,), (1,)),
        (0, (2, 2), (2**62, 1)),
        (2**62, (2, 3), (3, 1)),
    ],
)
def test_a_storage_shorter_than_the_tensor_is_refused(offset, shape, strides, container, read):
    body = tensor(storage(key="17"), offset=offset, shape=shape, strides=strides)
    with pytest.raises(UserError, match=r"storage 17 has 6 numbers, but a tensor .* needs"), peak_below(2**20):
        read(CONTAINERS[container](body, {"17": SIX}))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_tensor_may_end_at_the_end_of_its_storage(container, read):
    numbers = np.frombuffer(SIX, np.float32)
    array = read(CONTAINERS[container](tensor(offset=1, shape=(2, 2, 1), strides=(1, 3, 5))))
    np.testing.assert_array_equal(array, numbers[[[[1], [4]], [[2], [5]]]])
    assert read(CONTAINERS[container](tensor(offset=5, shape=(), strides=()))) == 5
    assert read(CONTAINERS[container](tensor(offset=9, shape=(3, 0), strides=(1, 1)))).shape == (3, 0)


@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (-1, (2,), (1,)),
        (0, (-2, -3), (3, 1)),
        (3, (2,), (-1,)),
        (0, (2**63,), (0,)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (1,), (2**63,)),
        (0, (2, 3), (1,)),
        (0, (0, 2**62, 2**62), (1, 1, 1)),
        (0, (1,) * 65, (1,) * 65),
        (2**64, (1,), (1,)),
    ],
)
def test_impossible_shapes_are_refused(offset, shape, strides, read):
    for container in CONTAINERS.values():
        with pytest.raises(UserError), peak_below(2**20):
            read(container(tensor(offset=offset, shape=shape, strides=strides)))


@pytest.mark.parametrize("odd", [b"N", b"\x88", b"G" + bytes(8), text("3"), row(number(3))])
def test_sizes_that_are_not_integers_are_refused(odd, read):
    def body(size):
        sizes, strides = row(size), row(number(1))
        return call(glob("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), sizes, strides)

    assert read(zip_file(body(number(3)))).shape == (3,)
    with pytest.raises(UserError):
        read(zip_file(body(odd)))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_claim_of_four_gigabytes_is_refused_before_it_is_allocated(container, read):
    whole = dict(shape=(2**30,), strides=(1,))
    with pytest.raises(UserError, match="24 bytes, but its length requires 4294967296"), peak_below(2**20):
        read(CONTAINERS[container](tensor(storage(length=2**30), **whole)))
    with pytest.raises(UserError, match="more memory"), peak_below(2**20):
        read(CONTAINERS[container](tensor(shape=(2**30,), strides=(0,))))
    claimed = legacy_file(tensor(storage(length=2**30), **whole), lengths={"0": 2**30})
    with pytest.raises(UserError, match="4294967296"), peak_below(2**20):
        read(claimed)
    with pytest.raises(UserError), peak_below(2**20):
        read(legacy_file(tensor(), lengths={"0": -1}))


def test_tensors_that_share_a_storage_have_a_memory_limit(read):
    count = 2**18
    one = tensor(storage(length=count), shape=(count,), strides=(1,))
    few, many = (b"](" + one * copies + b"e" for copies in (MIN_BUDGET // 2**20, MIN_BUDGET // 2**20 + 1))
    assert len(read(zip_file(few, {"0": bytes(2**20)}))) == 64
    with pytest.raises(UserError, match="more memory"):
        read(zip_file(many, {"0": bytes(2**20)}))


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("BoolStorage", np.bool_),
        ("ByteStorage", np.uint8),
        ("CharStorage", np.int8),
        ("ShortStorage", np.int16),
        ("IntStorage", np.int32),
        ("LongStorage", np.int64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
    ],
)
def test_every_dtype_of_storage(kind, dtype, read):
    numbers = np.array([1, 0, 3]).astype(dtype)
    body = tensor(storage(kind, length=3), shape=(3,), strides=(1,))
    for container in (zip_file, functools.partial(legacy_file, lengths={"0": 3})):
        array = read(container(body, {"0": numbers.tobytes()}))
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, numbers)
        with pytest.raises(UserError):
            read(container(body, {"0": numbers.tobytes()[:-1]}))


def test_a_missing_storage_or_one_with_two_dtypes_is_refused(read):
    with pytest.raises(UserError, match="archive/data/1"):
        read(zip_file(tensor(storage(key="1"))))
    with pytest.raises(UserError):
        read(legacy_file(tensor(storage(key="1"))))
    with pytest.raises(UserError, match="two dtypes"):
        read(legacy_file(row(tensor(), tensor(storage("IntStorage")))))


def test_tensors_with_metadata_are_refused(read):
    lazily_negated = tensor()[:-2] + mapping({"neg": b"\x88"}) + b"tR"
    with pytest.raises(UserError, match="metadata"):
        read(zip_file(lazily_negated))


# --- files that would take forever, or all memory


def doubled(levels: int) -> bytes:
    """Return the operations that push a tuple of two tuples of two tuples ..."""
    return b")" + b"".join(b"q" + bytes([level]) + b"h" + bytes([level]) + b"\x86" for level in range(levels))


@pytest.mark.parametrize(
    "body",
    [
        b"}" + doubled(200) + b"Ns",
        b"}" + text("x" * 1001) + b"Ns",
        call(glob("numpy", "dtype"), doubled(200)),
        row(text("storage"), glob("torch", "FloatStorage"), doubled(200), text("cpu"), number(6)) + b"Q",
        call(glob("torch._utils", "_rebuild_tensor_v2"), storage(), number(0), doubled(200), doubled(200)),
        call(glob("os", "system"), doubled(200)),
        # sizes that take a megabyte each and would be multiplied
        tensor(shape=(), strides=()).replace(
            b"(t(t", row(b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20 + b"q\x00", *[b"h\x00"] * 63) * 2
        ),
        # a module that contains itself under a long name
        glob("__torch__.a", "A") + b")\x81q\x00" + mapping({"child" * 180: b"h\x00"}) + b"b",
        b"B\xff\xff\xff\xff",
        b"X\xff\xff\xff\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"\x8e" + b"\xff" * 7 + b"\x7f",
        b"\x95" + b"\xff" * 8 + b"\xf0",
        b"](" * 3000,
        b"}(" * 3000 + b"u" * 3000,
        # a string of a megabyte, encoded a thousand times
        row(text("x" * 2**20) + b"q\x00", *[call(glob("_codecs", "encode"), b"h\x00", text("latin1"))] * 1000),
    ],
)
def test_a_small_file_takes_little_time_and_memory(body, read):
    start = time.monotonic()
    with pytest.raises(UserError):
        read(zip_file(body))
    assert time.monotonic() - start < 5


def test_a_large_memo_index_allocates_no_table(read):
    with peak_below(2**21):
        tree = read(zip_file(b"]r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff" + b"a"))
    assert tree[0] is tree


def test_deep_nesting_is_read(read):
    depth = 100_000
    tree = read(zip_file(b"]" * depth + b"a" * (depth - 1)))
    for _ in range(depth - 1):
        (tree,) = tree
    assert tree == []


def test_values_shared_many_times_are_read_once(read):
    tree = read(zip_file(mapping({"nest": doubled(200), "weight": tensor()})))
    assert tree["weight"].shape == (2, 3)


def test_an_endless_pickle_is_refused(read, monkeypatch):
    with pytest.raises(UserError, match="longer than"):
        read(zip_file(b"N" * reader_lib.MAX_PICKLE_BYTES))
    monkeypatch.setattr(reader_lib, "MAX_PICKLE_BYTES", 1000)
    with pytest.raises(UserError, match="pickle exhausted"):
        read(legacy_file(b"N" * 1000))
