"""Batches: functions of (seed, ids) alone, equal over process counts, resumable at every step, complete."""

import collections
import io
import pathlib
import subprocess
import sys

import chex
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from beitv2_jax.data import augment, decode, pipeline
from beitv2_jax.data.decode import CorruptImageError
from beitv2_jax.data.masking import block_mask
from beitv2_jax.data.pipeline import TrainTransform, eval_batches, train_iterator, view_batches
from beitv2_jax.data.targets import TargetReader, TargetWriter
from beitv2_jax.errors import UserError
from beitv2_jax.rng import host_rng

MASK = {"grid": (5, 7), "num_masked": 13, "min_patches": 3}


class ListSource:
    """Noise images of different sizes, label = 2 id + 1."""

    name, split, num_classes, class_names = "list", "train", 0, ()

    def __init__(self, count):
        self._encoded = []
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (11 + i, 29 - i % 13, 3), np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            self._encoded.append(buffer.getvalue())

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, i):
        return {"image": self._encoded[i], "label": 2 * i + 1, "example_id": i, "where": f"list/{i}"}

    def corrupt(self, i):
        self._encoded[i] = self._encoded[i][:40]


@pytest.fixture(scope="module")
def source():
    return ListSource(23)


def _transform(**changes):
    return TrainTransform(
        **{"seed": 3, "image_size": 8, "min_scale": 0.2, "color_jitter": 0.4, "mask": MASK, **changes}
    )


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_batch_content_and_types(source):
    batch = next(train_iterator(source, _transform(), batch_size=6, seed=3))
    expected = {
        "images": ((6, 8, 8, 3), np.uint8),
        "labels": ((6,), np.int32),
        "example_ids": ((6,), np.int64),
        "views": ((6,), np.int32),
        "mask": ((6, 35), bool),
        "jitter_factors": ((6, 3), np.float32),
        "jitter_order": ((6, 3), np.int32),
    }
    assert {key: (value.shape, value.dtype.type) for key, value in batch.items()} == {
        key: (shape, np.dtype(kind).type) for key, (shape, kind) in expected.items()
    }
    np.testing.assert_array_equal(batch["labels"], 2 * batch["example_ids"] + 1)
    np.testing.assert_array_equal(batch["mask"].sum(1), 13)
    plain = next(train_iterator(source, _transform(color_jitter=0.0, mask=None), batch_size=6, seed=3))
    assert set(plain) == {"images", "labels", "example_ids", "views"}


def test_every_draw_is_a_function_of_seed_and_ids(source):
    example, epoch = source[17], 4
    item = _transform(num_views=3)(example, epoch)
    image = decode.decode_image(example["image"])
    view = augment.random_view(host_rng(3, "view", 17, 1), *image.shape[:2], min_scale=0.2)
    factors, order = augment.jitter_draw(host_rng(3, "jitter", 17, 1), 0.4)
    mask = block_mask(host_rng(3, "mask", 17, 4), (5, 7), 13, min_patches=3)
    np.testing.assert_array_equal(item["images"], augment.crop_resize(image, view, 8))
    np.testing.assert_array_equal(item["jitter_factors"], factors)
    np.testing.assert_array_equal(item["jitter_order"], order)
    np.testing.assert_array_equal(item["mask"], mask.reshape(-1))
    assert item["views"] == 1
    # num_views 0: the view index is the epoch itself
    assert _transform()(example, 4)["views"] == 4
    assert (_transform()(example, 4)["images"] != item["images"]).any()


def test_views_repeat_while_masks_do_not(source):
    items = [_transform(num_views=2)(source[5], epoch) for epoch in range(4)]
    np.testing.assert_array_equal(items[0]["images"], items[2]["images"])
    np.testing.assert_array_equal(items[1]["images"], items[3]["images"])
    assert (items[0]["images"] != items[1]["images"]).any()
    for a in range(4):
        for b in range(a):
            assert (items[a]["mask"] != items[b]["mask"]).any()
    other = _transform(num_views=2, seed=4)(source[5], 0)
    assert all((other[key] != items[0][key]).any() for key in ("images", "mask", "jitter_factors"))


