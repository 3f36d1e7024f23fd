"""Target cache: what is written is read, TFDS opens it, and the manifest guards it against every other run."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from target_caches import CODE_MANIFEST, FEATURE_MANIFEST, fill

from beitv2_jax.data.target_cache import reader as reader_module
from beitv2_jax.data.target_cache.encoding import FEATURE_DTYPES, FEATURES, PACKED_CODE_IDS
from beitv2_jax.data.target_cache.leases import Leases
from beitv2_jax.data.target_cache.manifest import encoding_of, manifest_fields, read_manifest
from beitv2_jax.data.target_cache.reader import TargetReader, view_split
from beitv2_jax.data.target_cache.writer import TargetCache
from beitv2_jax.errors import UserError


def features(example_id, view):
    return np.random.default_rng([example_id, view]).normal(size=(21, 5)).astype(np.float32)


def ids(example_id, view):
    return np.random.default_rng([example_id, view]).integers(0, 13, 21)


@pytest.fixture(scope="module")
def feature_cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("features") / "views"
    fill(directory, FEATURE_MANIFEST, features)
    return directory


@pytest.fixture(scope="module")
def code_cache(tmp_path_factory):
    directory = tmp_path_factory.mktemp("codes") / "views"
    fill(directory, CODE_MANIFEST, ids)
    return directory


@pytest.mark.parametrize("dtype", FEATURE_DTYPES)
def test_written_and_read_are_equal_up_to_the_encoding(tmp_path, dtype):
    manifest = {**FEATURE_MANIFEST, "dtype": dtype}
    reader = fill(tmp_path / "views", manifest, features)
    encoding = encoding_of(manifest)
    assert (len(reader), reader.num_views, reader.feature) == (23, 3, FEATURES)
    for example_id in (22, 0, 7, 6):
        for view in (2, 0, 1):
            shrunk = encoding.shrink(features(example_id, view)[None])
            found = reader[example_id, view]
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, encoding.decode(shrunk)[0])
            entries = reader.entries(np.int64(example_id), view)
            assert {name: array.dtype for name, array in entries.items()} == {k: v.dtype for k, v in shrunk.items()}
    for example_id, view in ((0, -1), (0, 3), (23, 0), (-1, 0)):
        with pytest.raises(IndexError):
            reader[example_id, view]


def test_code_ids_are_read_as_written(code_cache):
    reader = TargetReader(code_cache, "train")
    for example_id in range(23):
        for view in range(3):
            np.testing.assert_array_equal(reader[example_id, view], ids(example_id, view))
            assert reader.entries(example_id, view)["code_ids"].dtype == np.int32


def test_tfds_opens_a_split_for_each_view_without_tensorflow(feature_cache, code_cache):
    for directory, field, shape in ((feature_cache, FEATURES, (21, 5)), (code_cache, PACKED_CODE_IDS, (11,))):
        builder = tfds.builder_from_directory(directory)
        assert list(builder.info.splits) == ["train_v0", "train_v1", "train_v2"]
        for name, split in builder.info.splits.items():
            records = builder.as_data_source(name)
            assert split.num_examples == len(records) == 23 and split.shard_lengths == [7, 7, 7, 2]
            assert split.num_bytes > 23 * np.prod(shape) and records[19][field].shape == shape
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("split", ["train[:50%]", "train[50%:]", "train[:-1]", "train[3:9]+train[11:]", "test"])
def test_slices_of_a_source_have_splits_that_tfds_can_name(tmp_path, split):
    reader = fill(tmp_path / "views", {**CODE_MANIFEST, "split": split, "num_examples": 3}, ids)
    np.testing.assert_array_equal(reader[2, 1], ids(2, 1))
    names = list(tfds.builder_from_directory(tmp_path / "views").info.splits)
    assert names == [view_split(split, view) for view in range(3)]
    with pytest.raises(UserError, match=r"split = .*, this run has 'train\[7:\]'"):
        TargetReader(tmp_path / "views", "train[7:]")


def test_reading_one_view_opens_no_other(tmp_path):
    fill(tmp_path / "views", CODE_MANIFEST, ids)
    reader = TargetReader(tmp_path / "views", "train")
    for path in (tmp_path / "views").glob("*_v1*"):
        path.unlink()
    for view in (0, 2):
        np.testing.assert_array_equal(reader[5, view], ids(5, view))
    with pytest.raises(UserError, match="view 1 of example 5 cannot be read"):
        reader[5, 1]
    entries, fault = reader.readable(5, 1)
    assert "cache-train_v1" in fault and "record 5" in fault and "No such file" in fault
    assert not entries["code_ids"].any() and entries["code_ids"].shape == (21,)
    assert "4 of 12 shards are missing, such as cache-train_v1" in refused(tmp_path / "views")


def test_views_are_closed_again(feature_cache, monkeypatch):
    reader = TargetReader(feature_cache, "train")
    opened = []
    real = reader_module.array_files.ranges_of_split
    monkeypatch.setattr(
        reader_module.array_files, "ranges_of_split", lambda builder, name: opened.append(name) or real(builder, name)
    )
    for view in (0, 0, 1, 0, 1, 1, 0, 2, 2, 1, 1):
        reader[3, view]
    assert opened == ["train_v0", "train_v1", "train_v2", "train_v1"]
    assert reader._views.cache_info().maxsize == reader_module.OPEN_VIEWS


def test_reader_goes_to_other_processes(feature_cache):
    copy = pickle.loads(pickle.dumps(TargetReader(feature_cache, "train")))
    np.testing.assert_array_equal(copy[4, 2], TargetReader(feature_cache, "train")[4, 2])
    assert len(pickle.dumps(copy)) < 1000


def test_a_finished_cache_is_left_alone(feature_cache):
    before = {path: path.stat().st_mtime_ns for path in feature_cache.rglob("*")}
    for num_views in (1, 3):
        manifest = {**FEATURE_MANIFEST, "num_views": num_views}
        cache = TargetCache(feature_cache, name="cache", manifest=manifest, shard_examples=7)
        assert cache.finished and not cache.views
    assert {path: path.stat().st_mtime_ns for path in feature_cache.rglob("*")} == before


def other(value):
    """Return another value of the same type."""
    return value + "x" if isinstance(value, str) else [*value[::-1], 1] if isinstance(value, list) else value + 1


@pytest.mark.parametrize(
    ("manifest", "field"),
    [
        (manifest, field)
        for manifest in (FEATURE_MANIFEST, CODE_MANIFEST)
        for field in manifest_fields(manifest["part"], manifest["target"])
    ],
    ids=lambda value: value if isinstance(value, str) else value["target"],
)
def test_every_field_of_the_manifest_is_compared_and_named(feature_cache, code_cache, manifest, field):
    directory = feature_cache if manifest is FEATURE_MANIFEST else code_cache
    reader = TargetReader(directory, "train")
    reader.check(manifest)
    reader.check({**manifest, "num_views": 2})
    value = other(reader.manifest[field])
    with pytest.raises(UserError, match=rf"made with {field} = .*, this run has") as caught:
        reader.check({**manifest, field: value})
    assert repr(value) in str(caught.value) and repr(reader.manifest[field]) in caught.value.instead
    if field not in ("schema_version", "unreadable", "num_views", "target", "dtype"):
        with pytest.raises(UserError, match=rf"made with {field} = "):
            TargetCache(directory, name="cache", manifest={**manifest, field: value}, shard_examples=7)


def test_centre_parts_have_a_crop_fraction_instead_of_drawn_views(tmp_path):
    manifest = {k: v for k, v in CODE_MANIFEST.items() if k not in ("seed", "min_scale", "color_jitter")}
    manifest |= {"part": "centre", "num_views": 1, "crop_fraction": 0.875}
    reader = fill(tmp_path / "centre", manifest, ids)
    assert set(reader.manifest) == set(manifest_fields("centre", "code_ids"))


@pytest.fixture
def damaged(tmp_path, feature_cache):
    shutil.copytree(feature_cache, tmp_path / "views")
    return tmp_path / "views"


def refused(directory):
    with pytest.raises(UserError) as caught:
        TargetReader(directory, "train")
    assert all((caught.value.happened, caught.value.meant, caught.value.instead))
    return str(caught.value)


@pytest.mark.parametrize("field", manifest_fields("views", FEATURES))
def test_a_manifest_without_a_field_or_with_another_type_is_refused_by_name(damaged, field):
    manifest = json.loads((damaged / "manifest.json").read_text())
    without = {name: value for name, value in manifest.items() if name != field}
    for changed in (without, *({**manifest, field: value} for value in (None, {"a": 1}, [], True, [1.5, None]))):
        (damaged / "manifest.json").write_text(json.dumps(changed))
        assert field in refused(damaged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_examples", 0), ("num_views", -1), ("grid", [7]), ("grid", [0, 3]), ("dtype", "int9"), ("part", "both")),
        *(("schema_version", 1), ("schema_version", "2"), ("num_examples", 24), ("num_views", 4), ("teacher_width", 6)),
    ],
)
def test_a_manifest_with_an_impossible_value_is_refused(damaged, field, value):
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps({**manifest, field: value}))
    assert any(word in refused(damaged) for word in (field, "disagree"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_manifest_is_never_a_traceback(feature_cache, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("fuzz")
    raw = bytearray((feature_cache / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["cut", "byte", "insert", "remove"]))
        if kind == "cut" and place:
            del raw[place:]
        elif kind == "byte":
            raw[place] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[place:place] = data.draw(st.binary(max_size=5))
        elif len(raw) > 1:
            del raw[place]
    (directory / "manifest.json").write_bytes(raw)
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        assert all((error.happened, error.meant, error.instead))
        return
    encoding_of(manifest)  # what is accepted can be used


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(value=json_values, fields=st.dictionaries(st.sampled_from(list(FEATURE_MANIFEST)), json_values, max_size=3))
def test_a_manifest_of_any_json_is_never_a_traceback(tmp_path_factory, value, fields):
    directory = tmp_path_factory.mktemp("fuzz")
    for content in (value, {"schema_version": 2, "unreadable": 0, **FEATURE_MANIFEST, **fields}):
        (directory / "manifest.json").write_text(json.dumps(content))
        try:
            encoding_of(read_manifest(directory))
        except UserError as error:
            assert all((error.happened, error.meant, error.instead))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'"text"'])
def test_a_manifest_that_is_no_manifest_is_refused(damaged, content):
    (damaged / "manifest.json").write_bytes(content)
    assert "manifest.json cannot be used" in refused(damaged)


def test_a_missing_cache_names_the_stage_to_run(tmp_path):
    assert "no targets in" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{", '{"a": 3}', None])
def test_damaged_tfds_metadata_are_refused(damaged, name, content):
    if content is None:
        (damaged / name).unlink()
    else:
        (damaged / name).write_text(content)
    refused(damaged)


def test_metadata_of_another_cache_are_refused(damaged, code_cache):
    shutil.copy(code_cache / "features.json", damaged / "features.json")
    assert "disagree" in refused(damaged)


@pytest.mark.parametrize("kept", [0, 100, 70_000])
def test_a_truncated_shard_is_an_error_that_names_the_example(damaged, kept):
    path = next(damaged.glob("*train_v0*00000-of*"))
    path.write_bytes(path.read_bytes()[:kept])
    reader = TargetReader(damaged, "train")
    with pytest.raises(UserError, match="view 0 of example 3 cannot be read"):
        for _ in range(2):
            reader[3, 0]


UNREADABLE = [{"split": "train", "example_id": i, "where": f"{i}.jpg", "cause": "empty"} for i in (2, 20)]


def test_unreadable_examples_are_known_and_counted(tmp_path):
    reader = fill(tmp_path / "views", FEATURE_MANIFEST, features, unreadable=UNREADABLE)
    assert reader.unreadable == {2, 20} and reader.manifest["unreadable"] == 2
    lines = (tmp_path / "views" / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == UNREADABLE
    for damage in (lines[:1], ["{", lines[0]], ["[]", lines[0]], [lines[0], lines[0]]):
        (tmp_path / "views" / "bad_records.jsonl").write_text("\n".join(damage))
        assert "bad_records.jsonl" in refused(tmp_path / "views")


@settings(max_examples=12, deadline=None)
@given(
    num_examples=st.integers(1, 40),
    num_views=st.integers(1, 3),
    shard_examples=st.integers(1, 50),
    codebook_size=st.integers(1, 70_000),
)
def test_caches_of_any_size_hold_what_was_written(
    tmp_path_factory, num_examples, num_views, shard_examples, codebook_size
):
    manifest = {**CODE_MANIFEST, "num_examples": num_examples, "num_views": num_views, "codebook_size": codebook_size}
    manifest["dtype"] = encoding_of(manifest).dtype

    def drawn(example_id, view):
        return np.random.default_rng([example_id, view]).integers(0, codebook_size, 21)

    reader = fill(tmp_path_factory.mktemp("cache") / "views", manifest, drawn, shard_examples=shard_examples)
    assert len(reader) == num_examples
    for view in range(num_views):
        for example_id in range(num_examples):
            np.testing.assert_array_equal(reader[example_id, view], drawn(example_id, view))


def test_a_plan_binds_once_a_shard_is_done(tmp_path):
    arguments = {"name": "codes", "shard_examples": 7}
    other = {**CODE_MANIFEST, "tokenizer_hash": "another"}
    TargetCache(tmp_path / "views", manifest=other, **arguments)
    cache = TargetCache(tmp_path / "views", manifest=CODE_MANIFEST, **arguments)
    cache.done_path(0).touch()
    with pytest.raises(UserError, match=r"made with tokenizer_hash = .*, this run has 'another'"):
        TargetCache(tmp_path / "views", manifest=other, **arguments)
    cache.done_path(0).unlink()
    TargetCache(tmp_path / "views", manifest=other, **arguments)


def test_the_plan_of_a_writer_binds_others_as_long_as_it_lives(tmp_path):
    def begin(seed):
        manifest = {**CODE_MANIFEST, "seed": seed}
        return TargetCache(tmp_path / "views", name="cache", manifest=manifest, shard_examples=7)

    killed = begin(11)
    with Leases(killed.work) as leases:
        assert leases.take("0")
        killed.open_shard(0)
        lease = json.loads((killed.work / "0.lease").read_text())
        with pytest.raises(UserError, match="seed = 11, this run has 12"):
            begin(12)
    ended = subprocess.Popen(["true"])
    ended.wait()
    (killed.work / "0.lease").write_text(json.dumps({**lease, "pid": ended.pid}))
    begin(12)
    with pytest.raises(UserError, match="seed = 12, this run has 11"), Leases(killed.work) as leases:
        assert leases.take("0")
        begin(11)
    reader = fill(tmp_path / "views", {**CODE_MANIFEST, "seed": 12}, ids)
    np.testing.assert_array_equal(reader[22, 2], ids(22, 2))
    with pytest.raises(UserError, match="seed = 12, this run has 11"):
        begin(11)
