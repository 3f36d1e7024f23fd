"""The task verify: which views are drawn, and what counts as equal."""

import contextlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from beitv2_jax.errors import UserError
from beitv2_jax.runners import verify


class Stored:
    """Stands for a reader: 11 examples of 3 views, two of them unreadable."""

    num_views, unreadable = 3, frozenset((2, 7))

    def __len__(self):
        return 11


def sample(examples, seed=5, part="views"):
    config = ConfigDict({"seed": seed, "output": {"verify_examples": examples}})
    return verify._sample(config, part, Stored())


def test_the_sample_has_different_readable_views():
    everything = [(i, v) for v in range(3) for i in range(11) if i not in (2, 7)]
    assert sample(1000) == everything
    drawn = sample(8)
    assert len(set(drawn)) == 8 and set(drawn) <= set(everything)
    assert drawn == sample(8) and drawn != sample(8, seed=6) and drawn != sample(8, part="centre")


PAIRS = [(4, 0), (9, 1), (3, 2)]


def test_the_worst_view_decides():
    live = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    metrics = verify._compare_features(live, live.copy(), PAIRS, 0.9995)
    assert metrics["min_cosine"] == pytest.approx(1) and metrics["worst_view_cosine"] == pytest.approx(1)
    verify._refuse_below(metrics, "cache")
    stored = live.copy()
    stored[1, 3] = live[1, 3] + 0.5
    metrics = verify._compare_features(live, stored, PAIRS, 0.9995)
    assert metrics["worst_view"] == [9, 1]
    assert metrics["min_cosine"] < metrics["worst_view_cosine"] < metrics["mean_cosine"] < 1
    with pytest.raises(UserError, match=r"worst_view_cosine is 0.*at least 0.9995"):
        verify._refuse_below(metrics, "cache")


@pytest.mark.parametrize("zeroed", ["live", "stored", "both"])
def test_zeros_equal_only_zeros(zeroed):
    live = np.ones((1, 2, 3), np.float32)
    stored = live.copy()
    for name, array in (("live", live), ("stored", stored)):
        if zeroed in (name, "both"):
            array[0, 1] = 0
    assert verify._compare_features(live, stored, PAIRS[:1], 0.5)["min_cosine"] == (zeroed == "both")


def test_values_that_are_no_numbers_are_refused():
    stored = np.full((1, 2, 3), np.nan, np.float32)
    metrics = verify._compare_features(np.ones((1, 2, 3), np.float32), stored, PAIRS[:1], 0.5)
    with pytest.raises(UserError, match="worst_view_cosine is nan"):
        verify._refuse_below(metrics, "cache")


@pytest.mark.parametrize(("wrong", "fails"), [(0, False), (1, False), (3, True), (100, True)])
def test_ids_may_differ_in_one_of_a_hundred(wrong, fails):
    live = np.arange(200).reshape(2, 100)
    stored = live.copy()
    stored.reshape(-1)[:wrong] += 1
    metrics = verify._compare_ids(live, stored)
    assert metrics["agreement"] == 1 - wrong / 200 and metrics["sample"] == 2
    with pytest.raises(UserError, match="agreement") if fails else contextlib.nullcontext():
        verify._refuse_below(metrics, "cache")