def test_epochs_are_reshuffled_and_drop_their_tail(source):
    # 23 examples in batches of 5: four batches an epoch, three examples left out
    batches = _take(train_iterator(source, _transform(), batch_size=5, seed=3), 24)
    ids = np.concatenate([batch["example_ids"] for batch in batches])
    epochs = ids.reshape(6, 20).tolist()
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    # the left-out ones change: over six epochs everything was seen
    assert set().union(*epochs) == set(range(23))
    again = _take(train_iterator(source, _transform(), batch_size=5, seed=3), 4)
    assert [int(i) for batch in again for i in batch["example_ids"]] == epochs[0]
    other = _take(train_iterator(source, _transform(), batch_size=5, seed=4), 4)
    assert [int(i) for batch in other for i in batch["example_ids"]] != epochs[0]


def test_epoch_of_the_views_follows_the_epoch_of_the_order(source):
    batches = _take(train_iterator(source, _transform(), batch_size=5, seed=3), 12)
    assert [set(batch["views"].tolist()) for batch in batches] == [{e} for e in range(3) for _ in range(4)]


def test_order_is_close_to_uniform():
    # first batch of each epoch: every example as often as any other
    order = [b["example_ids"][0] for b in _take(_ids_only(ListSource(7), batch_size=7), 700)]
    counts = collections.Counter(int(i) for i in order)
    assert max(abs(counts[i] - 100) for i in range(7)) < 5 * np.sqrt(700 * 6 / 49)


def _ids_only(source, **arguments):
    transform = lambda example, epoch: {"example_ids": np.int64(example["example_id"])}  # noqa: E731
    return train_iterator(source, transform, seed=1, **arguments)


@pytest.mark.parametrize("process_count", [2, 4])
def test_process_counts_see_the_same_global_batches(source, process_count):
    whole = _take(train_iterator(source, _transform(), batch_size=8, seed=3), 7)
    parts = [
        _take(
            train_iterator(source, _transform(), batch_size=8, seed=3, process_index=rank, process_count=process_count),
            7,
        )
        for rank in range(process_count)
    ]
    for step, batch in enumerate(whole):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in batch}
        chex.assert_trees_all_equal(joined, batch)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_restored_iterator_equals_the_unbroken_one_at_every_state(source, num_threads):
    def make(threads=num_threads):
        return train_iterator(source, _transform(), batch_size=5, seed=3, num_threads=threads)

    unbroken = make()
    states, batches = [], []
    for _ in range(9):
        states.append(unbroken.get_state())
        batches.append(next(unbroken))
    for start, state in enumerate(states):
        restored = make(threads=2)  # another number of threads is no obstacle
        restored.set_state(state)
        for step in range(start, min(start + 3, 9)):
            chex.assert_trees_all_equal(next(restored), batches[step])
    assert states[7] == {"next_index": 7}


