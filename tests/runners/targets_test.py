"""Workers that fill a target cache together: the same bytes whatever their number, their order and their deaths."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import cache_workers
import numpy as np
import pytest
from cache_workers import MANIFEST, SHARD_EXAMPLES, UNREADABLE, features, rows, work
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from beitv2_jax.data.target_cache import leases
from beitv2_jax.data.target_cache.manifest import encoding_of
from beitv2_jax.data.target_cache.reader import TargetReader
from beitv2_jax.data.target_cache.writer import ShardLost, ShardWriter, TargetCache
from beitv2_jax.errors import UserError
from beitv2_jax.runners import targets
from beitv2_jax.runtime import heartbeat


def contents(directory) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones included."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in pathlib.Path(directory).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed") / "views"
    work(str(directory))
    return contents(directory)


class Workers:
    """The process that forks workers."""

    def __init__(self):
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, cache_workers.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self, **arguments) -> int:
        """Start a worker and return its process id."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def workers():
    started = Workers()
    yield started
    started.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(pids) -> None:
    deadline = time.monotonic() + 60
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker does not come to an end"
        time.sleep(0.01)


def test_the_cache_holds_what_the_network_says(tmp_path):
    work(str(tmp_path / "views"))
    reader = TargetReader(tmp_path / "views", "train")
    encoding = encoding_of(MANIFEST)
    assert len(reader) == 83 and reader.unreadable == set(UNREADABLE) and reader.manifest["unreadable"] == 2
    for example_id in range(83):
        for view, row in enumerate(rows(example_id, range(3))):
            expected = features(row["images"][None])
            if example_id in UNREADABLE:
                expected = np.zeros_like(expected)
            stored = encoding.decode(encoding.shrink(expected))[0]
            np.testing.assert_array_equal(reader[example_id, view], stored)
    lines = [json.loads(line) for line in (tmp_path / "views" / "bad_records.jsonl").read_text().splitlines()]
    assert lines == [
        {"split": "train", "example_id": i, "where": "drawing", "cause": "no such picture"} for i in UNREADABLE
    ]


@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes(workers, undisturbed, tmp_path, count):
    wait_for([workers.start(directory=str(tmp_path / "views"), seconds=0.003) for _ in range(count)])
    assert contents(tmp_path / "views") == undisturbed


@pytest.mark.parametrize("seed", range(int(os.environ.get("TARGET_CACHE_KILL_SEEDS", "4"))))
def test_killed_at_random_moments_and_run_again_it_is_byte_identical(
    workers, undisturbed, tmp_path, seed, record_property
):
    draw = random.Random(seed)
    kills = 0
    directory = tmp_path / "views"
    for _ in range(5):
        pids = [workers.start(directory=str(directory), seconds=0.04) for _ in range(draw.choice((1, 2, 3)))]
        for pid in pids:
            time.sleep(draw.uniform(0.0, 0.35))
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
                kills += 1
        wait_for(pids)
    wait_for([workers.start(directory=str(directory)) for _ in range(2)])
    record_property("kills", kills)
    assert kills >= 3
    assert contents(directory) == undisturbed


def test_the_survivor_takes_over_from_a_dead_worker_at_once(workers, undisturbed, tmp_path):
    directory = tmp_path / "views"
    victim, survivor = (workers.start(directory=str(directory), seconds=0.03) for _ in range(2))
    time.sleep(0.3)
    os.kill(victim, signal.SIGKILL)
    wait_for([survivor])
    assert contents(directory) == undisturbed


def test_a_cache_grows_to_more_views_and_equals_the_one_made_at_once(undisturbed, tmp_path):
    directory = tmp_path / "views"
    work(str(directory), num_views=1)
    before = contents(directory)
    assert len(TargetReader(directory, "train").manifest) and TargetReader(directory, "train").num_views == 1
    times = {path.name: path.stat().st_mtime_ns for path in directory.glob("*_v0.*")}
    work(str(directory), num_views=3)
    assert {path.name: path.stat().st_mtime_ns for path in directory.glob("*_v0.*")} == times, "computed again"
    assert contents(directory) == undisturbed
    assert {name for name in before if before[name] != undisturbed[name]} == {"manifest.json", "dataset_info.json"}


def test_growing_killed_and_run_again_is_byte_identical(workers, undisturbed, tmp_path):
    directory = tmp_path / "views"
    work(str(directory), num_views=2)
    for delay in (0.05, 0.15, 0.25):
        pid = workers.start(directory=str(directory), seconds=0.02)
        time.sleep(delay)
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
        wait_for([pid])
        assert TargetReader(directory, "train").num_views in (2, 3)
    work(str(directory))
    assert contents(directory) == undisturbed


class Killed(BaseException):
    """Stands for a kill at one exact place."""


