"""Batches: functions of (seed, step) alone, whoever prepares them; resumable at every step, complete."""

import pathlib
import pickle
import subprocess
import sys

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listed_images import ListSource
from target_caches import CODE_MANIFEST, FEATURE_MANIFEST, fill

from beitv2_jax.data import pipeline
from beitv2_jax.data.pipeline import eval_batches, train_iterator
from beitv2_jax.data.sources import LabelledSource
from beitv2_jax.data.transform import TrainTransform
from beitv2_jax.errors import UserError

MASK = {"grid": (5, 7), "num_masked": 13, "min_patches": 3}
CORRUPT = (4, 11)


@pytest.fixture(scope="module")
def source():
    return ListSource(23, corrupt=CORRUPT)


def _transform(**changes):
    return TrainTransform(
        **{"seed": 3, "image_size": 8, "min_scale": 0.2, "color_jitter": 0.4, "mask": MASK, **changes}
    )


def _take(iterator, count):
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def _join(parts):
    return [
        {key: np.concatenate([part[key] for part in group]) for key in group[0]} for group in zip(*parts, strict=True)
    ]


def test_batch_content_and_types(source):
    (batch,) = _take(train_iterator(source, _transform(), batch_size=6, seed=3), 1)
    expected = {
        "images": ((6, 8, 8, 3), np.uint8),
        "labels": ((6,), np.int32),
        "example_ids": ((6,), np.int64),
        "weight": ((6,), np.float32),
        "views": ((6,), np.int32),
        "mask": ((6, 35), bool),
        "jitter_factors": ((6, 3), np.float32),
        "jitter_order": ((6, 3), np.int32),
        "jitter_gray": ((6,), np.float32),
    }
    assert batch.pop("faults").dtype.kind == "U"
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        key: (shape, np.dtype(kind)) for key, (shape, kind) in expected.items()
    }
    np.testing.assert_array_equal(batch["labels"], 2 * batch["example_ids"] + 1)
    np.testing.assert_array_equal(batch["mask"].sum(1), 13)
    (plain,) = _take(train_iterator(source, _transform(color_jitter=0.0, mask=None), batch_size=6, seed=3), 1)
    assert set(plain) == {"images", "labels", "example_ids", "views", "weight", "faults"}


def test_epochs_are_reshuffled_and_drop_their_tail(source):
    # 23 examples in batches of 5: four batches an epoch, three examples left out
    batches = _take(train_iterator(source, _transform(), batch_size=5, seed=3), 24)
    epochs = np.concatenate([batch["example_ids"] for batch in batches]).reshape(6, 20).tolist()
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # the left-out ones change: over six epochs everything was seen
    assert set().union(*epochs) == set(range(23))
    # the epoch of the views is that of the order
    assert [set(batch["views"].tolist()) for batch in batches] == [{e} for e in range(6) for _ in range(4)]


