"""How one view's targets become bytes: features in 8, 16 or 32 bits a number, code ids in ceil(log2 K) bits each.

`shrink` also runs inside the compiled step of the extract stage, so that no more leaves the device than is stored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from beitv2_jax.choices import FEATURE_DTYPES

FEATURES, SCALES, CODE_IDS, PACKED_CODE_IDS = "teacher_features", "teacher_scales", "code_ids", "packed_code_ids"
_INT8_MAX = 127.0
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class FeatureEncoding:
    """Store teacher features 'n t' of a view in one of `FEATURE_DTYPES`.

    int8 keeps of every token v its scale s = max|v| and q = round(127 sign(v) sqrt(|v| / s)), which is read as
    v = s q |q| / 127^2; a token of zeros stays zeros. The root gives small numbers small steps, so that a few channels
    far above the rest, which transformers have, do not cost the others their precision: with even steps the cosine
    falls below 0.9995 where one channel is 14 times the root mean square, with these it never does. The scale is
    float32, 4 bytes a token: a float16 one would save 0.4 % and could overflow.
    """

    dtype: str
    num_tokens: int
    width: int

    def __post_init__(self):
        if self.dtype not in FEATURE_DTYPES:
            raise ValueError(f"features are stored as one of {', '.join(FEATURE_DTYPES)}, not as {self.dtype!r}")

    target = FEATURES

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the arrays of one record. bfloat16 is stored as its 16 bits, unsigned."""
        shape = (self.num_tokens, self.width)
        if self.dtype == "int8":
            return {FEATURES: (shape, "int8"), SCALES: ((self.num_tokens,), "float32")}
        return {FEATURES: (shape, "uint16" if self.dtype == "bfloat16" else self.dtype)}

    def shrink(self, features, xp=np) -> dict[str, Any]:
        """Return the arrays that encode `features` 'b n t'; `xp` is numpy, or jax.numpy inside a compiled step."""
        features = xp.asarray(features, np.float32)
        if self.dtype != "int8":
            return {FEATURES: features.astype(_BFLOAT16 if self.dtype == "bfloat16" else self.dtype)}
        scales = xp.max(xp.abs(features), axis=-1)
        usable = (scales >= np.finfo(np.float32).tiny) & xp.isfinite(scales)
        scales = xp.where(usable | ~xp.isfinite(scales), scales, xp.float32(0))  # `pack` refuses what is not finite
        shares = xp.where(usable[..., None], features / xp.where(usable, scales, xp.float32(1))[..., None], 0)
        steps = xp.rint(_INT8_MAX * xp.sign(shares) * xp.sqrt(xp.abs(shares)))
        return {FEATURES: steps.astype(np.int8), SCALES: scales}

    def pack(self, shrunk: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of `fields`, 'b ...', of what `shrink` returned.

        Raises:
          ValueError: a value that is not finite, or that the stored type cannot hold.
        """
        packed = {name: np.asarray(array) for name, array in shrunk.items()}
        telling = packed[SCALES if self.dtype == "int8" else FEATURES]
        if not np.isfinite(telling).all():
            raise ValueError(f"features that are not finite as {self.dtype}")
        if self.dtype == "bfloat16":
            packed[FEATURES] = packed[FEATURES].view(np.uint16)
        return packed

    def unpack(self, record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what a batch carries of one record: the stored numbers, to be decoded on the device."""
        if self.dtype == "bfloat16":
            return {FEATURES: record[FEATURES].view(_BFLOAT16)}
        return dict(record)

    def decode(self, entries: Mapping[str, Any]) -> Any:
        """Return the float32 features of what `unpack` or `shrink` returned."""
        return decode_features(entries)


def decode_features(entries: Mapping[str, Any]) -> Any:
    """Return the float32 teacher features '... n t' of a batch, as NumPy or jax arrays as they came."""
    features = entries[FEATURES].astype(np.float32)
    if SCALES not in entries:
        return features
    return features * abs(features) * (entries[SCALES] * np.float32(1 / _INT8_MAX**2))[..., None]


@dataclasses.dataclass(frozen=True)
class CodeEncoding:
    """Store the code ids 'n' of a view in ceil(log2 codebook_size) bits each: 319 bytes for 196 ids of 8192 codes.

    The ids follow each other, lowest bit first, and fill bytes from the lowest bit; the last byte is filled up
    with zeros.
    """

    codebook_size: int
    num_tokens: int

    target = CODE_IDS

    @property
    def bits(self) -> int:
        """Bits of one id; 1 for a single code, so that a record is never empty."""
        return max(1, (self.codebook_size - 1).bit_length())

    @property
    def dtype(self) -> str:
        """Name of the type of one id in a manifest, 'uint13' for 8192 codes."""
        return f"uint{self.bits}"

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return name -> (shape, dtype) of the arrays of one record."""
        return {PACKED_CODE_IDS: ((-(-self.num_tokens * self.bits // 8),), "uint8")}

    def shrink(self, code_ids, xp=np) -> dict[str, Any]:
        """Return `code_ids` 'b n' as they leave the device."""
        return {CODE_IDS: xp.asarray(code_ids, np.int32)}

    def pack(self, shrunk: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of `fields`, 'b ...', of what `shrink` returned.

        Raises:
          ValueError: an id that is none of the codebook.
        """
        ids = np.asarray(shrunk[CODE_IDS])
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
            raise ValueError(f"code ids {ids.min()}..{ids.max()} outside 0..{self.codebook_size - 1}")
        return {PACKED_CODE_IDS: pack_ids(ids, self.bits)}

    def unpack(self, record: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return what a batch carries of one record: the ids, int32 'n'.

        Raises:
          ValueError: bytes that this encoding does not write.
        """
        ids = unpack_ids(record[PACKED_CODE_IDS], self.bits, self.num_tokens)
        if ids.max(initial=0) >= self.codebook_size:
            raise ValueError(f"code id {ids.max()} outside 0..{self.codebook_size - 1}")
        return {CODE_IDS: ids}

    def decode(self, entries: Mapping[str, Any]) -> Any:
        """Return the int32 ids of what `unpack` or `shrink` returned."""
        return entries[CODE_IDS]


def pack_ids(ids: np.ndarray, bits: int) -> np.ndarray:
    """Return ids '... n' below 2 ** bits as bytes '... ceil(n * bits / 8)', uint8, lowest bits first."""
    spread = (ids[..., None] >> np.arange(bits, dtype=np.int32)) & 1
    return np.packbits(spread.reshape(*ids.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def unpack_ids(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the `count` ids 'n', int32, that `pack_ids` wrote to `packed`, uint8 of one record.

    Raises:
      ValueError: another number of bytes, another type, or bits set after the last id.
    """
    expected = -(-count * bits // 8)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{count} ids of {bits} bits take {expected} bytes, found {packed.dtype} of shape {packed.shape}"
        )
    spread = np.unpackbits(packed, bitorder="little")
    if spread[count * bits :].any():
        raise ValueError(f"bits are set after the last of {count} ids")
    weights = np.int32(1) << np.arange(bits, dtype=np.int32)
    return spread[: count * bits].reshape(count, bits) @ weights


Encoding = FeatureEncoding | CodeEncoding


def zero_entries(encoding: Encoding) -> dict[str, np.ndarray]:
    """Return what a batch carries of a record of zeros."""
    return encoding.unpack({name: np.zeros(*field) for name, field in encoding.fields.items()})