def test_state_survives_a_checkpoint_and_another_process_count(source, tmp_path):
    whole = _take(train_iterator(source, _transform(), batch_size=8, seed=3), 5)
    iterator = train_iterator(source, _transform(), batch_size=8, seed=3)
    _take(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        half = train_iterator(source, _transform(), batch_size=8, seed=3, process_index=1, process_count=2)
        restore = grain.checkpoint.CheckpointRestore(half)
        manager.restore(3, args=ocp.args.Composite(data=restore))
    for step in (3, 4):
        chex.assert_trees_all_equal(next(half), {key: value[4:] for key, value in whole[step].items()})


def test_mistakes_are_user_errors(source):
    with pytest.raises(UserError, match="24 is larger than the 23 examples of list"):
        train_iterator(source, _transform(), batch_size=24, seed=0)
    for make in (
        lambda: train_iterator(source, _transform(), batch_size=9, seed=0, process_count=2),
        lambda: eval_batches(source, image_size=8, batch_size=9, process_count=2),
    ):
        with pytest.raises(UserError, match="cannot be divided among 2"):
            make()
    with pytest.raises(UserError, match="num_views is 0"):
        view_batches(source, seed=0, image_size=8, min_scale=0.2, num_views=0, batch_size=3)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_corrupt_image_names_its_file(num_threads):
    source = ListSource(5)
    source.corrupt(2)
    with pytest.raises(CorruptImageError, match="list/2"):
        _take(train_iterator(source, _transform(), batch_size=5, seed=0, num_threads=num_threads), 1)
    with pytest.raises(CorruptImageError, match="list/2"):
        list(eval_batches(source, image_size=8, batch_size=5, num_threads=num_threads))


@pytest.mark.parametrize("process_count", [1, 2])
def test_view_batches_hold_every_view_once_in_order(source, process_count):
    settings = {"seed": 3, "image_size": 8, "min_scale": 0.2, "num_views": 3, "batch_size": 10, "color_jitter": 0.4}
    parts = [
        view_batches(source, **settings, process_index=r, process_count=process_count) for r in range(process_count)
    ]
    assert {len(part) for part in parts} == {7}  # 23 x 3 = 69 rows
    batches = [{key: np.concatenate([b[key] for b in group]) for key in group[0]} for group in zip(*parts, strict=True)]
    assert len(batches) == 7 and all(batch["images"].shape == (10, 8, 8, 3) for batch in batches)
    rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(rows["weight"], [1.0] * 69 + [0.0])
    real = rows["weight"] == 1
    pairs = list(zip(rows["example_ids"][real].tolist(), rows["views"][real].tolist(), strict=True))
    assert pairs == [(i, v) for i in range(23) for v in range(3)]
    # the same views as in training
    transform = _transform(num_views=3, mask=None)
    for row in (0, 4, 68):
        item = transform(source[pairs[row][0]], pairs[row][1])
        chex.assert_trees_all_equal(item, {key: rows[key][row] for key in item})


@pytest.mark.parametrize("process_count", [1, 2])
def test_eval_batches_are_complete_and_in_order(source, process_count):
    parts = [
        eval_batches(source, image_size=7, batch_size=6, process_index=r, process_count=process_count)
        for r in range(process_count)
    ]
    for _ in range(2):  # they can be read again
        batches = [
            {key: np.concatenate([b[key] for b in group]) for key in group[0]} for group in zip(*parts, strict=True)
        ]
        rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        np.testing.assert_array_equal(rows["weight"], [1.0] * 23 + [0.0])
        np.testing.assert_array_equal(rows["example_ids"][:23], np.arange(23))
        np.testing.assert_array_equal(rows["labels"][:23], 2 * np.arange(23) + 1)
        image = decode.decode_image(source[20]["image"])
        np.testing.assert_array_equal(rows["images"][20], augment.center_crop(image, 7))


def _store(directory, feature, shape, dtype, count):
    with TargetWriter(
        directory, name="store", card={}, split="train", features={feature: ((3, *shape), dtype)}
    ) as writer:
        for i in range(count):
            views = np.arange(3).reshape(3, *[1] * len(shape))
            writer.write(i, np.broadcast_to(100 * i + views, (3, *shape)))
    return TargetReader(directory, "train")


@pytest.mark.parametrize(
    ("feature", "shape", "stored", "yielded"),
    [("teacher_features", (5, 7), "float32", np.float32), ("code_ids", (5,), "uint16", np.int32)],
)
def test_targets_of_the_matching_view(source, tmp_path, feature, shape, stored, yielded):
    reader = _store(tmp_path / "store", feature, shape, stored, 23)
    transform = _transform(num_views=3, targets=reader)
    seen = set()
    for batch in _take(train_iterator(source, transform, batch_size=6, seed=3), 12):
        assert batch[feature].shape == (6, *shape) and batch[feature].dtype == yielded
        expected = (100 * batch["example_ids"] + batch["views"]).reshape(6, *[1] * len(shape))
        np.testing.assert_array_equal(batch[feature], np.broadcast_to(expected, (6, *shape)))
        seen |= set(batch["views"].tolist())
    assert seen == {0, 1, 2}


def test_targets_that_cannot_match_are_refused(source, tmp_path):
    reader = _store(tmp_path / "store", "code_ids", (5,), "uint16", 22)
    for num_views in (0, 4):
        with pytest.raises(UserError, match="stored targets hold 3 views"):
            _transform(num_views=num_views, targets=reader)
    with pytest.raises(UserError, match="22 examples"):
        train_iterator(source, _transform(num_views=3, targets=reader), batch_size=6, seed=0)


def test_data_never_imports_jax():
    # grain itself loads jax where it is installed, so that one is looked for in the text
    code = (
        "import sys; import beitv2_jax.data.pipeline, beitv2_jax.data.sources, beitv2_jax.data.targets; "
        "print(sorted(m for m in ('flax', 'tensorflow', 'torch') if m in sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
    for path in pathlib.Path(pipeline.__file__).parent.glob("*.py"):
        assert "import jax" not in path.read_text() and "from jax " not in path.read_text()