class _Drawn:
    """Stand for a transform, so that a property can be tried many times: the ids and one number drawn from them."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, example, epoch):
        draw = np.random.default_rng((self.seed, example["example_id"], epoch)).integers(0, 2**40)
        return {"example_ids": np.int64(example["example_id"]), "draws": np.int64(draw)}


class _Numbers:
    name, split = "numbers", "train"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        assert 0 <= i < self.count
        return {"example_id": i}


@settings(max_examples=40, deadline=None)
@given(
    share=st.integers(1, 5),
    spare=st.integers(0, 60),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**9),
    threads=st.integers(0, 3),
    prefetch=st.integers(1, 5),
)
def test_global_batches_depend_on_seed_and_step_alone(share, spare, seed, start, threads, prefetch):
    """Processes, threads, prefetching, and where one starts to read, change neither order nor draws."""
    batch_size = 4 * share
    source, transform = _Numbers(batch_size + spare), _Drawn(seed)

    def read(first, count, **reading):
        iterator = train_iterator(source, transform, batch_size=batch_size, seed=seed, **reading)
        iterator.set_state({"next_batch": first})
        assert iterator.get_state() == {"next_batch": first}
        return _take(iterator, count)

    whole = read(start, 4, num_threads=0)
    for process_count in (1, 2, 4):
        parts = [
            read(start + 1, 3, num_threads=threads, prefetch=prefetch, process_index=i, process_count=process_count)
            for i in range(process_count)
        ]
        chex.assert_trees_all_equal(_join(parts), whole[1:])


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_pixels_are_the_same_for_every_number_of_processes_and_threads(source, process_count):
    whole = _take(train_iterator(source, _transform(), batch_size=8, seed=3, num_threads=0), 5)
    parts = []
    for index in range(process_count):
        reading = {"process_index": index, "process_count": process_count, "num_threads": index + 1}
        parts.append(_take(train_iterator(source, _transform(), batch_size=8, seed=3, **reading), 5))
    chex.assert_trees_all_equal(_join(parts), whole)
    faults = {i: f for b in whole for i, f in zip(b["example_ids"].tolist(), b["faults"].tolist(), strict=True) if f}
    assert set(faults) == set(CORRUPT) and all(fault.startswith(f"list/{i}: ") for i, fault in faults.items())


@pytest.mark.long
def test_worker_processes_give_the_same_batches_and_resume_mid_epoch(source):
    """Ids and pixels; a position saved by one process without workers is restored on two with workers, and back."""
    batches = {"batch_size": 8, "seed": 3}
    whole = _take(train_iterator(source, _transform(), **batches, num_threads=0), 7)
    halves = [
        train_iterator(source, _transform(), **batches, process_index=i, process_count=2, num_workers=2 - i)
        for i in (0, 1)
    ]
    for half in halves:
        half.set_state({"next_batch": 1})  # mid-epoch: two batches make an epoch
    read = [[next(half) for _ in range(4)] for half in halves]
    chex.assert_trees_all_equal(_join(read), whole[1:5])
    assert any(batch["faults"].any() for batch in _join(read))
    states = [half.get_state() for half in halves]
    assert states == [{"next_batch": 5}] * 2
    for half in halves:
        half.close()
    alone = train_iterator(source, _transform(), **batches, num_threads=2)
    alone.set_state(states[1])
    chex.assert_trees_all_equal(_take(alone, 2), whole[5:])
    crops = [eval_batches(source, image_size=8, batch_size=6, num_workers=workers) for workers in (0, 2)]
    chex.assert_trees_all_equal(*[list(batches) for batches in crops])


@pytest.mark.parametrize("num_threads", [0, 3])
def test_restored_iterator_equals_the_unbroken_one_at_every_state(source, num_threads):
    unbroken = train_iterator(source, _transform(), batch_size=5, seed=3, num_threads=num_threads)
    states, batches = [], []
    for _ in range(9):
        states.append(unbroken.get_state())
        batches.append(next(unbroken))
    assert states[7] == {"next_batch": 7}
    restored = train_iterator(source, _transform(), batch_size=5, seed=3, num_threads=2)
    for start, state in enumerate(states):
        restored.set_state(state)
        for step in range(start, min(start + 2, 9)):
            chex.assert_trees_all_equal(next(restored), batches[step])
    unbroken.set_state(states[2])  # also backwards, and after batches were prepared ahead
    chex.assert_trees_all_equal(next(unbroken), batches[2])
    unbroken.close()
    restored.close()


def test_mistakes_are_user_errors(source):
    with pytest.raises(UserError, match="24 is larger than the 23 examples of list"):
        train_iterator(source, _transform(), batch_size=24, seed=0)
    for make in (
        lambda: train_iterator(source, _transform(), batch_size=9, seed=0, process_count=2),
        lambda: eval_batches(source, image_size=8, batch_size=9, process_count=2),
    ):
        with pytest.raises(UserError, match="cannot be divided among 2"):
            make()


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_batches_are_complete_and_in_order(source, process_count):
    parts = [
        eval_batches(source, image_size=7, batch_size=6, process_index=r, process_count=process_count)
        for r in range(process_count)
    ]
    assert {len(part) for part in parts} == {4}
    for _ in range(2):  # they can be read again
        batches = _join(parts)
        rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        readable = [float(i not in CORRUPT) for i in range(23)]
        np.testing.assert_array_equal(rows["weight"], [*readable, 0.0])
        np.testing.assert_array_equal(rows["example_ids"][:23], np.arange(23))
        np.testing.assert_array_equal(rows["labels"][:23], 2 * np.arange(23) + 1)
        assert [i for i, fault in enumerate(rows["faults"].tolist()) if fault] == list(CORRUPT)


def test_the_padding_of_an_unreadable_last_record_has_no_fault():
    (batch,) = eval_batches(ListSource(3, corrupt=(2,)), image_size=7, batch_size=5)
    assert batch["weight"].tolist() == [1, 1, 0, 0, 0]
    assert [bool(fault) for fault in batch["faults"].tolist()] == [False, False, True, False, False]


class PartlyLabelled(ListSource):
    def __getitem__(self, i):
        return {**super().__getitem__(i), "label": -1 if i % 2 else 3}


def test_an_example_without_a_label_counts_as_unreadable_where_labels_are_learned():
    source = pickle.loads(pickle.dumps(LabelledSource(PartlyLabelled(4, corrupt=(2,)))))
    assert (len(source), source.split) == (4, "train")
    (batch,) = eval_batches(source, image_size=7, batch_size=4)
    assert batch["weight"].tolist() == [1, 0, 0, 0] and batch["labels"].tolist() == [3, -1, 3, -1]
    assert [fault.partition(": ")[0] for fault in batch["faults"].tolist()] == ["", "list/1", "list/2", "list/3"]
    assert batch["faults"][1] == batch["faults"][3].replace("list/3", "list/1") == "list/1: it has no label"


@pytest.mark.parametrize(("manifest", "feature"), [(FEATURE_MANIFEST, "teacher_features"), (CODE_MANIFEST, "code_ids")])
def test_targets_of_the_matching_view(source, tmp_path, manifest, feature):
    def targets(example_id, view):
        rng = np.random.default_rng((example_id, view))
        return rng.normal(size=(21, 5)) if feature == "teacher_features" else rng.integers(0, 13, 21)

    corrupt_then = {"split": "train", "example_id": 7, "where": "list/7", "cause": "it was corrupt then"}
    reader = fill(tmp_path / "cache", manifest, targets, unreadable=[corrupt_then])
    iterator = train_iterator(source, _transform(num_views=3, targets=reader), batch_size=6, seed=3)
    seen = set()
    for batch in _take(iterator, 12):
        for row, key in enumerate(zip(batch["example_ids"].tolist(), batch["views"].tolist(), strict=True)):
            for name, expected in reader.entries(*key).items():
                np.testing.assert_array_equal(batch[name][row], expected)
            # what was unreadable when the targets were made has none, although it can be read today
            assert batch["weight"][row] == (key[0] not in (7, *CORRUPT))
            seen.add(key[1])
    assert seen == {0, 1, 2}


def test_targets_that_cannot_match_are_refused(source, tmp_path):
    ids = lambda example_id, view: np.full(21, (example_id + view) % 13)  # noqa: E731
    reader = fill(tmp_path / "cache", {**CODE_MANIFEST, "num_examples": 22}, ids)
    for num_views in (0, 4):
        with pytest.raises(UserError, match="stored targets hold 3 views"):
            _transform(num_views=num_views, targets=reader)
    with pytest.raises(UserError, match="22 examples"):
        train_iterator(source, _transform(num_views=3, targets=reader), batch_size=6, seed=0)


def test_data_never_imports_jax():
    # grain itself loads jax where it is installed, so that one is looked for in the text
    code = (
        "import sys; import beitv2_jax.data.pipeline, beitv2_jax.data.sources, beitv2_jax.data.target_cache.reader; "
        "print(sorted(m for m in ('flax', 'tensorflow', 'torch') if m in sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
    for path in pathlib.Path(pipeline.__file__).parent.glob("*.py"):
        assert "import jax" not in path.read_text() and "from jax " not in path.read_text()
