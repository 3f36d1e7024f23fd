"""Peak rates of chips and their networks, for the roofline of a plan, and the time of a collective.

The rates are per chip and come from the makers' public descriptions; `Chip.source` names the page.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from beitv2_jax.errors import UserError, did_you_mean, nearest
from beitv2_jax.planning.collectives import Collective

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The peak rates of one chip.

    Attributes:
        name: as the plan's target writes it.
        platform: "tpu" or "cuda".
        flops: dense bfloat16 multiply-adds with float32 sums, FLOP/s.
        exact_flops: float32 products in full precision, FLOP/s. A TPU makes one out of six bfloat16 products.
        hbm_bytes: memory.
        hbm_rate: bytes/s between memory and the chip.
        link_rate: bytes/s in one direction through one link to a neighbour (TPU), or through all links to the other
            GPUs of the host.
        network_rate: bytes/s in one direction that a chip's share of the host's network cards carries: between slices
            (TPU) and between hosts (GPU).
        wraps: lengths of a side of the slice at which it closes to a ring are multiples of this (TPU).
        per_host: GPUs of one host; 0 for TPUs, whose links join hosts too.
        shapes: slices that can be rented, by number of chips (TPU).
        source: the page that states the rates.
    """

    name: str
    platform: str
    flops: float
    exact_flops: float
    hbm_bytes: float
    hbm_rate: float
    link_rate: float
    network_rate: float
    wraps: int = 0
    per_host: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    source: str

    def shape_of(self, count: int) -> tuple[int, ...] | None:
        """Return the shape of the slice of `count` chips, None if none is rented."""
        return next((shape for shape in self.shapes if math.prod(shape) == count), None)


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SOLID = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16))
_GOOGLE = "docs.cloud.google.com/tpu/docs/"


def _tpu(name: str, tera: float, **rates) -> Chip:
    return Chip(name=name, platform="tpu", flops=tera * TERA, exact_flops=tera * TERA / 6, **rates)


def _gpu(name: str, tera: float, exact_tera: float, **rates) -> Chip:
    return Chip(
        name=name,
        platform="cuda",
        flops=tera * TERA,
        exact_flops=exact_tera * TERA,
        hbm_bytes=rates.pop("gb") * GB,
        per_host=8,
        **rates,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu(
            "v4", 275, hbm_bytes=32 * GIB, hbm_rate=1200 * GB, link_rate=50 * GB, network_rate=6.25 * GB, wraps=4,
            shapes=_SOLID, source=_GOOGLE + "v4; network: 50 Gbit/s a chip as on v5p",
        ),
        _tpu(
            "v5e", 197, hbm_bytes=16 * GIB, hbm_rate=819 * GB, link_rate=50 * GB, network_rate=3.125 * GB, wraps=16,
            shapes=_FLAT, source=_GOOGLE + "v5e",
        ),
        _tpu(
            "v5p", 459, hbm_bytes=95 * GIB, hbm_rate=2765 * GB, link_rate=100 * GB, network_rate=6.25 * GB, wraps=4,
            shapes=_SOLID, source=_GOOGLE + "v5p",
        ),
        _tpu(
            "v6e", 918, hbm_bytes=32 * GIB, hbm_rate=1638 * GB, link_rate=100 * GB, network_rate=12.5 * GB, wraps=16,
            shapes=_FLAT, source=_GOOGLE + "v6e",
        ),
        _gpu(
            "h100", 989, 67, gb=80, hbm_rate=3350 * GB, link_rate=450 * GB, network_rate=50 * GB,
            source="NVIDIA H100 SXM data sheet; network: one 400 Gbit/s card a GPU",
        ),
        _gpu(
            "h200", 989, 67, gb=141, hbm_rate=4800 * GB, link_rate=450 * GB, network_rate=50 * GB,
            source="NVIDIA H200 SXM data sheet; network: one 400 Gbit/s card a GPU",
        ),
        _gpu(
            "a100", 312, 19.5, gb=80, hbm_rate=2039 * GB, link_rate=300 * GB, network_rate=25 * GB,
            source="NVIDIA A100 80GB SXM data sheet; network: one 200 Gbit/s card a GPU",
        ),
    )
}  # fmt: skip


def find_chip(name: str) -> Chip:
    """Return the chip of that name.

    Raises:
        UserError: there is none in the table.
    """
    if name not in CHIPS:
        raise UserError(
            f"There is no chip '{name}' in the table.",
            did_you_mean(name, CHIPS),
            f"Pass one of {', '.join(CHIPS)}, as in --plan={nearest(name, CHIPS) or next(iter(CHIPS))}:8.",
        )
    return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Network:
    """The network of a mesh: the `coords` of each device in its slice, in the mesh's order, and the slice it is in.

    `shape` is that of one slice. For GPUs a slice is a host and has one dimension.
    """

    chip: Chip
    shape: tuple[int, ...]
    coords: np.ndarray
    slices: np.ndarray

    def seconds(self, collective: Collective) -> float:
        """Return the least time of one collective.

            all-reduce  2 B (n - 1) / (n r);   all-gather, reduce-scatter, all-to-all  B (n - 1) / (n r)
            permutation  B / link rate

        for B bytes, n devices of a group and the rate r at which one of them sends. On a TPU that is the rate of a
        link times 2 for every side of the slice along which the group extends and that closes to a ring, times 1 for
        one that does not. A group in s slices (hosts) of m devices does the same with B between the m, and with B / m
        between the s over the network, one after the other.
        """
        if collective.kind == "collective-permute":
            crosses = any(self.slices[a] != self.slices[b] for a, b in collective.groups)
            return collective.bytes / (self.chip.network_rate if crosses else self.chip.link_rate)
        group = np.array(collective.groups[0])
        slices = len(set(self.slices[group].tolist()))
        inside = len(group) // slices
        passes = 2 if collective.kind == "all-reduce" else 1
        sent = passes * collective.bytes
        seconds = sent * (inside - 1) / inside / self._rate(group) if inside > 1 else 0.0
        if slices > 1:
            seconds += sent / inside * (slices - 1) / slices / self.chip.network_rate
        return seconds

    def _rate(self, group: np.ndarray) -> float:
        if self.chip.per_host:
            return self.chip.link_rate
        first = self.slices[group] == self.slices[group[0]]
        extends = [len(set(column)) for column in self.coords[group[first]].T.tolist()]
        links = sum(
            2 if extent == side and side % self.chip.wraps == 0 else 1
            for extent, side in zip(extends, self.shape, strict=True)
            if extent > 1
        )
        return links * self.chip.link_rate


def tpu_network(chip: Chip, shape: Sequence[int], devices: Sequence) -> Network:
    """Return the network of TPU devices (of a topology, or real ones) in their order; `shape` is that of one slice."""
    coords = np.array([tuple(device.coords)[: len(shape)] for device in devices])
    slices = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
    return Network(chip, tuple(shape), coords, slices)


def grid_network(chip: Chip, shape: Sequence[int], num_slices: int = 1) -> Network:
    """Return the network of slices of `shape` whose devices are counted row by row, slice after slice."""
    size = math.prod(shape)
    coords = np.array(np.unravel_index(np.arange(size), tuple(shape))).T
    return Network(chip, tuple(shape), np.tile(coords, (num_slices, 1)), np.repeat(np.arange(num_slices), size))
