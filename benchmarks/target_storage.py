"""What a target cache costs: bytes per view and per data set, and the read rate that training from it needs.

    python -m benchmarks.target_storage

prints the table of docs/target-cache.md. Sizes are those of the files, ArrayRecord's and the record's bytes included;
only what every file adds, `FILE_BYTES` at most, is left out.
"""

import math
from collections.abc import Iterator

import numpy as np

from beitv2_jax.data.target_cache.encoding import FEATURE_DTYPES, CodeEncoding, Encoding, FeatureEncoding

NUM_PATCHES = 196  # 224 pixels in patches of 16
TEACHERS = {
    "CLIP B/16 (projected)": 512,
    "CLIP L/14 (projected)": 768,
    "DINO B/16": 768,
    "DINOv2 S/14": 384,
    "DINOv2 B/14": 768,
    "DINOv2 L/14": 1024,
    "DINOv2 g/14": 1536,
    "SigLIP B/16": 768,
    "SigLIP L/16": 1024,
}
"""Teacher -> width of its features, on the tokenizer's grid of 14 x 14 (teachers with patches of 14 are given 196)."""
DATA_SETS = {"ImageNet-1k": (1_281_167, 50_000), "ImageNet-22k": (14_197_122, 0)}
"""Data set -> images in the train and the eval split, of which one centre crop each is stored."""
RATES = (1_000, 10_000, 50_000)
"""Images a second that training might read."""

FILE_BYTES = 131_072
"""Largest number of bytes that a file of any length adds: its end fills up two blocks."""
_RECORD_BYTES = 58
"""ArrayRecord's own bytes for a record that is a group of its own (measured; see the test)."""
_FIELD_BYTES = 16
"""Bytes of tf.train.Example around the name and the values of a field: tags and lengths (measured)."""
_BLOCK_BYTES = 65_536
"""ArrayRecord stores large records in blocks, each with a header."""
_BLOCK_HEADER_BYTES = 24


def record_bytes(encoding: Encoding) -> int:
    """Return the bytes of one view in a file."""
    payload = sum(
        math.prod(shape) * np.dtype(dtype).itemsize + len(name) + _FIELD_BYTES
        for name, (shape, dtype) in encoding.fields.items()
    )
    return payload + _RECORD_BYTES + payload * _BLOCK_HEADER_BYTES // _BLOCK_BYTES


def encodings() -> Iterator[tuple[str, str, Encoding]]:
    """Yield (who says it, as what it is stored, how) for code ids and for the features of every teacher."""
    for codebook_size in (8192, 16384):
        encoding = CodeEncoding(codebook_size, NUM_PATCHES)
        yield f"code ids, K = {codebook_size}", f"{encoding.bits} bit", encoding
    for teacher, width in TEACHERS.items():
        for dtype in FEATURE_DTYPES:
            yield teacher, dtype, FeatureEncoding(dtype, NUM_PATCHES, width)


def table() -> str:
    """Return the table as Markdown: sizes in decimal units, the total for one view of each image."""
    head = ["targets", "stored as", "bytes a view", *(f"{name}, a view" for name in DATA_SETS)]
    head += [f"MB/s at {rate:,} images/s" for rate in RATES]
    lines = [head, ["---"] * len(head)]
    for targets, stored, encoding in encodings():
        size = record_bytes(encoding)
        totals = [_decimal(size * sum(counts)) for counts in DATA_SETS.values()]
        lines.append([targets, stored, f"{size:,}", *totals, *(_megabytes(size * rate / 1e6) for rate in RATES)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _megabytes(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def _decimal(size: float) -> str:
    unit, name = next((unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size >= unit)
    return f"{size / unit:.3g} {name}"


if __name__ == "__main__":
    print(table())