@pytest.mark.parametrize("place", range(0, 14))
def test_killed_at_each_step_of_the_finish(undisturbed, tmp_path, monkeypatch, place):
    from beitv2_jax.data.target_cache import writer

    real, calls = writer.os.replace, []

    def replace(source, target):
        if len(calls) == place:
            raise Killed
        calls.append(target)
        real(source, target)

    monkeypatch.setattr(writer.os, "replace", replace)
    try:
        work(str(tmp_path / "views"))
    except Killed:
        monkeypatch.undo()
        work(str(tmp_path / "views"))
    assert contents(tmp_path / "views") == undisturbed


def test_killed_while_clearing_up_leaves_nothing_for_long(undisturbed, tmp_path, monkeypatch):
    for name in ("rename", "rmtree"):
        directory = tmp_path / name / "views"
        module = TargetCache.__init__.__globals__["os" if name == "rename" else "shutil"]
        real = getattr(module, name)

        def cut(path, *args, real=real, **kwargs):
            if pathlib.Path(path).name == ".writing" or ".cleared" in pathlib.Path(path).name:
                raise Killed
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, cut)
        with pytest.raises(Killed):
            work(str(directory))
        monkeypatch.undo()
        assert len(TargetReader(directory, "train")) == 83, "published, though not cleared up"
        work(str(directory))
        assert contents(directory) == undisturbed


def test_a_worker_that_lost_its_shard_changes_nothing(tmp_path):
    cache = TargetCache(tmp_path / "views", name="cache", manifest=MANIFEST, shard_examples=SHARD_EXAMPLES)
    slow = cache.open_shard(0)
    cache.open_shard(0).discard()
    with pytest.raises(ShardLost):
        slow.close([])


def test_an_incomplete_shard_is_never_published(tmp_path):
    cache = TargetCache(tmp_path / "views", name="cache", manifest=MANIFEST, shard_examples=SHARD_EXAMPLES)
    writer = cache.open_shard(0)
    encoding = encoding_of(MANIFEST)
    for view in cache.views:
        packed = encoding.pack(encoding.shrink(np.ones((SHARD_EXAMPLES - (view == 2), 21, 5))))
        writer.write(view, packed)
    with pytest.raises(OSError, match="does not hold the 11 records"):
        writer.close([])
    assert not cache.is_done(0) and not list((tmp_path / "views").glob("*array_record*"))


def test_a_file_that_reads_back_otherwise_is_never_published(tmp_path, monkeypatch):
    from beitv2_jax.data.target_cache import writer

    cache = TargetCache(tmp_path / "views", name="cache", manifest=MANIFEST, shard_examples=SHARD_EXAMPLES)
    real = writer._reread
    monkeypatch.setattr(writer, "_reread", lambda path: (real(path)[0], real(path)[1] ^ ("v1" in path.name)))
    writer, encoding = cache.open_shard(0), encoding_of(MANIFEST)
    for view in cache.views:
        writer.write(view, encoding.pack(encoding.shrink(np.ones((SHARD_EXAMPLES, 21, 5)))))
    with pytest.raises(OSError, match="does not hold the 11 records"):
        writer.close([])
    assert not cache.is_done(0) and not list((tmp_path / "views").glob("*array_record*"))


def test_a_full_disk_is_named_and_the_finished_shards_stay(undisturbed, tmp_path):
    directory, limits = tmp_path / "views", resource.getrlimit(resource.RLIMIT_FSIZE)
    write = ShardWriter.write

    def run_full(writer, view, packed):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if writer._shard == 2 else limits[0], limits[1]))
        write(writer, view, packed)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught, targets.explained(str(tmp_path)):
        patch.setattr(ShardWriter, "write", run_full)
        try:
            work(str(directory))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in caught.value.happened and "File too large" in caught.value.happened
    assert "GB free" in caught.value.happened and "Free space" in caught.value.instead
    assert sorted(path.name for path in directory.glob(".writing/*.done")) == ["00000.done", "00001.done"]
    assert not list(directory.glob(".writing/*.tmp"))
    work(str(directory))
    assert contents(directory) == undisturbed


def test_a_damaged_mark_of_a_finished_shard_costs_that_shard(undisturbed, tmp_path):
    directory = tmp_path / "views"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"00002.done was damaged"):
        patch.setattr(
            TargetCache, "_check_count", lambda cache, *_: (cache.done_path(2).write_text(""), cache._done(2))
        )
        work(str(directory))
    work(str(directory))
    assert contents(directory) == undisturbed


