"""The roofline's arithmetic: the table of chips, and the time of a collective on tori, hosts and networks."""

import math

import numpy as np
import pytest

from beitv2_jax.errors import UserError
from beitv2_jax.planning.chips import CHIPS, find_chip, grid_network
from beitv2_jax.planning.collectives import Collective

MEGA = 1_000_000


def exchange(kind, *groups, numbers=MEGA):
    return Collective(kind, (("f32", (numbers,)),), groups)


def test_the_table_is_complete():
    assert {"v4", "v5e", "v5p", "v6e", "h100", "h200", "a100"} == set(CHIPS)
    for chip in CHIPS.values():
        assert chip.source and chip.exact_flops < chip.flops
        assert 1e14 < chip.flops < 1e15 and 1e10 < chip.hbm_bytes < 2e11 and 5e11 < chip.hbm_rate < 5e12
        assert chip.network_rate < chip.link_rate < chip.hbm_rate
        sizes = [math.prod(shape) for shape in chip.shapes]
        assert sizes == sorted(set(sizes)) and sizes[:1] in ([], [1])


def test_a_ring_over_a_closed_side_uses_two_links():
    chip = CHIPS["v5e"]
    network = grid_network(chip, (16, 16))
    row = tuple(range(16))
    seconds = network.seconds(exchange("all-reduce", row))
    assert seconds == pytest.approx(2 * 4 * MEGA * 15 / 16 / (2 * 50e9))
    assert network.seconds(exchange("all-gather", row)) == pytest.approx(seconds / 2)


def test_a_whole_slice_uses_every_side():
    network = grid_network(CHIPS["v5e"], (16, 16))
    seconds = network.seconds(exchange("all-reduce", tuple(range(256))))
    assert seconds == pytest.approx(2 * 4 * MEGA * 255 / 256 / (4 * 50e9))


def test_an_open_side_uses_one_link_and_a_side_of_one_none():
    chip = CHIPS["v5e"]
    assert grid_network(chip, (2, 4)).seconds(exchange("all-reduce", tuple(range(8)))) == pytest.approx(
        2 * 4 * MEGA * 7 / 8 / (2 * 50e9)
    )
    assert grid_network(chip, (1, 4)).seconds(exchange("all-reduce", tuple(range(4)))) == pytest.approx(
        2 * 4 * MEGA * 3 / 4 / 50e9
    )


def test_a_part_of_a_closed_side_is_open():
    network = grid_network(CHIPS["v5e"], (16, 16))
    half = tuple(range(8))
    assert network.seconds(exchange("all-gather", half)) == pytest.approx(4 * MEGA * 7 / 8 / 50e9)


def test_cubes_close_at_multiples_of_four():
    network = grid_network(CHIPS["v5p"], (4, 4, 8))
    seconds = network.seconds(exchange("all-reduce", tuple(range(128))))
    assert seconds == pytest.approx(2 * 4 * MEGA * 127 / 128 / (6 * 100e9))


def test_between_slices_the_network_carries_a_fraction():
    chip = CHIPS["v5e"]
    two, one = grid_network(chip, (16, 16), 2), grid_network(chip, (16, 16))
    inside = one.seconds(exchange("all-reduce", tuple(range(256))))
    across = 2 * 4 * MEGA / 256 * (1 / 2) / 3.125e9
    assert two.seconds(exchange("all-reduce", tuple(range(512)))) == pytest.approx(inside + across)
    # between the slices alone
    assert two.seconds(exchange("all-reduce", (0, 256))) == pytest.approx(2 * 4 * MEGA / 2 / 3.125e9)


def test_gpus_of_a_host_and_of_several():
    chip = CHIPS["h100"]
    inside = grid_network(chip, (8,)).seconds(exchange("reduce-scatter", tuple(range(8)), numbers=MEGA))
    assert inside == pytest.approx(8 * 4 * MEGA * 7 / 8 / 450e9)
    several = grid_network(chip, (8,), 4).seconds(exchange("all-reduce", tuple(range(32))))
    assert several == pytest.approx(2 * 4 * MEGA * 7 / 8 / 450e9 + 2 * 4 * MEGA / 8 * 3 / 4 / 50e9)


def test_a_permutation_goes_through_one_link():
    network = grid_network(CHIPS["v6e"], (2, 4), 2)
    assert network.seconds(exchange("collective-permute", (0, 1), (1, 0))) == pytest.approx(4 * MEGA / 100e9)
    assert network.seconds(exchange("collective-permute", (0, 8))) == pytest.approx(4 * MEGA / 12.5e9)


def test_devices_are_counted_slice_after_slice():
    network = grid_network(CHIPS["v5e"], (2, 4), 2)
    assert network.coords[5].tolist() == [1, 1] == network.coords[13].tolist()
    assert np.array_equal(network.slices, np.repeat([0, 1], 8))


def test_an_unknown_chip_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="v5lite"):
        find_chip("v5lite")
    with pytest.raises(UserError, match="Did you mean 'h100'"):
        find_chip("h10")
