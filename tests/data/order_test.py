"""Order: epochs are permutations, functions of (seed, epoch); the rows of the processes tile the global batch."""

import collections
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beitv2_jax.data.order import BatchRows, EpochOrder
from beitv2_jax.errors import UserError


@given(share=st.integers(1, 9), process_count=st.sampled_from([1, 2, 3, 4, 7]), step=st.integers(0, 10**12))
def test_rows_of_the_processes_tile_the_global_batch_in_order(share, process_count, step):
    batch_size = share * process_count
    parts = [BatchRows(batch_size, index, process_count)(step) for index in range(process_count)]
    assert [row for part in parts for row in part] == list(range(step * batch_size, (step + 1) * batch_size))
    assert {len(part) for part in parts} == {share}


def test_a_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(UserError, match="9 cannot be divided among 2"):
        BatchRows(9, 0, 2)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), num_examples=st.integers(1, 300))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(seed, epoch, num_examples):
    order = EpochOrder(seed, num_examples)
    permutation = order(epoch).copy()
    assert sorted(permutation.tolist()) == list(range(num_examples))
    for other in (epoch + 1, epoch + 2, epoch):  # pushed out of memory and drawn again
        again = order(other)
    np.testing.assert_array_equal(again, permutation)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(order))(epoch), permutation)
    if num_examples > 20:
        assert (order(epoch + 1) != permutation).any()
        assert (EpochOrder(seed + 1, num_examples)(epoch) != permutation).any()


def test_order_is_close_to_uniform():
    order = EpochOrder(1, 7)
    for place in (0, 3, 6):
        counts = collections.Counter(int(order(epoch)[place]) for epoch in range(700))
        assert max(abs(counts[i] - 100) for i in range(7)) < 5 * np.sqrt(700 * 6 / 49)


def test_threads_that_reach_an_epoch_together_draw_it_once(monkeypatch):
    draws = []
    order = EpochOrder(3, 1000)
    monkeypatch.setattr("beitv2_jax.data.order.host_rng", _counted(draws))
    threads = [threading.Thread(target=order, args=(5,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert draws == [(3, "order", 5)]
    assert order(5).dtype == np.int32  # what 14 million examples cost: 57 MB


def _counted(draws):
    from beitv2_jax.rng import host_rng

    def counted(*arguments):
        draws.append(arguments)
        threading.Event().wait(0.02)  # the others arrive meanwhile
        return host_rng(*arguments)

    return counted
