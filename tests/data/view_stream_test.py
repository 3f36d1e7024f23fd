"""Views for a frozen network: every one once, in order, decoded once, the same ones that training sees."""

import threading

import chex
import numpy as np
import pytest
from listed_images import ListSource

from beitv2_jax.data import decode
from beitv2_jax.data.transform import TrainTransform
from beitv2_jax.data.view_stream import view_stream
from beitv2_jax.tasks.targets import ViewRows

TRANSFORM = TrainTransform(seed=3, image_size=8, min_scale=0.2, num_views=5, color_jitter=0.4)


def stream(source, chunks, views, **changes):
    arguments = {"batch_size": 4, "num_threads": 3, "num_workers": 0, **changes}
    return list(view_stream(ViewRows(source, TRANSFORM, views), chunks, views, **arguments))


@pytest.mark.parametrize("num_threads", [0, 1, 7])
def test_every_chunk_and_view_is_a_batch(num_threads):
    source = ListSource(11)
    batches = stream(source, [range(0, 4), range(4, 7), range(9, 11)], range(1, 4), num_threads=num_threads)
    assert [(batch["example_ids"].tolist(), set(batch["views"])) for batch in batches] == [
        (ids, {view}) for ids in ([0, 1, 2, 3], [4, 5, 6, -1], [9, 10, -1, -1]) for view in (1, 2, 3)
    ]
    for batch in batches:
        assert batch["images"].shape == (4, 8, 8, 3)
        np.testing.assert_array_equal(batch["weight"], batch["example_ids"] >= 0)
        for row, example_id in enumerate(batch["example_ids"]):
            if example_id >= 0:  # the same view as in training
                expected = TRANSFORM(source[int(example_id)], int(batch["views"][row]))
                chex.assert_trees_all_equal({key: batch[key][row] for key in expected}, expected)


def test_a_batch_does_not_depend_on_which_other_views_are_wanted():
    source = ListSource(7)
    together = stream(source, [range(0, 4), range(4, 7)], range(0, 5))
    apart = stream(source, [range(4, 7)], range(3, 4))
    (same,) = (batch for batch in together if batch["views"][0] == 3 and batch["example_ids"][0] == 4)
    chex.assert_trees_all_equal(apart[0], same)


def test_an_image_is_decoded_once_for_all_its_views(monkeypatch):
    decoded, lock, real = [], threading.Lock(), decode.decode_image

    def counting(encoded, where):
        with lock:
            decoded.append(where)
        return real(encoded, where)

    monkeypatch.setattr(decode, "decode_image", counting)
    stream(ListSource(7), [range(0, 4), range(4, 7)], range(0, 5))
    assert len(decoded) == len(set(decoded)) == 7


def test_the_next_chunk_is_loaded_while_one_is_used_and_no_further():
    drawn = []

    def chunks():
        for first in range(0, 20, 4):
            drawn.append(first)
            yield range(first, first + 4)

    views = range(0, 2)
    batches = view_stream(
        ViewRows(ListSource(20), TRANSFORM, views), chunks(), views, batch_size=4, num_threads=2, num_workers=0
    )
    ahead = [len(drawn) for _ in batches]
    assert ahead == [2, 2, 3, 3, 4, 4, 5, 5, 5, 5]


def test_unreadable_images_are_rows_of_weight_0_with_their_fault():
    (batch,) = stream(ListSource(4, corrupt=(2,)), [range(0, 4)], range(0, 1))
    np.testing.assert_array_equal(batch["weight"], [1, 1, 0, 1])
    np.testing.assert_array_equal(batch["example_ids"], range(4))
    assert [bool(fault) for fault in batch["faults"]] == [False, False, True, False] and "list/2" in batch["faults"][2]


def test_worker_processes_give_the_same_batches():
    source, chunks, views = ListSource(7, corrupt=(5,)), [range(0, 4), range(4, 7)], range(1, 3)
    apart = stream(source, chunks, views, num_workers=2)
    for found, expected in zip(apart, stream(source, chunks, views), strict=True):
        chex.assert_trees_all_equal(found, expected)


def test_a_failure_of_the_loader_is_raised_and_ends_the_stream():
    def fails(example_id):
        raise OSError(f"no example {example_id}")

    with pytest.raises(OSError, match="no example 0"):
        list(view_stream(fails, [range(0, 4)], range(1), batch_size=4, num_threads=2, num_workers=0))
