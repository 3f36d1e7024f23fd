"""Encodings of targets: what is stored is read, how near it is, how small it is, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from beitv2_jax.data.target_cache.encoding import (
    CODE_IDS,
    FEATURE_DTYPES,
    FEATURES,
    PACKED_CODE_IDS,
    SCALES,
    CodeEncoding,
    FeatureEncoding,
    decode_features,
    pack_ids,
    unpack_ids,
)

LEAST_COSINE = {"int8": 0.9995, "bfloat16": 0.99999, "float16": 0.9999999, "float32": 1 - 1e-7}


def through(encoding, targets):
    """Return the targets after storing and reading, one record at a time, and the records."""
    packed = encoding.pack(encoding.shrink(targets))
    assert {name: (array.shape[1:], str(array.dtype)) for name, array in packed.items()} == encoding.fields
    records = [{name: array[row] for name, array in packed.items()} for row in range(len(targets))]
    return np.stack([encoding.decode(encoding.unpack(record)) for record in records]), records


def cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-300)


def heavy_tailed(seed, count, tokens, width):
    """Features with a few channels far above the rest, as transformers have them."""
    rng = np.random.default_rng(seed)
    channels = np.exp(rng.normal(0, 0.7, width))
    channels[: max(1, width // 64)] *= 8
    return (rng.normal(0, 1, (count, tokens, width)) * channels * rng.uniform(0.1, 20, (count, tokens, 1))).astype(
        np.float32
    )


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(21, 512), (7, 192), (3, 768)])
def test_features_keep_their_direction(dtype, tokens, width):
    features = heavy_tailed(3, 5, tokens, width)
    read, _ = through(FeatureEncoding(dtype, tokens, width), features)
    assert read.dtype == np.float32
    assert cosines(read, features).min() >= LEAST_COSINE[dtype]
    if dtype == "float32":
        np.testing.assert_array_equal(read, features)


def half_a_step(features):
    """Return the largest error of each number in int8: half the distance to the neighbouring values, and rounding."""
    largest = np.abs(features).max(axis=-1, keepdims=True).astype(np.float64)
    roots = np.sqrt(np.abs(features) / np.where(largest > 0, largest, 1))
    return largest * ((roots + 0.5 / 127) ** 2 - roots**2) * 1.001


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 23),
    width=st.integers(1, 67),
    exponent=st.integers(-30, 30),
)
def test_int8_is_off_by_half_a_step_at_most(seed, tokens, width, exponent):
    features = np.random.default_rng(seed).normal(0, 1, (2, tokens, width)) * 10.0**exponent
    features = features.astype(np.float32)
    read, records = through(FeatureEncoding("int8", tokens, width), features)
    assert (np.abs(read - features) <= half_a_step(features)).all()
    for record in records:  # the largest number of a token takes the whole range
        assert (np.abs(record[FEATURES].astype(int)).max(axis=-1) == 127).all()


@given(features=hnp.arrays(np.float32, (1, 3, 5), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=200, deadline=None)
def test_int8_takes_whatever_is_finite(features):
    read, _ = through(FeatureEncoding("int8", 3, 5), features)
    assert (np.abs(read - features) <= half_a_step(features) + np.finfo(np.float32).tiny).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 2048),
    share=st.floats(0, 1),
    factor=st.floats(1, 1e6),
)
def test_int8_keeps_the_direction_whatever_channels_stand_out(seed, width, share, factor):
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 1, (1, 7, width)) * np.where(rng.random(width) < share, factor, 1)
    read, _ = through(FeatureEncoding("int8", 7, width), features.astype(np.float32))
    assert cosines(read, features).min() >= LEAST_COSINE["int8"]


def test_tokens_of_zeros_stay_zeros():
    features = heavy_tailed(0, 2, 7, 11)
    features[1, 3] = 0
    features[0, 2] = 1e-40
    read, records = through(FeatureEncoding("int8", 7, 11), features)
    assert not read[1, 3].any() and not read[0, 2].any() and records[1][SCALES][3] == 0
    assert read[1, 2].any()


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(dtype, value):
    features = heavy_tailed(0, 2, 7, 11)
    features[1, 6, 10] = value
    encoding = FeatureEncoding(dtype, 7, 11)
    with pytest.raises(ValueError, match=f"not finite as {dtype}"):
        encoding.pack(encoding.shrink(features))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65536.0), ("bfloat16", 3.4028e38)])
def test_what_overflows_is_refused(dtype, value):
    features = np.full((1, 2, 3), value, np.float32)
    encoding = FeatureEncoding(dtype, 2, 3)
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=f"not finite as {dtype}"):
        encoding.pack(encoding.shrink(features))


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="int8, bfloat16, float16, float32, not as 'int4'"):
        FeatureEncoding("int4", 3, 5)


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_the_device_shrinks_as_the_host_does(dtype):
    features = heavy_tailed(5, 3, 7, 67)
    features[2, 1] = 0
    encoding = FeatureEncoding(dtype, 7, 67)
    host, device = encoding.shrink(features), encoding.shrink(jnp.asarray(features), jnp)
    assert host.keys() == device.keys()
    for name in host:
        assert host[name].dtype == device[name].dtype
        # a root may be rounded otherwise, and so a number that lies between two steps
        off = np.abs(host[name].astype(np.float64) - np.asarray(device[name]).astype(np.float64))
        assert (off <= (dtype == "int8" and name == FEATURES)).all() and (off > 0).mean() < 0.002
    entries = encoding.unpack({name: array[0] for name, array in encoding.pack(device).items()})
    on_device = decode_features({name: jnp.asarray(array) for name, array in entries.items()})
    np.testing.assert_allclose(on_device, encoding.decode(entries), rtol=3e-7)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), codebook_size=st.integers(1, 2**31 - 1), tokens=st.integers(1, 211), count=st.integers(1, 4))
def test_ids_of_any_codebook_are_read_as_written(data, codebook_size, tokens, count):
    seed = data.draw(st.integers(0, 2**32 - 1))
    ids = np.random.default_rng(seed).integers(0, codebook_size, (count, tokens)).astype(np.int32)
    ids[0, 0], ids[-1, -1] = codebook_size - 1, 0
    encoding = CodeEncoding(codebook_size, tokens)
    read, records = through(encoding, ids)
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)
    assert 2 ** (encoding.bits - 1) < codebook_size <= 2**encoding.bits or (codebook_size, encoding.bits) == (1, 1)
    assert len(records[0][PACKED_CODE_IDS]) == -(-tokens * encoding.bits // 8)


@pytest.mark.parametrize(
    ("codebook_size", "bits", "num_bytes"),
    [(8192, 13, 319), (8193, 14, 343), (4096, 12, 294), (1024, 10, 245), (2, 1, 25), (1, 1, 25), (65536, 16, 392)],
)
def test_a_view_of_196_ids_takes_so_many_bytes(codebook_size, bits, num_bytes):
    encoding = CodeEncoding(codebook_size, 196)
    assert (encoding.bits, encoding.dtype) == (bits, f"uint{bits}")
    assert encoding.fields == {PACKED_CODE_IDS: ((num_bytes,), "uint8")}


def test_the_order_of_bits():
    assert pack_ids(np.array([1, 0b100, 0b111]), 3).tolist() == [0b11100001, 0b1]
    assert unpack_ids(np.array([0b11100001, 0b1], np.uint8), 3, 3).tolist() == [1, 4, 7]


@pytest.mark.parametrize("value", [-1, 13, 2**31 - 1])
def test_ids_outside_the_codebook_are_not_stored(value):
    encoding = CodeEncoding(13, 3)
    with pytest.raises(ValueError, match=r"outside 0\.\.12"):
        encoding.pack(encoding.shrink(np.array([[0, value, 12]])))


@settings(max_examples=200, deadline=None)
@given(packed=hnp.arrays(np.uint8, st.integers(0, 20)), codebook_size=st.integers(1, 300), tokens=st.integers(1, 17))
def test_foreign_bytes_are_ids_of_the_codebook_or_an_error(packed, codebook_size, tokens):
    encoding = CodeEncoding(codebook_size, tokens)
    try:
        ids = encoding.unpack({PACKED_CODE_IDS: packed})[CODE_IDS]
    except ValueError as error:
        assert str(error)
        return
    assert ids.shape == (tokens,) and 0 <= ids.min() <= ids.max() < codebook_size
    np.testing.assert_array_equal(pack_ids(ids, encoding.bits), packed)


@pytest.mark.parametrize(
    "packed", [np.zeros(3, np.uint8), np.zeros(5, np.uint8), np.zeros((1, 4), np.uint8), np.zeros(4, np.int8)]
)
def test_truncated_ids_are_an_error(packed):
    with pytest.raises(ValueError, match="7 ids of 4 bits take 4 bytes"):
        unpack_ids(packed, 4, 7)


def test_bits_after_the_last_id_are_an_error():
    with pytest.raises(ValueError, match="after the last of 7"):
        unpack_ids(np.array([0, 0, 0, 0b10000], np.uint8), 4, 7)
