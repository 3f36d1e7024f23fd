"""The storage table against files as the stages write them."""

import numpy as np
import pytest
from paths import ROOT
from target_caches import CODE_MANIFEST, FEATURE_MANIFEST

from beitv2_jax.data.target_cache.encoding import CodeEncoding, FeatureEncoding
from beitv2_jax.data.target_cache.writer import TargetCache
from benchmarks import target_storage

TOLERANCE = 0.005
"""Largest relative difference between the table and the files, whose ends are counted apart."""


def file_bytes(directory, encoding, count) -> int:
    """Return the size of a file with `count` views, written by the stages' writer."""
    if isinstance(encoding, CodeEncoding):
        manifest = {**CODE_MANIFEST, "dtype": encoding.dtype, "codebook_size": encoding.codebook_size}
        targets = np.ones((count, encoding.num_tokens), np.int32)
    else:
        manifest = {**FEATURE_MANIFEST, "dtype": encoding.dtype, "teacher_width": encoding.width}
        targets = np.ones((count, encoding.num_tokens, encoding.width), np.float32)
    manifest |= {"num_examples": count, "num_views": 1, "grid": [1, encoding.num_tokens]}
    cache = TargetCache(directory, name="cache", manifest=manifest, shard_examples=count)
    writer = cache.open_shard(0)
    writer.write(0, encoding.pack(encoding.shrink(targets)))
    writer.close([])
    return cache.shard_path(0, 0).stat().st_size


@pytest.mark.parametrize(
    ("encoding", "count"),
    [
        (CodeEncoding(8192, 196), 20_000),
        (CodeEncoding(16384, 196), 3_000),
        (FeatureEncoding("int8", 196, 512), 150),
        (FeatureEncoding("int8", 196, 1536), 60),
        (FeatureEncoding("bfloat16", 196, 384), 70),
        (FeatureEncoding("float16", 196, 768), 50),
        (FeatureEncoding("float32", 196, 512), 30),
    ],
    ids=lambda value: "" if isinstance(value, int) else f"{value.dtype}",
)
def test_the_bytes_of_a_view_are_those_of_files(tmp_path, encoding, count):
    size, expected = file_bytes(tmp_path / "views", encoding, count), count * target_storage.record_bytes(encoding)
    assert (1 - TOLERANCE) * expected <= size <= (1 + TOLERANCE) * expected + target_storage.FILE_BYTES
    assert target_storage.record_bytes(encoding) == pytest.approx(
        (size - target_storage.FILE_BYTES / 2) / count, rel=0.025
    )


def test_the_table_has_every_teacher_and_encoding():
    lines = [line.strip("| ").split(" | ") for line in target_storage.table().splitlines()]
    assert len({len(line) for line in lines}) == 1
    rows = {(line[0], line[1]): line[2:] for line in lines[2:]}
    assert len(rows) == 2 + 4 * len(target_storage.TEACHERS)
    size, one, many, *rates = rows["CLIP B/16 (projected)", "int8"]
    assert 196 * 516 < int(size.replace(",", "")) < 1.002 * 196 * 516
    assert (one, many) == ("135 GB", "1.44 TB") and rates == ["101", "1,013", "5,065"]
    assert 319 < int(rows["code ids, K = 8192", "13 bit"][0]) < 420


def test_the_documentation_holds_this_table():

    assert target_storage.table() in (ROOT / "docs" / "target-cache.md").read_text()