def test_a_shard_that_went_away_is_found_at_the_end_and_written_again(undisturbed, tmp_path, monkeypatch):
    directory = tmp_path / "views"
    finish = TargetCache.finish

    def lose_a_file(cache):
        next(directory.glob("*v1*00003-of*")).unlink()
        finish(cache)

    monkeypatch.setattr(TargetCache, "finish", lose_a_file)
    with pytest.raises(UserError, match="holds 0 of 11 records"):
        work(str(directory))
    monkeypatch.undo()
    assert not (directory / "manifest.json").exists()
    work(str(directory))
    assert contents(directory) == undisturbed


def test_too_many_unreadable_images_stop_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_workers, "UNREADABLE", tuple(range(0, 83, 7)))
    with pytest.raises(
        UserError, match=r"unreadable(?s:.*)for example drawing: no such picture(?s:.*)max_bad_fraction"
    ):
        work(str(tmp_path / "views"))
    assert not (tmp_path / "views" / "manifest.json").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path, monkeypatch, value):
    def broken(images):
        result = features(images)
        result[:, 3, 2] = value
        return result

    monkeypatch.setattr(cache_workers, "features", broken)
    with pytest.raises(UserError, match=r"not finite as int8, among the examples 0 to 3"):
        work(str(tmp_path / "views"))
    assert not list((tmp_path / "views").glob("*array_record*"))


@pytest.mark.parametrize(("key", "value"), [("seed", 12), ("num_views", 2), ("teacher_hash", "other")])
def test_two_configurations_do_not_write_one_cache(tmp_path, key, value):
    begun = TargetCache(tmp_path / "views", name="cache", manifest=MANIFEST, shard_examples=11)
    begun.done_path(0).touch()
    with pytest.raises(UserError, match=f"{key} = "):
        TargetCache(tmp_path / "views", name="cache", manifest={**MANIFEST, key: value}, shard_examples=11)
    with pytest.raises(UserError, match="shard_examples = 11, this run has 12"):
        TargetCache(tmp_path / "views", name="cache", manifest=MANIFEST, shard_examples=12)


def test_a_lease_goes_to_one_and_comes_back(tmp_path):
    with leases.Leases(tmp_path) as first, leases.Leases(tmp_path) as second:
        assert first.take("a") and not second.take("a") and not first.take("a")
        assert second.take("b")
        first.release("a")
        assert second.take("a") and not first.take("a")
    assert list(tmp_path.iterdir()) == []


def test_a_lease_without_a_heartbeat_is_free_after_a_while(tmp_path):
    beating = leases.Leases(tmp_path, heartbeat_seconds=0.02, stale_seconds=1.0)
    silent = leases.Leases(tmp_path, heartbeat_seconds=60, stale_seconds=1.0)
    with beating, silent, leases.Leases(tmp_path, stale_seconds=1.0) as other:
        assert beating.take("a") and silent.take("b")
        for _ in range(5):
            time.sleep(0.4)
            assert not other.take("a")
            if other.take("b"):
                break
        else:
            pytest.fail("a silent lease was never given up")
        silent.release("b")  # no longer its own
        assert silent.take("c")
        for _ in range(4):
            time.sleep(0.4)
            assert not silent.take("c"), "took its own lease for a dead one"
        assert not beating.take("b")


@pytest.mark.parametrize("content", [b"", b'{"machine": "here", "pi', b"[]"])
def test_a_lease_whose_worker_died_while_writing_it_is_free_after_two_beats(tmp_path, content):
    (tmp_path / "a.lease").write_bytes(content)
    with leases.Leases(tmp_path, heartbeat_seconds=0.1, stale_seconds=60) as worker:
        assert not worker.take("a"), "it may be being written at this moment"
        time.sleep(0.3)
        assert worker.take("a")


def test_leases_of_other_machines_are_not_called_dead(tmp_path, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    owner = {"machine": heartbeat.machine(), "pid": gone.pid, "token": "x"}
    for content, free in (
        (json.dumps(owner), True),
        (json.dumps({**owner, "machine": "elsewhere"}), False),
        (json.dumps({**owner, "pid": os.getpid()}), False),
        ("", False),
        ("[]", False),
        ('{"machine": ', False),
        (json.dumps({**owner, "pid": "many"}), False),
    ):
        (tmp_path / "a.lease").write_text(content)
        with leases.Leases(tmp_path) as looking:
            assert looking.take("a") == free
        (tmp_path / "a.lease").unlink(missing_ok=True)


@settings(max_examples=25, deadline=None)
@given(num_examples=st.integers(1, 200), shard_examples=st.integers(1, 60))
def test_shards_hold_every_example_once(tmp_path_factory, num_examples, shard_examples):
    manifest = {**MANIFEST, "num_examples": num_examples}
    cache = TargetCache(
        tmp_path_factory.mktemp("s") / "views", name="cache", manifest=manifest, shard_examples=shard_examples
    )
    assert [i for shard in cache.shards for i in shard] == list(range(num_examples))
    assert all(i in cache.shards[cache.shard_of(i)] for i in range(num_examples))
