"""Block-wise masks: exact counts for every grid, and the distribution of the released generator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beitv2_jax.data.masking import block_mask
from beitv2_jax.rng import host_rng

# Masking probability of one quadrant (rows 0..6, columns 0..6) of the 14x14 grid with 75 hidden patches, from
# 40,000 masks of the released generator; standard error at most 0.0025.
QUADRANT = np.array(
    [
        [0.046, 0.086, 0.122, 0.152, 0.173, 0.187, 0.194],
        [0.086, 0.161, 0.227, 0.280, 0.318, 0.343, 0.355],
        [0.122, 0.227, 0.316, 0.387, 0.439, 0.471, 0.487],
        [0.152, 0.280, 0.387, 0.470, 0.528, 0.566, 0.584],
        [0.173, 0.318, 0.439, 0.528, 0.592, 0.634, 0.653],
        [0.187, 0.343, 0.471, 0.566, 0.634, 0.676, 0.697],
        [0.194, 0.355, 0.487, 0.584, 0.653, 0.697, 0.718],
    ]
)


@pytest.fixture(scope="module")
def masks():
    return np.stack([block_mask(host_rng(11, "mask", i, 0), (14, 14), 75) for i in range(8000)])


def test_frequency_agrees_with_the_released_generator(masks):
    frequency = masks.mean(0)
    # the law is symmetric under both mirrors and the exchange of rows and columns: fold to the quadrant
    folded = (frequency + frequency[::-1] + frequency[:, ::-1] + frequency[::-1, ::-1])[:7, :7] / 4
    folded = (folded + folded.T) / 2
    # single cells: 4 standard errors of both samples; the mean deviation is held tighter
    assert np.abs(folded - QUADRANT).max() < 0.012
    assert np.sqrt(np.square(folded - QUADRANT).mean()) < 0.005
    # and unfolded, so that an asymmetry cannot hide
    whole = np.block([[QUADRANT, QUADRANT[:, ::-1]], [QUADRANT[::-1], QUADRANT[::-1, ::-1]]])
    assert np.abs(frequency - whole).max() < 4 * np.sqrt(0.25 / 8000) + 0.003


def test_blocks_hang_together_as_in_the_released_generator(masks):
    pairs = (masks[:, :, 1:] & masks[:, :, :-1]).sum() + (masks[:, 1:] & masks[:, :-1]).sum()
    # masked 4-neighbours of a masked patch: 3.34 over 40,000 masks of the released generator
    np.testing.assert_allclose(2 * pairs / masks.sum(), 3.34, atol=0.015)


def test_rectangles_are_smaller_than_the_grid():
    # in a single row no rectangle fits, so the patches are drawn one by one: neighbours as often as by chance
    masks = np.stack(
        [block_mask(host_rng(7, "mask", i), (1, 40), 10, min_patches=4, min_aspect=0.1)[0] for i in range(2000)]
    )
    pairs = (masks[:, 1:] & masks[:, :-1]).sum(1)
    assert abs(pairs.mean() - 39 * (10 * 9) / (40 * 39)) < 4 * pairs.std() / np.sqrt(2000)


@settings(max_examples=80, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    share=st.floats(0, 1),
    min_patches=st.integers(1, 30),
    max_patches=st.one_of(st.none(), st.integers(0, 40)),
    min_aspect=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**31),
)
def test_count_is_exact(grid, share, min_patches, max_patches, min_aspect, seed):
    num_masked = round(share * grid[0] * grid[1])
    mask = block_mask(
        host_rng(seed, "mask"),
        grid,
        num_masked,
        min_patches=min_patches,
        max_patches=max_patches,
        min_aspect=min_aspect,
    )
    assert mask.shape == grid and mask.dtype == bool
    assert mask.sum() == num_masked


@pytest.mark.parametrize("num_masked", range(36))
def test_every_count_of_a_small_grid(num_masked):
    assert block_mask(host_rng(num_masked, "mask"), (5, 7), num_masked, min_patches=3).sum() == num_masked


def test_mask_is_a_function_of_its_generator():
    draw = [block_mask(host_rng(3, "mask", *ids), (14, 14), 75) for ids in ((1, 2), (1, 2), (1, 3), (2, 2))]
    assert (draw[0] == draw[1]).all() and (draw[0] != draw[2]).any() and (draw[0] != draw[3]).any()


@pytest.mark.parametrize("num_masked", [-1, 36])
def test_impossible_counts_are_refused(num_masked):
    with pytest.raises(ValueError, match=r"0\.\.35"):
        block_mask(host_rng(0, "mask"), (5, 7), num_masked)
